"""The modules an adapter can change: read from a model, or from the table an engine keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heatsink.runtime.adapter_keys import Key, Unknown, file_path
from heatsink.runtime.components import CONTROL_PREFIX
from heatsink.runtime.ldm_names import translate, unet_names

if TYPE_CHECKING:
    from heatsink.runtime.model import Model

# Two-dimensional weights that are tables, not linears.
_TABLES = re.compile(r".*(token|position)_embedding")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """All that reading an adapter needs to know of a model.

    Attributes:
        shapes: component -> module path -> the weight's shape.
        flat: component -> kohya's name (dots as underscores, by diffusers' and by the original
            layout) -> module path.
        kind: the model's, `"sd1"` or `"sdxl"`; empty where unknown.
    """

    shapes: dict[str, dict[str, Shape]]
    flat: dict[str, dict[str, str]]
    kind: str = ""

    @classmethod
    def of(cls, model: Model) -> Targets:
        """The linears and convolutions of a model's text encoders, UNet and ControlNet."""
        # Of the ControlNets only the model's own is a target: files name no other.
        others = ("vae", CONTROL_PREFIX)
        names = [name for name in model.components if not name.startswith(others)]
        shapes = {name: _shapes(model, name) for name in (*names, *model.extras)}
        flat = {component: _flat_names(component, table) for component, table in shapes.items()}
        inverse = {new: old for old, new in unet_names(model.config("unet")).items()}
        for path in shapes["unet"]:
            original = translate(inverse, path)
            if original is not None:
                flat["unet"].setdefault(original.replace(".", "_"), path)
        return cls(shapes, flat, model.kind)

    def locate(self, key: Key) -> str:
        """The module path in its component that a key means.

        Raises:
            Unknown: the model has no such component or module.
        """
        component = key.component
        if component not in self.shapes:
            raise Unknown(f"unknown target: the model has no {component}")
        path = self._find(key)
        if path is None:
            raise Unknown(f"unknown target: {component} has no linear or convolution {key.name}")
        return path

    def _find(self, key: Key) -> str | None:
        component = key.component
        if key.format == "kohya":
            return self.flat.get(component, {}).get(key.name)
        # transformers' prefix of a text encoder came and went; the table has one spelling.
        bare = key.name.removeprefix("text_model.")
        text = component.startswith("text_encoder")
        spellings = (bare, f"text_model.{bare}") if text else (key.name,)
        return next((path for path in spellings if path in self.shapes[component]), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        shapes = {
            component: {path: list(shape) for path, shape in table.items()}
            for component, table in self.shapes.items()
        }
        return {"kind": self.kind, "shapes": shapes, "flat": self.flat}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Targets:
        """The inverse of `as_dict`."""
        shapes = {
            component: {path: tuple(shape) for path, shape in table.items()}
            for component, table in values["shapes"].items()
        }
        flat = {component: dict(table) for component, table in values["flat"].items()}
        return cls(shapes, flat, values["kind"])


def _shapes(model: Model, component: str) -> dict[str, Shape]:
    weights = model.weights(component)
    paths = (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    return {
        path: weights.shape(f"{path}.weight")
        for path in paths
        if len(weights.shape(f"{path}.weight")) in (2, 4) and not _TABLES.fullmatch(path)
    }


def _flat_names(component: str, paths: Mapping[str, Shape]) -> dict[str, str]:
    return {file_path(component, path).replace(".", "_"): path for path in paths}
