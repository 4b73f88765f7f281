"""UNet2DConditionModel and ControlNetModel as captured programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.replacement import Replacement
from heatsink.runtime.errors import InvalidRequest

_DOWN, _MID = "down_residual_", "mid_residual"
_ADDED = ("text_embeds", "time_ids")
_ADAPTERS = frozenset(
    {
        "load_lora_adapter", "unload_lora", "fuse_lora", "unfuse_lora", "set_adapters",
        "set_adapter", "add_adapter", "delete_adapters", "disable_lora", "enable_lora",
        "disable_adapters", "enable_adapters", "active_adapters",
        "save_lora_adapter",
    }
)  # fmt: skip


class _Network(nn.Module):
    """The library's module, its arguments given in order by the names they have here."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def arguments(self, values: Sequence[Tensor]) -> dict[str, Any]:
        """The keyword arguments of the library's `forward`."""
        given = dict(zip(self.names, values, strict=True))
        down = tuple(given.pop(name) for name in self.names if name.startswith(_DOWN))
        added = {name: given.pop(name) for name in _ADDED if name in given}
        if added:
            # The model joins it with float32 sinusoids, which promotes it; not every exporter does.
            added["text_embeds"] = added["text_embeds"].to(torch.float32)
        arguments: dict[str, Any] = {**given, "added_cond_kwargs": added or None}
        if _MID in given:
            del arguments[_MID]
            arguments["down_block_additional_residuals"] = down
            arguments["mid_block_additional_residual"] = given[_MID]
        return arguments


class _UNetNetwork(_Network):
    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return (self.model(**self.arguments(values), return_dict=False)[0],)


class _ControlNetwork(_Network):
    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        down, mid = self.model(**self.arguments(values), return_dict=False)
        return (*down, mid)


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
            inputs |= {f"{_DOWN}{index}": value for index, value in enumerate(down)}
            inputs[_MID] = mid
        names = list(inputs)
        out = self._compute("unet", lambda model: _UNetNetwork(model, names), inputs, ("out",))[
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
        outputs = [*(f"{_DOWN}{index}" for index in range(count)), _MID]
        found = self._compute(
            "controlnet", lambda model: _ControlNetwork(model, names), inputs, outputs
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
    wanted = _ADDED if config.addition_embed_type == "text_time" else ()
    given = {name: value for name, value in (added or {}).items() if value is not None}
    if set(given) != set(wanted):
        raise InvalidRequest(
            f"{component}: argument 'added_cond_kwargs' wants {list(wanted)}, got {sorted(given)}"
        )
    return {name: given[name] for name in wanted}
