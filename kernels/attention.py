"""Attention: `softmax(scale * q k^T + bias) v`, a head at a time, in one pass.

Layouts: `q (B, Sq, H, D)`, `k` and `v (B, Sk, H, D)`, any strides, so views of a packed projection
need no copy; the output is `(B, Sq, H, D)`, contiguous. Head dims 1 to 256, and 512 (the middle
block of an autoencoder). fp16, bf16, fp32; scores, softmax and sums are fp32 and the output is
rounded once. On CUDA the softmax's weights are rounded to the dtype before they meet `v`, since
tensor cores take them so; in C++ they stay fp32. PyTorch's attention has roundings of its own.

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

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._heads import (
    MAX_HEAD_DIM,
    check_bias,
    check_heads,
    check_scale,
    describable,
    parts,
    stride_unit,
    strides,
)
from heatsink.kernels._launch import Kernel, Launch, Value, run
from heatsink.kernels._op import Case, Inputs, Op, normal

KERNEL = Kernel(
    "attention", module="attention", plain=("batches", "heads", "seq_q", "seq_k"), scratch=True
)
WHOLE = Kernel("attention_whole", module="attention_whole", plain=("heads", "seq_q", "seq_k"))

LOG2_E = 1.4426950408889634
# The most keys that count as short in configuration keys, and that a tuner tries to hold whole.
SHORT = 512
_WHOLE_KEYS = 128
# Where descriptors exist, and as many programs as an H100 or H200 has multiprocessors.
_TMA_ARCH = 90
_PROGRAMS = 132
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
) -> Tensor:
    """`softmax(scale * q k^T + bias) v` for each head.

    Args:
        q: `(B, Sq, H, D)`, fp16, bf16 or fp32, any strides; D from 1 to 256, or 512.
        k: `(B, Sk, H, D)`, like `q`.
        v: `(B, Sk, H, D)`, like `q`.
        scale: positive and finite; `1 / sqrt(D)` if None.
        causal: query i sees keys 0 to i.
        bias: added to the scaled scores: of `q`'s dtype, broadcastable to `(B, H, Sq, Sk)`.

    Returns:
        `(B, Sq, H, D)`, contiguous, of the same dtype. 0 for a query that sees no key.

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
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape)
    out: Tensor = torch.ops.heatsink.attention(q, k, v, scale, causal, bias)
    return out


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
) -> tuple[Tensor, list[Launch]]:
    """The output and the launch that fills it."""
    batch, seq_q, heads, head_dim = q.shape
    seq_k = k.shape[1]
    scale = check_scale(scale, head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bias is not None:
        bias = bias.expand(batch, heads, seq_q, seq_k)
    head_a, head_b = parts(head_dim, config["SPLIT_D"])
    unit = stride_unit(q, k, v)
    args: dict[str, Value] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "out_ptr": out,
        "batches": batch,
        "heads": heads,
        "seq_q": seq_q,
        "seq_k": seq_k,
        # Without a bias the scores stay in units of log2.
        "scale": scale * LOG2_E if bias is None else scale,
        **strides(q, "q", "bmhd", unit),
        **strides(k, "k", "bnhd", unit),
        **strides(v, "v", "bnhd", unit),
        **strides(bias, "b", "bhmn"),
    }
    constants = {
        "BLOCK_M": config["BLOCK_M"],
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "HEAD_A": head_a,
        "HEAD_B": head_b,
        "HAS_BIAS": bias is not None,
        "CAUSAL": causal,
        "PRECISION": _PRECISIONS[config["PRECISION"]],
        "UPCAST": q.dtype == torch.bfloat16 and q.device.type == "cpu",
    }
    blocks = -(-seq_q // config["BLOCK_M"])
    if config["WHOLE"]:
        keys_a, keys_b = parts(seq_k, config["SPLIT_N"])
        constants |= {"BLOCKS": config["BLOCKS"], "KEYS_A": keys_a, "KEYS_B": keys_b}
        del args["batches"]
        kernel, tiles = WHOLE, -(-blocks // config["BLOCKS"]) * heads * batch
    else:
        kernel, tiles = KERNEL, blocks * heads * batch
        constants |= {
            "BLOCK_N": config["BLOCK_N"],
            "RAGGED": seq_k % config["BLOCK_N"] != 0,
            "PROGRAMS": config["PROGRAMS"],
            "TMA": bool(config["TMA"]) and describable(k) and describable(v),
        }
        tiles = min(tiles, config["PROGRAMS"] or tiles)
    grid = (tiles, 1, 1)
    launch = Launch(kernel, grid, args, constants, config["warps"], config["stages"])
    return out, [launch]


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    found = key(q, k, v, scale, causal, bias)
    out, launches = plan(
        lookup("attention", found, target_of(q.device)), q, k, v, scale, causal, bias
    )
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


torch.library.define(
    "heatsink::attention",
    "(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? bias) -> Tensor",
)
torch.library.impl("heatsink::attention", "default", _attention_torch)
torch.library.impl("heatsink::attention", "cuda", _attention_triton)
torch.library.register_fake("heatsink::attention", _attention_fake)


def _case(
    name: str,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float16,
    causal: bool = False,
    biased: bool = False,
) -> Case:
    def make(device: torch.device) -> Inputs:
        packed = normal((2, queries, 3, heads, head_dim), dtype, device, seed=1)
        q, k, v = packed.unbind(2)
        if keys != queries:
            k, v = normal((2, keys, 2, heads, head_dim), dtype, device, seed=2).unbind(2)
        bias = normal((1, 1, queries, keys), dtype, device, seed=3) if biased else None
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
    _case("text-bias", 512, 512, 64, 64, _BF16, biased=True),
    _case("bundled-self", 64, 64, 8, 32, _FP32),
    _case("bundled-self", 16, 16, 8, 32, _FP32),
    _case("bundled-cross", 64, 24, 8, 32, _FP32),
    _case("bundled-self", 64, 64, 8, 32, _BF16),
    _case("bundled-self", 16, 16, 8, 32, _BF16),
    _case("bundled-cross", 64, 24, 8, 32, _BF16),
)


def _space(key: Key, arch: int) -> list[Config]:
    """Block sizes, and on Hopper and later descriptors and persistent programs."""
    shared = {"SPLIT_D": 1, "SPLIT_N": 1, "BLOCKS": 1, "PROGRAMS": 0, "TMA": 0, "WHOLE": 0}
    shared["PRECISION"] = 0
    blocks = [
        {**shared, "BLOCK_M": m, "BLOCK_N": n, "warps": warps, "stages": stages, "SPLIT_D": split}
        for m in (32, 64, 128)
        for n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        for split in (0, 1)
    ]
    if arch >= _TMA_ARCH:
        blocks += [
            {**config, "TMA": tma, "PROGRAMS": programs}
            for config in blocks
            for tma, programs in ((1, 0), (0, _PROGRAMS), (1, _PROGRAMS))
        ]
    if int(key["seq_k"]) <= _WHOLE_KEYS and int(key["head_dim"]) <= MAX_HEAD_DIM:
        blocks += [
            {**shared, "WHOLE": 1, "BLOCK_M": m, "BLOCKS": n, "SPLIT_N": split, "BLOCK_N": 16}
            | {"warps": warps, "stages": 1}
            for m in (16, 32, 64, 128)
            for n in (1, 2, 4)
            for split in (0, 1)
            for warps in (4, 8)
        ]
    return blocks


OP = Op(
    name="attention",
    public=attention,
    kernels=(KERNEL, WHOLE),
    cases=_CASES,
    key=key,
    plan=plan,
    space=_space,
    smoke=("sdxl-self-4096x4096x64-fp16", "sdxl-cross-4096x77x64-fp16"),
)
_native.load()
