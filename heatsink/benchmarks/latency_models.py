"""Whole models of known configurations with random weights, as folders in diffusers layout.

Weights are bfloat16 values, so that every precision begins with the same ones; they are scaled so
that activations keep their size. The tokenizer has a token for each byte and no merges: what a text
costs does not depend on what it says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.benchmarks.lora_models import KINDS
from heatsink.runtime import components
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.files import make_folder, write_whole
from heatsink.runtime.model_folder import PARTS, PIPELINES, TOKENIZERS

Progress = Callable[[str, int, int], None]
CONFIGS = tuple(KINDS)
_TOKENS = 77
# A half in standard deviation: residuals add up, and must not grow through the network.
_GAIN = 0.5


def known_config(name: str) -> dict[str, Any]:
    """Every part's configuration of `sd15` or `sdxl`.

    Raises:
        InvalidRequest: another name.
    """
    if name not in KINDS:
        raise InvalidRequest(f"config: expected one of {', '.join(CONFIGS)}, got {name!r}")
    folder = Path(components.__file__).parent / "configs"
    text = (folder / f"{KINDS[name]}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def random_model(name: str, folder: Path, progress: Progress | None = None) -> Path:
    """The folder of a model with random weights; one that is whole is taken as it is.

    Args:
        name: one of `CONFIGS`.
        folder: where it goes; made where it is missing.
        progress: called with (what, done, total).
    """
    return write_model(KINDS[name], known_config(name), folder, progress)


def write_model(
    kind: str, config: Mapping[str, Any], folder: Path, progress: Progress | None = None
) -> Path:
    """Write the model of these configurations, `model_index.json` last: with it, it is whole."""
    index = folder / "model_index.json"
    if index.is_file():
        return folder
    make_folder(folder)
    parts = PARTS[kind]
    for done, part in enumerate(parts):
        if progress:
            progress("random weights", done, len(parts))
        _write_part(part, dict(config[part]), folder / part)
    if progress:
        progress("random weights", len(parts), len(parts))
    for tokenizer in TOKENIZERS[kind]:
        length = config["text_encoder"].get("max_position_embeddings", _TOKENS)
        _write_tokenizer(folder / tokenizer, config["text_encoder"]["vocab_size"], length)
    make_folder(folder / "scheduler")
    _write_json(folder / "scheduler" / "scheduler_config.json", config["scheduler"])
    _write_json(index, _index(kind, config))
    return folder


def _write_part(part: str, config: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    make_folder(folder)
    module = _meta_part(part, config)
    names = module.state_dict()
    generator = torch.Generator().manual_seed(len(names))
    values = {
        name: _value(name, value, generator)
        for name, value in names.items()
        if not name.endswith("position_ids")
    }
    base = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    save_file(values, folder / f"{base}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _meta_part(part: str, config: Mapping[str, Any]) -> nn.Module:
    if part != "vae":
        return components.meta_module(part, config)
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module: nn.Module = AutoencoderKL.from_config(dict(config))
    return module


def _value(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if like.dim() < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    scale = _GAIN / math.sqrt(like[0].numel())
    return (torch.randn(like.shape, generator=generator) * scale).to(torch.bfloat16)


def _write_tokenizer(folder: Path, size: int, length: int) -> None:
    """CLIP's tokenizer with no merges: a token for each byte, alone and at a word's end."""
    from tokenizers.pre_tokenizers import ByteLevel

    make_folder(folder)
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters)]
    tokens += [f"<|unused{i}|>" for i in range(size - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "vocab.json", {token: place for place, token in enumerate(tokens)})
    write_whole(folder / "merges.txt", lambda file: file.write(b"#version: 0.2\n"))
    special = dict(zip(("bos_token", "eos_token"), tokens[-2:], strict=True))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            **special,
            "unk_token": tokens[-1],
            "pad_token": tokens[-1],
        },
    )


def _index(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`model_index.json`."""
    pipeline = next(name for name, each in PIPELINES.items() if each == kind)
    named: dict[str, Any] = {
        part: ["diffusers" if part in ("unet", "vae") else "transformers", class_name]
        for part, class_name in PARTS[kind].items()
    }
    named |= {name: ["transformers", "CLIPTokenizer"] for name in TOKENIZERS[kind]}
    absent = ["feature_extractor", "image_encoder"]
    absent += ["safety_checker"] if kind == "sd1" else []
    named |= {name: [None, None] for name in absent}
    named["scheduler"] = ["diffusers", config["scheduler"]["_class_name"]]
    return {"_class_name": pipeline, **named, **config.get("settings", {})}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
