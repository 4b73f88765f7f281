"""UNets and ControlNets as modules that take tensors in order: what capture wraps them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.runtime.errors import NotBuilt

DOWN, MID = "down_residual_", "mid_residual"
"""Names of a ControlNet's outputs, and of the UNet's inputs that they are added at."""
ADDED = ("text_embeds", "time_ids")
SCALE = "conditioning_scale"

Shape = tuple[int | str, ...]


def residual_names(count: int) -> tuple[str, ...]:
    """The names of `count` residuals of the way down, and the middle's."""
    return (*(f"{DOWN}{index}" for index in range(count)), MID)


def residuals_among(names: Iterable[str]) -> tuple[str, ...]:
    """The residuals among `names`, in their order; all up to the middle's, or none.

    Raises:
        ValueError: some are missing.
    """
    found = {name for name in names if name.startswith(DOWN) or name == MID}
    whole = residual_names(max(0, len(found) - 1)) if found else ()
    if found != set(whole):
        raise ValueError(f"residuals: expected {list(whole)}, got {sorted(found)}")
    return whole


class _Denoiser(nn.Module):
    """The library's module, its arguments given in order by the names they have here."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def arguments(self, values: Sequence[Tensor]) -> dict[str, Any]:
        """The keyword arguments of the library's `forward`."""
        given = dict(zip(self.names, values, strict=True))
        added = {name: given.pop(name) for name in ADDED if name in given}
        if added:
            # The model joins it with float32 sinusoids, which promotes it; not every exporter does.
            added["text_embeds"] = added["text_embeds"].to(torch.float32)
        residuals = [given.pop(name) for name in residuals_among(self.names)]
        arguments: dict[str, Any] = {**given, "added_cond_kwargs": added or None}
        if residuals:
            arguments["down_block_additional_residuals"] = tuple(residuals[:-1])
            arguments["mid_block_additional_residual"] = residuals[-1]
        return arguments


class UNet(_Denoiser):
    """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, T, D) -> out (B, C', h, w).

    SDXL's conditions, text_embeds (B, P) and time_ids (B, 6), and a ControlNet's residuals follow
    where there are any. A residual of -0.0 changes no bit of what it is added to.
    """

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Predict from the noisy latents."""
        return (self.model(**self.arguments(values), return_dict=False)[0],)


class ControlNet(_Denoiser):
    """As `UNet`'s inputs, and controlnet_cond (B, 3, H, W) in [0, 1] -> the residuals.

    With conditioning_scale float32 (B,) among the names they are multiplied by it, row by row.
    """

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """What to add to the UNet's activations."""
        arguments = self.arguments(values)
        scale = arguments.pop(SCALE, None)
        down, mid = self.model(**arguments, return_dict=False)
        found = (*down, mid)
        if scale is None:
            return found
        # In float32, so that half precision rounds the product and not the scale too.
        scale = scale.reshape(-1, 1, 1, 1)
        return tuple((value.to(scale.dtype) * scale).to(value.dtype) for value in found)


def unet_inputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a UNet takes without a ControlNet, in order."""
    added = ADDED if config.get("addition_embed_type") == "text_time" else ()
    return ("sample", "timestep", "encoder_hidden_states", *added)


def residual_shapes(config: Mapping[str, Any], shape: Sequence[int | str]) -> dict[str, Shape]:
    """What a UNet, or a ControlNet made for it, has at the places where residuals are added.

    Args:
        config: of either.
        shape: of its `sample`: (B, C, h, w).
    """
    batch, _, height, width = shape
    channels = list(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    counts = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    found: list[Shape] = [(batch, channels[0], height, width)]
    for place, (width_of, count) in enumerate(zip(channels, counts, strict=True)):
        last = place == len(channels) - 1
        found += [(batch, width_of, height, width)] * count
        if not last:
            # A convolution of stride 2, padded by one.
            height, width = (-(-int(size) // 2) for size in (height, width))
            found.append((batch, width_of, height, width))
    names = residual_names(len(found))
    return dict(zip(names, [*found, (batch, channels[-1], height, width)], strict=True))


def refuse_unknown_control(config: Mapping[str, Any]) -> None:
    """Refuse a ControlNet whose outputs are not one tensor for each place of the UNet.

    Raises:
        NotBuilt: says which option it is.
    """
    if config.get("global_pool_conditions"):
        raise NotBuilt("controlnet: global_pool_conditions is not supported yet")
    if config.get("conditioning_channels", 3) != 3:
        raise NotBuilt(
            f"controlnet: expected 3 conditioning_channels, got {config['conditioning_channels']}; "
            "others are not supported yet"
        )
