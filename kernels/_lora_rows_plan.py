"""The launches of `heatsink.kernels.lora_rows`: how its operands reach the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._config import Config
from heatsink.kernels._heads import is_settled, settled, stride_unit
from heatsink.kernels._launch import Kernel, Launch, Value
from heatsink.kernels._windows import Window

Arguments = dict[str, Value]
Constants = dict[str, Any]

_TABLE = ("slots", "rank", "adapters", "stride_ht")
_DOWN = tuple(f"stride_{name}" for name in ("xr", "xh", "xs", "as", "ar", "ac", "at"))
_UP = tuple(f"stride_{name}" for name in ("yr", "ys", "bs", "br"))
SHRINK = Kernel("lora_shrink", module="lora_rows", plain=(*_TABLE, *_DOWN))
EXPAND = Kernel("lora_expand", module="lora_rows", plain=(*_TABLE, *_UP))
FUSED = Kernel("lora_fused", module="lora_rows", plain=(*_TABLE, *_DOWN, *_UP))

# Ranks of the scratch are padded to this, so that its rows begin at multiples of 16 bytes.
_RANKS = 16
# How products of fp32 are taken: by `PRECISION` in a configuration.
_PRECISIONS = ("ieee", "tf32x3")


@dataclass(frozen=True)
class Operand:
    """A tensor as a kernel takes it.

    Attributes:
        tensor: what is read or written.
        strides: those of the dimensions that are not dense, in units.
        unit: of the strides, in elements.
        inside: whether channels are dense; else tokens, or pixels of an image's row.
        linear: whether tokens follow one another at one stride.
    """

    tensor: Tensor
    strides: tuple[int, ...]
    unit: int
    inside: bool = True
    linear: bool = True

    @classmethod
    def of(cls, x: Tensor, inside: bool = True, linear: bool = True) -> Operand:
        """A settled tensor as an operand."""
        unit = stride_unit(x)
        return cls(x, tuple(step // unit for step in x.stride()[:-1]), unit, inside, linear)


def _tokens(x: Tensor, linear: bool) -> Tensor | None:
    """`(R, ..., C)` of a linear layer or `(R, C, H, W)` as a view `(R, T, C)`, if there is one."""
    inside = x if linear else x.permute(0, 2, 3, 1)
    try:
        return inside.view(x.shape[0], -1, inside.shape[-1])
    except RuntimeError:
        return None


def _in_place(tokens: Tensor | None) -> Operand | None:
    """`(R, T, C)` with dense channels or tokens, if it needs no copy: strides of (R, other)."""
    if tokens is None:
        return None
    if is_settled(tokens):
        return Operand.of(tokens)
    return Operand.of(tokens.mT, inside=False) if is_settled(tokens.mT) else None


def _input(x: Tensor, linear: bool, window: Window) -> Operand:
    """x, copied where it must be: strides of (row, height, other)."""
    if linear or window.pointwise:
        tokens = _tokens(x, linear)
        if tokens is None and linear:
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if tokens is not None:
            found = _in_place(tokens) or Operand.of(settled(tokens))
            row, other = found.strides
            return replace(found, strides=(row, 0, other))
    if is_settled(x) and not is_settled(x.permute(0, 2, 3, 1)):
        found = Operand.of(x, inside=False, linear=False)
        row, channel, height = found.strides
        return replace(found, strides=(row, height, channel))
    return Operand.of(settled(x.permute(0, 2, 3, 1)), linear=False)


def _output(y: Tensor, linear: bool) -> tuple[Tensor, Operand]:
    """`y` itself as an operand, or a copy that must be copied back."""
    operand = _in_place(_tokens(y, linear))
    if operand is None:
        y = y.clone(memory_format=torch.contiguous_format)
        operand = _in_place(_tokens(y, linear))
        assert operand is not None
    return y, operand


def _down(a: Tensor) -> Operand:
    """The bank's A as `(S, rank, taps, in)`; as it lies where that is not dense along `in`."""
    a = (a[..., None] if a.dim() == 3 else a.flatten(3)).mT
    if is_settled(a):
        found = Operand.of(a)
        slot, rank, tap = found.strides
        return replace(found, strides=(slot, rank, 1, tap))
    slot, rank, tap, channel = a.stride()
    return Operand(a, (slot, rank, channel, tap), 1, inside=False)


