"""Native engines with adapter ports: one graph for all rows, on the bank's own memory."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import heatsink
from heatsink.export import exactness, ported_exactness
from heatsink.export.manifest import FILE_NAME, Manifest, read_manifest
from heatsink.export.opening import open_session
from heatsink.export.port_table import read_table
from heatsink.runtime.backends.native_ports import PortedNativeSession
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import EngineMismatch, InvalidRequest
from heatsink.runtime.graph.phases import Phase
from heatsink.runtime.native.program import Program
from heatsink.runtime.native.workspace import Workspace

STEPS = 3


def pictures(engine: Engine, styles: list[Any], prompt: str = "a fox") -> list[bytes]:
    count = len(styles)
    result = engine.generate(
        [prompt] * count, negative_prompt="blur", seed=[7] * count, steps=STEPS, guidance=3.0,
        adapters=styles,
    )  # fmt: skip
    return [np.asarray(image).tobytes() for image in result.images]


def test_the_manifest_tells_the_ports(sd1_ported_folder: Path, sd1_folder: Path) -> None:
    manifest = read_manifest(sd1_ported_folder)
    assert (manifest.backend, manifest.ports.adapter_slots) == ("torch", 3)
    assert sorted(manifest.ports.components) == ["text_encoder", "unet"]
    plain = read_manifest(sd1_folder)
    for name, part in manifest.ports.components.items():
        assert part.graph == f"{name}_ports.graph.json"
        assert (part.counts, part.refused_counts, part.twin) == ([4], [], True)
        assert part.known.buckets == [1, 2, 3, 4]
        # The weights are there once, and are those of the engine without ports.
        assert [f.name for f in sd1_ported_folder.glob(f"{name}*.safetensors")] == [
            f"{name}.safetensors"
        ]
        known = manifest.exactness.components[name]
        assert known.answers == plain.exactness.components[name].answers


def test_styles_in_one_call_are_calls_of_one(sd1_styled_engine: Engine, sd1_folder: Path) -> None:
    styles: list[Any] = [None, "A", {"B": 0.75}, {"A": 0.5, "B": 1.0, "C": -0.25}]
    together = pictures(sd1_styled_engine, styles)
    assert [pictures(sd1_styled_engine, [style])[0] for style in styles] == together
    assert len(set(together)) == 4
    # No adapter: what an engine without ports draws.
    assert pictures(heatsink.load(sd1_folder, threads=1), [None]) == together[:1]


def test_every_run_of_any_rows_is_one_replay(
    sd1_styled_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = sd1_styled_engine._components["unet"]
    component = unet._session._component if unet._session else unet._open()._component
    # All buckets are checked, and all values kept.
    every: list[list[Any]] = [["A"], ["A", None], [None, None], [{"A": 0.5, "B": 1.0}, None]]
    for styles in every:
        pictures(sd1_styled_engine, styles)
    seen: list[tuple[int, int]] = []
    replay = Program.replay

    def watch(self: Program) -> None:
        if any(program is self for program in component._step._programs.values()):
            seen.append((self.batch, self.launches))
        replay(self)

    monkeypatch.setattr(Program, "replay", watch)
    launches = set()
    for styles in every:
        seen.clear()
        pictures(sd1_styled_engine, styles)
        assert [batch for batch, _ in seen] == [2 * len(styles)] * STEPS
        launches |= {count for _, count in seen}
    assert len(launches) == 1


def test_a_slot_with_other_content_is_another_value(
    sd1_styled_engine: Engine, sd1_ported_folder: Path, sd1_styles: Mapping[str, Path]
) -> None:
    # Five adapters in three slots: the same slot means one after the other.
    order = ["A", "B", "C", "D", "E", "A", "D", "B"]
    found = [pictures(sd1_styled_engine, [name])[0] for name in order]
    for name in "ABCDE":
        fresh = heatsink.load(sd1_ported_folder, threads=1)
        fresh.add_adapter("only", sd1_styles[name])
        (expected,) = pictures(fresh, ["only"])
        assert {found[at] for at, each in enumerate(order) if each == name} == {expected}


def test_text_and_adapters_are_computed_once_a_request(
    sd1_ported_folder: Path, sd1_styles: Mapping[str, Path]
) -> None:
    engine = heatsink.load(sd1_ported_folder, threads=1)
    engine.add_adapter("A", sd1_styles["A"])

    def rows() -> dict[Phase, int]:
        unet: Any = engine._components["unet"]
        component = unet._session._component
        return {phase: use.rows for phase, use in component.uses().items()}

    pictures(engine, ["A"])
    before = rows()
    pictures(engine, ["A"])
    again = rows()
    assert again[Phase.REQUEST] == before[Phase.REQUEST]
    assert again[Phase.STEP] == before[Phase.STEP] + 2 * STEPS
    # Another weight of the adapter: its part of keys and values is computed again.
    pictures(engine, [{"A": 0.5}])
    assert rows()[Phase.REQUEST] == again[Phase.REQUEST] + 2


def test_another_answer_with_adapters_refuses_the_bucket(
    sd1_ported_folder: Path, sd1_styles: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd1_ported_folder, tmp_path / "engine"))
    raw = json.loads((folder / FILE_NAME).read_text())
    raw["ports"]["components"]["unet"]["known"]["answers"][0] = "0" * 16
    del raw["digest"]
    raw["digest"] = Manifest.model_validate(raw).digest
    (folder / FILE_NAME).write_text(json.dumps(raw))
    engine = heatsink.load(folder, threads=1)
    engine.add_adapter("A", sd1_styles["A"])
    assert pictures(engine, [None])
    with pytest.raises(EngineMismatch, match=r"unet with adapters: batch 2 .* known answer"):
        pictures(engine, ["A"])


def test_a_bank_that_is_brought_along_leaves_the_engines_own_alone(
    sd1_styled_engine: Engine, sd1_ported_folder: Path
) -> None:
    (before,) = pictures(sd1_styled_engine, ["A"])
    assert sd1_styled_engine.bank is not None
    unet: Any = sd1_styled_engine._components["unet"]
    layout = read_table(sd1_ported_folder, "adapters.json")[0]["unet"]
    manifest = read_manifest(sd1_ported_folder)
    part = manifest.ports.components["unet"]
    inputs = manifest.components["unet"].inputs
    ported_exactness.check(unet._open(), inputs, layout, part.counts, part.known, 2, 4)
    assert pictures(sd1_styled_engine, ["A"]) == [before]


def test_banks_that_two_threads_bring_along_do_not_mix(
    sd1_ported_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(sd1_ported_folder)
    workspace = Workspace()
    brought: list[Any] = []
    session: Any = open_session(
        manifest, sd1_ported_folder, "text_encoder", threads=1, ported=True, workspace=workspace
    )
    layout = read_table(sd1_ported_folder, "adapters.json")[0]["text_encoder"]
    values = exactness.probe(manifest.components["text_encoder"].inputs, 1, 1)
    adapted = ported_exactness.port_inputs([[(0, 1.0)]], 4)
    bring = PortedNativeSession._bring

    def watch(self: Any, bank: Mapping[str, Any]) -> Any:
        brought.append(bank)
        return bring(self, bank)

    monkeypatch.setattr(PortedNativeSession, "_bring", watch)
    bank = ported_exactness.bank_probe(layout, [0], 1)
    worker = threading.Thread(target=session.run, args=({**values, **bank, **adapted},))
    with workspace.lock:
        worker.start()
        worker.join(0.3)
        # Another call runs on the bank that it brought.
        assert brought == []
        assert worker.is_alive()
    worker.join()
    assert len(brought) == 1


def test_rows_with_adapters_and_no_bank_are_refused(sd1_ported_folder: Path) -> None:
    manifest = read_manifest(sd1_ported_folder)
    session = open_session(manifest, sd1_ported_folder, "unet", threads=1, ported=True)
    values = exactness.probe(manifest.components["unet"].inputs, 2, 1)
    adapted = ported_exactness.port_inputs([[(0, 1.0)], []], 4)
    with pytest.raises(InvalidRequest, match="there is no bank"):
        session.run({**values, **adapted})
    assert session.run(values)["out"].shape[0] == 2
