"""Loads and launches compiled kernels through the CUDA driver API, without Triton or a compiler.

What Triton's launcher does: one block of `32 x warps` threads for each program, the parameters in
order with the constants left out, and two pointers to scratch memory after them.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._compile import Binary
from heatsink.kernels._config import target_of
from heatsink.kernels._launch import Launch
from heatsink.kernels._params import Parameters
from heatsink.kernels.errors import KernelError

# What a kernel may use without asking for more.
_PLAIN_SHARED = 48 * 1024
_WARP = 32
_INVALID_CONTEXT = 201


@functools.cache
def driver() -> Any:
    """The module `cuda.bindings.driver`, with the driver initialised.

    Raises:
        KernelError: if it is not installed, or there is no driver or no device.
    """
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise KernelError(
            f"expected cuda-bindings, got {error}: pip install 'heatsink[kernels]'"
        ) from None
    try:
        (code,) = bindings.cuInit(0)
    # The library itself is missing; that error's class differs by version.
    except RuntimeError as error:
        raise KernelError(f"expected a CUDA driver (libcuda.so.1), got none: {error}") from None
    _check(bindings, "cuInit", code)
    return bindings


def _check(bindings: Any, name: str, code: Any) -> None:
    if int(code):
        _, text = bindings.cuGetErrorString(code)
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise KernelError(f"{name}: CUDA error {int(code)}: {said}")


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; what it returns besides its code."""
    bindings = driver()
    code, *values = getattr(bindings, name)(*arguments)
    _check(bindings, name, code)
    return values[0] if values else None


def device_of(launch: Launch) -> int | None:
    """The index of the CUDA device that a launch's tensors lie on; None if it is no CUDA device."""
    for value in launch.args.values():
        if isinstance(value, Tensor):
            return value.get_device() if value.is_cuda else None
    return None


def arch_of(device: int) -> int:
    """A device's architecture: 90 is sm_90."""
    return target_of(torch.device("cuda", device)).arch


@functools.cache
def _context(device: int) -> Any:
    """The context that PyTorch uses on a device, retained once and, as PyTorch's own, for good."""
    return _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", device))


def _bind(device: int) -> None:
    """Make the context that PyTorch uses current in this thread."""
    _call("cuCtxSetCurrent", _context(device))


class Function:
    """A loaded kernel on one device; calling it queues a launch."""

    def __init__(self, binary: Binary, image: bytes, launch: Launch, device: int) -> None:
        """Load a binary.

        Args:
            binary: what is known of it.
            image: its bytes.
            launch: one of the launches that it is for.
            device: the CUDA device's index.

        Raises:
            KernelError: if the driver refuses it.
        """
        self._device = device
        self._scratch, alignment = binary.scratch
        # PyTorch's allocator aligns to this.
        assert alignment <= 512
        self._shared = binary.shared
        self._threads = _WARP * binary.warps
        self._parameters = Parameters(launch.signature())
        # One buffer for all threads: the driver copies it before it returns.
        self._lock = threading.Lock()
        driver()
        with torch.cuda.device(device):
            _bind(device)
            self._module = _call("cuModuleLoadData", image)
            self._function = _call("cuModuleGetFunction", self._module, binary.symbol.encode())
            if binary.shared > _PLAIN_SHARED:
                attribute = driver().CUfunction_attribute
                name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call("cuFuncSetAttribute", self._function, name, binary.shared)
        entry = "cuLaunchCooperativeKernel" if binary.cooperative else "cuLaunchKernel"
        self._entry, self._launch = entry, getattr(driver(), entry)
        # The cooperative form takes no last argument.
        self._rest = () if binary.cooperative else (0,)

    def __call__(self, launch: Launch) -> None:
        """Queue a launch on PyTorch's current stream of the device.

        Raises:
            KernelError: if the driver refuses it.
        """
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self._queue(launch)
        return self._queue(launch)

    def _queue(self, launch: Launch) -> None:
        x, y, z = launch.grid
        stream = torch.cuda.current_stream(self._device).cuda_stream
        scratch = None
        if self._scratch:
            # Freed on return, which is safe: who gets it next is queued behind this launch.
            size = self._scratch * x * y * z
            scratch = torch.empty(
                size, dtype=torch.uint8, device=torch.device("cuda", self._device)
            )
        address = 0 if scratch is None else scratch.data_ptr()
        parameters = self._parameters
        place = (x, y, z, self._threads, 1, 1, self._shared, stream, parameters.address)
        with self._lock:
            parameters.pack(launch.args, address)
            (code,) = self._launch(self._function, *place, *self._rest)
            if int(code) == _INVALID_CONTEXT:
                # A thread that has not used CUDA yet.
                _bind(self._device)
                (code,) = self._launch(self._function, *place, *self._rest)
        _check(driver(), self._entry, code)
