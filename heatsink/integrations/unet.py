"""UNet2DConditionModel and ControlNetModel as captured programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heatsink.integrations.replacement import Replacement
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph import denoisers
from heatsink.runtime.graph.denoisers import ADDED, residual_names

_ADAPTERS = frozenset(
    {
        "load_lora_adapter", "unload_lora", "fuse_lora", "unfuse_lora", "set_adapters",
        "set_adapter", "add_adapter", "delete_adapters", "disable_lora", "enable_lora",
        "disable_adapters", "enable_adapters", "active_adapters",
        "save_lora_adapter",
    }
)  # fmt: skip


class UNet(Replacement):
    """Stands for a UNet2DConditionModel."""

    # SDXL's pipelines read from it how many conditions the network wants.
    kept = frozenset({"add_embedding"})
    changing = _ADAPTERS

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Any = None,
        timestep_cond: Any = None,
        attention_mask: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As the original's; what the captured network lacks is refused.

        Raises:
            InvalidRequest: an argument that is not supported, or of another dtype or device.
            NotBuilt: the network can't be captured for these shapes.
        """
        self._refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
        )
        inputs = {
            "sample": sample,
            "timestep": per_row(timestep, sample),
            "encoder_hidden_states": encoder_hidden_states,
            **added_inputs(self._component, self.original.config, added_cond_kwargs),
        }
        down, mid = down_block_additional_residuals, mid_block_additional_residual
        if (down is None) != (mid is None):
            lone = "mid" if down is None else "down"
            raise InvalidRequest(
                f"{self._component}: argument '{lone}_block_additional_residual"
                f"{'' if lone == 'mid' else 's'}' came without the other one; a T2I adapter's "
                "residuals are not supported"
            )
        if down is not None and mid is not None:
            inputs |= zip(residual_names(len(down)), [*down, mid], strict=True)
        names = list(inputs)
        out = self._compute("unet", lambda model: denoisers.UNet(model, names), inputs, ("out",))[
            "out"
        ]
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)


class ControlNet(Replacement):
    """Stands for a ControlNetModel."""

    changing = _ADAPTERS

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Any = None,
        timestep_cond: Any = None,
        attention_mask: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """As the original's; the scale is applied to what the captured network returns.

        Raises:
            InvalidRequest: an argument that is not supported, or of another dtype or device.
            NotBuilt: the network can't be captured for these shapes.
        """
        self._refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
        )
        inputs = {
            "sample": sample,
            "timestep": per_row(timestep, sample),
            "encoder_hidden_states": encoder_hidden_states,
            "controlnet_cond": controlnet_cond,
            **added_inputs(self._component, self.original.config, added_cond_kwargs),
        }
        names, count = list(inputs), len(self.original.controlnet_down_blocks)
        outputs = residual_names(count)
        found = self._compute(
            "controlnet", lambda model: denoisers.ControlNet(model, names), inputs, outputs
        )
        values = [found[name] for name in outputs]
        scales: Any = [conditioning_scale] * len(values)
        if guess_mode:
            # From a tenth at the finest to the whole at the middle block, as the original's.
            scales = torch.logspace(-1, 0, len(values), device=sample.device) * conditioning_scale
        scaled = [value * scale for value, scale in zip(values, scales, strict=True)]
        if not return_dict:
            return scaled[:-1], scaled[-1]
        from diffusers.models.controlnets.controlnet import ControlNetOutput

        return ControlNetOutput(down_block_res_samples=scaled[:-1], mid_block_res_sample=scaled[-1])


def per_row(timestep: Tensor | float | int, sample: Tensor) -> Tensor:
    """One float32 time a row: `(B,)` on the sample's device.

    Raises:
        InvalidRequest: neither one time nor one for each row.
    """
    times = torch.as_tensor(timestep, device=sample.device).to(torch.float32).reshape(-1)
    if len(times) not in (1, sample.shape[0]):
        raise InvalidRequest(
            f"argument 'timestep' wants 1 or {sample.shape[0]} times, got {len(times)}"
        )
    return times.expand(sample.shape[0])


def added_inputs(
    component: str, config: Any, added: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """SDXL's conditions, for a network that has them.

    Raises:
        InvalidRequest: one is missing, or one was given that the network does not have.
    """
    wanted = ADDED if config.addition_embed_type == "text_time" else ()
    given = {name: value for name, value in (added or {}).items() if value is not None}
    if set(given) != set(wanted):
        raise InvalidRequest(
            f"{component}: argument 'added_cond_kwargs' wants {list(wanted)}, got {sorted(given)}"
        )
    return {name: given[name] for name in wanted}
