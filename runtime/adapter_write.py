"""Writes LoRA files (safetensors) in diffusers', PEFT's or kohya's format; nothing is lost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatsink.runtime.adapter_config import CLASSES, CONFIG_NAME, METADATA_KEY
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_keys import DOTTED, PEFT_PREFIX, file_path
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.files import write_whole

FORMATS = ("diffusers", "peft", "kohya")


def write_adapter(
    path: str | Path,
    deltas: Iterable[AdapterDelta],
    format: str = "diffusers",
    *,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA file whole: under a temporary name first, then renamed.

    Read again, it gives the same dtypes, bits and scales.

    Args:
        path: of the safetensors file. PEFT's format has an `adapter_config.json` beside it.
        deltas: at most one for each module.
        format: `"diffusers"` (PEFT's keys, alpha in the header where it is not the rank), `"peft"`
            or `"kohya"`.
        alpha: replaces the deltas' own scale by alpha / rank.
        metadata: more text for the header.

    Raises:
        ValueError: an unknown format, no deltas, or two for one module.
        AdapterError: the format can't hold the adapter.
        CallerError, ResourceError: the file can't be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    path = Path(path)
    chosen = _one_each(deltas, alpha)
    header = {"format": "pt", **(metadata or {})}
    if format == "kohya":
        _save(path, _kohya_tensors(chosen), header)
        return
    configs = _configs(chosen, format)
    if format == "peft":
        _write_peft(path, chosen, configs, header)
        return
    if any(d.scale != 1 for d in chosen):
        fields = {f"{c}.{key}": value for c, own in configs.items() for key, value in own.items()}
        header[METADATA_KEY] = json.dumps(fields, indent=2, sort_keys=True)
    _save(path, _dotted_tensors(chosen, DOTTED), header)


def _one_each(deltas: Iterable[AdapterDelta], alpha: float | None) -> list[AdapterDelta]:
    """The deltas in order, with their scale from `alpha` if it is given; one for each module."""
    chosen = sorted(deltas, key=lambda d: (d.component, d.module_path))
    if alpha is not None:
        chosen = [replace(d, scale=alpha / d.rank) for d in chosen]
    counts = Counter((d.component, d.module_path) for d in chosen)
    if not chosen or max(counts.values()) > 1:
        raise ValueError(
            f"deltas: expected one for each of some modules, got {counts.most_common(1)}"
        )
    return chosen


def _write_peft(
    path: Path,
    deltas: list[AdapterDelta],
    configs: dict[str, dict[str, Any]],
    header: dict[str, str],
) -> None:
    if len(configs) > 1:
        raise AdapterError(
            f"a PEFT adapter is of one component; this one has {' and '.join(configs)}"
        )
    for other in sorted(path.parent.glob("*.safetensors")):
        if other.name != path.name and _is_peft(other):
            raise AdapterError(
                f"{other} takes its scales from the {CONFIG_NAME} beside it: write another PEFT"
                " adapter into a folder of its own"
            )
    staged = path.with_name(f"{path.stem}.staged{path.suffix}")
    _save(staged, _dotted_tensors(deltas, dict.fromkeys(configs, PEFT_PREFIX)), header)
    text = json.dumps(next(iter(configs.values())), indent=2, sort_keys=True)
    try:
        # Between these steps there is no adapter, rather than one with another's scale.
        path.unlink(missing_ok=True)
        write_whole(path.parent / CONFIG_NAME, lambda file: file.write(text.encode()))
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _is_peft(path: Path) -> bool:
    """Whether a file's keys are PEFT's; one that can't be read is nobody's adapter."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            return any(key.startswith(PEFT_PREFIX) for key in handle.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _save(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors.torch import save

    # Copies, for trained parameters on any device and for matrices that two modules share.
    owned = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    data = save(owned, metadata=header)
    write_whole(path, lambda file: file.write(data))


def _shaped(value: Tensor, *lead: int, like: Tensor) -> Tensor:
    """`value` as `lead`, with ones behind where `like` is a convolution's matrix."""
    return value.reshape(*lead, *(1,) * (like.dim() - 2))


