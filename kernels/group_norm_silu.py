"""GroupNorm, an optional modulation per sample, and SiLU, of images with channels innermost.

    y = (x - mean) / sqrt(variance + eps) * weight + bias
    y = y * (1 + scale) + shift
    out = y / (1 + exp(-y))

Mean and variance are a sample's over a group of channels and all pixels. Layout: `(N, C, ...)` in
channels_last memory, as views of `(N, H, W, C)` are; pixels may lie further apart than C, as in a
part of a concatenation. Any other strides cost a copy, as does what `_rows.settled` refuses. fp16,
bf16, fp32; inside all is fp32, with one rounding at the end. Variance is taken about the mean,
never as a difference of squares.

Triton, sm_80 and later. What must move is every value once in and once out, 2 * size.
- Where a sample's pixels of a few groups fit in a program's registers, one launch moves just that.
- Elsewhere three: moments of chunks of pixels (reads size), per-sample coefficients (from 8 bytes
  a channel and chunk, 1 / 64 of size for fp16 and chunks of 256), and the normalisation (reads and
  writes size), which goes backwards, so that what the first launch read last comes from the L2.
  So 3 * size, of which the L2 serves what it can hold of the second reading. Both passes of a
  sample in one cooperative launch would let it serve whole samples in any batch: an experiment.

CPU: C++, or the same bits in PyTorch operations (`_pixels.py`), which serve other devices too.

Source: Wu and He, "Group normalization" (https://arxiv.org/abs/1803.08494).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_eps, check_shape, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._group_norm_cases import CASES
from heatsink.kernels._launch import Kernel, Launch, Value, run
from heatsink.kernels._op import Op
from heatsink.kernels._outs import Out, even_pixels
from heatsink.kernels._pixels import as_pixels, empty_like_pixels, group_norm_torch
from heatsink.kernels._rows import power_of_two, settled, settled_or_none

WHOLE = Kernel("group_norm_whole", module="group_norm_silu", plain=("pixels", "groups"))
MOMENTS = Kernel("group_norm_moments", module="group_norm_silu", plain=("pixels", "chunks"))
FINISH = Kernel(
    "group_norm_finish",
    module="group_norm_silu",
    plain=("pixels", "chunks", "groups", "group_size"),
)
APPLY = Kernel("group_norm_apply", module="group_norm_silu", plain=("pixels",))

# Channels side by side that a program of the one-launch path takes, where groups are narrow.
_LINE = 32
# Values that a program of the chunked path's second launch holds; more would not fit in registers.
_TILE = 4096


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """GroupNorm, `* (1 + scale) + shift`, and SiLU, in fp32 with one rounding.

    Args:
        x: `(N, C, ...)` with at least one dimension of pixels, fp16, bf16 or fp32. Fast where
            channels are innermost in memory (channels_last); copied to that otherwise.
        groups: how many groups of channels; divides C.
        weight: `(C,)`, or None for ones.
        bias: `(C,)`, or None for zeros.
        eps: added to the variance, positive.
        scale: `(N, C)`, or None for zeros.
        shift: `(N, C)`, or None for zeros.
        silu: whether SiLU follows.
        out: memory for the result, channels innermost (`_outs.py`); `x` itself, too.

    Returns:
        `(N, C, ...)` of the same dtype, channels innermost in memory.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, `groups` does not divide C, `eps` is not positive
            or a gradient is required.
    """
    check_tensors({"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}, FLOATS)
    shape = x.shape
    if len(shape) < 3:
        raise ValueError(f"x: expected (N, C, ...) with pixels, got shape {tuple(shape)}")
    samples, channels = shape[0], shape[1]
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: expected an integer, got {type(groups).__name__}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    check_eps(eps)
    if weight is not None:
        check_shape("weight", weight, (channels,))
    if bias is not None:
        check_shape("bias", bias, (channels,))
    if scale is not None:
        check_shape("scale", scale, (samples, channels))
    if shift is not None:
        check_shape("shift", shift, (samples, channels))
    if out is not None:
        return OUT(x, groups, weight, bias, eps, scale, shift, silu, out)
    new: Tensor = torch.ops.heatsink.group_norm_silu(
        x, groups, weight, bias, eps, scale, shift, silu
    )
    return new


def _groups_together(groups: int, group_size: int) -> int:
    return min(groups, max(1, _LINE // group_size))


def key(x: Tensor, groups: int, **_: object) -> Key:
    """What the configuration depends on: a sample's shape.

    `tile` is how many values a program of the one-launch path would hold, padding included.
    """
    channels, pixels = x.shape[1], x.shape[2:].numel()
    group_size = max(1, channels // groups)
    wide = power_of_two(_groups_together(groups, group_size) * group_size)
    return {
        "pixels": pixels,
        "channels": channels,
        "group_size": group_size,
        "tile": power_of_two(pixels) * wide,
        "dtype": short(x.dtype),
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def plan(
    config: Config,
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The output and the launches that fill it: one where the configuration says WHOLE."""
    if out is None:
        out = empty_like_pixels(x)
    if x.numel() == 0:
        return out, []
    pixels = settled(as_pixels(x))
    scale, shift = settled_or_none(scale), settled_or_none(shift)
    given: dict[str, Value] = {
        "weight_ptr": settled_or_none(weight),
        "bias_ptr": settled_or_none(bias),
        "scale_ptr": scale,
        "shift_ptr": shift,
    }
    tail: dict[str, Value] = {"stride_sn": _stride(scale), "stride_tn": _stride(shift), "eps": eps}
    if config["WHOLE"]:
        return out, [_whole(config, pixels, groups, given, tail, as_pixels(out), silu)]
    return out, _chunked(config, pixels, groups, given, tail, as_pixels(out), silu)


