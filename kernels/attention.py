"""Attention: `softmax(scale * q k^T + bias) v`, a head at a time, in one pass.

Layouts: `q (B, Sq, H, D)`, `k` and `v (B, Sk, H, D)`, any strides, so views of a packed projection
need no copy; the output is `(B, Sq, H, D)`, contiguous. Head dims 1 to 256, and 512 (the middle
block of an autoencoder). fp16, bf16, fp32; scores, softmax and sums are fp32 and rounded once at
the end; the weights are rounded to the dtype before they meet `v`.

`causal` lets query i see keys 0 to i, aligned at the top left as PyTorch's is, whatever Sq and Sk.
A query that sees no key (a bias of -inf everywhere, or Sk = 0) gives 0.

CUDA: Triton, sm_80 and later. Many keys are worked on block by block with a running softmax
(`attention`); few are held whole by a program that serves several blocks of queries
(`attention_whole`). CPU: C++ where the extension is loaded. Elsewhere: PyTorch's own attention.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(https://arxiv.org/abs/1805.02867); Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import ALIGNMENT, Kernel, Launch, Value, run
from heatsink.kernels._op import Case, Inputs, Op, normal

KERNEL = Kernel(
    "attention", module="attention", plain=("batches", "heads", "seq_q", "seq_k"), scratch=True
)
WHOLE = Kernel("attention_whole", module="attention_whole", plain=("heads", "seq_q", "seq_k"))

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256
VAE_HEAD_DIM = 512
# Keys that can be held whole, and the most that count as short in configuration keys.
SHORT = 512
_PRECISIONS = ("tf32", "tf32x3", "ieee")


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
        check_bias(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape)
    out: Tensor = torch.ops.heatsink.attention(q, k, v, scale, causal, bias)
    return out


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the shapes are those of attention and the head dim is in range."""
    if q.dim() != 4:
        raise ValueError(f"q: expected (B, Sq, H, D), got shape {tuple(q.shape)}")
    if k.dim() != 4:
        raise ValueError(f"k: expected (B, Sk, H, D), got shape {tuple(k.shape)}")
    batch, _, heads, head_dim = q.shape
    if not (1 <= head_dim <= MAX_HEAD_DIM or head_dim == VAE_HEAD_DIM):
        raise ValueError(
            f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, or {VAE_HEAD_DIM}, got {head_dim}"
        )
    check_shape("k", k, (batch, k.shape[1], heads, head_dim))
    check_shape("v", v, (batch, k.shape[1], heads, head_dim))


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale to use.

    Raises:
        ValueError: unless it is None or positive and finite.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)


def check_bias(bias: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `bias` broadcasts to `shape`."""
    fits = bias.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias: expected a shape that broadcasts to {shape}, got {tuple(bias.shape)}"
        )


def parts(size: int, split: int, least: int = 16) -> tuple[int, int]:
    """How a dimension is tiled: a power of two, and a smaller second one or 0.

    Args:
        size: what must be covered, from 1 on.
        split: 0 pads to the next power of two instead.
        least: the smallest tile.

    Returns:
        `(first, second)`: 80 -> (64, 16), 64 -> (64, 0), 112 -> (128, 0).
    """
    padded = max(least, 1 << (size - 1).bit_length())
    first = padded // 2
    second = max(least, 1 << (size - first - 1).bit_length()) if first < size else 0
    if not split or first < least or not 0 < second < first:
        return padded, 0
    return first, second


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
        **strides(q, "q", "bmhd"),
        **strides(k, "k", "bnhd"),
        **strides(v, "v", "bnhd"),
        **strides(bias, "b", "bhmn"),
    }
    constants = {
        "BLOCK_M": config["BLOCK_M"],
        "HEAD_DIM": head_dim,
        "HEAD_A": head_a,
        "HEAD_B": head_b,
        "HAS_BIAS": bias is not None,
        "CAUSAL": causal,
        "PRECISION": _PRECISIONS[config.get("PRECISION", 0)],
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


def strides(x: Tensor | None, name: str, dims: str) -> dict[str, Value]:
    """A tensor's strides as kernel parameters, in the order b, h, m or n, d; None where it is."""
    by_dim = dict(zip(dims, x.stride() if x is not None else (None,) * 4, strict=True))
    return {f"stride_{name}{dim}": by_dim[dim] for dim in "bhmnd" if dim in by_dim}


def describable(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe it: a dense last dimension, the rest aligned."""
    size = x.element_size()
    aligned = x.device.type == "meta" or x.data_ptr() % ALIGNMENT == 0
    return (
        aligned
        and x.stride(-1) == 1
        and all(stride * size % ALIGNMENT == 0 and stride > 0 for stride in x.stride()[:-1])
    )


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
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal, scale=scale
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
_native.load()
