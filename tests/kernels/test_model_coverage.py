"""Every norm and gate that a whole model calls is among what is compiled ahead of time.

The calls are those of diffusers' and transformers' own modules, seen by hooks on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heatsink.runtime
from heatsink.kernels import aot, catalog
from heatsink.kernels._launch import ARCHS
from heatsink.kernels._op import Case, Inputs

CONFIGS = Path(heatsink.runtime.__file__).parent / "configs"
META = torch.device("meta")
OPS = catalog.ops()
WEIGHTS = ("weight", "bias")
F16, F32 = torch.float16, torch.float32
# Of a call: op, shape of its input, and what else decides: groups and SiLU.
Call = tuple[str, tuple[int, ...], int, bool]


def config(model: str, part: str) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = json.loads((CONFIGS / f"{model}.json").read_text())
    return {name: value for name, value in parts[part].items() if name != "_class_name"}


@contextmanager
def recorded(network: nn.Module) -> Iterator[set[Call]]:
    """The calls that a forward pass of `network` makes, complete at the end."""
    from diffusers.models.activations import GEGLU

    calls: set[Call] = set()
    normalised: list[tuple[Tensor, nn.GroupNorm]] = []
    activated: list[Tensor] = []

    def after(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.GroupNorm):
            normalised.append((out, module))
        elif isinstance(module, nn.LayerNorm):
            calls.add(("layer_norm", tuple(out.shape), 0, False))
        elif isinstance(module, nn.SiLU):
            activated.append(given[0])
        elif isinstance(module, GEGLU):
            calls.add(("geglu", (*out.shape[:-1], 2 * out.shape[-1]), 0, False))

    for module in network.modules():
        module.register_forward_hook(after)
    with torch.no_grad():
        yield calls
    for out, norm in normalised:
        silu = any(out is x for x in activated)
        calls.add(("group_norm_silu", tuple(out.shape), norm.num_groups, silu))


@cache
def unet_calls(model: str) -> set[Call]:
    from diffusers import UNet2DConditionModel

    described = config(model, "unet")
    with META:
        network = UNet2DConditionModel(**described)
        side = described["sample_size"]
        latents = torch.empty(2, 4, side, side)
        text = torch.empty(2, 77, described["cross_attention_dim"])
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        with recorded(network) as calls:
            network(latents, torch.empty(()), text, added_cond_kwargs=added)
    return calls


@cache
def vae_calls(model: str) -> set[Call]:
    from diffusers import AutoencoderKL

    described = config(model, "vae")
    with META:
        network = AutoencoderKL(**described)
        side = described["sample_size"]
        with recorded(network) as calls:
            network.encode(torch.empty(1, 3, side, side))
            network.decode(torch.empty(1, 4, side // 8, side // 8))
    return calls


@cache
def text_calls(model: str, part: str) -> set[Call]:
    from transformers import CLIPTextConfig, CLIPTextModel

    with META:
        network = CLIPTextModel(CLIPTextConfig(**config(model, part)))
        with recorded(network) as calls:
            network(torch.zeros(2, 77, dtype=torch.int64))
    return calls


def inputs(call: Call, dtype: torch.dtype, packed: bool) -> Inputs:
    """What the op is given; `packed`: x is a part of something wider."""
    op, shape, groups, silu = call
    if op == "geglu":
        return {"x": torch.empty(shape, dtype=dtype, device=META)}
    channels = shape[1] if groups else shape[-1]
    inner = (shape[0], *shape[2:], channels) if groups else shape
    wide = torch.empty((*inner[:-1], (1 + packed) * channels), dtype=dtype, device=META)
    x = wide[..., :channels]
    parameters = {name: torch.empty(channels, dtype=dtype, device=META) for name in WEIGHTS}
    if not groups:
        return {"x": x, **parameters}
    return {"x": x.movedim(-1, 1), "groups": groups, "silu": silu, **parameters}


@cache
def compiled(op: str, arch: int) -> set[str]:
    """The keys of all launches of an op's cases."""
    launches = (aot.launches_of(OPS[op], case, arch) for case in OPS[op].cases)
    return {launch.key() for found in launches for launch in found}


def case_of(call: Call, dtype: torch.dtype, packed: bool) -> Case:
    return Case(str(call), lambda device: inputs(call, dtype, packed))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("part", ["unet", "vae", "vae-fp32", "text_encoder", "text_encoder_2"])
def test_a_models_launches_are_compiled_ahead_of_time(model: str, part: str) -> None:
    if (model, part) in (("sd1", "text_encoder_2"), ("sd1", "vae-fp32")):
        pytest.skip("SD1.5 has one text encoder, and an autoencoder that works in fp16")
    if part == "unet":
        calls = unet_calls(model)
        assert {op for op, *_ in calls} == {"group_norm_silu", "layer_norm", "geglu"}
    elif part.startswith("vae"):
        calls = vae_calls(model)
        assert {op for op, *_ in calls} == {"group_norm_silu"}
    else:
        calls = text_calls(model, part)
        assert {op for op, *_ in calls} == {"layer_norm"}
    if "text" not in part:
        # Seen to be followed by SiLU, and seen not to be.
        assert {silu for op, *_, silu in calls if op == "group_norm_silu"} == {True, False}
    dtype = F32 if part.endswith("fp32") else F16
    missing = {
        (call, arch, launch.kernel.name)
        for call in calls
        for packed in (False, call[2] > 0)
        for arch in ARCHS
        for launch in aot.launches_of(OPS[call[0]], case_of(call, dtype, packed), arch)
        if launch.key() not in compiled(call[0], arch)
    }
    assert not missing
