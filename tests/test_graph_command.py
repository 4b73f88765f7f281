from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from heatsink.cli import app
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.passes.pipeline import NATIVE

MODEL = Path(__file__).resolve().parents[1] / "models" / "emoji"
pytestmark = pytest.mark.skipif(
    not (MODEL / "model_index.json").is_file(), reason="the bundled model is not in this checkout"
)


def _show(*words: str) -> str:
    result = CliRunner().invoke(app, ["graph", "show", str(MODEL), *words])
    if result.exception is not None:
        raise result.exception
    return result.output


def _json(*words: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_show(*words, "--json"))
    return document


def test_a_component_as_the_native_engine_runs_it() -> None:
    found = _json("text_encoder", "--rows", "3")
    assert (found["component"], found["rows"], found["pass"]) == ("text_encoder", 3, None)
    operators = found["graph"]["operators"]
    # Two layers; 24 tokens see each other in 4 heads of 32, for 3 rows.
    assert operators["heatsink.attention"]["nodes"] == 2
    assert operators["heatsink.attention"]["flops"] == 2 * 4 * 3 * 24 * 24 * 128
    assert found["graph"]["total"]["nodes"] == sum(o["nodes"] for o in operators.values())


def test_before_and_after_a_pass() -> None:
    found = _json("vae_decoder", "--diff", "group_norm", "--size", "128x64")
    before, after = found["before"]["operators"], found["after"]["operators"]
    assert before["aten.group_norm"]["nodes"] == after["heatsink.group_norm_silu"]["nodes"] > 0
    assert "aten.group_norm" not in after
    assert found["before"]["total"]["flops"] == found["after"]["total"]["flops"]
    smaller = _json("vae_decoder", "--diff", "group_norm", "--size", "64")
    assert found["before"]["total"]["flops"] == 2 * smaller["before"]["total"]["flops"]


def test_what_leaves_the_loop() -> None:
    found = _json("unet", "--phases", "--rows", "2")["phases"]
    assert list(found) == ["request", "schedule", "step"]
    whole = _json("unet", "--rows", "2")["graph"]["total"]
    assert sum(part["flops"] for part in found.values()) == whole["flops"]
    assert all(0 < part["launches"] <= part["nodes"] for part in found.values())
    table = _show("unet", "--phases")
    assert "once a schedule" in table
    with pytest.raises(InvalidRequest, match="leave --diff out"):
        _show("unet", "--phases", "--diff", "all")


def test_the_table_says_what_went_and_what_came() -> None:
    table = _show("text_encoder", "--diff", "all")
    assert "text_encoder · 1 row · before and after all" in table
    (row,) = (line for line in table.splitlines() if "heatsink.attention" in line)
    assert "0 -> 2" in row
    assert any("total" in line and "->" in line for line in table.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decoder"], "COMPONENT: expected one of .*vae_decoder.*, got 'decoder'"),
        (["unet", "--diff", "magic"], f"--diff: expected all or one of {', '.join(NATIVE)}, got"),
        (["unet", "--rows", "0"], "--rows: expected at least 1, got 0"),
        (["unet", "--size", "60"], "a positive multiple of 32 for this model, got 60"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _show(*words)
