"""A 64-bit digest of each row of a tensor, with its non-finite count and absolute maximum.

    digest = sum over i of key(i) * word(bits_i)   (mod 2^64)

`i` is the element's logical index in its row (row-major order of the shape, whatever the strides),
`bits_i` its bit pattern with every NaN read as one; -0.0 and +0.0 differ. The sum is over integers,
so it may be taken in any order and by any number of threads. docs/fingerprint.md specifies `key`
and `word`, states what the digest detects, and has test vectors.

dtypes: float16, bfloat16, float32, float64, int32, int64, uint8, bool. CUDA: Triton; CPU: C++, or
the PyTorch implementation here, which also serves every other device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal

KERNEL = Kernel("fingerprint", module="fingerprint", plain=("rows", "tiles"), fusion=False)

FINGERPRINT_VERSION = 1
MAX_ROW_ELEMENTS = 2**31 - 1

_MASK32 = 0xFFFFFFFF
_SALT = 0x27D4EB2F
# Elements of a row worked on at a time, so that the int64 temporaries stay small.
_CHUNK = 1 << 18
# dtype -> (the integer type of its bits, bits of +inf, bits every NaN is read as)
_FLOATS = {
    torch.float16: (torch.int16, 0x7C00, 0x7E00),
    torch.bfloat16: (torch.int16, 0x7F80, 0x7FC0),
    torch.float32: (torch.int32, 0x7F800000, 0x7FC00000),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x7FF8000000000000),
}
_UNSIGNED_MASK = {torch.int16: 0xFFFF, torch.int32: _MASK32, torch.int64: -1}
_MAGNITUDE_MASK = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF, torch.int64: 2**63 - 1}
_INTEGERS = {torch.int32: _MASK32, torch.int64: -1, torch.uint8: 0xFF, torch.bool: 0x1}

# dtype -> what the kernel reads it as, and what it calls it
_READ_AS = {
    torch.float16: (torch.int16, "fp16"),
    torch.bfloat16: (torch.int16, "bf16"),
    torch.float32: (torch.int32, "fp32"),
    torch.float64: (torch.int64, "fp64"),
    torch.int32: (torch.int32, "int"),
    torch.int64: (torch.int64, "int"),
    torch.uint8: (torch.uint8, "uint"),
    torch.bool: (torch.uint8, "uint"),
}


class Fingerprint(NamedTuple):
    """What `fingerprint` knows of each row. All three tensors have shape `(rows,)`.

    Attributes:
        digest: int64, holding the bits of an unsigned 64-bit number.
        nonfinite: int64, how many elements are NaN or infinite (0 for integer dtypes).
        absmax: float32, the largest magnitude of the finite elements, rounded to nearest (only
            float64 and integers need it); 0 where there is none.
    """

    digest: Tensor
    nonfinite: Tensor
    absmax: Tensor

    def hex(self) -> list[str]:
        """Each row's digest as 16 hexadecimal digits."""
        return [f"{value % 2**64:016x}" for value in self.digest.tolist()]


def fingerprint(x: Tensor) -> Fingerprint:
    """Digest every row (slice along dimension 0) of `x`.

    A row's result depends on the values of its elements in logical order alone: not on strides or
    memory format, nor on the other rows or the row's place. It says nothing of shape or dtype.

    Args:
        x: `(rows, ...)`, any strides, one of the dtypes above.

    Returns:
        The digest, non-finite count and absolute maximum of each row.

    Raises:
        TypeError: if `x` is no tensor or its dtype is not supported.
        ValueError: if `x` has no dimension, rows of 2^31 elements or more, or requires a gradient.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS and x.dtype not in _INTEGERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*_FLOATS, *_INTEGERS))
        raise TypeError(f"x: expected a dtype among {names}, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: expected no gradient (inference only), got requires_grad")
    if x.dim() == 0:
        raise ValueError("x: expected (rows, ...), got a tensor without dimensions")
    elements = x.shape[1:].numel()
    if elements > MAX_ROW_ELEMENTS:
        raise ValueError(f"x: expected rows of fewer than 2^31 elements, got {elements}")
    digest, nonfinite, absmax = torch.ops.heatsink.fingerprint(x)
    return Fingerprint(digest, nonfinite, absmax)


def _keys(start: int, stop: int, device: torch.device) -> Tensor:
    """The 64-bit keys of logical indices start..stop-1, int64."""
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    a = ((2 * index + 1) * 0x9E3779B1) & _MASK32
    a = a ^ ((a >> 15) & ~1)
    b = (a * 0x85EBCA77) & _MASK32
    b = b ^ ((b >> 16) & ~1)
    return ((a * b) & _MASK32) << 32 | b


def _words(bits: Tensor, size: int) -> Tensor:
    """Spread the high bits over the low ones; `bits` is int64, `size` its meaningful bytes."""
    if size == 8:
        # int64 shifts keep the sign; the masks make them logical ones.
        bits = bits ^ ((bits >> 32) & _MASK32)
        return bits ^ ((bits >> 16) & (2**48 - 1)) ^ _SALT
    return bits ^ (bits >> 16) ^ _SALT


def _float_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words, non-finite flags and finite magnitudes (as bits) of floating-point `(rows, n)`."""
    integer, infinity, quiet_nan = _FLOATS[x.dtype]
    raw = x.view(integer).to(torch.int64) & _UNSIGNED_MASK[integer]
    magnitude = raw & _MAGNITUDE_MASK[integer]
    bits = raw.masked_fill(magnitude > infinity, quiet_nan)
    nonfinite = magnitude >= infinity
    return _words(bits, x.element_size()), nonfinite, magnitude.masked_fill(nonfinite, 0)


