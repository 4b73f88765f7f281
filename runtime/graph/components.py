"""Every component's inputs and outputs, and wrappers that give a library's modules that form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import BATCH

TextLayer = Literal["last", "penultimate"]
Shape = tuple[int | str, ...]

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Interface:
    """Names of a component's inputs (with the optional ones last) and outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()


INTERFACES: dict[str, Interface] = {
    "text_encoder": Interface(("input_ids",), ("hidden",)),
    "text_encoder_2": Interface(("input_ids",), ("hidden", "pooled")),
    "unet": Interface(
        ("sample", "timestep", "encoder_hidden_states"), ("out",), ("text_embeds", "time_ids")
    ),
    "vae_decoder": Interface(("latents",), ("image",)),
    "vae_encoder": Interface(("image",), ("mean", "std")),
}


class TextEncoder(nn.Module):
    """input_ids int64 (B, T) -> hidden (B, T, D), and pooled (B, P) of a model with projection."""

    def __init__(self, model: nn.Module, layer: TextLayer, pooled: bool) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Encode the tokens."""
        # Given, not read from the module's table: that is no parameter and has no values on meta.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        result = self.model(
            input_ids=input_ids,
            position_ids=positions,
            output_hidden_states=self.layer == "penultimate",
        )
        last = self.layer == "last"
        hidden = result.last_hidden_state if last else result.hidden_states[-2]
        return (hidden, result.text_embeds) if self.pooled else (hidden,)


class UNet(nn.Module):
    """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, T, D) -> out (B, C, h, w).

    SDXL's conditions, text_embeds (B, P) and time_ids (B, 6), follow where the model has them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Predict from the noisy latents."""
        added = None
        if text_embeds is not None:
            # The model joins it with float32 sinusoids, which promotes it; not every exporter does.
            added = {"text_embeds": text_embeds.to(torch.float32), "time_ids": time_ids}
        result = self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )
        return (result[0],)


class VaeDecoder(nn.Module):
    """latents (B, C, h, w), scaled -> image (B, 3, H, W) in [-1, 1]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.scale, self.shift = _latent_scale(model.config)

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Decode the latents."""
        latents = latents / self.scale
        if self.shift:
            latents = latents + self.shift
        return (self.model.decode(latents, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """image (B, 3, H, W) in [-1, 1] -> mean and std (B, C, h, w) of the posterior, scaled."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.scale, self.shift = _latent_scale(model.config)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The posterior of the image; nothing is sampled."""
        moments = self.model.encoder(image)
        if getattr(self.model, "quant_conv", None) is not None:
            moments = self.model.quant_conv(moments)
        mean, logvar = torch.chunk(moments, 2, dim=1)
        if self.shift:
            mean = mean - self.shift
        std = torch.exp(0.5 * torch.clamp(logvar, *LOGVAR_RANGE))
        return mean * self.scale, std * self.scale


def _latent_scale(config: Any) -> tuple[float, float]:
    if getattr(config, "latents_mean", None) or getattr(config, "latents_std", None):
        raise NotBuilt("an autoencoder with `latents_mean`/`latents_std` is not supported yet")
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


def wrap(component: str, module: Any, text_layer: TextLayer | None = None) -> nn.Module:
    """The component's wrapper around `module`, which becomes its attribute `model`.

    Args:
        component: one of `INTERFACES`.
        module: CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel or AutoencoderKL.
        text_layer: which hidden states a text encoder gives. SDXL wants the penultimate of both;
            the default is the last for `text_encoder`, the penultimate for `text_encoder_2`.

    Raises:
        NotBuilt: the component is unknown.
    """
    if component == "text_encoder":
        return TextEncoder(module, text_layer or "last", pooled=False)
    if component == "text_encoder_2":
        return TextEncoder(module, text_layer or "penultimate", pooled=True)
    if component == "unet":
        return UNet(module)
    if component == "vae_decoder":
        return VaeDecoder(module)
    if component == "vae_encoder":
        return VaeEncoder(module)
    raise NotBuilt(f"component {component!r} can't be captured; known are {sorted(INTERFACES)}")


def input_names(component: str, shapes: Mapping[str, Sequence[int | str]]) -> tuple[str, ...]:
    """The component's inputs in order, checked against the shapes that were given.

    Raises:
        ValueError: a shape is missing or belongs to no input.
    """
    interface = INTERFACES[component]
    names = interface.inputs + tuple(n for n in interface.optional if n in shapes)
    if set(names) != set(shapes):
        raise ValueError(
            f"example_shapes of {component} must name {list(interface.inputs)} "
            f"(and may name {list(interface.optional)}), got {sorted(shapes)}"
        )
    return names


def input_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an input of a component that computes in `dtype`."""
    # Times and sizes become sinusoids: half precision would round them first.
    exact = {"input_ids": torch.int64, "timestep": torch.float32, "time_ids": torch.float32}
    return exact.get(name, dtype)


def input_shapes(
    component: str, config: Mapping[str, Any], *, height: int, width: int, text_length: int = 77
) -> dict[str, Shape]:
    """The shapes of a component's inputs for images of one size.

    Args:
        component: one of `INTERFACES`.
        config: the module's configuration (`module.config` of diffusers and transformers works).
        height: of the *latents* for `unet` and `vae_decoder`, of the image for `vae_encoder`.
        width: likewise.
        text_length: tokens of a prompt.

    Raises:
        NotBuilt: a UNet takes conditions besides these.
    """
    if component.startswith("text_encoder"):
        return {"input_ids": (BATCH, text_length)}
    if component == "vae_decoder":
        return {"latents": (BATCH, config["latent_channels"], height, width)}
    if component == "vae_encoder":
        return {"image": (BATCH, config["in_channels"], height, width)}
    _refuse_unknown_conditions(config)
    shapes: dict[str, Shape] = {
        "sample": (BATCH, config["in_channels"], height, width),
        "timestep": (BATCH,),
        "encoder_hidden_states": (BATCH, text_length, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        times = 6 * config["addition_time_embed_dim"]
        shapes["text_embeds"] = (BATCH, config["projection_class_embeddings_input_dim"] - times)
        shapes["time_ids"] = (BATCH, 6)
    return shapes


def _refuse_unknown_conditions(config: Mapping[str, Any]) -> None:
    """Refuse a UNet with conditions that no input carries: it would run without them, unnoticed."""
    known = {"addition_embed_type": (None, "text_time")}
    for key in (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    ):
        value = config.get(key)
        if value not in known.get(key, (None,)):
            raise NotBuilt(f"unet: {key} {value!r} is not supported yet")
