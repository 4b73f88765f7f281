"""This package's ops in ONNX's standard operators, for graphs that the native passes rewrote.

`translations(opset)` is a `custom_translation_table` of `torch.onnx.export`. A backend that fuses
Attention, LayerNormalization and Gelu with their neighbours finds them under their names. What
ONNX Runtime's CPU provider has no kernel for is written in what it has: GroupNorm as
InstanceNormalization, as in `export.onnx`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from heatsink.runtime.errors import NotBuilt

# Attention is one operator from here on.
MIN_OPSET = 23

Translation = Callable[..., Any]


def translations(opset: int) -> dict[Callable[..., Any], Translation]:
    """Translations by operator.

    Raises:
        NotBuilt: the opset has no Attention operator.
    """
    if opset < MIN_OPSET:
        raise NotBuilt(f"ONNX opset {opset} is too old for fused graphs: {MIN_OPSET} is needed")
    import onnxscript
    import torch

    import heatsink.kernels.attention
    import heatsink.kernels.conv2d
    import heatsink.kernels.geglu
    import heatsink.kernels.group_norm_silu
    import heatsink.kernels.layer_norm
    import heatsink.kernels.linear  # noqa: F401 - they register the ops

    # The operators used here have not changed since; newer opsets may not be there yet.
    op: Any = onnxscript.opset23
    ops = torch.ops.heatsink
    return {
        ops.attention.default: _attention(op),
        ops.group_norm_silu.default: _group_norm_silu(op),
        ops.layer_norm.default: _layer_norm(op),
        ops.geglu.default: _geglu(op),
        ops.linear.default: _linear(op),
        ops.conv2d.default: _conv2d(op),
    }


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _attention(op: Any) -> Translation:
    def attention(
        q: Any, k: Any, v: Any, scale: float = 1.0, causal: bool = False, bias: Any = None
    ) -> Any:
        heads_first = [op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v)]
        out, *_ = op.Attention(*heads_first, bias, scale=scale, is_causal=int(causal))
        return op.Transpose(out, perm=[0, 2, 1, 3])

    return attention


def _silu(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))


def _modulate(op: Any, x: Any, scale: Any, shift: Any, axes: list[int]) -> Any:
    """`x * (1 + scale) + shift` with scale and shift (N, C), given the axes of 1 that they lack."""

    def spread(rows: Any) -> Any:
        return op.Unsqueeze(rows, _ints(op, *axes)) if axes else rows

    if scale is not None:
        one = op.CastLike(op.Constant(value_float=1.0), scale)
        x = op.Mul(x, op.Add(spread(scale), one))
    return x if shift is None else op.Add(x, spread(shift))


def _group_norm_silu(op: Any) -> Translation:
    def group_norm_silu(
        x: Any,
        groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        scale: Any = None,
        shift: Any = None,
        silu: bool = True,
    ) -> Any:
        channels, *sizes = (int(size) for size in x.shape[1:])
        # A group is an instance's channel.
        grouped = op.Reshape(x, _ints(op, 0, groups, -1))
        ones, zeros = (
            op.CastLike(op.Constant(value_floats=[value] * groups), x) for value in (1.0, 0.0)
        )
        normal = op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        y = op.Reshape(normal, _ints(op, 0, channels, *sizes))
        a_channel = _ints(op, channels, *(1 for _ in sizes))
        if weight is not None:
            y = op.Mul(y, op.Reshape(weight, a_channel))
        if bias is not None:
            y = op.Add(y, op.Reshape(bias, a_channel))
        y = _modulate(op, y, scale, shift, list(range(2, 2 + len(sizes))))
        return _silu(op, y) if silu else y

    return group_norm_silu


def _layer_norm(op: Any) -> Translation:
    def layer_norm(
        x: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        scale: Any = None,
        shift: Any = None,
    ) -> Any:
        if weight is None:
            weight = op.CastLike(op.Constant(value_floats=[1.0] * int(x.shape[-1])), x)
        y, *_ = op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)
        return _modulate(op, y, scale, shift, list(range(1, len(x.shape) - 1)))

    return layer_norm


def _halves(op: Any, x: Any) -> Any:
    value, gate = op.Split(x, num_outputs=2, axis=-1)
    return op.Mul(value, op.Gelu(gate))


def _geglu(op: Any) -> Translation:
    def geglu(x: Any) -> Any:
        return _halves(op, x)

    return geglu


def _activate(op: Any, x: Any, activation: str) -> Any:
    if activation == "silu":
        return _silu(op, x)
    if activation == "gelu":
        return op.Gelu(x)
    if activation == "gelu_tanh":
        return op.Gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        steep = op.CastLike(op.Constant(value_float=1.702), x)
        return op.Mul(x, op.Sigmoid(op.Mul(x, steep)))
    return _halves(op, x) if activation == "geglu" else x


def _linear(op: Any) -> Translation:
    def linear(
        x: Any,
        weight: Any,
        bias: Any = None,
        residual: Any = None,
        sample_add: Any = None,
        activation: str = "",
    ) -> Any:
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        y = y if bias is None else op.Add(y, bias)
        y = _modulate(op, y, None, sample_add, list(range(1, len(x.shape) - 1)))
        y = _activate(op, y, activation)
        return y if residual is None else op.Add(y, residual)

    return linear


def _conv2d(op: Any) -> Translation:
    def conv2d(
        x: Any,
        x2: Any,
        weight: Any,
        bias: Any = None,
        residual: Any = None,
        sample_add: Any = None,
        stride: int = 1,
        padding: int = 0,
        upsample: int = 1,
        activation: str = "",
    ) -> Any:
        x = x if x2 is None else op.Concat(x, x2, axis=1)
        if upsample != 1:
            scales = op.Constant(value_floats=[1.0, 1.0, float(upsample), float(upsample)])
            x = op.Resize(
                x,
                None,
                scales,
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        y = op.Conv(x, weight, bias, strides=[stride] * 2, pads=[padding] * 4)
        y = _modulate(op, y, None, sample_add, [2, 3])
        y = _activate(op, y, activation)
        return y if residual is None else op.Add(y, residual)

    return conv2d