def _float_row(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digest, count and absmax of `(rows, n)` floats, n > 0, by chunks of the row."""
    rows, count = x.shape
    integer = _FLOATS[x.dtype][0]
    digest = torch.zeros(rows, dtype=torch.int64, device=x.device)
    nonfinite = torch.zeros_like(digest)
    largest = torch.zeros_like(digest)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        words, flags, magnitude = _float_parts(x[:, start:stop])
        digest += (words * _keys(start, stop, x.device)).sum(1)
        nonfinite += flags.sum(1)
        # Compared as integers: the order is that of the magnitudes, and subnormals are kept even
        # where the processor is told to flush them.
        largest = torch.maximum(largest, magnitude.amax(1))
    return digest, nonfinite, largest.to(integer).view(x.dtype).to(torch.float32)


def _integer_row(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digest, count (zero) and absmax of `(rows, n)` integers, n > 0."""
    rows, count = x.shape
    digest = torch.zeros(rows, dtype=torch.int64, device=x.device)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        bits = x[:, start:stop].to(torch.int64) & _INTEGERS[x.dtype]
        digest += (_words(bits, x.element_size()) * _keys(start, stop, x.device)).sum(1)
    # Rounding is monotone, so it may come before the maximum; -2^63 has no int64 magnitude.
    wide = x.to(torch.int64)
    above = wide.amax(1).to(torch.float32)
    below = -wide.amin(1).to(torch.float32)
    absmax = torch.maximum(above, below).abs()
    return digest, torch.zeros_like(digest), absmax


def _fingerprint_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch implementation; see `fingerprint`."""
    rows = x.shape[0]
    if x.numel() == 0:
        digest = torch.zeros(rows, dtype=torch.int64, device=x.device)
        return digest, digest.clone(), torch.zeros(rows, dtype=torch.float32, device=x.device)
    flat = x.reshape(rows, -1)
    return _float_row(flat) if flat.dtype in _FLOATS else _integer_row(flat)


def key(x: Tensor) -> Key:
    """What the configuration depends on."""
    return {"count": x.shape[1:].numel(), "bytes": x.element_size()}


def plan(config: Config, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs, which start at 0, and the launch that adds to them."""
    rows, count = x.shape[0], x.shape[1:].numel()
    digest = torch.zeros(rows, dtype=torch.int64, device=x.device)
    nonfinite = torch.zeros_like(digest)
    absmax = torch.zeros(rows, dtype=torch.float32, device=x.device)
    inside = _channels_inside(x)
    integers, form = _READ_AS[x.dtype]
    _, infinity, quiet_nan = _FLOATS.get(x.dtype, (None, 0, 0))
    x = (x if inside or _row_contiguous(x) else x.contiguous()).view(integers)
    # Rows share keys: as many whatever the batch, so that one binary serves every batch.
    together = config["ROWS"]
    tiles = -(-count // (config["BLOCK"] * config["STEPS"]))
    launch = Launch(
        KERNEL,
        grid=(-(-rows // together) * tiles, 1, 1),
        args={
            "x_ptr": x,
            "digest_ptr": digest,
            "nonfinite_ptr": nonfinite,
            "absmax_ptr": absmax.view(torch.int32),
            "rows": rows,
            "count": count,
            "tiles": tiles,
            "channels": x.shape[1] if inside else 1,
            "stride_xr": x.stride(0),
        },
        constants={
            "FORMAT": form,
            "INFINITY": infinity,
            "QUIET_NAN": quiet_nan,
            "CHANNELS_INSIDE": inside,
            "ROWS": together,
            "BLOCK": config["BLOCK"],
            "STEPS": config["STEPS"],
        },
        warps=config["warps"],
        stages=1,
    )
    return (digest, nonfinite, absmax), [launch]


def _row_contiguous(x: Tensor) -> bool:
    return x.numel() == 0 or x[0].is_contiguous()


def _channels_inside(x: Tensor) -> bool:
    """Whether a row is dense with its first dimension innermost, as in channels_last."""
    if x.dim() < 3 or _row_contiguous(x):
        return False
    return x[0].movedim(0, -1).is_contiguous()


def _fingerprint_triton(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    results, launches = plan(lookup("fingerprint", key(x), target_of(x.device)), x)
    run(launches)
    return results


def _fingerprint_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows, dtype=torch.float32),
    )


torch.library.define(
    "heatsink::fingerprint", "(Tensor x) -> (Tensor digest, Tensor nonfinite, Tensor absmax)"
)
torch.library.impl("heatsink::fingerprint", "default", _fingerprint_torch)
torch.library.impl("heatsink::fingerprint", "cuda", _fingerprint_triton)
torch.library.register_fake("heatsink::fingerprint", _fingerprint_fake)
_native.load()


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, inside: bool = False) -> Case:
    def make(device: torch.device) -> Inputs:
        x = normal(shape, dtype, device, seed=1)
        return {"x": x.contiguous(memory_format=torch.channels_last) if inside else x}

    return Case(name, make)


OP = Op(
    name="fingerprint",
    public=fingerprint,
    kernels=(KERNEL,),
    cases=(
        _case("sdxl-8x1280x32x32-fp16", (8, 1280, 32, 32), torch.float16),
        _case("sdxl-8x1280x32x32-fp16-channels-last", (8, 1280, 32, 32), torch.float16, True),
        _case("sd15-2x320x64x64-bf16", (2, 320, 64, 64), torch.bfloat16),
        _case("latents-8x4x128x128-fp32", (8, 4, 128, 128), torch.float32),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"ROWS": rows, "BLOCK": block, "STEPS": steps, "warps": warps}
        for rows in (1, 2, 4, 8)
        for block in (256, 512, 1024)
        for steps in (2, 4, 8)
        for warps in (4, 8)
    ],
)
