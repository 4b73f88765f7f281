"""What compiled kernels use of a processor, against hard limits and a committed table.

The table holds, for the Triton version that it was written with, each case's registers, spilled
bytes and shared memory. More than it says is a problem; a spill needs a `reason` there. With
another version of Triton only the limits hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heatsink.kernels._compile import Binary
from heatsink.kernels._config import FOLDER

TABLE = FOLDER / "resources.json"

_KIB = 1024
# What a block can have, by architecture (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB, 120: 99 * _KIB}
REGISTER_LIMIT = 255
_REGISTER_FILE = 65536
# From sm_90 on a cubin counts the system's own kilobyte of each block as the function's; what a
# block can have, above, does not hold it.
_RESERVED = 1024
_WARP = 32


@dataclass(frozen=True)
class Row:
    """What a kernel uses; `reason` says why it may spill."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    reason: str = ""


def used(binary: Binary, arch: int) -> Row:
    """A binary's row."""
    static = binary.static_shared
    if arch >= 90 and static >= _RESERVED:
        static -= _RESERVED
    return Row(binary.registers, binary.spill_bytes, binary.shared + static)


def over_limits(binary: Binary, arch: int) -> list[str]:
    """Why a binary can't be launched on its architecture; nothing if it can."""
    row = used(binary, arch)
    # Registers are given out to a warp in units of 8 a thread.
    block = -(-row.registers // 8) * 8 * _WARP * binary.warps
    bounds = (
        ("shared_bytes", row.shared_bytes, SHARED_LIMIT[arch]),
        ("registers", row.registers, REGISTER_LIMIT),
        ("registers of a block", block, _REGISTER_FILE),
    )
    return [f"{what}: at most {most}, got {value}" for what, value, most in bounds if value > most]


def _order(name: str) -> tuple[str, int]:
    """`op/case/kernel sm_90` by use, then by architecture as a number."""
    use, _, arch = name.rpartition(" sm_")
    return use, int(arch)


@dataclass(frozen=True)
class Table:
    """The committed rows by use (`op/case/kernel sm_90`), and the Triton version they are of."""

    triton: str
    rows: Mapping[str, Row]

    @classmethod
    def read(cls, path: Path = TABLE) -> Table:
        """The table in a file; an empty one if there is none."""
        if not path.is_file():
            return cls("", {})
        found = json.loads(path.read_text("utf-8"))
        return cls(found["triton"], {name: Row(**row) for name, row in found["rows"].items()})

    def write(self, path: Path = TABLE) -> None:
        """Write it, a row a line, so that a change shows as one."""
        lines = []
        for name, row in sorted(self.rows.items(), key=lambda item: _order(item[0])):
            fields: dict[str, Any] = {
                "registers": row.registers,
                "spill_bytes": row.spill_bytes,
                "shared_bytes": row.shared_bytes,
            }
            if row.reason:
                fields["reason"] = row.reason
            lines.append(f"    {json.dumps(name)}: {json.dumps(fields)}")
        head = f'  "triton": {json.dumps(self.triton)},\n  "rows": {{\n'
        path.write_text("{\n" + head + ",\n".join(lines) + "\n  }\n}\n", "utf-8")

    def problems(self, name: str, found: Row) -> list[str]:
        """What is worse in `found` than the table's row says."""
        row = self.rows.get(name)
        if row is None:
            return ["expected a row in the table, got none"]
        told = [
            f"{what}: at most {most}, got {value}"
            for what, value, most in (
                ("registers", found.registers, row.registers),
                ("spill_bytes", found.spill_bytes, row.spill_bytes),
                ("shared_bytes", found.shared_bytes, row.shared_bytes),
            )
            if value > most
        ]
        return told + self.spills(name, found)

    def spills(self, name: str, found: Row) -> list[str]:
        """The spills of `found` that the table gives no reason for."""
        if not found.spill_bytes or (name in self.rows and self.rows[name].reason):
            return []
        return [f"{found.spill_bytes} bytes are spilled and the table gives no reason"]

    def updated(self, triton: str, found: Mapping[str, Row], known: Iterable[str]) -> Table:
        """A table of what was found, with the reasons of this one.

        Args:
            triton: the version that compiled.
            found: rows by use.
            known: the uses that there are; rows of others are dropped. Rows that were not compiled
                now are kept, if they are of the same version.
        """
        kept = self.rows if triton == self.triton else {}
        rows = {name: row for name, row in kept.items() if name in set(known)}
        for name, row in found.items():
            reason = self.rows[name].reason if name in self.rows and row.spill_bytes else ""
            rows[name] = replace(row, reason=reason)
        return Table(triton, rows)
