"""Attention in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    causal: bool = False,
    bias: Array | None = None,
) -> Array:
    """`softmax(scale * q k^T + bias) v`, `(B, S, H, D)`; 0 where no key is seen."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = np.einsum("bmhd,bnhd->bhmn", q, k) * scale
    if bias is not None:
        scores = scores + bias.astype(np.float64)
    if causal:
        seen = np.arange(scores.shape[3]) <= np.arange(scores.shape[2])[:, None]
        scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=3, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=3, keepdims=True)
    weights = weights / np.where(total == 0.0, 1.0, total)
    out: Array = np.einsum("bhmn,bnhd->bmhd", weights, v)
    return out
