"""Every component's inputs and outputs, and wrappers that give a library's modules that form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heatsink.runtime.components import kind_of
from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.denoisers import (
    ADDED,
    SCALE,
    ControlNet,
    Shape,
    UNet,
    refuse_unknown_control,
    residual_names,
    residual_shapes,
    residuals_among,
    unet_inputs,
)
from heatsink.runtime.graph.graph import BATCH

TextLayer = Literal["last", "penultimate"]
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
    "unet": Interface(("sample", "timestep", "encoder_hidden_states"), ("out",), ADDED),
    # Its outputs are the residuals: how many, its configuration says.
    "controlnet": Interface(
        ("sample", "timestep", "encoder_hidden_states", "controlnet_cond", SCALE), (), ADDED
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


def wrap(
    component: str,
    module: Any,
    text_layer: TextLayer | None = None,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """The component's wrapper around `module`, which becomes its attribute `model`.

    Args:
        component: one of `INTERFACES`, or a ControlNet's, `controlnet_NAME`.
        module: CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel, ControlNetModel or
            AutoencoderKL.
        text_layer: which hidden states a text encoder gives. SDXL wants the penultimate of both;
            the default is the last for `text_encoder`, the penultimate for `text_encoder_2`.
        names: of a UNet or a ControlNet: its inputs in order; what the module needs if None.

    Raises:
        NotBuilt: the component is unknown.
    """
    component = kind_of(component)
    if component == "text_encoder":
        return TextEncoder(module, text_layer or "last", pooled=False)
    if component == "text_encoder_2":
        return TextEncoder(module, text_layer or "penultimate", pooled=True)
    if component == "unet":
        return UNet(module, names or unet_inputs(module.config))
    if component == "controlnet":
        own = (*unet_inputs(module.config), "controlnet_cond", SCALE)
        return ControlNet(module, names or own)
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
    component = kind_of(component)
    interface = INTERFACES[component]
    names = interface.inputs + tuple(n for n in interface.optional if n in shapes)
    if component == "unet":
        names += residuals_among(shapes)
    if set(names) != set(shapes):
        raise ValueError(
            f"example_shapes of {component} must name {list(interface.inputs)} "
            f"(and may name {list(interface.optional)}), got {sorted(shapes)}"
        )
    return names


def output_names(component: str, module: Any) -> tuple[str, ...]:
    """The names of what the component's wrapper returns, in order."""
    kind = kind_of(component)
    if kind == "controlnet":
        return residual_names(len(module.controlnet_down_blocks))
    return INTERFACES[kind].outputs


def input_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an input of a component that computes in `dtype`."""
    # Times and sizes become sinusoids: half precision would round them first.
    exact = {"input_ids": torch.int64}
    exact |= dict.fromkeys(("timestep", "time_ids", SCALE), torch.float32)
    return exact.get(name, dtype)


def input_shapes(
    component: str,
    config: Mapping[str, Any],
    *,
    height: int,
    width: int,
    text_length: int = 77,
    controlled: bool = False,
) -> dict[str, Shape]:
    """The shapes of a component's inputs for images of one size.

    Args:
        component: one of `INTERFACES`, or a ControlNet's, `controlnet_NAME`.
        config: the module's configuration (`module.config` of diffusers and transformers works).
        height: of the *latents* for `unet`, `controlnet` and `vae_decoder`, of the image for
            `vae_encoder`.
        width: likewise.
        text_length: tokens of a prompt.
        controlled: a UNet gets inputs for a ControlNet's residuals.

    Raises:
        NotBuilt: a UNet or a ControlNet takes conditions besides these.
    """
    component = kind_of(component)
    if component.startswith("text_encoder"):
        return {"input_ids": (BATCH, text_length)}
    if component == "vae_decoder":
        return {"latents": (BATCH, config["latent_channels"], height, width)}
    if component == "vae_encoder":
        return {"image": (BATCH, config["in_channels"], height, width)}
    _refuse_unknown_conditions(component, config)
    shapes: dict[str, Shape] = {
        "sample": (BATCH, config["in_channels"], height, width),
        "timestep": (BATCH,),
        "encoder_hidden_states": (BATCH, text_length, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        times = 6 * config["addition_time_embed_dim"]
        shapes["text_embeds"] = (BATCH, config["projection_class_embeddings_input_dim"] - times)
        shapes["time_ids"] = (BATCH, 6)
    if component == "controlnet":
        refuse_unknown_control(config)
        # Its embedding of the picture goes down by half for each of these but the last.
        factor = 2 ** (len(config.get("conditioning_embedding_out_channels") or (0,) * 4) - 1)
        shapes["controlnet_cond"] = (BATCH, 3, factor * height, factor * width)
        shapes[SCALE] = (BATCH,)
    if controlled:
        shapes |= residual_shapes(config, shapes["sample"])
    return shapes


def _refuse_unknown_conditions(component: str, config: Mapping[str, Any]) -> None:
    """Refuse conditions that no input carries: the network would run without them, unnoticed."""
    known = {"addition_embed_type": (None, "text_time")}
    for key in (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    ):
        value = config.get(key)
        if value not in known.get(key, (None,)):
            raise NotBuilt(f"{component}: {key} {value!r} is not supported yet")