def _dotted_tensors(deltas: list[AdapterDelta], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = {}
    for delta in deltas:
        module = prefixes[delta.component] + file_path(delta.component, delta.module_path)
        tensors[f"{module}.lora_A.weight"] = delta.a
        tensors[f"{module}.lora_B.weight"] = _shaped(delta.b, *delta.b.shape, like=delta.a)
        if delta.magnitude is not None:
            # PEFT's shapes: (out,), of a convolution (1, out, 1, 1).
            lead = (1, -1) if delta.a.dim() == 4 else (-1,)
            tensors[f"{module}.lora_magnitude_vector"] = _shaped(
                delta.magnitude, *lead, like=delta.a
            )
    return tensors


def _configs(deltas: list[AdapterDelta], format: str) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each component."""
    configs = {}
    for component in sorted({delta.component for delta in deltas}):
        own = [delta for delta in deltas if delta.component == component]
        dora = {delta.magnitude is not None for delta in own}
        if len(dora) > 1:
            raise AdapterError(
                f"{format}: a component is DoRA whole or not at all; some modules of {component}"
                " are and some are not (kohya's format can hold both)"
            )
        fields = _fields(own, format)
        fields |= {"use_dora": True} if dora.pop() else {}
        if format == "peft":
            class_ = {"base_model_class": CLASSES[component], "parent_library": _library(component)}
            fields |= {"peft_type": "LORA", "bias": "none", "auto_mapping": class_}
        configs[component] = fields
    return configs


def _library(component: str) -> str:
    return "transformers" if component.startswith("text_encoder") else "diffusers"


def _fields(deltas: list[AdapterDelta], format: str) -> dict[str, Any]:
    # Without `text_model.`: PEFT matches a path's end, so this fits every version of transformers.
    paths = {d.module_path.removeprefix("text_model."): d for d in deltas}
    stable = False
    alphas = {path: _alpha(d.scale, d.rank) for path, d in paths.items()}
    if None in alphas.values():
        stable = True
        alphas = {path: _alpha(d.scale, math.sqrt(d.rank)) for path, d in paths.items()}
    if None in alphas.values():
        raise _no_alpha(deltas, format)
    rank = Counter(d.rank for d in deltas).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    named = {path: _pattern(path, paths) for path in paths}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(paths),
        "rank_pattern": {named[p]: d.rank for p, d in paths.items() if d.rank != rank},
        "alpha_pattern": {named[p]: value for p, value in alphas.items() if value != alpha},
        **({"use_rslora": True} if stable else {}),
    }


def _pattern(path: str, paths: Iterable[str]) -> str:
    """PEFT's pattern for one module: its path, from the start where another's path ends so."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path


def _alpha(scale: float, divisor: float) -> float | None:
    """The alpha with `alpha / divisor == scale`, bit by bit; None where there is none."""
    near = scale * divisor
    for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / divisor == scale:
            return alpha
    return None


def _no_alpha(deltas: list[AdapterDelta], format: str) -> AdapterError:
    odd = next(d for d in deltas if _alpha(d.scale, d.rank) is None)
    return AdapterError(
        f"{format}: no alpha over rank {odd.rank} is exactly the scale {odd.scale!r} of"
        f" {odd.component}'s {odd.module_path}"
    )


def _kohya_tensors(deltas: list[AdapterDelta]) -> dict[str, Tensor]:
    two = any(delta.component == "text_encoder_2" for delta in deltas)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_"}
    prefixes |= {"text_encoder_2": "lora_te2_", "controlnet": "lora_controlnet_"}
    tensors: dict[str, Tensor] = {}
    for delta in deltas:
        path = file_path(delta.component, delta.module_path).replace(".", "_")
        module = f"{prefixes[delta.component]}{path}"
        if f"{module}.alpha" in tensors:
            raise AdapterError(f"kohya: two modules of {delta.component} would be named {path}")
        alpha = _alpha(delta.scale, delta.rank)
        if alpha is None:
            raise _no_alpha(deltas, "kohya")
        value = torch.tensor(alpha, dtype=torch.float64)
        narrow = value.float()
        tensors[f"{module}.lora_down.weight"] = delta.a
        tensors[f"{module}.lora_up.weight"] = _shaped(delta.b, *delta.b.shape, like=delta.a)
        tensors[f"{module}.alpha"] = narrow if narrow.double() == value else value
        if delta.magnitude is not None:
            tensors[f"{module}.dora_scale"] = _shaped(delta.magnitude, -1, 1, like=delta.a)
    return tensors
