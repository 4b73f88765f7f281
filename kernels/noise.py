"""Counter-based normal noise: Philox4x32-10, then a normal transform in IEEE operations only.

    word(i) = Philox(counter = (i//4 mod 2^32, i//4 div 2^32, step, purpose), key = seed)[i mod 4]
    normal(i) = inverse normal CDF at (word(i) + 1/2) / 2^32, by AS 241's rational functions

Every value depends on (seed, purpose, step, i) alone. The transform uses float32 additions,
multiplications, divisions and square roots, each rounded once, and integer operations, so any
device that computes these by IEEE 754 gives the same bits. docs/noise.md is the specification.
CUDA: Triton; CPU: C++, or the PyTorch implementation here, which serves every other device too.

Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988), PPND7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op

NOISE_VERSION = 1
PHILOX_ROUNDS = 10

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Highest power first. Each is rounded to float32 before use.
_CENTRAL_NUM = (59.109374720, 159.29113202, 50.434271938, 3.3871327179)
_CENTRAL_DEN = (67.187563600, 78.757757664, 17.895169469, 1.0)
_TAIL_NUM = (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
_TAIL_DEN = (0.12021132975, 0.73700164250, 1.0)
_LOG_SERIES = (2 / 7, 2 / 5, 2 / 3, 2.0)
_LN2 = 0.6931471805599453
_SPLIT = 0.425
_SPLIT_SQUARED = 0.180625
_TAIL_SHIFT = 1.6
_SQRT_HALF_BITS = 0x3F3504F3

KERNEL = Kernel("normal", module="noise", plain=("purpose", "tiles"), fusion=False)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, each holding a 32-bit word.
        key: two more of the kind.

    Returns:
        Four int64 tensors of the broadcast shape, each holding an unsigned 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The product fills 64 bits and so may be negative as int64: mask after the shift.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value = (value + coefficient) * x
    return value + coefficients[-1]


def _minus_log(y: Tensor) -> Tensor:
    """-ln(y / 2^32) of float32 `y` in [0.5, 2^31]."""
    bits = y.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    s = f / (f + 2.0)
    series = _horner(_LOG_SERIES, s * s)
    return (32 - exponent).to(torch.float32) * _LN2 - s * series


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of float32 `x`."""
    # PyTorch's float32 square root on the CPU is Intel MKL's, which may be off by an ulp. Through
    # float64 it is exact: the root of a 24-bit number is never within 2^-50 (relative to its
    # binade) of the midpoint of two float32 numbers, and float64's error is below 2^-52.
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def words_to_normal(words: Tensor) -> Tensor:
    """The normal transform.

    Args:
        words: int64 of any shape, each an unsigned 32-bit number.

    Returns:
        float32 of the same shape: finite, of magnitude at most 6.34, never zero, and odd about the
        middle (word w and 2^32 - 1 - w give opposite values).
    """
    signed = words - 2**31
    negative = signed < 0
    distance = torch.where(negative, -1 - signed, signed)
    q = (distance.to(torch.float32) + 0.5) * 2.0**-32
    r = _SPLIT_SQUARED - q * q
    inner = q * _horner(_CENTRAL_NUM, r) / _horner(_CENTRAL_DEN, r)
    y = (2**31 - 1 - distance).to(torch.float32) + 0.5
    t = _sqrt(_minus_log(y)) - _TAIL_SHIFT
    outer = _horner(_TAIL_NUM, t) / _horner(_TAIL_DEN, t)
    magnitude = torch.where(q <= _SPLIT, inner, outer)
    return torch.where(negative, -magnitude, magnitude)


def _normal_torch(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    """The PyTorch implementation of `heatsink::normal`."""
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=keys.device)
    counter = (
        block & _MASK32,
        block >> 32,
        (steps & _MASK32)[:, None],
        torch.full_like(steps, purpose)[:, None],
    )
    key = ((keys & _MASK32)[:, None], ((keys >> 32) & _MASK32)[:, None])
    words = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :count]
    return words_to_normal(words).contiguous()


def key(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Key:
    """What the configuration depends on."""
    return {"count": count}


def plan(
    config: Config, keys: Tensor, steps: Tensor, purpose: int, count: int
) -> tuple[Tensor, list[Launch]]:
    """The output and the launch that fills it."""
    out = _normal_fake(keys, steps, purpose, count)
    tiles = -(-count // (4 * config["BLOCK"]))
    launch = Launch(
        KERNEL,
        grid=(keys.shape[0] * tiles, 1, 1),
        args={
            "keys_ptr": keys,
            "steps_ptr": steps,
            "out_ptr": out,
            "purpose": purpose,
            "count": count,
            "tiles": tiles,
            "stride_k": keys.stride(0),
            "stride_s": steps.stride(0),
        },
        constants={"BLOCK": config["BLOCK"]},
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _normal_triton(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    config = lookup("normal", key(keys, steps, purpose, count), target_of(keys.device))
    out, launches = plan(config, keys, steps, purpose, count)
    run(launches)
    return out


def _normal_fake(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    return keys.new_empty((keys.shape[0], count), dtype=torch.float32)


def normal(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    """Standard normal values for rows of seeds.

    Args:
        keys: `(rows,)` int64, the bits of each row's unsigned 64-bit seed.
        steps: `(rows,)` int64 in [0, 2^32), on the same device.
        purpose: in [0, 2^32).
        count: values a row.

    Returns:
        `(rows, count)` float32, contiguous.

    Raises:
        TypeError: if `keys` or `steps` is no tensor, or `purpose` or `count` no integer.
        ValueError: if a shape, dtype or device is another, or a number out of range.
    """
    for name, tensor in (("keys", keys), ("steps", steps)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name}: expected (rows,) int64, got {shape} {tensor.dtype}")
    if keys.shape != steps.shape or keys.device != steps.device:
        raise ValueError(
            f"steps: expected {tuple(keys.shape)} on {keys.device} like keys, "
            f"got {tuple(steps.shape)} on {steps.device}"
        )
    for name, number in (("purpose", purpose), ("count", count)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an integer, got {type(number).__name__}")
    if not 0 <= purpose < 2**32:
        raise ValueError(f"purpose: expected an integer in [0, 2^32), got {purpose}")
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}")
    result: Tensor = torch.ops.heatsink.normal(keys, steps, purpose, count)
    return result


torch.library.define(
    "heatsink::normal", "(Tensor keys, Tensor steps, int purpose, int count) -> Tensor"
)
torch.library.impl("heatsink::normal", "default", _normal_torch)
torch.library.impl("heatsink::normal", "cuda", _normal_triton)
torch.library.register_fake("heatsink::normal", _normal_fake)
_native.load()


def _case(name: str, rows: int, count: int) -> Case:
    def make(device: torch.device) -> Inputs:
        keys = torch.arange(rows, dtype=torch.int64, device=device)
        return {"keys": keys, "steps": keys, "purpose": 1, "count": count}

    return Case(name, make)


OP = Op(
    name="normal",
    public=normal,
    kernels=(KERNEL,),
    cases=(
        _case("sdxl-latents-8x65536", 8, 4 * 128 * 128),
        _case("sd15-latents-8x16384", 8, 4 * 64 * 64),
        _case("bundled-latents-24x512", 24, 8 * 8 * 8),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK": block, "warps": warps} for block in (32, 64, 128, 256) for warps in (1, 2, 4)
    ],
)
