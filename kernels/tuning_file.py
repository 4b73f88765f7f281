"""What `configs/<device>.json` holds after tuning: the choices, with their times, and their origin.

    {"arch": 90,
     "source": {"device": ..., "runs": {when: {"driver": ..., "torch": ..., "triton": ...}}},
     "ops": {op: [{"key": {..., "arch": 90}, "config": {...}, "run": when, "microseconds": {...},
                   "default_microseconds": {...}, ...}]}}

`arch` tells the ahead-of-time compiler for which architecture to compile these. A later run
replaces what it tuned again and keeps the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from heatsink.kernels._config import Key
from heatsink.kernels.tune import Choice

Document = dict[str, Any]


def merge(
    before: Mapping[str, Any] | None,
    choices: Iterable[Choice],
    *,
    arch: int,
    device: str,
    when: str,
    versions: Mapping[str, str],
) -> Document:
    """The file's new contents.

    Args:
        before: its contents so far, if there is one.
        choices: what was found now.
        arch: the device's architecture; part of every key.
        device: its name.
        when: the time of this run, ISO 8601.
        versions: of driver, torch and triton in this run.
    """
    old = before or {"source": {"runs": {}}, "ops": {}}
    ops: dict[str, list[dict[str, Any]]] = {name: list(v) for name, v in old["ops"].items()}
    for choice in choices:
        if choice.error:
            continue
        key = {**choice.key, "arch": arch}
        kept = [entry for entry in ops.get(choice.op, []) if entry["key"] != key]
        ops[choice.op] = [*kept, _entry(choice, key, when)]
    runs = {**old["source"]["runs"], when: dict(versions)}
    used = {entry["run"] for entries in ops.values() for entry in entries}
    return {
        "arch": arch,
        "source": {
            "device": device,
            "runs": {name: run for name, run in runs.items() if name in used},
        },
        "ops": {
            name: sorted(entries, key=lambda entry: str(sorted(entry["key"].items())))
            for name, entries in sorted(ops.items())
        },
    }


def _entry(choice: Choice, key: Key, when: str) -> dict[str, Any]:
    return {
        "key": dict(key),
        "config": choice.config,
        "run": when,
        "microseconds": _microseconds(choice.seconds),
        "default": choice.default,
        "default_microseconds": _microseconds(choice.default_seconds),
        "tried": choice.tried,
        "skipped": len(choice.skipped),
        "complete": choice.complete,
    }


def _microseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {case: round(value * 1e6, 3) for case, value in seconds.items()}
