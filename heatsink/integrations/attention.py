"""An attention processor for diffusers' UNets and autoencoders.

    unet.set_attn_processor(HeatsinkAttnProcessor())

diffusers' own processors of these models do not listen to `set_attention_backend`. This one gives
the projections to `heatsink.kernels.attention` as they come, `(B, S, H, D)`, without transposing
them; on a device without a kernel of ours that operator is PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import heatsink.kernels as hk


class HeatsinkAttnProcessor:
    """Attention by `heatsink.kernels.attention`, for self and cross attention; inference only.

    Masks become the operator's bias. Attention that adds keys and values of its own (DeepFloyd's,
    IP adapters') has other processors, and is refused.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What `diffusers.models.attention_processor.Attention` asks of a processor.

        Args:
            attn: the module, with its projections.
            hidden_states: `(B, S, C)` or `(B, C, H, W)`; fp16, bf16 or fp32.
            encoder_hidden_states: `(B, Sk, C')`; the hidden states themselves if None.
            attention_mask: added to the scores, `(B, 1 or S, Sk)`, also with a row for each head;
                if it is of bools, True keeps.
            temb: for spatial normalisation.

        Returns:
            Of `hidden_states`' shape.

        Raises:
            ValueError: a mask of another shape, a module with added keys, a gradient is required.
        """
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            raise ValueError("attn: expected attention without added_kv_proj_dim")
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        found = attn.to_out[0](_attend(attn, hidden_states, encoder_hidden_states, attention_mask))
        found = attn.to_out[1](found)
        if len(shape) == 4:
            found = found.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            found = found + residual
        done: Tensor = found / attn.rescale_output_factor
        return done


def _attend(attn: Any, hidden: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
    if context is None:
        context = hidden
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    q, k, v = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    # Head by head within a token, as the projection has them.
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    bias = None if mask is None else _bias(mask, q, k)
    joined: Tensor = hk.attention(q, k, v, scale=attn.scale, bias=bias).flatten(2)
    return joined


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as `(B, 1 or H, 1 or Sq, Sk)` of `q`'s dtype."""
    batch, queries, heads, _ = q.shape
    fits = (
        mask.dim() == 3
        and mask.shape[0] in (batch, batch * heads)
        and mask.shape[1] in (1, queries)
        and mask.shape[2] == k.shape[1]
    )
    if not fits:
        raise ValueError(
            f"attention_mask: expected ({batch} or {batch * heads}, 1 or {queries}, {k.shape[1]}), "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return mask.reshape(batch, -1, *mask.shape[1:]).to(q.dtype)
