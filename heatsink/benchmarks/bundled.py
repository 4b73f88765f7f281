"""The bundled model's shapes, float32: what is measured on a CPU.

The model draws 64x64 pixels from 8x8 latents: levels of 8x8, 4x4 and 2x2 tokens with 64, 128 and
192 channels, heads of 32, 24 tokens of text. Eight rows are four pictures with guidance. Its
autoencoder works on up to 64x64 pixels with 32 channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._op import Case, Inputs, normal

# What ops call their own cases of this kind too.
PREFIX = "bundled-"
ROWS = 8
PICTURES = 4
TEXT = 24
HEAD_DIM = 32
EPS = 1e-5


def _normal(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    return normal(shape, torch.float32, device, seed)


def _case(name: str, shapes: dict[str, tuple[int, ...]], **others: Any) -> Case:
    def make(device: torch.device) -> Inputs:
        values: Inputs = {
            argument: _normal(shape, device, seed)
            for seed, (argument, shape) in enumerate(shapes.items())
        }
        return {**values, **others}

    return Case(PREFIX + name, make)


def _attention(name: str, tokens: int, heads: int, keys: int) -> Case:
    query, key = (ROWS, tokens, heads, HEAD_DIM), (ROWS, keys, heads, HEAD_DIM)
    return _case(name, {"q": query, "k": key, "v": key})


def _group_norm(name: str, rows: int, side: int, channels: int, groups: int) -> Case:
    shapes = {"x": (rows, side, side, channels), "weight": (channels,), "bias": (channels,)}
    pixels = _case(name, shapes, groups=groups, eps=EPS, silu=True)

    def make(device: torch.device) -> Inputs:
        inputs = pixels.make(device)
        return {**inputs, "x": inputs["x"].permute(0, 3, 1, 2)}

    return Case(pixels.name, make)


def _tokens(name: str, tokens: int, channels: int, parameters: tuple[str, ...]) -> Case:
    shapes: dict[str, tuple[int, ...]] = {"x": (ROWS, tokens, channels)}
    shapes |= dict.fromkeys(parameters, (channels,))
    return _case(name, shapes, eps=EPS)


CASES: dict[str, tuple[Case, ...]] = {
    "attention": (
        _attention("self-64", 64, 2, 64),
        _attention("self-16", 16, 4, 16),
        _attention("text-64", 64, 2, TEXT),
        _attention("text-16", 16, 4, TEXT),
    ),
    "group_norm_silu": (
        _group_norm("unet-8x8x64", ROWS, 8, 64, 16),
        _group_norm("unet-4x4x128", ROWS, 4, 128, 16),
        _group_norm("unet-2x2x192", ROWS, 2, 192, 16),
        _group_norm("vae-64x64x32", PICTURES, 64, 32, 8),
    ),
    "layer_norm": (
        _tokens("unet-64x64", 64, 64, ("weight", "bias")),
        _tokens("unet-16x128", 16, 128, ("weight", "bias")),
        _tokens("text-24x128", TEXT, 128, ("weight", "bias")),
    ),
    "rms_norm": (_tokens("unet-64x64", 64, 64, ("weight",)),),
    "geglu": (
        _case("unet-64x256", {"x": (ROWS, 64, 512)}),
        _case("unet-16x512", {"x": (ROWS, 16, 1024)}),
    ),
    "silu_mul": (_case("unet-64x256", {"gate": (ROWS, 64, 256), "up": (ROWS, 64, 256)}),),
    "fingerprint": (
        _case("unet-8x8x64", {"x": (ROWS, 8, 8, 64)}),
        _case("vae-64x64x32", {"x": (PICTURES, 64, 64, 32)}),
    ),
}
