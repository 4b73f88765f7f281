"""Writes LoRA files (safetensors) in diffusers' or kohya's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_keys import file_path

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's configurations in a file's header."""


def write_adapter(
    path: str | Path,
    deltas: Iterable[AdapterDelta],
    format: str = "diffusers",
    *,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA file whole: under a temporary name first, then renamed.

    Args:
        path: of the safetensors file.
        deltas: at most one for each module. Their dtype is kept.
        format: `"diffusers"` (PEFT's keys, alpha in the header where it is not the rank) or
            `"kohya"`.
        alpha: replaces the deltas' own scale by alpha / rank.
        metadata: more text for the header.

    Raises:
        ValueError: an unknown format, no deltas, or two for one module.
    """
    if format not in ("diffusers", "kohya"):
        raise ValueError(f"format is {format!r}, expected 'diffusers' or 'kohya'")
    chosen = sorted(deltas, key=lambda d: (d.component, d.module_path))
    if alpha is not None:
        chosen = [replace(d, scale=alpha / d.rank) for d in chosen]
    counts = Counter((d.component, d.module_path) for d in chosen)
    if not chosen or max(counts.values()) > 1:
        raise ValueError(
            f"deltas: expected one for each of some modules, got {counts.most_common(1)}"
        )
    tensors = _kohya_tensors(chosen) if format == "kohya" else _diffusers_tensors(chosen)
    header = {"format": "pt", **(metadata or {})}
    if format == "diffusers" and any(d.scale != 1 for d in chosen):
        header[METADATA_KEY] = json.dumps(_diffusers_metadata(chosen), indent=2, sort_keys=True)
    _save(Path(path), tensors, header)


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # Copies, for trained parameters on any device and for matrices that two modules share.
    owned = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(owned, temporary, metadata=header)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _up_of(delta: AdapterDelta) -> Tensor:
    shape = (*delta.b.shape, *(1,) * (delta.a.dim() - 2))
    return delta.b.reshape(shape)


def _diffusers_tensors(deltas: list[AdapterDelta]) -> dict[str, Tensor]:
    tensors = {}
    for delta in deltas:
        module = f"{delta.component}.{file_path(delta.component, delta.module_path)}"
        tensors[f"{module}.lora_A.weight"] = delta.a
        tensors[f"{module}.lora_B.weight"] = _up_of(delta)
    return tensors


def _diffusers_metadata(deltas: list[AdapterDelta]) -> dict[str, Any]:
    """The fields diffusers packs: one PEFT configuration for each component."""
    fields: dict[str, Any] = {}
    for component in sorted({delta.component for delta in deltas}):
        own = [delta for delta in deltas if delta.component == component]
        # Without `text_model.`: PEFT matches a path's end, so this fits every version of
        # transformers.
        paths = {d.module_path.removeprefix("text_model."): d for d in own}
        rank = Counter(d.rank for d in own).most_common(1)[0][0]
        alphas = {path: d.scale * d.rank for path, d in paths.items()}
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        fields |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": alpha,
            f"{component}.target_modules": sorted(paths),
            f"{component}.rank_pattern": {p: d.rank for p, d in paths.items() if d.rank != rank},
            f"{component}.alpha_pattern": {p: v for p, v in alphas.items() if v != alpha},
        }
    return fields


def _kohya_tensors(deltas: list[AdapterDelta]) -> dict[str, Tensor]:
    two = any(delta.component == "text_encoder_2" for delta in deltas)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_"}
    prefixes["text_encoder_2"] = "lora_te2_"
    tensors = {}
    for delta in deltas:
        path = file_path(delta.component, delta.module_path).replace(".", "_")
        module = f"{prefixes[delta.component]}{path}"
        tensors[f"{module}.lora_down.weight"] = delta.a
        tensors[f"{module}.lora_up.weight"] = _up_of(delta)
        tensors[f"{module}.alpha"] = torch.tensor(delta.scale * delta.rank, dtype=torch.float32)
    return tensors
