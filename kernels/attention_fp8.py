"""Attention with 8-bit products, for many tokens: quantised, multiplied and rounded in one op.

Layouts are those of `attention`: `q (B, Sq, H, D)`, `k` and `v (B, Sk, H, D)`, any strides; D from
1 to 256; fp16 and bf16. K is smoothed: its mean over a sample's tokens, per head and channel, is
taken off, which moves all scores of a query alike and so leaves the weights as they are.

Two forms, chosen by the caller because their errors differ:
- by default Q (a scale a token) and K (a scale a block of tokens) are int8, with sums in int32 that
  become fp32; the weights meet V in its own dtype, in fp32 sums.
- `pure`: Q, K, V (a scale a channel) and the weights are e4m3, the sums fp32; on Hopper, whose e4m3
  sums are short of bits, they are carried on in fp32 after each block.

Error against float64, as |out - exact| / |exact| in Frobenius' norm over unit normal q, k, v, with
or without outlier channels in K: below 2e-2 by default and below 7e-2 for `pure`
(tests/kernels/test_attention_fp8.py). e4m3 has three bits of mantissa, a relative rounding of 2.6%
in the root mean square, and no averaging helps where values have no mean: each of Q and K, the
weights and V alone adds more than 2e-2. So `pure` can't be that exact, whatever its scales.

Every launch that smooths and quantises is a part of the op. CUDA: Triton, sm_80 and later, `pure`
sm_89 and later; speed is unmeasured. Elsewhere: the same quantisation in PyTorch operations, with
weights not rounded.

Source: Zhang et al., "SageAttention" (https://arxiv.org/abs/2410.02367) for smoothing K.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._attention_space import attention_fp8_space
from heatsink.kernels._checks import check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._heads import (
    MAX_HEAD_DIM,
    check_heads,
    check_scale,
    parts,
    settled,
    stride_unit,
    strides,
)
from heatsink.kernels._launch import ARCHS, Kernel, Launch, Value, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels.attention import LOG2_E, _attention_torch

Constants = dict[str, Any]

# e4m3 products, and conversions to e4m3, are there from sm_89 on.
_E4M3_ARCHS = tuple(arch for arch in ARCHS if arch >= 89)
# Sizes and strides are never specialised: one binary reads every place in a batch.
_LAYOUT = ("heads", "chunks", "seq")
_BLOCKS = (*_LAYOUT, "blocks")
_X = ("stride_xb", "stride_xh", "stride_xs")
_K = ("stride_kb", "stride_kh", "stride_kn")
_V = ("stride_vb", "stride_vh", "stride_vn")
STATS = Kernel("attention_fp8_stats", "attention_fp8_quantise", plain=(*_LAYOUT, *_K, *_V))
ROWS = Kernel("attention_fp8_rows", "attention_fp8_quantise", plain=(*_BLOCKS, *_X))
VALUES = Kernel(
    "attention_fp8_values", "attention_fp8_quantise", _E4M3_ARCHS, plain=(*_BLOCKS, *_V)
)
KERNEL = Kernel("attention_fp8", "attention_fp8", plain=("heads", "seq_q", "seq_k", *_V))

FLOATS = (torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
INT8_MAX = 127.0
# Tokens of K that share a scale in the PyTorch implementation.
_BLOCK = 64


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, pure: bool = False
) -> Tensor:
    """`softmax(scale * q k^T) v` for each head, with 8-bit products.

    Args:
        q: `(B, Sq, H, D)`, fp16 or bf16, any strides; D from 1 to 256.
        k: `(B, Sk, H, D)`, like `q`.
        v: `(B, Sk, H, D)`, like `q`.
        scale: positive and finite; `1 / sqrt(D)` if None.
        pure: both products in e4m3, instead of int8 for the first alone. The module's docstring
            states the errors of both.

    Returns:
        `(B, Sq, H, D)`, contiguous, of the same dtype.

    Raises:
        TypeError: if an argument is no tensor or its dtype is another.
        ValueError: if shapes or devices differ, the head dim or scale is out of range, or a
            gradient is required, or a CUDA device is too old for `pure`.
    """
    check_tensors({"q": q, "k": k, "v": v}, FLOATS)
    check_heads(q, k, v)
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, got {q.shape[3]}")
    scale = check_scale(scale, q.shape[3])
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape)
    out: Tensor = torch.ops.heatsink.attention_fp8(q, k, v, scale, pure)
    return out


def key(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, pure: bool = False) -> Key:
    """What the configuration depends on."""
    return {
        "dtype": short(q.dtype),
        "head_dim": q.shape[3],
        "seq_q": q.shape[1],
        "seq_k": k.shape[1],
        "pure": int(pure),
    }


def plan(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    pure: bool = False,
) -> tuple[Tensor, list[Launch]]:
    """The output, and the launches that measure, quantise and multiply."""
    head_dim = q.shape[3]
    width, _ = parts(head_dim, 0, least=32)
    q, k, v = settled(q), settled(k), settled(v)
    tile: Constants = {"UNIT": stride_unit(q), "HEAD_DIM": head_dim, "WIDTH": width}
    tile["EMULATE"] = q.device.type == "cpu"
    factor = check_scale(scale, head_dim) * LOG2_E
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums, peaks, stats = _stats(config, k, v, pure, tile)
    q8, q_scale, quantise_q = _rows(config, q, None, config["BLOCK_M"], factor, pure, tile)
    k8, k_scale, quantise_k = _rows(config, k, sums, config["BLOCK_N"], 1.0, pure, tile)
    launches = [stats, quantise_q, quantise_k]
    v8, v_scale = v, None
    if peaks is not None:
        v8, v_scale, quantise_v = _values(config, v, peaks, tile)
        launches.append(quantise_v)
    args: dict[str, Value] = {
        "q_ptr": q8,
        "q_scale_ptr": q_scale,
        "k_ptr": k8,
        "k_scale_ptr": k_scale,
        "v_ptr": v8,
        "v_scale_ptr": v_scale,
        "out_ptr": out,
    }
    grid = (q_scale.numel() // config["BLOCK_M"], 1, 1)
    launches.append(_product(config, grid, args, q, k, None if pure else v, tile))
    if pure:
        launches = [replace(one, kernel=replace(one.kernel, archs=_E4M3_ARCHS)) for one in launches]
    return out, launches


def _product(
    config: Config,
    grid: tuple[int, int, int],
    args: dict[str, Value],
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    tile: Constants,
) -> Launch:
    """The launch that multiplies; `v` is None where it is quantised, and so dense."""
    head_dim = q.shape[3]
    sizes: dict[str, Value] = {"heads": q.shape[2], "seq_q": q.shape[1], "seq_k": k.shape[1]}
    row_a, row_b = parts(head_dim, config["SPLIT_D"], least=32)
    head_a, head_b = parts(head_dim, config["SPLIT_D"])
    constants = tile | {
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "ROW_A": row_a,
        "ROW_B": row_b,
        "HEAD_A": head_a,
        "HEAD_B": head_b,
        "RAGGED": k.shape[1] % config["BLOCK_N"] != 0,
        "PURE": v is None,
    }
    args = {**args, **sizes, **strides(v, "v", "bnh")}
    return Launch(KERNEL, grid, args, constants, config["warps"], config["stages"])


def _stats(
    config: Config, k: Tensor, v: Tensor, pure: bool, tile: Constants
) -> tuple[Tensor, Tensor | None, Launch]:
    """Sums of K and, where V is quantised, peaks of V: `(B H, chunks, WIDTH)`, fp32."""
    batch, seq, heads, _ = k.shape
    chunks = -(-seq // config["CHUNK"])
    sums = torch.empty(batch * heads, chunks, tile["WIDTH"], device=k.device)
    peaks = torch.empty_like(sums) if pure else None
    args: dict[str, Value] = {
        "k_ptr": k,
        "v_ptr": v,
        "sums_ptr": sums,
        "peaks_ptr": peaks,
        "heads": heads,
        "chunks": chunks,
        "seq": seq,
        **strides(k, "k", "bnh"),
        **strides(v, "v", "bnh"),
    }
    constants = tile | {"CHUNK": config["CHUNK"], "PURE": pure}
    del constants["EMULATE"]
    grid = (batch * heads, chunks, 1)
    return sums, peaks, Launch(STATS, grid, args, constants, config["side_warps"], 1)


def _rows(
    config: Config,
    x: Tensor,
    sums: Tensor | None,
    block: int,
    factor: float,
    pure: bool,
    tile: Constants,
) -> tuple[Tensor, Tensor, Launch]:
    """Q (without sums) or K in 8 bits, `(B H, blocks, block, WIDTH)`, and its fp32 scales."""
    batch, seq, heads, _ = x.shape
    blocks = -(-seq // block)
    shape = (batch * heads, blocks, block, tile["WIDTH"])
    out = torch.empty(shape, dtype=E4M3 if pure else torch.int8, device=x.device)
    scales = torch.empty(shape[:3] if sums is None else shape[:2], device=x.device)
    args: dict[str, Value] = {
        "x_ptr": x,
        "sums_ptr": sums,
        "out_ptr": out,
        "scale_ptr": scales,
        "heads": heads,
        "chunks": 0 if sums is None else sums.shape[1],
        "seq": seq,
        "blocks": blocks,
        "factor": factor,
        **strides(x, "x", "bsh"),
    }
    constants = tile | {"BLOCK": block, "KEYS": sums is not None, "PURE": pure}
    grid = (batch * heads, blocks, 1)
    return out, scales, Launch(ROWS, grid, args, constants, config["side_warps"], 1)


def _values(
    config: Config, v: Tensor, peaks: Tensor, tile: Constants
) -> tuple[Tensor, Tensor, Launch]:
    """V in e4m3, transposed: `(B H, WIDTH, tokens up to whole blocks)`, and a scale a channel."""
    batch, seq, heads, _ = v.shape
    block, width = config["BLOCK_N"], tile["WIDTH"]
    blocks = -(-seq // block)
    out = torch.empty(batch * heads, width, blocks * block, dtype=E4M3, device=v.device)
    scales = torch.empty(batch * heads, width, device=v.device)
    args: dict[str, Value] = {
        "v_ptr": v,
        "peaks_ptr": peaks,
        "out_ptr": out,
        "scale_ptr": scales,
        "heads": heads,
        "chunks": peaks.shape[1],
        "seq": seq,
        "blocks": blocks,
        **strides(v, "v", "bnh"),
    }
    constants = tile | {"BLOCK": block}
    grid = (batch * heads, blocks, 1)
    return out, scales, Launch(VALUES, grid, args, constants, config["side_warps"], 1)


def _attention_fp8_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, pure: bool) -> Tensor:
    target = target_of(q.device)
    # On the CPU the interpreter stands in, and it has e4m3.
    if pure and q.device.type != "cpu" and target.arch < min(_E4M3_ARCHS):
        raise ValueError(f"pure: expected a device of sm_89 or later, got sm_{target.arch}")
    config = lookup("attention_fp8", key(q, k, v, scale, pure), target)
    out, launches = plan(config, q, k, v, scale, pure)
    run(launches)
    return out


def _dequantised(x: Tensor, dims: tuple[int, ...], pure: bool) -> Tensor:
    """fp32 values as 8 bits hold them, with one scale along `dims`."""
    top = x.abs().amax(dims, keepdim=True)
    unit = torch.where(top == 0, 1.0, top / (E4M3_MAX if pure else INT8_MAX))
    x = x / unit
    return (x.to(E4M3).float() if pure else x.round()) * unit


def _attention_fp8_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, pure: bool) -> Tensor:
    batch, seq, heads, head_dim = k.shape
    dtype = q.dtype
    q, k, v = (x.float().contiguous() for x in (q, k, v))
    k = k - k.mean(1, keepdim=True)
    pad = -seq % _BLOCK
    blocks = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, pad))
    blocks = blocks.view(batch, -1, _BLOCK, heads, head_dim)
    k = _dequantised(blocks, (2, 4), pure).view(batch, seq + pad, heads, head_dim)[:, :seq]
    q = _dequantised(q, (3,), pure)
    if pure:
        v = _dequantised(v, (1,), pure)
    return _attention_torch(q, k, v, scale, False, None).to(dtype)


def _attention_fp8_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, pure: bool) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


torch.library.define(
    "heatsink::attention_fp8", "(Tensor q, Tensor k, Tensor v, float scale, bool pure) -> Tensor"
)
torch.library.impl("heatsink::attention_fp8", "default", _attention_fp8_torch)
torch.library.impl("heatsink::attention_fp8", "cuda", _attention_fp8_triton)
torch.library.register_fake("heatsink::attention_fp8", _attention_fp8_fake)


def _case(name: str, tokens: int, heads: int, head_dim: int, pure: bool) -> Case:
    def make(device: torch.device) -> Inputs:
        packed = normal((2, tokens, 3, heads, head_dim), torch.float16, device, seed=1)
        q, k, v = packed.unbind(2)
        return {"q": q, "k": k, "v": v, "pure": pure}

    return Case(f"{name}-{'e4m3' if pure else 'int8'}", make)


OP = Op(
    name="attention_fp8",
    public=attention_fp8,
    kernels=(STATS, ROWS, VALUES, KERNEL),
    cases=tuple(
        _case(name, tokens, heads, head_dim, pure)
        for name, tokens, heads, head_dim in (
            ("sdxl-4096x64", 4096, 10, 64),
            ("sdxl-1024x64", 1024, 20, 64),
            ("sd15-4096x40", 4096, 8, 40),
            ("sd15-1024x80", 1024, 8, 80),
            ("sd15-256x160", 256, 8, 160),
            ("transformer-4096x128", 4096, 24, 128),
        )
        for pure in (False, True)
    ),
    key=key,
    plan=plan,
    space=attention_fp8_space,
    smoke=("sdxl-4096x64-int8", "sdxl-4096x64-e4m3"),
)
