"""CLIP's text models as captured programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.replacement import Replacement


class _Network(nn.Module):
    """input_ids (B, T) -> last hidden states, the pooled one, and all of them where wanted."""

    def __init__(self, model: nn.Module, pooled: str, hidden: bool) -> None:
        super().__init__()
        self.model, self.pooled, self.hidden = model, pooled, hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        # Given, not read from the module's table: that is no parameter and has no values on meta.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        found = self.model(
            input_ids=input_ids, position_ids=positions, output_hidden_states=self.hidden
        )
        every = found.hidden_states if self.hidden else ()
        return (found.last_hidden_state, getattr(found, self.pooled), *every)


class TextEncoder(Replacement):
    """Stands for a CLIPTextModel or CLIPTextModelWithProjection."""

    # `clip_skip` puts the last normalisation after an earlier layer itself.
    kept = frozenset({"text_model", "final_layer_norm", "get_input_embeddings"})
    changing = frozenset(
        {
            "load_adapter", "add_adapter", "set_adapter", "delete_adapter", "disable_adapters",
            "enable_adapters", "active_adapters",
        }
    )  # fmt: skip

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the original's; masks, positions and attentions are refused.

        Raises:
            InvalidRequest: an argument that is not supported, or tokens of another dtype or device.
            NotBuilt: the network can't be captured for this length.
        """
        self._refuse(
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_attentions=output_attentions or None,
            **others,
        )
        if input_ids is None:
            raise ValueError("input_ids: expected a tensor of tokens (B, T), got None")
        config = self.original.config
        projects = hasattr(self.original, "text_projection")
        pooled = "text_embeds" if projects else "pooler_output"
        hidden = bool(
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        count = config.num_hidden_layers + 1 if hidden else 0
        names = ["last_hidden_state", pooled, *(f"hidden_{index}" for index in range(count))]
        found = self._compute(
            "text_encoder_states" if hidden else "text_encoder",
            lambda model: _Network(model, pooled, hidden),
            {"input_ids": input_ids},
            names,
        )
        every = tuple(found[name] for name in names[2:]) if hidden else None
        result = _result(found["last_hidden_state"], found[pooled], every, projects)
        wanted = config.return_dict if return_dict is None else return_dict
        return result if wanted else result.to_tuple()


def _result(last: Tensor, pooled: Tensor, hidden: Any, projects: bool) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    if projects:
        return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=last, hidden_states=hidden)
    return BaseModelOutputWithPooling(
        last_hidden_state=last, pooler_output=pooled, hidden_states=hidden
    )
