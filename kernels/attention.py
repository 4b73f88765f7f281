"""Attention: `softmax(scale * q k^T + bias) v`, a head at a time, in one pass.

Layouts: `q (B, Sq, H, D)`, `k` and `v (B, Sk, H, D)`, any strides; views of a packed projection
need no copy on CUDA where heads are multiples of 16 bytes (`_heads.settled`); the output is
`(B, Sq, H, D)`, contiguous. Head dims 1 to 256, and 512 (the middle block of an autoencoder). fp16,
bf16, fp32; scores, softmax and sums are fp32 and the output is rounded once. On CUDA, and in
bf16 in C++, the softmax's weights are rounded to the dtype before they meet `v`, since matrix units
take them so; in C++ they stay fp32 otherwise. Products of bf16 in C++ take subnormal numbers for 0.
PyTorch's attention has roundings of its own.

`causal` lets query i see keys 0 to i, aligned at the top left as PyTorch's is, whatever Sq and Sk.
A query that sees no key (a bias of -inf everywhere, or Sk = 0) gives 0.

CUDA: Triton, sm_80 and later. Many keys are worked on block by block with a running softmax
(`attention`); few are held whole by a program that serves several blocks of queries
(`attention_whole`). CPU: C++ where the extension is loaded. Elsewhere: PyTorch's own attention,
with other bits than C++ gives.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(https://arxiv.org/abs/1805.02867); Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._attention_space import attention_space
from heatsink.kernels._checks import FLOATS, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._heads import (
    check_bias,
    check_heads,
    check_scale,
    parts,
    settled,
    stride_unit,
    strides,
)
from heatsink.kernels._launch import Kernel, Launch, Value, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels._outs import Out, dense_heads

# Never specialised: one binary reads every place in a batch, alone or packed.
_STRIDES = ("qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "bb", "bh", "bm")
_PLAIN = ("heads", "seq_q", "seq_k", *(f"stride_{of}" for of in _STRIDES))
KERNEL = Kernel("attention", module="attention", plain=(*_PLAIN, "batches"), scratch=True)
WHOLE = Kernel("attention_whole", module="attention_whole", plain=_PLAIN)

LOG2_E = 1.4426950408889634
# The most keys that count as short in configuration keys.
SHORT = 512
# How products of fp32 are taken: by `PRECISION` in a configuration.
_PRECISIONS = ("ieee", "tf32x3")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q k^T + bias) v` for each head.

    Args:
        q: `(B, Sq, H, D)`, fp16, bf16 or fp32, any strides; D from 1 to 256, or 512.
        k: `(B, Sk, H, D)`, like `q`.
        v: `(B, Sk, H, D)`, like `q`.
        scale: positive and finite; `1 / sqrt(D)` if None.
        causal: query i sees keys 0 to i.
        bias: added to the scaled scores: of `q`'s dtype, broadcastable to `(B, H, Sq, Sk)`.
        out: memory for the result (`_outs.py`), dense in D.

    Returns:
        `(B, Sq, H, D)` of the same dtype: `out`, or contiguous. 0 for a query that sees no key.

    Raises:
        TypeError: if an argument is no tensor or its dtype is another.
        ValueError: if shapes or devices differ, the head dim or scale is out of range, or a
            gradient is required.
    """
    check_tensors({"q": q, "k": k, "v": v, "bias": bias}, FLOATS)
    check_heads(q, k, v)
    scale = check_scale(scale, q.shape[-1])
    if bias is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        check_bias(bias, shape)
        bias = bias.expand(shape)
    if out is not None:
        return OUT(q, k, v, scale, causal, bias, out)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape)
    new: Tensor = torch.ops.heatsink.attention(q, k, v, scale, causal, bias)
    return new


def key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Key:
    """What the configuration depends on."""
    seq_k = k.shape[1]
    return {
        "dtype": short(q.dtype),
        "bits": 8 * q.element_size(),
        "head_dim": q.shape[3],
        "seq_q": q.shape[1],
        "seq_k": seq_k,
        "kv": "short" if seq_k <= SHORT else "long",
        "causal": int(causal),
        "bias": int(bias is not None),
    }


