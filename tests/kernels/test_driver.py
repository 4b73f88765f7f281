"""The launcher on the CUDA driver API: what it passes, what it says without a driver, and whole."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink import kernels
from heatsink.kernels import _driver, aot, catalog
from heatsink.kernels._cache import Cache, write_cache
from heatsink.kernels._compile import Binary, Job
from heatsink.kernels._config import target_of
from heatsink.kernels._launch import ARCHS, Kernel
from heatsink.kernels._op import Case, Op
from heatsink.kernels._params import Parameters, layout, passed
from heatsink.kernels._workers import compile_jobs
from heatsink.kernels.errors import CacheMismatch, KernelError
from heatsink.kernels.silu_mul import OP, silu_mul

SIGNATURE = {
    "x_ptr": "*fp16:16",
    "scale": "fp32",
    "out_ptr": "*bf16",
    "rows": "i32",
    "wide": "i64:16",
    "step": "=1",
    "bias_ptr": "=None",
    "few": "i32:16",
}


def test_parameters_are_packed_as_c_lays_them_out() -> None:
    x = torch.zeros(3)
    args: dict[str, Any] = {
        "x_ptr": x,
        "scale": 0.5,
        "out_ptr": x[1:],
        "rows": -3,
        "wide": -(2**40),
        "step": 1,
        "bias_ptr": None,
        "few": 48,
    }
    parameters = Parameters(SIGNATURE)
    assert parameters.names == ("x_ptr", "scale", "out_ptr", "rows", "wide", "few")
    places = layout(passed(SIGNATURE).values())
    assert [offset for offset, _ in places] == [0, 8, 16, 24, 32, 40, 48, 56]
    parameters.pack(args, scratch=0xABC)
    # As the driver reads them: through an array of pointers, one to each value.
    pointers = (ctypes.c_void_p * len(places)).from_address(parameters.address)
    sizes = (size for _, size in places)
    found = [ctypes.string_at(p or 0, n) for p, n in zip(pointers, sizes, strict=True)]
    address = x.data_ptr()
    assert found == [
        struct.pack("<Q", address),
        struct.pack("<f", 0.5),
        struct.pack("<Q", address + 4),
        struct.pack("<i", -3),
        struct.pack("<q", -(2**40)),
        struct.pack("<i", 48),
        struct.pack("<Q", 0xABC),
        struct.pack("<Q", 0),
    ]


def test_a_type_that_has_no_place_is_refused() -> None:
    with pytest.raises(KernelError, match="x: expected a pointer, i32, i64 or fp32, got u1"):
        passed({"x": "u1"})


def test_without_a_driver_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip(reason="there is a driver here")
    jobs = [job for job, _ in aot.jobs([OP], [90]).values()]
    (binary,) = compile_jobs(jobs, tmp_path)
    assert isinstance(binary, Binary)
    (launch,) = aot.launches_of(OP, OP.cases[0], 90)
    image = (tmp_path / binary.file).read_bytes()
    with pytest.raises(KernelError, match=r"expected a CUDA driver \(libcuda.so.1\), got none"):
        _driver.Function(binary, image, launch, device=0)


def test_without_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"expected cuda-bindings, .* pip install 'heatsink\["):
        _driver.driver.__wrapped__()


def test_only_cuda_tensors_have_a_device() -> None:
    (launch,) = aot.launches_of(OP, OP.cases[0], 90)
    assert _driver.device_of(launch) is None


def test_a_devices_context_is_retained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def call(name: str, *arguments: Any) -> Any:
        calls.append((name, *arguments))
        what = {"cuDeviceGet": "device", "cuDevicePrimaryCtxRetain": "context of"}
        return f"{what.get(name)} {arguments[0]}"

    monkeypatch.setattr(_driver, "_call", call)
    _driver._context.cache_clear()
    try:
        for device in (0, 1, 0, 0, 1):
            _driver._bind(device)
    finally:
        _driver._context.cache_clear()
    retained = [call[1] for call in calls if call[0] == "cuDevicePrimaryCtxRetain"]
    assert retained == ["device 0", "device 1"]
    current = [call[1] for call in calls if call[0] == "cuCtxSetCurrent"]
    assert current == [f"context of device {device}" for device in (0, 1, 0, 0, 1)]


def smoke() -> list[tuple[Op, Case]]:
    """What together reaches every kernel."""
    return [(op, case) for op in catalog.ops().values() for case in aot.smoke_cases(op)]


def arch_here() -> int:
    """The architecture to compile for, on this machine's device."""
    arch = target_of(torch.device("cuda", 0)).arch
    if arch not in ARCHS:
        pytest.skip(reason=f"nothing is compiled ahead of time for sm_{arch}")
    return arch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for this machine's device."""
    jobs = [job for job, _ in aot.jobs(catalog.ops().values(), [arch_here()]).values()]

    def make(path: Path) -> list[tuple[Job, Binary]]:
        results = compile_jobs(jobs, path, workers=8)
        return [(job, b) for job, b in zip(jobs, results, strict=True) if isinstance(b, Binary)]

    path = tmp_path_factory.mktemp("gpu") / "cache"
    assert write_cache(path, make, "heatsink kernels compile", "test") == len(jobs)
    return path


