"""Looks up tuned configurations: data in `configs/*.json`, a pure function of op, key and device.

A file holds, for each op, a list of entries `{"key": {...}, "config": {...}}`; the first entry
whose every key item matches is taken. A key item is a value, or a pair [low, high] that holds both
ends. Keys hold per-row dimensions only (and the architecture), never the batch: a configuration
decides in which order sums are taken. `configs/<device>.json` comes before `configs/default.json`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heatsink.kernels.errors import MissingConfig

FOLDER = Path(__file__).parent / "configs"
DEFAULT = "default"

Key = Mapping[str, int | str]
Config = dict[str, int]

# What the interpreter and shape-only runs look up.
_WITHOUT_DEVICE = 80


@dataclass(frozen=True)
class Target:
    """What kernels are chosen for.

    Attributes:
        device: the device's name as its configuration file is called, or empty.
        arch: compute capability as a number: 90 is sm_90.
    """

    device: str
    arch: int


def file_name(device: str) -> str:
    """`NVIDIA H200` -> `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


@functools.cache
def _cuda_target(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(file_name(torch.cuda.get_device_name(index)), 10 * major + minor)


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device; the CPU, under the interpreter, stands for sm_80."""
    if device.type != "cuda":
        return Target("", _WITHOUT_DEVICE)
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def targets(arch: int) -> list[Target]:
    """The targets of an architecture: the default, and each device whose file has keys of it."""
    found = [Target("", arch)]
    for path in sorted(FOLDER.glob("*.json")):
        ops = {} if path.stem == DEFAULT else json.loads(path.read_text("utf-8")).get("ops", {})
        keys = [entry["key"] for entries in ops.values() for entry in entries]
        if any(_matches({"arch": key.get("arch", "")}, {"arch": arch}) for key in keys):
            found.append(Target(path.stem, arch))
    return found


@functools.cache
def _entries(name: str) -> dict[str, list[dict[str, Any]]]:
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        return {}
    entries: dict[str, list[dict[str, Any]]] = json.loads(path.read_text("utf-8"))["ops"]
    return entries


def _matches(wanted: Mapping[str, Any], key: Key) -> bool:
    for name, value in wanted.items():
        if name not in key:
            return False
        found = key[name]
        if isinstance(value, list):
            low, high = value
            if isinstance(found, str) or not low <= found <= high:
                return False
        elif found != value:
            return False
    return True


def lookup(op: str, key: Key, target: Target) -> Config:
    """The configuration of `op` for a key of per-row dimensions on a target.

    Raises:
        MissingConfig: if no entry matches.
    """
    whole = {**key, "arch": target.arch}
    for name in (target.device, DEFAULT):
        for entry in _entries(name).get(op, []) if name else []:
            if _matches(entry["key"], whole):
                return dict(entry["config"])
    raise MissingConfig(
        f"{op}: expected a configuration for {dict(whole)} in configs/{target.device or DEFAULT}"
        f".json or configs/{DEFAULT}.json, got none"
    )
