"""`heatsink generate --mask --control`, and how these and `--controlnet` are read."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from heatsink import cli, flags
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    sd1_folder: Path,
) -> Iterator[Run]:
    """Runs `heatsink generate "a cat"` in an empty folder; gives its code and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    handler = signal.getsignal(signal.SIGTERM)

    def generate(*arguments: Any) -> tuple[int, str]:
        command = ["heatsink", "generate", "a cat", "--engine", sd1_folder, "-q", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code is None or isinstance(stopped.value.code, int)
        return stopped.value.code or 0, capsys.readouterr().err

    yield generate
    signal.signal(signal.SIGTERM, handler)


def test_a_mask_paints_a_part_of_the_picture_anew(run: Run, sd1_engine: Engine) -> None:
    start = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    start.save("start.png")
    mask.save("mask.png")
    code, err = run("--image", "start.png", "--mask", "mask.png", "--steps", 2)
    assert (code, err) == (0, "")
    (entry,) = json.loads(Path("out/receipts.json").read_text())
    mine = sd1_engine.generate("a cat", image=start, mask=mask, steps=2)
    assert entry["receipt"]["image"] == mine.receipts[0].image
    assert entry["receipt"]["steps"] == 2


def test_pictures_reach_the_request(run: Run) -> None:
    Image.new("RGB", (8, 8)).save("lines.png")
    code, err = run("--control", "lines=lines.png:0.5")
    assert code == 2
    assert "NotBuilt: control: this engine has no ControlNet lines (it has: none)" in err
    assert os.listdir() == ["lines.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "missing.png"], "--mask: missing.png can't be read"),
        (["--control", "lines"], "--control: expected NAME=IMAGE:SCALE, got 'lines'"),
        (["--control", "a=b.png", "--control", "a=c.png"], "--control: 'a' is given twice"),
        (["--control", "a=b.png:much"], "--control: expected IMAGE:SCALE, such as lines.png:0.8"),
        (["--control", "a=missing.png"], "--control: missing.png can't be read"),
    ],
)
def test_what_is_refused_says_so_in_one_line(run: Run, arguments: list[str], message: str) -> None:
    code, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_controlnets_and_their_pictures_are_named() -> None:
    assert flags.parse_controls(["lines=a.png:0.5", "depth=b/c=d.png"]) == {
        "lines": (Path("a.png"), 0.5),
        "depth": (Path("b/c=d.png"), 1.0),
    }
    assert flags.parse_controlnets(["lines=nets/a", "nets/depth/"]) == {
        "lines": Path("nets/a"),
        "depth": Path("nets/depth/"),
    }
    for texts, message in (
        (["a="], "--controlnet: expected NAME=FOLDER, got 'a='"),
        (["a=b", "a=c"], "--controlnet: two are called 'a'"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            flags.parse_controlnets(texts)