@pytest.fixture
def cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cache in use, and Triton out of reach."""

    def refuse(self: Kernel) -> Any:
        raise AssertionError(f"{self.name} was asked of Triton")

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "function", refuse)
        kernels.use_cache(folder)
        yield
    kernels.use_cache(None)


def tensors(out: Any) -> list[Tensor]:
    """What an op gives, flat."""
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), smoke(), ids=lambda value: value.name)
def test_same_bits_as_through_triton(op: Op, case: Case, folder: Path) -> None:
    if not {job.kernel for job, _ in aot.jobs([op], [arch_here()]).values()}:
        pytest.skip(reason=f"{op.name} is not written for this device")
    inputs = case.make(torch.device("cuda", 0))
    kernels.use_cache(None)
    expected = [x.clone() for x in tensors(op.prepare(inputs)())]
    kernels.use_cache(folder)
    try:
        found = tensors(op.prepare(inputs)())
    finally:
        kernels.use_cache(None)
    for x, y in zip(found, expected, strict=True):
        same = x.contiguous().view(torch.uint8) == y.contiguous().view(torch.uint8)
        assert bool(same.all())


@pytest.mark.gpu
@pytest.mark.usefixtures("cached")
def test_on_another_stream_thread_and_in_a_graph() -> None:
    inputs = OP.cases[0].make(torch.device("cuda", 0))
    expected = silu_mul(**inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = silu_mul(**inputs)
    stream.synchronize()
    assert torch.equal(other, expected)

    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(silu_mul(**inputs)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = silu_mul(**inputs)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True], ids=["triton", "cache"])
def test_a_launch_runs_where_its_tensors_lie(ahead: bool, request: pytest.FixtureRequest) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(reason=f"expected two devices, got {torch.cuda.device_count()}")
    if ahead:
        if target_of(torch.device("cuda", 1)).arch != arch_here():
            pytest.skip(reason="the second device is of another architecture than the first")
        request.getfixturevalue("cached")
    there = torch.device("cuda", 1)
    inputs = OP.cases[0].make(there)
    with torch.cuda.device(0):
        out = silu_mul(**inputs)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(there)
    assert out.device == there
    exact = torch.nn.functional.silu(inputs["gate"].double()) * inputs["up"].double()
    eps = torch.finfo(out.dtype).eps
    assert torch.allclose(out.double(), exact, rtol=eps, atol=eps)


@pytest.mark.gpu
def test_what_the_cache_lacks_is_told_on_the_device(folder: Path) -> None:
    kernels.use_cache(folder)
    try:
        with pytest.raises(CacheMismatch, match="expected a binary for sm_"):
            silu_mul(*torch.ones(2, 3, 17, device="cuda"))
    finally:
        kernels.use_cache(None)
    assert len(Cache(folder).entries) >= len(smoke())
