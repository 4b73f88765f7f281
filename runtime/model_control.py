"""Reads ControlNets that are to steer a model's UNet."""

from __future__ import annotations

import re
from pathlib import Path

from heatsink.runtime.errors import InvalidRequest, ModelError
from heatsink.runtime.graph.denoisers import residual_shapes
from heatsink.runtime.model_folder import EXTRAS, Config, Part, read_network

# It becomes part of files' names.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_ALIKE = ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")


def check_name(name: str) -> None:
    """Refuse what can't be a ControlNet's name.

    Raises:
        InvalidRequest: says what can.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"controlnet: expected a name of up to 40 of a-z, 0-9, _ and -, got {name!r}"
        )


def read_controlnet(folder: Path, name: str, unet: Config, notes: list[str]) -> Part:
    """Read a ControlNet's folder and compare it with the UNet that it is to steer.

    Args:
        folder: holds `config.json` and the weights.
        name: what requests call it.
        unet: the UNet's configuration.
        notes: what was chosen is added.

    Raises:
        InvalidRequest: the name is none.
        ModelError: it is missing, damaged, of another class, or made for another UNet.
        UnsafeFile: its weights are pickled.
    """
    check_name(name)
    if not folder.is_dir():
        raise ModelError(f"controlnet {name!r}: there is no folder {folder}")
    part = read_network(folder, EXTRAS["controlnet"], None, notes)
    # Any size does: the channels and their number are compared.
    shape = ("batch", 4, 1024, 1024)
    other = [key for key in _ALIKE if part.config.get(key) != unet.get(key)]
    if residual_shapes(part.config, shape) != residual_shapes(unet, shape):
        other += ["block_out_channels", "layers_per_block"]
    if other:
        told = ", ".join(f"{k} {part.config.get(k)} (wants {unet.get(k)})" for k in other)
        raise ModelError(f"{folder} is a ControlNet for another UNet: it has {told}")
    return part
