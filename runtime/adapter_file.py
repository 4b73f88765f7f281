"""Reads LoRA files (safetensors; diffusers, PEFT, kohya): every key is applied, or none."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime import adapter_config
from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas, fuse, fuse_model, scaled
from heatsink.runtime.adapter_family import NAMES, family_of, foreign
from heatsink.runtime.adapter_keys import Key, Unknown, parse
from heatsink.runtime.adapter_module import read_module
from heatsink.runtime.adapter_open import open_adapter
from heatsink.runtime.adapter_receipt import AdapterReceipt
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.adapter_write import write_adapter
from heatsink.runtime.components import lasting_name
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import AdapterError, InvalidRequest
from heatsink.runtime.weights import Entry

if TYPE_CHECKING:
    from heatsink.runtime.model import Model

__all__ = [
    "AdapterDelta", "AdapterReceipt", "Targets", "digest_deltas", "fuse", "fuse_model",
    "inspect_adapter", "read_adapter", "scaled", "write_adapter",
]  # fmt: skip

NOT_JUDGED = "no model was given: whether its modules exist and the shapes fit is not judged"


def read_adapter(
    path: str | Path, target: Model | Targets, *, ignore: Sequence[str] = ()
) -> list[AdapterDelta]:
    """Read a LoRA file whole, or refuse it whole.

    The scale of a module is alpha / rank: alpha from its `alpha` key (kohya), from the metadata
    diffusers writes into the header, or from PEFT's `adapter_config.json`; 1 where none gives it.

    Args:
        path: a safetensors file.
        target: the model (or its `Targets`) the adapter is for.
        ignore: keys, or shell patterns of keys, that are read as if the file didn't hold them.

    Returns:
        The deltas ordered by component and module path; their tensors are mapped from the file.

    Raises:
        UnsafeFile: the file is a pickle.
        DamagedFile: it is empty, truncated or no safetensors.
        AdapterError: `refused` maps each key that can't be applied to its reason.
        InvalidRequest: a pattern of `ignore` matches no key.
    """
    reading = _read(Path(path), target, ignore)
    if reading.refused:
        raise AdapterError(reading.receipt("").refusal(), reading.refused)
    return reading.deltas


def inspect_adapter(
    path: str | Path, target: Model | Targets | None = None, *, ignore: Sequence[str] = ()
) -> tuple[AdapterReceipt, list[AdapterDelta]]:
    """Read a LoRA file and account for every key.

    Args:
        path: a safetensors file.
        target: as of `read_adapter`. Without one, targets and shapes are not judged, module paths
            are the file's own spelling, and kohya's keep their underscores.
        ignore: as of `read_adapter`.

    Returns:
        The receipt, and the deltas; none where a key is refused. Without a target the receipt has
        no digest.

    Raises:
        UnsafeFile, DamagedFile, AdapterError: nothing can be read of the file.
        InvalidRequest: a pattern of `ignore` matches no key.
    """
    reading = _read(Path(path), target, ignore)
    receipt = reading.receipt(sha256_file(path))
    if reading.refused:
        return receipt, []
    if reading.targets is None:
        # A digest is of the modules' true names and shapes.
        return receipt, reading.deltas
    return replace(receipt, digest=digest_deltas(reading.deltas)), reading.deltas


Places = dict[tuple[str, str], dict[str, str]]
"""(component, module path) -> role -> key."""


@dataclass
class _Reading:
    """A file while it is read."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    targets: Targets | None
    peft_component: str = ""
    keys: dict[str, Key] = field(default_factory=dict)
    places: Places = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    deltas: list[AdapterDelta] = field(default_factory=list)

    def receipt(self, sha256: str) -> AdapterReceipt:
        used = {key: self.entries[key] for roles in self.places.values() for key in roles.values()}
        matrices = [e for k, e in used.items() if self.keys[k].role != "alpha"]
        downs = [e.shape[:1] for k, e in used.items() if self.keys[k].role == "down"]
        return AdapterReceipt(
            path=str(self.path),
            sha256=sha256,
            format="+".join(sorted({key.format for key in self.keys.values()})) or "unknown",
            digest=None,
            dtypes=tuple(sorted({str(e.dtype).removeprefix("torch.") for e in matrices})),
            ranks=tuple(sorted({rank for shape in downs for rank in shape})),
            applied={
                key: (*place, role)
                for place, roles in sorted(self.places.items())
                for role, key in sorted(roles.items())
                if key not in self.refused
            },
            refused=self.refused,
            ignored=tuple(self.ignored),
            notes=tuple(self.notes),
        )


def _read(path: Path, target: Model | Targets | None, ignore: Sequence[str]) -> _Reading:
    entries, metadata = open_adapter(path)
    targets = target if target is None or isinstance(target, Targets) else Targets.of(target)
    reading = _Reading(path, entries, metadata, targets)
    if targets is None:
        reading.notes.append(NOT_JUDGED)
    reading.ignored = _ignored(path, entries, ignore)
    for key in entries.keys() - set(reading.ignored):
        try:
            reading.keys[key] = parse(key)
        except Unknown as reason:
            reading.refused[key] = str(reason)
    configs = _configs(reading)
    _place(reading)
    _read_modules(reading, configs)
    _refuse_partly_ignored(reading)
    _name_the_family(reading)
    reading.refused = dict(sorted(reading.refused.items()))
    return reading


