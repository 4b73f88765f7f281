"""`heatsink kernels tune`: the file that it keeps, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heatsink import cli, tuning
from heatsink.kernels._config import Target
from heatsink.kernels.tune import Choice
from heatsink.runtime.errors import CallerError, InvalidRequest

CONFIG = {"BLOCK_R": 1, "BLOCK_W": 256, "warps": 4}


def choice(width: int, **changes: Any) -> Choice:
    fields: dict[str, Any] = {"seconds": {"a": 1e-5}, "default_seconds": {"a": 2e-5}}
    return Choice("silu_mul", {"width": width}, CONFIG, CONFIG, **{**fields, **changes})


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def failure(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["heatsink", "kernels", "tune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MissingDevice: expected a CUDA device, found none"),
        (("--op", "gelu"), "InvalidRequest: --op: expected one of"),
        (("--seconds", "0"), "InvalidRequest: --seconds: expected more than 0, got 0"),
    ],
)
def test_the_command_fails_in_one_line(
    arguments: tuple[str, ...],
    message: str,
    without_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failure(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"heatsink: {message}")
    assert captured.err.count("\n") == 1


def test_an_op_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InvalidRequest, match=r"silu_mul.*got 'gelu'"):
        tuning.select(["silu_mul", "gelu"])
    assert [op.name for op in tuning.select(["silu_mul"])] == ["silu_mul"]


def test_every_choice_is_in_the_file_as_soon_as_it_is_made(
    tmp_path: Path, without_cuda: None
) -> None:
    path = tmp_path / "device.json"
    keeper = tuning.Keeper(path, Target("device", 90))
    keeper.add(choice(8))
    first = json.loads(path.read_text())
    assert [e["key"] for e in first["ops"]["silu_mul"]] == [{"width": 8, "arch": 90}]
    keeper.add(choice(16))
    assert len(json.loads(path.read_text())["ops"]["silu_mul"]) == 2
    (run,) = first["source"]["runs"].values()
    assert run["torch"] == torch.__version__
    assert {"driver", "triton", "cuda", "python"} <= set(run)
    later = tuning.Keeper(path, Target("device", 90))
    later.add(choice(16, seconds={"a": 5e-6}))
    widths = {
        e["key"]["width"]: e["microseconds"]["a"]
        for e in json.loads(path.read_text())["ops"]["silu_mul"]
    }
    assert widths == {8: 10.0, 16: 5.0}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"ops": {}}', '{"source": "reasoning", "ops": {}}'],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "default.json"
    path.write_text(text)
    with pytest.raises(CallerError, match=r"default\.json"):
        tuning.Keeper(path, Target("device", 90))
    assert path.read_text() == text


def test_lines_say_what_was_chosen_and_why_others_were_not() -> None:
    skipped = [{"config": {}, "reason": "OutOfResources: shared memory"}] * 2
    lines = tuning.choice_lines(choice(8, tried=4, skipped=skipped, complete=False))
    assert lines == [
        "silu_mul {'width': 8}: default kept, of 4 tried; a 20.0 -> 10.0 us; not all were tried, "
        "the time was up",
        "  skipped 2: OutOfResources: shared memory",
    ]
    assert tuning.choice_lines(choice(8, error="the default: no")) == [
        "silu_mul {'width': 8}: not tuned, the default: no"
    ]
