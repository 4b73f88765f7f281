"""Networks and adapters of true sizes for measurements: real configurations, random values.

Weights are scaled so that activations keep their size; adapters touch every linear and convolution
of the UNet, so that a swap moves every weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.runtime import components
from heatsink.runtime.adapter_delta import AdapterDelta

KINDS = {"sd15": "sd1", "sdxl": "sdxl"}
_TEXT_TOKENS = 77


def unet_config(kind: str) -> dict[str, Any]:
    """The UNet's configuration of `sd15` or `sdxl`."""
    folder = Path(components.__file__).parent / "configs"
    text = (folder / f"{KINDS[kind]}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)["unet"]
    return config


def random_unet(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A UNet with this configuration and seeded weights, in eval mode."""
    module = components.meta_module("unet", config).to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(1)
    for name, value in module.named_parameters():
        with torch.no_grad():
            if value.dim() < 2:
                value.fill_(float(name.endswith("weight")))
            else:
                value.normal_(0.0, 0.5 / math.sqrt(value[0].numel()), generator=generator)
    return module


def targets(unet: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Module path and weight of every linear and convolution."""
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield path, module.weight


def random_adapter(
    unet: nn.Module, rank: int, seed: int, dtype: torch.dtype = torch.float16
) -> list[AdapterDelta]:
    """An adapter of one rank for every linear and convolution, in host memory."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for path, weight in targets(unet):
        shape = tuple(weight.shape)
        a = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(weight[0].numel())
        b = torch.randn(shape[0], rank, generator=generator) * 0.02
        deltas.append(AdapterDelta("unet", path, a.to(dtype), b.to(dtype)))
    return deltas


def peft_state(deltas: list[AdapterDelta]) -> dict[str, Tensor]:
    """The adapter under PEFT's keys, as diffusers takes it for one network."""
    state = {}
    for delta in deltas:
        tail = (1,) * (delta.a.dim() - 2)
        state[f"{delta.module_path}.lora_A.weight"] = delta.a
        state[f"{delta.module_path}.lora_B.weight"] = delta.b.reshape(*delta.b.shape, *tail)
    return state


def unet_inputs(
    config: dict[str, Any], rows: int, side: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of a UNet for `rows` rows of `side` x `side` latents."""
    generator = torch.Generator(device=device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs: dict[str, Any] = {
        "sample": draw(rows, config["in_channels"], side, side),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": draw(rows, _TEXT_TOKENS, config["cross_attention_dim"]),
        "return_dict": False,
    }
    if config.get("addition_embed_type"):
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device)
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(rows, pooled),
            "time_ids": sizes.repeat(rows, 1),
        }
    return inputs