def _whole(
    config: Config,
    x: Tensor,
    groups: int,
    given: dict[str, Value],
    tail: dict[str, Value],
    out: Tensor,
    silu: bool,
) -> Launch:
    samples, pixels, channels = x.shape
    if pixels * x.stride(1) >= 2**31:
        x = x.contiguous()
    group_size = channels // groups
    together = _groups_together(groups, group_size)
    return Launch(
        WHOLE,
        grid=(samples * -(-groups // together), 1, 1),
        args={
            "x_ptr": x,
            **given,
            "out_ptr": out,
            "pixels": pixels,
            "channels": channels,
            "groups": groups,
            "stride_xn": x.stride(0),
            "stride_xp": x.stride(1),
            **tail,
        },
        constants={
            "GROUPS": together,
            "GROUP_SIZE": group_size,
            "BLOCK_G": power_of_two(together),
            "BLOCK_P": power_of_two(pixels),
            "BLOCK_C": power_of_two(together * group_size),
            "SILU": silu,
        },
        warps=config["warps"],
        stages=1,
    )


def _chunked(
    config: Config,
    x: Tensor,
    groups: int,
    given: dict[str, Value],
    tail: dict[str, Value],
    out: Tensor,
    silu: bool,
) -> list[Launch]:
    samples, pixels, channels = x.shape
    chunks = -(-pixels // config["CHUNK"])
    blocks = -(-channels // config["BLOCK_C"])
    tiles = -(-pixels // config["BLOCK_P"])
    scratch = [torch.empty(samples, chunks, channels, device=x.device) for _ in range(2)]
    coefficients = torch.empty(samples, 3, channels, device=x.device)
    sizes: dict[str, Value] = {"pixels": pixels, "channels": channels}
    strides: dict[str, Value] = {"stride_xn": x.stride(0), "stride_xp": x.stride(1)}
    partial: dict[str, Value] = {"mean_ptr": scratch[0], "m2_ptr": scratch[1]}
    block = {"BLOCK_P": config["BLOCK_P"], "BLOCK_C": config["BLOCK_C"]}
    moments = Launch(
        MOMENTS,
        grid=(samples * chunks * blocks, 1, 1),
        args={"x_ptr": x, **partial, **sizes, "chunks": chunks, **strides},
        constants={"CHUNK": config["CHUNK"], **block},
        warps=config["warps"],
    )
    given = {**partial, **given, "coefficients_ptr": coefficients, **sizes, "chunks": chunks}
    apply = Launch(
        APPLY,
        grid=(samples * tiles * blocks, 1, 1),
        args={"x_ptr": x, "coefficients_ptr": coefficients, "out_ptr": out, **sizes, **strides},
        constants={**block, "SILU": silu},
        warps=config["warps"],
        stages=1,
    )
    return [moments, _finish(config, samples, groups, chunks, channels, given, tail), apply]


def _finish(
    config: Config,
    samples: int,
    groups: int,
    chunks: int,
    channels: int,
    given: dict[str, Value],
    tail: dict[str, Value],
) -> Launch:
    """From chunks' moments to coefficients: a program a group, which holds a tile of chunks."""
    group_size = channels // groups
    wide = power_of_two(group_size)
    together = min(config["BLOCK_K"], power_of_two(chunks), max(1, _TILE // wide))
    return Launch(
        FINISH,
        grid=(samples * groups, 1, 1),
        args={**given, "groups": groups, "group_size": group_size, **tail},
        constants={"CHUNK": config["CHUNK"], "BLOCK_K": together, "BLOCK_C": wide},
        warps=min(32, max(4, wide // 512)),
        stages=1,
    )


def _group_norm_silu_triton(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor | None = None,
) -> Tensor:
    config = lookup("group_norm_silu", key(x, groups), target_of(x.device))
    out, launches = plan(
        config, x, groups, weight, bias, eps=eps, scale=scale, shift=shift, silu=silu, out=out
    )
    run(launches)
    return out


def _group_norm_silu_fake(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    return empty_like_pixels(x)


def _dense_pixels(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


SCHEMA = (
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, bool silu) -> Tensor"
)
OUT = Out("group_norm_silu", SCHEMA, even_pixels, whole=_dense_pixels)
torch.library.define("heatsink::group_norm_silu", SCHEMA)
torch.library.impl("heatsink::group_norm_silu", "default", group_norm_torch)
torch.library.impl("heatsink::group_norm_silu", "cuda", _group_norm_silu_triton)
torch.library.register_fake("heatsink::group_norm_silu", _group_norm_silu_fake)
OUT.define(group_norm_torch, _group_norm_silu_triton)
_native.load()


def _space(key: Key, arch: int) -> list[Config]:
    whole = [{"WHOLE": 1, "warps": n} for n in (4, 8, 16, 32)]
    chunked = [
        {"WHOLE": 0, "CHUNK": c, "BLOCK_P": p, "BLOCK_C": w, "BLOCK_K": 32, "warps": n}
        for c in (128, 256, 512, 1024)
        for p in (16, 32, 64)
        for w in (64, 128)
        for n in (4, 8)
    ]
    tile = key["tile"]
    assert isinstance(tile, int)
    return [*whole, *chunked] if tile <= 32768 else chunked


OP = Op(
    name="group_norm_silu",
    public=group_norm_silu,
    kernels=(WHOLE, MOMENTS, FINISH, APPLY),
    cases=CASES,
    key=key,
    plan=plan,
    space=_space,
    smoke=("sd15-320x64x64-fp16", "sd15-1280x16x16-fp16"),
)
