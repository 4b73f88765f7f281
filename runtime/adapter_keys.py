"""What the keys of a LoRA file mean: which module of which component, and which of its tensors.

Understood: PEFT (`lora_A`, `lora_B`), diffusers (`lora.down`, `lora.up`, `lora_linear_layer.*` and
the older `processor.to_q_lora.*`) and kohya (`lora_unet_*`, `lora_te_*`, `lora_te1_*`, `lora_te2_*`
with `lora_down`, `lora_up`, `alpha`; its SDXL files name the UNet's modules by the original
layout).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heatsink.runtime.components import text_prefix
from heatsink.runtime.ldm_names import translate, unet_names

if TYPE_CHECKING:
    from heatsink.runtime.model import Model

PEFT_PREFIX = "base_model.model."
_DOTTED = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    PEFT_PREFIX: "unet",
}
_FLAT = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_DOWN = r"lora_A(?:\.default)?|lora\.down|lora_linear_layer\.down|lora_down"
_UP = r"lora_B(?:\.default)?|lora\.up|lora_linear_layer\.up|lora_up"
_ROLES = {
    "down": re.compile(rf"(.+?)\.(?:{_DOWN})\.weight"),
    "up": re.compile(rf"(.+?)\.(?:{_UP})\.weight"),
    "alpha": re.compile(r"(.+?)\.alpha"),
}
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_UNSUPPORTED = {
    "lora_mid": "a LoCon with lora_mid is not supported",
    "dora_scale": "DoRA is not supported",
    "lora_magnitude_vector": "DoRA is not supported",
    "hada_": "LoHa is not supported",
    "lokr_": "LoKr is not supported",
    "lora_embedding": "adapters of embeddings are not supported",
    "bias": "adapters of biases are not supported",
}
# Two-dimensional weights that are tables, not linears.
_TABLES = re.compile(r".*(token|position)_embedding")


class Unknown(Exception):
    """A key this package can't place; its text is the reason. Never leaves the reader."""


@dataclass(frozen=True)
class Targets:
    """The modules an adapter can change.

    Attributes:
        shapes: component -> module path -> the weight's shape.
        flat: component -> kohya's name (dots as underscores) -> module path.
    """

    shapes: dict[str, dict[str, tuple[int, ...]]]
    flat: dict[str, dict[str, str]]

    @classmethod
    def of(cls, model: Model) -> Targets:
        """The linears and convolutions of a model's text encoders and UNet."""
        shapes = {}
        for component in model.components:
            if component.startswith("vae"):
                continue
            weights = model.weights(component)
            paths = (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
            shapes[component] = {
                path: weights.shape(f"{path}.weight")
                for path in paths
                if len(weights.shape(f"{path}.weight")) in (2, 4) and not _TABLES.fullmatch(path)
            }
        flat = {component: _flat_names(component, table) for component, table in shapes.items()}
        inverse = {new: old for old, new in unet_names(model.config("unet")).items()}
        for path in shapes["unet"]:
            original = translate(inverse, path)
            if original is not None:
                flat["unet"].setdefault(original.replace(".", "_"), path)
        return cls(shapes, flat)


def _flat_names(component: str, paths: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {file_path(component, path).replace(".", "_"): path for path in paths}


def file_path(component: str, path: str) -> str:
    """A module path as files spell it: a text encoder's with `text_model.` before it."""
    if not component.startswith("text_encoder") or path.startswith("text_projection"):
        return path
    return "text_model." + path.removeprefix("text_model.")


def place(key: str, targets: Targets) -> tuple[str, str, str]:
    """The component, module path and role (`"down"`, `"up"`, `"alpha"`) of a key.

    Raises:
        Unknown: with the reason.
    """
    module, role = _split(key)
    for prefix, component in _FLAT.items():
        if module.startswith(prefix):
            name = module.removeprefix(prefix)
            path = targets.flat.get(component, {}).get(name)
            return _found(component, path, name, targets), path or "", role
    for prefix, component in _DOTTED.items():
        if module.startswith(prefix):
            name = module.removeprefix(prefix)
            path = module_path(component, name)
            known = path if path in targets.shapes.get(component, {}) else None
            return _found(component, known, name, targets), path, role
    raise Unknown(f"unknown target: no component's prefix ({', '.join([*_DOTTED, *_FLAT])})")


def module_path(component: str, name: str) -> str:
    """A dotted module path of a file as the installed libraries spell it."""
    if not component.startswith("text_encoder") or name.startswith("text_projection"):
        return name
    return text_prefix(component) + name.removeprefix("text_model.")


def _found(component: str, path: str | None, name: str, targets: Targets) -> str:
    if component not in targets.shapes:
        raise Unknown(f"unknown target: the model has no {component}")
    if path is None:
        raise Unknown(f"unknown target: {component} has no linear or convolution {name}")
    return component


def _split(key: str) -> tuple[str, str]:
    old = _PROCESSOR.fullmatch(key)
    if old:
        leaf = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{leaf}", old[3]
    for role, pattern in _ROLES.items():
        match = pattern.fullmatch(key)
        if match:
            return match[1], role
    for part, reason in _UNSUPPORTED.items():
        if part in key:
            raise Unknown(reason)
    raise Unknown("no tensor of a LoRA: expected lora_A/lora_B, lora_down/lora_up or alpha")