def _ignored(path: Path, entries: Mapping[str, Entry], patterns: Sequence[str]) -> list[str]:
    """The keys that any of the patterns matches, in order."""
    if isinstance(patterns, str):
        raise InvalidRequest(f"ignore: expected a list of keys or patterns, got {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        # A key is no pattern where it holds square brackets.
        matches = {k for k in entries if k == pattern or fnmatch.fnmatchcase(k, pattern)}
        if not matches:
            raise InvalidRequest(f"ignore: {pattern!r} matches no key of {path}")
        found |= matches
    return sorted(found)


def _configs(reading: _Reading) -> dict[str, dict[str, Any]]:
    """PEFT's configurations by component; PEFT's keys get their component."""
    peft = {key: parsed for key, parsed in reading.keys.items() if parsed.format == "peft"}
    if not peft:
        return adapter_config.in_header(reading.path, reading.metadata, reading.keys)
    config = adapter_config.beside(reading.path)
    component = adapter_config.component_of(config) or _best_component(reading, peft)
    reading.peft_component = component
    for key, parsed in peft.items():
        reading.keys[key] = replace(parsed, component=component)
    return {component: config}


def _best_component(reading: _Reading, peft: Mapping[str, Key]) -> str:
    """The component that most of PEFT's keys fit, for a configuration that names no class."""
    targets = reading.targets
    if targets is None:
        text = any(key.name.startswith(("text_model.", "encoder.layers.")) for key in peft.values())
        return "text_encoder" if text else "unet"

    def fits(component: str, name: str, key: Key) -> bool:
        try:
            path = targets.locate(replace(key, component=component))
        except Unknown:
            return False
        axis = 0 if key.role == "up" else 1
        mine, shape = reading.entries[name].shape, targets.shapes[component][path]
        return mine[axis : axis + 1] == shape[axis : axis + 1]

    matrices = {name: key for name, key in peft.items() if key.role in ("up", "down")}
    scores = {
        component: sum(fits(component, name, key) for name, key in matrices.items())
        for component in adapter_config.CLASSES
        if component in targets.shapes
    }
    best = max(scores.values())
    chosen = [component for component, score in scores.items() if score == best]
    if best and len(chosen) > 1:
        reading.notes.append(
            f"the file fits {' and '.join(chosen)} alike, and its configuration names no class:"
            f" it is taken for the {chosen[0]}"
        )
    return chosen[0]


def _module_path(reading: _Reading, key: Key) -> str:
    if reading.targets is not None:
        return reading.targets.locate(key)
    # Kohya's underscores could each have been a dot: only a model tells.
    return key.name if key.format == "kohya" else lasting_name(key.component, key.name)


def _place(reading: _Reading) -> None:
    """Sort the keys by module and role; refuse those without a target, and two for one place."""
    for name, key in sorted(reading.keys.items()):
        try:
            path = _module_path(reading, key)
        except Unknown as reason:
            reading.refused[name] = str(reason)
            continue
        roles = reading.places.setdefault((key.component, path), {})
        first = roles.setdefault(key.role, name)
        if first != name:
            reading.refused[name] = f"contradiction: the same target as {first}"
            reading.refused[first] = f"contradiction: the same target as {name}"


def _read_modules(reading: _Reading, configs: Mapping[str, Mapping[str, Any]]) -> None:
    contracted = 0
    for (component, module), roles in sorted(reading.places.items()):
        tensors = {role: reading.entries[key] for role, key in roles.items()}
        shape = reading.targets.shapes[component][module] if reading.targets else None
        try:
            config = configs.get(component)
            if configs and config is None and "alpha" not in roles:
                told = ", ".join(sorted(configs))
                raise Unknown(
                    f"contradiction: the metadata gives the scales of {told},"
                    f" and none of {component}"
                )
            reading.deltas.append(read_module(component, module, tensors, shape, config))
        except Unknown as reason:
            reading.refused.update(dict.fromkeys(roles.values(), str(reason)))
            continue
        contracted += "mid" in roles
    if contracted:
        reading.notes.append(
            f"lora_mid of {contracted} modules is contracted into their A: in float64, kept in"
            " float32"
        )


def _refuse_partly_ignored(reading: _Reading) -> None:
    """A module is ignored whole: without its alpha, say, the rest of it would mean another."""
    for name in reading.ignored:
        try:
            key = parse(name)
            key = replace(key, component=key.component or reading.peft_component)
            path = _module_path(reading, key)
        except Unknown:
            continue
        roles = reading.places.get((key.component, path), {})
        if roles and key.role not in roles:
            reason = f"incomplete: {name} of the same module is ignored"
            reading.refused.update(dict.fromkeys(roles.values(), reason))


def _name_the_family(reading: _Reading) -> None:
    """Say so where keys don't fit because the file is for another architecture."""
    family = family_of({key: entry.shape for key, entry in reading.entries.items()})
    if family is not None and reading.targets is None:
        reading.notes.append(f"by its names the file is for {NAMES.get(family, family)}")
    why = foreign(family, reading.targets) if reading.refused else None
    for key, reason in reading.refused.items():
        if why and reason.startswith(("unknown target:", "wrong shape:", "no tensor of a LoRA")):
            reading.refused[key] = f"another architecture: {why} ({reason})"
