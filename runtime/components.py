"""A model's components: the normal form of their names, their modules, the unsaved buffers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.runtime.errors import ModelError
from heatsink.runtime.weights import Weights

COMPONENTS = {
    "sd1": ("text_encoder", "unet", "vae_decoder", "vae_encoder"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"),
}
CONTROL_PREFIX = "controlnet_"
"""Before a ControlNet's name in its component's: an engine may have several."""
# The children of AutoencoderKL that each of its two components is made of.
_HALVES = {
    "vae_decoder": ("decoder", "post_quant_conv"),
    "vae_encoder": ("encoder", "quant_conv"),
}
_CLASSES = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(
    r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)"
)
_TEXT_PREFIX = "text_model."


def kind_of(component: str) -> str:
    """What a component is: its name, or `controlnet` for any of the ControlNets."""
    return "controlnet" if component.startswith(CONTROL_PREFIX) else component


def part_of(component: str) -> str:
    """The folder a component's configuration and weights are in."""
    return "vae" if component in _HALVES else component


def module_name(component: str, name: str) -> str | None:
    """The installed library's name for a file's tensor `name`; None: it is no weight of the module.

    CLIP's own prefix `text_model.` came and went with the versions of transformers; `position_ids`
    was a stored buffer once; AutoencoderKL's attention had other names.
    """
    if component.startswith("text_encoder"):
        bare = name.removeprefix(_TEXT_PREFIX)
        if bare == "embeddings.position_ids":
            return None
        if bare == "text_projection.weight":
            # The model of encoder 1 ends before the projection; some files keep it all the same.
            return bare if component == "text_encoder_2" else None
        return text_prefix(component) + bare
    if component in _HALVES:
        other = _HALVES["vae_encoder" if component == "vae_decoder" else "vae_decoder"]
        if name.split(".")[0] in other:
            return None
    old = _OLD_ATTENTION_NAME.fullmatch(name)
    return f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else name


def lasting_name(component: str, name: str) -> str:
    """`name` as a digest spells it: the same under every version of the libraries."""
    return name.removeprefix(_TEXT_PREFIX) if component.startswith("text_encoder") else name


def text_prefix(component: str) -> str:
    """What the installed transformers puts before a text encoder's names: "text_model." or ""."""
    return _text_prefix(component == "text_encoder_2")


@functools.cache
def _text_prefix(projection: bool) -> str:
    probe = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1}
    probe |= {"num_attention_heads": 1, "max_position_embeddings": 2, "projection_dim": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    names = _text_encoder({**probe, **tokens}, projection).state_dict()
    return _TEXT_PREFIX if any(name.startswith(_TEXT_PREFIX) for name in names) else ""


def _text_encoder(config: Mapping[str, Any], projection: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    class_ = CLIPTextModelWithProjection if projection else CLIPTextModel
    with torch.device("meta"):
        module: nn.Module = class_(CLIPTextConfig.from_dict(dict(config)))
    return module


def meta_module(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The component's module on the meta device, in eval mode, without gradients.

    `vae_decoder` and `vae_encoder` are an AutoencoderKL without its other half, so that names stay
    diffusers'.

    Raises:
        ModelError: the configuration is of another class, or the library can't build it.
    """
    expected = _CLASSES.get(kind_of(component), "AutoencoderKL")
    text = component.startswith("text_encoder")
    found = config.get("model_type" if text else "_class_name")
    if found not in (None, "clip_text_model" if text else expected):
        raise ModelError(f"{component}'s configuration is of a {found}, which is not supported")
    try:
        if text:
            module = _text_encoder(config, component == "text_encoder_2")
        else:
            module = _diffusers_module(expected, config)
    # The libraries raise whatever their arithmetic meets first on a wrong value.
    except Exception as cause:
        raise ModelError(f"{component}'s configuration can't be built: {cause!r}") from cause
    for child in _HALVES["vae_encoder" if component == "vae_decoder" else "vae_decoder"]:
        if component in _HALVES and getattr(module, child) is not None:
            delattr(module, child)
    return module.eval().requires_grad_(False)


def _diffusers_module(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, class_name).from_config(dict(config))
    return module


def unsaved_buffers(component: str, module: nn.Module) -> dict[str, Tensor]:
    """The true values of the buffers that no file holds, by name (CLIP's `position_ids`)."""
    stored = module.state_dict().keys()
    values = {}
    for name, buffer in module.named_buffers():
        if name in stored:
            continue
        if not name.endswith("position_ids"):
            raise ModelError(f"{component} has the buffer {name}, whose value is in no file")
        values[name] = torch.arange(buffer.shape[-1]).expand(buffer.shape).contiguous()
    return values


def check_names(weights: Weights, module: nn.Module) -> None:
    """Compare the weights with the module's state dict.

    Raises:
        ModelError: lists the keys that are missing, unexpected or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = [
        f"{name} {weights.shape(name)} instead of {wanted[name]}"
        for name in weights
        if name in wanted and weights.shape(name) != wanted[name]
    ]
    faults = {
        "missing": sorted(wanted.keys() - set(weights)),
        "unexpected": [f"{n} ({weights.source(n)})" for n in weights if n not in wanted],
        "of another shape": shapes,
    }
    told = [f"{len(names)} {what}: {_few(names)}" for what, names in faults.items() if names]
    if told:
        raise ModelError(
            f"the weights of {weights.component} don't fit its configuration; " + "; ".join(told)
        )


def _few(names: list[str], most: int = 8) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def fill_module(module: nn.Module, state: Mapping[str, Tensor], component: str) -> nn.Module:
    """Put `state` and the unsaved buffers into a module on the meta device, without copying."""
    for name, value in unsaved_buffers(component, module).items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_buffer(leaf, value, persistent=False)
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.requires_grad_(False)
