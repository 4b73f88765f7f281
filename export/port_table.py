"""The file of an engine with ports that says how its bank is laid out and how adapters are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.port_layout import PortLayout

TABLE = "adapters.json"


def write_table(folder: Path, found: Mapping[str, PortLayout], targets: Targets) -> str:
    """Write what an opened engine needs to read adapter files and to lay out its bank."""
    fields = {
        "layouts": [layout.as_dict() for layout in found.values()],
        "targets": targets.as_dict(),
    }
    text = json.dumps(fields, indent=0, sort_keys=True)
    (folder / TABLE).write_text(text + "\n", encoding="utf-8")
    return TABLE


def read_table(folder: Path, name: str) -> tuple[dict[str, PortLayout], Targets]:
    """The inverse of `write_table`: layouts by component, and the modules."""
    fields = json.loads((folder / name).read_text(encoding="utf-8"))
    found = [PortLayout.from_dict(values) for values in fields["layouts"]]
    return {layout.component: layout for layout in found}, Targets.from_dict(fields["targets"])
