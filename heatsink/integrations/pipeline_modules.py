"""What of a diffusers pipeline an adapter can change, and which pipelines are refused, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.replacement import Replacement
from heatsink.runtime.adapter_keys import file_path
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.ldm_names import translate, unet_names
from heatsink.runtime.merge_terms import weight_key

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "controlnet")
"""The attributes of a pipeline that hold networks with adapters."""

_CLASSES = {
    "UNet2DConditionModel",
    "ControlNetModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
}
_ANEW = ": close() them and make them anew"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline, by component; those it hasn't got are left out."""
    found = {}
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        module = getattr(module, "_orig_mod", module)
        # Programs read the original's weights again when they change.
        module = module.original if isinstance(module, Replacement) else module
        kinds = {base.__name__ for base in type(module).__mro__}
        if isinstance(module, nn.Module) and kinds & _CLASSES:
            found[name] = module
    return found


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline, if adapters can change what they compute.

    Raises:
        AdapterError: it has no UNet of SD1's or SDXL's kind, or something stands between its
            weights and what is computed.
    """
    found = networks_of(pipe)
    if "unet" not in found:
        raise AdapterError(
            f"a {type(pipe).__name__} has no UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL"
            " are supported"
        )
    for name, module in found.items():
        _refuse(name, module)
    return found


def _refuse(component: str, module: nn.Module) -> None:
    for path, part in module.named_modules():
        reason = _reason(part)
        if reason:
            raise AdapterError(f"{component}{'.' * bool(path)}{path}: {reason}")


def _reason(part: nn.Module) -> str | None:
    if any(base.__module__.split(".")[0] == "peft" for base in type(part).__mro__):
        return (
            "PEFT has adapters here already, which would be added on top:"
            " pipe.unload_lora_weights() first"
        )
    if hasattr(part, "_hf_hook"):
        return (
            "accelerate moves these weights about (CPU offload), so they have no place to be"
            " written in: use the pipeline without offload"
        )
    registry = getattr(part, "_diffusers_hook", None)
    if registry is not None and registry.hooks:
        return (
            f"a hook of diffusers ({', '.join(registry.hooks)}) moves or casts these weights, or"
            " leaves layers out: disable it first"
        )
    # diffusers leaves the flag `fused_projections` set when it takes the fusion back.
    if "Fused" in type(getattr(part, "processor", None)).__name__:
        return "its projections are fused into copies: pipe.unfuse_qkv_projections() first"
    weight = getattr(part, "weight", None)
    if isinstance(part, nn.Linear | nn.Conv2d) and weight is not None:
        if weight.is_meta:
            return "its weight is not loaded (it is on the meta device)"
        if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            kind = f"{type(weight).__name__} of {weight.dtype}"
            return f"its weight is a {kind}, expected a Parameter of fp32, fp16 or bf16"
    return None


def layers_of(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The linears and convolutions of a network that adapters know, by path."""
    for path, part in module.named_modules():
        # Those of an attention's processor belong to other additions (an IP-Adapter).
        if isinstance(part, nn.Linear | nn.Conv2d) and ".processor." not in f".{path}.":
            if isinstance(part, nn.Conv2d) and (part.groups != 1 or part.padding_mode != "zeros"):
                continue
            yield path, part


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of these layers, by `component.name`."""
    return {
        weight_key(component, f"{path}.weight"): layer.weight
        for component, module in modules.items()
        for path, layer in layers_of(module)
    }


def check_networks(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    """Check that a pipeline has these networks and no others.

    Raises:
        AdapterError: one was replaced.
    """
    found = networks_of(pipe)
    for name in COMPONENTS:
        if found.get(name) is not modules.get(name):
            raise AdapterError(f"the pipeline has another {name} than these adapters{_ANEW}")


def check_held(modules: Mapping[str, nn.Module], live: Mapping[str, Tensor]) -> None:
    """Check that the weights that were written are still in these networks, wherever.

    Less than `check_weights`, which nothing passes that wraps layers.

    Raises:
        AdapterError: some are not.
    """
    held = {id(weight) for module in modules.values() for weight in module.parameters()}
    for key, weight in live.items():
        if id(weight) not in held:
            raise AdapterError(f"{key}, which adapters are merged into, was replaced{_ANEW}")


def check_weights(modules: Mapping[str, nn.Module], live: Mapping[str, Tensor]) -> None:
    """Check that the weights that are written are the ones that layers compute with.

    Raises:
        AdapterError: some were replaced.
    """
    found = weights_of(modules)
    for key in sorted(found.keys() | live.keys()):
        if found.get(key) is not live.get(key):
            raise AdapterError(
                f"{key} is another tensor than these adapters know (a layer was replaced, or"
                f" load_state_dict(assign=True)){_ANEW}"
            )


def targets_of(modules: Mapping[str, nn.Module]) -> Targets:
    """What adapter files may name in these networks."""
    shapes = {
        component: {path: tuple(layer.weight.shape) for path, layer in layers_of(module)}
        for component, module in modules.items()
    }
    flat = {
        component: {file_path(component, path).replace(".", "_"): path for path in paths}
        for component, paths in shapes.items()
    }
    config: Any = modules["unet"].config
    inverse = {new: old for old, new in unet_names(dict(config)).items()}
    for path in shapes["unet"]:
        # kohya's SDXL files name the UNet's modules by the original layout.
        original = translate(inverse, path)
        if original is not None:
            flat["unet"].setdefault(original.replace(".", "_"), path)
    return Targets(shapes, flat, "sdxl" if "text_encoder_2" in modules else "sd1")
