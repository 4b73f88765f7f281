"""Reads a model folder in diffusers layout: its kind, configurations and mapped weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heatsink.runtime.errors import ModelError, UnsafeFile
from heatsink.runtime.weights import PICKLE_SUFFIXES, Entry, open_safetensors

Config = dict[str, Any]

# What each kind is saved by; the same networks serve all of a kind's pipelines.
_TASKS = (
    "", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"
)  # fmt: skip
PIPELINES = {
    f"StableDiffusion{infix}{task}Pipeline": kind
    for infix, kind in (("", "sd1"), ("XL", "sdxl"))
    for task in _TASKS
}
PARTS = {
    "sd1": {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
    "sdxl": {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
}
TOKENIZERS = {"sd1": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}
EXTRAS = {"controlnet": "ControlNetModel"}
"""Networks that may lie in a model's folder beside its own, each with its class."""
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermark")


@dataclass(frozen=True)
class Part:
    """One network as found on disk: its configuration and its tensors by diffusers' name."""

    config: Config
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Layout:
    """A model as found on disk.

    `notes` says in words what was chosen or left aside; `extras` are the folders of networks that
    the pipeline doesn't name, read when they are asked for.
    """

    kind: str
    parts: dict[str, Part]
    tokenizers: tuple[Path, ...]
    scheduler: Config
    settings: Config
    notes: list[str] = field(default_factory=list)
    extras: dict[str, Path] = field(default_factory=dict)
    variant: str | None = None


def read_folder(folder: Path, variant: str | None) -> Layout:
    """Read `folder` without reading any weight.

    Args:
        folder: holds `model_index.json`.
        variant: which weight files to take (`"fp16"`: `*.fp16.safetensors`); None takes the plain
            ones, and the only variant there is where plain ones are absent.

    Raises:
        ModelError: anything is missing, damaged, or of a kind this package does not run.
        UnsafeFile: a component has pickled weights only.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is no model folder in diffusers layout: it holds no model_index.json"
        )
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ModelError(f"{folder} holds a {name} (model_index.json); supported: {known}")
    kind = PIPELINES[name]
    notes: list[str] = []
    ignored = [key for key in _IGNORED if (index.get(key) or [None])[0] is not None]
    if ignored:
        notes.append(f"{' and '.join(ignored)} of {folder.name} are ignored")
    parts = {}
    for part, class_name in PARTS[kind].items():
        _check_class(folder, index, part, class_name)
        config = read_json(folder / part / "config.json")
        parts[part] = Part(config, _read_weights(folder / part, variant, notes))
    tokenizers = tuple(tokenizer_in(folder / each) for each in TOKENIZERS[kind])
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    settings = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    extras = {name: folder / name for name in EXTRAS if (folder / name / "config.json").is_file()}
    return Layout(kind, parts, tokenizers, scheduler, settings, notes, extras, variant)


def read_extra(layout: Layout, name: str) -> Part:
    """Read a network of `layout.extras`; errors as of `read_folder`."""
    return read_network(layout.extras[name], EXTRAS[name], layout.variant, layout.notes)


def read_network(folder: Path, class_name: str, variant: str | None, notes: list[str]) -> Part:
    """Read one network's folder.

    Args:
        folder: holds `config.json` and the weights.
        class_name: of the network.
        variant: as of `read_folder`.
        notes: what was chosen is added.

    Raises:
        ModelError, UnsafeFile: as `read_folder`.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != class_name:
        raise ModelError(
            f"{folder} holds a {config.get('_class_name')} (config.json), expected {class_name}"
        )
    return Part(config, _read_weights(folder, variant, notes))


def read_json(path: Path) -> Config:
    """The JSON object in `path`; a `ModelError` where it is missing or something else."""
    if not path.is_file():
        raise ModelError(f"{path.parent} lacks {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as cause:
        raise ModelError(f"{path} is not readable as JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def tokenizer_in(folder: Path) -> Path:
    """`folder`, where it holds a CLIP tokenizer's files; else a `ModelError`."""
    files = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return folder
    raise ModelError(f"{folder} holds no tokenizer (vocab.json with merges.txt, or tokenizer.json)")


def _check_class(folder: Path, index: Config, part: str, class_name: str) -> None:
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        raise ModelError(f"{folder}: model_index.json names no {part}, which this model needs")
    if entry[1] != class_name:
        raise ModelError(f"{folder}: {part} is a {entry[1]}, expected {class_name}")
    if not (folder / part).is_dir():
        raise ModelError(f"{folder}: the component {part} is missing (no folder {part}/)")


def _read_weights(folder: Path, variant: str | None, notes: list[str]) -> dict[str, Entry]:
    base = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    chosen = variant if variant is not None else _only_variant(folder, base, notes)
    suffix = f".{chosen}" if chosen else ""
    single = folder / f"{base}{suffix}.safetensors"
    sharded = folder / f"{base}.safetensors.index{suffix}.json"
    if single.is_file():
        return open_safetensors(single)[0]
    if sharded.is_file():
        return _read_shards(sharded)
    raise ModelError(f"{folder} holds no {single.name} (nor {sharded.name})")


def _only_variant(folder: Path, base: str, notes: list[str]) -> str:
    """Return the variant to take, `""` for plain weights; `notes` says which was chosen."""
    names = sorted(entry.name for entry in folder.iterdir())
    if {f"{base}.safetensors", f"{base}.safetensors.index.json"} & set(names):
        return ""
    patterns = (
        rf"{base}\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors",
        rf"{base}\.safetensors\.index\.(\w+)\.json",
    )
    found = {m[1] for name in names for p in patterns if (m := re.fullmatch(p, name))}
    if "fp16" in found or len(found) == 1:
        variant = "fp16" if "fp16" in found else found.pop()
        notes.append(f"{folder.name} has no plain weights: its {variant} variant is used")
        return variant
    if found:
        raise ModelError(
            f"{folder} has no plain weights but several variants: give variant="
            f" one of {sorted(found)}"
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsafeFile(
            f"{folder} has only pickled weights ({', '.join(pickles)}), which can run"
            f" code when they are loaded; {base}.safetensors is needed"
        )
    raise ModelError(f"{folder} holds no weights: {base}.safetensors is missing")


def _read_shards(index: Path) -> dict[str, Entry]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{index} has no weight_map")
    shards = {}
    for shard in sorted({str(each) for each in table.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index} names the shard {shard!r}, expected a .safetensors file beside it"
            )
        shards[shard] = open_safetensors(index.parent / shard)[0]
    lost = [key for key, shard in table.items() if key not in shards[shard]]
    if lost:
        raise ModelError(f"{index} names tensors its shards lack: {', '.join(sorted(lost)[:8])}")
    return {key: shards[shard][key] for key, shard in table.items()}