def plan(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The output, contiguous, and the launch that fills it."""
    batch, seq_q, heads, head_dim = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bias is not None:
        bias = settled(bias.expand(batch, heads, seq_q, k.shape[1]))
    tma = bool(config["TMA"]) and not config["WHOLE"] and stride_unit(q) > 1
    q, k, v = settled(q), settled(k, broadcast=not tma), settled(v, broadcast=not tma)
    scale = check_scale(scale, head_dim)
    # Without a bias the scores stay in units of log2.
    args = _args(q, k, v, bias, out, scale * LOG2_E if bias is None else scale)
    constants = _constants(config, q, bias, causal)
    blocks = -(-seq_q // config["BLOCK_M"])
    if config["WHOLE"]:
        keys_a, keys_b = parts(k.shape[1], config["SPLIT_N"])
        constants |= {"BLOCKS": config["BLOCKS"], "KEYS_A": keys_a, "KEYS_B": keys_b}
        kernel, tiles = WHOLE, -(-blocks // config["BLOCKS"]) * heads * batch
    else:
        constants |= {"BLOCK_N": config["BLOCK_N"], "RAGGED": k.shape[1] % config["BLOCK_N"] != 0}
        constants |= {"PROGRAMS": config["PROGRAMS"], "TMA": tma}
        args["batches"] = batch
        kernel, tiles = KERNEL, blocks * heads * batch
        tiles = min(tiles, config["PROGRAMS"] or tiles)
    return out, [Launch(kernel, (tiles, 1, 1), args, constants, config["warps"], config["stages"])]


def _args(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, scale: float
) -> dict[str, Value]:
    """The parameters of both kernels; `batches` comes after them where it is one."""
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "out_ptr": out,
        "heads": q.shape[2],
        "seq_q": q.shape[1],
        "seq_k": k.shape[1],
        "scale": scale,
        **strides(q, "q", "bmh"),
        **strides(k, "k", "bnh"),
        **strides(v, "v", "bnh"),
        **strides(bias, "b", "bhm"),
    }


def _constants(config: Config, q: Tensor, bias: Tensor | None, causal: bool) -> dict[str, Any]:
    """The constants of both kernels."""
    head_dim = q.shape[3]
    head_a, head_b = parts(head_dim, config["SPLIT_D"])
    return {
        "BLOCK_M": config["BLOCK_M"],
        "UNIT": stride_unit(q),
        "BIAS_UNIT": 1 if bias is None else stride_unit(bias),
        "HEAD_DIM": head_dim,
        "HEAD_A": head_a,
        "HEAD_B": head_b,
        "HAS_BIAS": bias is not None,
        "CAUSAL": causal,
        "PRECISION": _PRECISIONS[config["PRECISION"]],
        "UPCAST": q.dtype == torch.bfloat16 and q.device.type == "cpu",
    }


def _attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    found = key(q, k, v, scale, causal, bias)
    config = lookup("attention", found, target_of(q.device))
    out, launches = plan(config, q, k, v, scale, causal, bias, out)
    run(launches)
    return out


def _attention_torch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    if bias is not None:
        scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        bias = bias.expand(scores)
        if causal:
            # Not every backend of PyTorch's takes both.
            unseen = torch.ones(scores[2:], dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(unseen, -torch.inf)
    # Dense, because its bits depend on strides.
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal and bias is None, scale=scale
    )
    return out.transpose(1, 2).contiguous()


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


SCHEMA = "(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? bias) -> Tensor"
OUT = Out("attention", SCHEMA, dense_heads, in_place=0)
torch.library.define("heatsink::attention", SCHEMA)
torch.library.impl("heatsink::attention", "default", _attention_torch)
torch.library.impl("heatsink::attention", "cuda", _attention_triton)
torch.library.register_fake("heatsink::attention", _attention_fake)
OUT.define(_attention_torch, _attention_triton)


def _case(
    name: str,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float16,
    causal: bool = False,
    bias_rows: int = 0,
) -> Case:
    def make(device: torch.device) -> Inputs:
        packed = normal((2, queries, 3, heads, head_dim), dtype, device, seed=1)
        q, k, v = packed.unbind(2)
        if keys != queries:
            k, v = normal((2, keys, 2, heads, head_dim), dtype, device, seed=2).unbind(2)
        bias = normal((1, 1, bias_rows, keys), dtype, device, seed=3) if bias_rows else None
        return {"q": q, "k": k, "v": v, "causal": causal, "bias": bias}

    return Case(f"{name}-{queries}x{keys}x{head_dim}-{short(dtype)}", make)


_BF16, _FP32 = torch.bfloat16, torch.float32
_CASES = (
    _case("sdxl-self", 4096, 4096, 10, 64),
    _case("sdxl-cross", 4096, 77, 10, 64),
    _case("sdxl-self", 4096, 4096, 10, 64, _BF16),
    _case("sdxl-self", 1024, 1024, 20, 64),
    _case("sdxl-cross", 1024, 77, 20, 64, _BF16),
    _case("sd15-self", 4096, 4096, 8, 40),
    _case("sd15-self", 1024, 1024, 8, 80),
    _case("sd15-self", 256, 256, 8, 160),
    _case("sd15-self", 64, 64, 8, 160),
    _case("sd15-cross", 4096, 77, 8, 40),
    _case("sd15-cross", 1024, 77, 8, 80),
    _case("sd15-cross", 256, 77, 8, 160),
    _case("wide-self", 1024, 1024, 8, 96),
    _case("transformer", 4096, 4096, 24, 128, _BF16),
    _case("ragged", 4173, 4173, 24, 128, _BF16),
    _case("text-cross", 4096, 512, 24, 128, _BF16),
    _case("vae", 4096, 4096, 1, 512),
    _case("vae", 16384, 16384, 1, 512, _BF16),
    _case("vae", 4096, 4096, 1, 512, _FP32),
    _case("clip-causal", 77, 77, 12, 64, causal=True),
    _case("text-bias", 512, 512, 64, 64, _BF16, bias_rows=512),
    _case("text-causal", 512, 512, 32, 128, _BF16, causal=True),
    _case("masked-self", 4096, 4096, 16, 72),
    _case("masked-cross", 4096, 300, 16, 72, bias_rows=1),
    _case("bundled-self", 64, 64, 8, 32, _FP32),
    _case("bundled-self", 16, 16, 8, 32, _FP32),
    _case("bundled-cross", 64, 24, 8, 32, _FP32),
    _case("bundled-self", 64, 64, 8, 32, _BF16),
    _case("bundled-self", 16, 16, 8, 32, _BF16),
    _case("bundled-cross", 64, 24, 8, 32, _BF16),
)


OP = Op(
    name="attention",
    public=attention,
    kernels=(KERNEL, WHOLE),
    cases=_CASES,
    key=key,
    plan=plan,
    space=attention_space,
    smoke=("sdxl-self-4096x4096x64-fp16", "sdxl-cross-4096x77x64-fp16"),
)
_native.load()