def _geometry(x: Tensor, y: Tensor, linear: bool, window: Window) -> dict[str, Value]:
    """What says where a tap of an output lies; None where tokens follow one another."""
    names = ("height", "width", "out_width", "step_h", "step_w", "pad_h", "pad_w", "dil_h", "dil_w")
    if linear:
        return dict.fromkeys(names)
    pairs = (*window.stride, *window.padding, *window.dilation)
    return dict(zip(names, (*x.shape[2:], y.shape[3], *pairs), strict=True))


def tokens_of(y: Tensor, linear: bool) -> int:
    """How many tokens or pixels a row has."""
    return y.shape[1:-1].numel() if linear else y.shape[2:].numel()


def _tables(h: Tensor, a: Tensor, slots: Tensor, ranks: Tensor | None, tokens: int) -> Arguments:
    return {
        "h_ptr": h,
        "slots_ptr": slots.contiguous(),
        "ranks_ptr": None if ranks is None else ranks.contiguous(),
        "slots": a.shape[0],
        "rank": a.shape[1],
        "adapters": slots.shape[1],
        "tokens": tokens,
        "stride_ht": h.stride(0) // _RANKS,
    }


def _shrinking(
    config: Config, y: Tensor, x: Tensor, a: Tensor, scales: Tensor, window: Window
) -> tuple[Arguments, Constants]:
    given, down = _input(x, a.dim() == 3, window), _down(a)
    args: Arguments = {
        "x_ptr": given.tensor,
        "a_ptr": down.tensor,
        "scales_ptr": scales.contiguous(),
        "inputs": a.shape[2],
        **_geometry(x, y, given.linear, window),
        **dict(zip(_DOWN, (*given.strides, *down.strides), strict=True)),
    }
    constants = {
        "X_UNIT": given.unit,
        "A_UNIT": down.unit,
        "TAPS": a.shape[3:].numel(),
        "KERNEL_W": window.kernel[1],
        "LINEAR": given.linear,
        "X_INSIDE": given.inside,
        "A_INSIDE": down.inside,
        "BLOCK_K": config["BLOCK_K"],
        "BLOCK_R": config["BLOCK_R"],
    }
    return args, constants


def _expanding(config: Config, out: Operand, b: Tensor) -> tuple[Arguments, Constants]:
    up = Operand.of(settled(b))
    args: Arguments = {
        "y_ptr": out.tensor,
        "b_ptr": up.tensor,
        "outputs": b.shape[2],
        **dict(zip(_UP, (*out.strides, *up.strides), strict=True)),
    }
    constants = {
        "Y_UNIT": out.unit,
        "B_UNIT": up.unit,
        "Y_INSIDE": out.inside,
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_E": config["BLOCK_E"],
    }
    return args, constants


def plan_rows(
    config: Config,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    window: Window,
) -> tuple[Tensor, list[Launch]]:
    """What the launches change, `y` or a copy of it, and the launches: one or two."""
    result, out = _output(y, a.dim() == 3)
    tokens = tokens_of(y, a.dim() == 3)
    fused, splits = bool(config["FUSED"]), config["SPLITS"]
    assert splits == 1 or not fused
    # Parts of a sum are added in fp32; a whole one is rounded when it is made.
    h = torch.empty(
        (slots.numel() * splits * tokens, -(-a.shape[1] // _RANKS) * _RANKS),
        dtype=x.dtype if splits == 1 else torch.float32,
        device=x.device,
    )
    # One after the other, these are in the kernels' order.
    tables = _tables(h, a, slots, ranks, tokens)
    down, of_down = _shrinking(config, y, x, a, scales, window)
    up, of_up = _expanding(config, out, b)
    shared: Constants = {
        "H_UNIT": _RANKS,
        "BLOCK_T": config["BLOCK_T"],
        "PRECISION": _PRECISIONS[config["PRECISION"]],
        "UPCAST": x.dtype == torch.bfloat16 and x.device.type == "cpu",
    }
    tiles = slots.shape[0] * -(-tokens // config["BLOCK_T"])
    blocks = -(-b.shape[2] // config["BLOCK_N"])
    warps, stages = config["warps"], config["stages"]
    if fused:
        args = {**tables, **down, **up}
        return result, [
            Launch(FUSED, (tiles, 1, 1), args, {**shared, **of_down, **of_up}, warps, stages)
        ]
    shared["SPLITS"] = splits
    first = Launch(
        SHRINK,
        grid=(tiles * splits, 1, 1),
        args={**tables, **down},
        constants={**shared, **of_down},
        warps=warps,
        stages=stages,
    )
    second = Launch(
        EXPAND,
        grid=(tiles * blocks, 1, 1),
        args={**tables, **up},
        constants={**shared, **of_up},
        warps=config["expand_warps"],
        stages=1,
    )
    return result, [first, second]
