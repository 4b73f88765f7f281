"""Reads LoRA files (safetensors; diffusers, PEFT, kohya): every key is applied, or none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas, fuse, fuse_model, scaled
from heatsink.runtime.adapter_keys import PEFT_PREFIX, Targets, Unknown, place
from heatsink.runtime.adapter_write import METADATA_KEY, write_adapter
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.weights import Entry, open_safetensors

if TYPE_CHECKING:
    from heatsink.runtime.model import Model

__all__ = [
    "AdapterDelta", "Targets", "digest_deltas", "fuse", "fuse_model", "read_adapter", "scaled",
    "write_adapter",
]  # fmt: skip


def read_adapter(path: str | Path, target: Model | Targets) -> list[AdapterDelta]:
    """Read a LoRA file whole, or refuse it whole.

    The scale of a module is alpha / rank: alpha from its `alpha` key (kohya), from the metadata
    diffusers writes into the header, or from PEFT's `adapter_config.json`; 1 where none gives it.

    Args:
        path: a safetensors file.
        target: the model (or its `Targets`) the adapter is for.

    Returns:
        The deltas ordered by component and module path; their tensors are mapped from the file.

    Raises:
        UnsafeFile: the file is a pickle.
        AdapterError: it is damaged, or `refused` maps each key that can't be applied to its reason.
    """
    path = Path(path)
    targets = target if isinstance(target, Targets) else Targets.of(target)
    entries, metadata = open_safetensors(path, AdapterError)
    if not entries:
        raise AdapterError(f"{path} holds no tensors")
    groups, refused = _by_module(entries, targets)
    configs = _peft_configs(path, entries, metadata)
    deltas = []
    for (component, module), keys in sorted(groups.items()):
        tensors = {role: entries[key] for role, key in keys.items()}
        try:
            shape = targets.shapes[component][module]
            config = configs.get(component)
            deltas.append(_delta(component, module, tensors, shape, config))
        except Unknown as reason:
            refused.update(dict.fromkeys(keys.values(), str(reason)))
    if refused:
        told = "; ".join(f"{key}: {why}" for key, why in list(refused.items())[:5])
        raise AdapterError(
            f"{path}: {len(refused)} of {len(entries)} keys can't be applied, so none is: {told}",
            refused,
        )
    return deltas


def _by_module(
    keys: Iterable[str], targets: Targets
) -> tuple[dict[tuple[str, str], dict[str, str]], dict[str, str]]:
    """The keys by (component, module path) and role, and the refused ones with their reasons."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    refused: dict[str, str] = {}
    for key in keys:
        try:
            component, module, role = place(key, targets)
        except Unknown as reason:
            refused[key] = str(reason)
            continue
        first = groups.setdefault((component, module), {}).setdefault(role, key)
        if first != key:
            refused[key] = f"the same target as {first}"
            refused[first] = f"the same target as {key}"
    return groups, refused


def _delta(
    component: str,
    module: str,
    tensors: Mapping[str, Entry],
    shape: tuple[int, ...],
    config: Mapping[str, Any] | None,
) -> AdapterDelta:
    for role in ("down", "up"):
        if role not in tensors:
            raise Unknown(f"incomplete: no {role} matrix (lora_{'A' if role == 'down' else 'B'})")
        if len(tensors[role].shape) not in (2, 4):
            raise Unknown(f"wrong shape: the {role} matrix is {tensors[role].shape}")
    a, b = _as_matrices(tensors["down"].read(), tensors["up"].read(), shape)
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise Unknown(f"rank mismatch: down has rank {a.shape[0]}, up has rank {b.shape[1]}")
    alpha = tensors["alpha"].read().double().reshape(-1).tolist() if "alpha" in tensors else None
    if alpha is not None and (len(alpha) != 1 or not math.isfinite(alpha[0])):
        raise Unknown(f"alpha is {alpha}, expected one finite number")
    if alpha is not None and config is not None:
        raise Unknown("alpha is given twice: as a key and in the metadata")
    for name, value in (("down", a), ("up", b)):
        if not bool(torch.isfinite(value).all()):
            raise Unknown(f"non-finite: the {name} matrix holds NaN or infinity")
    rank = int(a.shape[0])
    scale = alpha[0] / rank if alpha is not None else _peft_scale(config, module, rank)
    return AdapterDelta(component, module, a, b, scale)


def _as_matrices(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`a` as `(r, *shape[1:])`, `b` as `(out, r)`; 1x1 convolutions and linears are the same."""
    if b.dim() == 4:
        if b.shape[2:] != (1, 1):
            raise Unknown(f"wrong shape: the up matrix is a {tuple(b.shape[2:])} convolution")
        b = b.flatten(1)
    pointwise = shape[2:] in ((), (1, 1)) and a.shape[2:] in ((), (1, 1))
    if pointwise and a.shape[1] == shape[1]:
        a = a.reshape(a.shape[0], *shape[1:])
    if tuple(a.shape[1:]) != shape[1:] or b.shape[0] != shape[0]:
        raise Unknown(
            f"wrong shape: down {tuple(a.shape)} and up {tuple(b.shape)} for a weight {shape}"
        )
    return a, b


def _peft_configs(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component, from the header or from the file PEFT writes beside."""
    if any(key.startswith(PEFT_PREFIX) for key in entries):
        beside = path.parent / "adapter_config.json"
        if not beside.is_file():
            raise AdapterError(
                f"{path} was written by PEFT, which keeps alpha in adapter_config.json:"
                " that is missing beside it"
            )
        return {"unet": _json_object(beside.read_text(encoding="utf-8"), beside)}
    if METADATA_KEY not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _json_object(metadata[METADATA_KEY], path).items():
        component, _, field = key.partition(".")
        configs.setdefault(component, {})[field] = value
    return configs


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as cause:
        raise AdapterError(f"{path}: the adapter's configuration is not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: the adapter's configuration is no JSON object")
    return value


def _peft_scale(config: Mapping[str, Any] | None, module: str, rank: int) -> float:
    """The scale PEFT configures: alpha / r, or alpha / sqrt(r) if rank-stabilised; else 1."""
    if config is None:
        return 1.0
    if config.get("use_dora") or config.get("lora_bias"):
        raise Unknown("the configuration asks for DoRA or biases, which are not supported")
    r = _pattern(config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if r != rank:
        raise Unknown(f"rank mismatch: the configuration says {r}, the matrices have {rank}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise Unknown(f"the configuration's alpha is {alpha!r}, expected a finite number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(table: Any, module: str, default: Any) -> Any:
    """PEFT's lookup: a pattern is a module's path or the end of one."""
    for pattern, value in (table or {}).items():
        bare = str(pattern).removeprefix("^").removeprefix("text_model.")
        # PEFT takes any regular expression; one from a stranger's file is not run, nor guessed at.
        if not re.fullmatch(r"[\w.]+", bare):
            raise Unknown(f"the configuration's pattern {pattern!r} is no module path")
        if f".{module}".endswith(f".{bare}"):
            return value
    return default
