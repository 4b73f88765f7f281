"""`heatsink.optimize(pipe)`: a diffusers pipeline's networks run as captured programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heatsink.integrations.programs import Spaces
from heatsink.integrations.replacement import Replacement
from heatsink.integrations.text import TextEncoder
from heatsink.integrations.unet import ControlNet, UNet
from heatsink.integrations.vae import Autoencoder
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.graph.components import input_shapes

PIPELINES = tuple(
    f"StableDiffusion{kind}{variant}Pipeline"
    for kind in ("", "XL")
    for variant in (
        "",
        "Img2Img",
        "Inpaint",
        "ControlNet",
        "ControlNetImg2Img",
        "ControlNetInpaint",
    )
)
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae", "controlnet")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_KINDS: dict[str, type[Replacement]] = {
    "UNet2DConditionModel": UNet,
    "ControlNetModel": ControlNet,
    "AutoencoderKL": Autoencoder,
    "CLIPTextModel": TextEncoder,
    "CLIPTextModelWithProjection": TextEncoder,
}


@dataclass(frozen=True)
class Optimised:
    """What `optimize` did.

    Attributes:
        replaced: the components that run as captured programs, and the class each stands for.
        left: the components that are as they were, and why.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        """A line for each component."""
        lines = [f"{name}: {kind} runs as a program" for name, kind in self.replaced.items()]
        return "\n".join([*lines, *(f"{name}: left, {why}" for name, why in self.left.items())])


def optimize(
    pipe: Any,
    *,
    components: Sequence[str] | None = None,
    precision: str | torch.dtype | None = None,
) -> Optimised:
    """Let a pipeline's networks run as programs on planned memory.

    The networks are captured at their first use, once for each set of shapes (height, width, text
    length; up to 8 are kept), and use the pipeline's own weights where they lie. `pipe` is changed;
    `restore(pipe)` puts the very same modules back.

    Args:
        pipe: one of `PIPELINES`, its weights loaded.
        components: of `COMPONENTS`; each must be there and capturable. By default all that are
            there, and those that can't be captured are named in the report.
        precision: what to compute in: "fp32", "bf16", "fp16" or the dtype. By default each module's
            own dtype, in which case no weight is copied.

    Returns:
        What was replaced, what was left and why.

    Raises:
        InvalidRequest: another kind of pipeline, already optimised, adapters loaded, offloaded, on
            meta, in training; an unknown component or precision. Nothing was changed.
        NotBuilt: a component that was asked for by name can't be captured. Nothing was changed.
    """
    dtype = _precision(precision)
    _check_pipeline(pipe)
    found: dict[str, nn.Module] = {name: getattr(pipe, name) for name in _names(pipe, components)}
    for name, module in found.items():
        _check_state(name, module)
    left = {name: why for name, module in found.items() if (why := _obstacle(module))}
    if left and components is not None:
        raise NotBuilt("; ".join(f"{name}: {why}" for name, why in left.items()))
    spaces, replaced = Spaces(), {}
    for name, module in found.items():
        if name not in left:
            kind = type(module).__name__
            # Past the pipeline's `__setattr__`, which would write the class into its configuration.
            object.__setattr__(pipe, name, _KINDS[kind](module, name, spaces, dtype))
            replaced[name] = kind
    return Optimised(replaced, left)


def restore(pipe: Any) -> list[str]:
    """Put the modules that `optimize` replaced back; returns the components' names.

    They are the same objects with the same weights. A pipeline that was not optimised is left as it
    is.
    """
    done = []
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        if isinstance(module, Replacement):
            object.__setattr__(pipe, name, module.original)
            done.append(name)
    return done


def refresh(pipe: Any) -> list[str]:
    """Read the weights of what `optimize` replaced again; returns the components' names.

    Needed only after a write that PyTorch does not count: through `.data`, NumPy or other memory of
    a weight, by a kernel of one's own, or into weights made under `torch.inference_mode()`.
    """
    done = []
    for name in COMPONENTS:
        module = getattr(pipe, name, None)
        if isinstance(module, Replacement):
            module.refresh()
            done.append(name)
    return done


def _precision(given: str | torch.dtype | None) -> torch.dtype | None:
    dtype = PRECISIONS.get(given) if isinstance(given, str) else given
    if given is not None and dtype not in PRECISIONS.values():
        raise InvalidRequest(f"precision: expected one of {sorted(PRECISIONS)}, got {given!r}")
    return dtype


def _check_pipeline(pipe: Any) -> None:
    if type(pipe).__name__ not in PIPELINES:
        raise InvalidRequest(
            f"pipe: expected one of {', '.join(PIPELINES)}, got {type(pipe).__name__}"
        )
    if any(isinstance(getattr(pipe, name, None), Replacement) for name in COMPONENTS):
        raise InvalidRequest("pipe: already optimised; heatsink.restore(pipe) first")
    if getattr(pipe, "hf_device_map", None):
        raise InvalidRequest("pipe: spread over devices by a device map; reset_device_map() first")


def _names(pipe: Any, components: Sequence[str] | None) -> list[str]:
    present = [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)]
    if components is None:
        return present
    if isinstance(components, str) or not components:
        raise InvalidRequest(f"components: expected a list of names, got {components!r}")
    if absent := [name for name in components if name not in present]:
        raise InvalidRequest(f"components: the pipeline has {present}, not {absent}")
    return [name for name in COMPONENTS if name in components]


def _check_state(name: str, module: nn.Module) -> None:
    """Raise InvalidRequest for a state in which a captured network would be another."""
    for part in module.modules():
        if hasattr(part, "_hf_hook") or getattr(part, "_diffusers_hook", None) is not None:
            raise InvalidRequest(
                f"{name}: offloaded or hooked ({type(part).__name__}); remove_all_hooks() first, "
                "and offload after heatsink.optimize"
            )
        if getattr(part, "lora_A", None) is not None or getattr(part, "peft_config", None):
            raise InvalidRequest(
                f"{name}: PEFT adapters are loaded ({type(part).__name__}); "
                "unload_lora_weights() first"
            )
        if part._forward_hooks or part._forward_pre_hooks:
            raise InvalidRequest(
                f"{name}: a hook changes what {type(part).__name__} computes, adapters by prompt "
                "for one; remove it first"
            )
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            raise InvalidRequest(f"{name}: in training mode with dropout; eval() first")
    if any(value.is_meta for value in [*module.parameters(), *module.buffers()]):
        raise InvalidRequest(f"{name}: on meta, its weights are not loaded")


def _obstacle(module: nn.Module) -> str:
    """Why a module can't be captured; "" if nothing is known to stand in the way."""
    kind = type(module).__name__
    if kind not in _KINDS:
        return f"{kind} can't be captured yet"
    dtypes = {value.dtype for value in module.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(PRECISIONS.values()):
        return f"weights of {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if len({value.device for value in module.parameters()}) != 1:
        return "weights on several devices"
    config: Any = module.config
    if kind in ("UNet2DConditionModel", "ControlNetModel"):
        try:
            input_shapes("unet", config, height=8, width=8)
        except NotBuilt as error:
            return str(error)
    if getattr(config, "global_pool_conditions", False):
        return "global_pool_conditions is not supported"
    return ""
