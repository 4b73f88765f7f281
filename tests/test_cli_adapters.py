"""`heatsink generate --adapter`: what it applies, and what it refuses before any work."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from heatsink import cli, flags
from heatsink.runtime.adapter_file import AdapterDelta, Targets, write_adapter
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.engine import Engine
from heatsink.runtime.model import Model
from heatsink.runtime.port_layout import PortLayout

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Runs `heatsink generate "a cat"` in an empty folder; gives its code and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    handler = signal.getsignal(signal.SIGTERM)

    def generate(engine: Path, *arguments: Any) -> tuple[int, str]:
        command = ["heatsink", "generate", "a cat", "--engine", engine, "-q", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code is None or isinstance(stopped.value.code, int)
        return stopped.value.code or 0, capsys.readouterr().err

    yield generate
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def ported(tiny_sd1: Path, sd1_engine: Engine) -> Engine:
    """The tiny engine with two slots; a slot's mean is added to the UNet's rows that use it."""
    targets = Targets.of(Model.open(tiny_sd1))
    layout = PortLayout.of("unet", 2, 4, targets.shapes["unet"])
    bank = AdapterBank([layout], targets=targets)

    def unet(inputs: Mapping[str, Any]) -> dict[str, Any]:
        rows = dict(inputs)
        slots, scales = rows.pop("adapter_slots", None), rows.pop("adapter_scales", None)
        out = sd1_engine._components["unet"](rows)["out"]
        for row, own in enumerate([] if slots is None else slots):
            for slot, scale in zip(own, scales[row], strict=True):
                values = [t.unflatten(0, (-1, 2))[:, slot] for t in bank.tensors("unet").values()]
                out[row] += scale * sum(float(value.mean()) for value in values)
        return {"out": out}

    return Engine(sd1_engine.spec, {**sd1_engine._components, "unet": unet}, bank)


@pytest.fixture
def loras(ported: Engine) -> list[str]:
    """Three LoRA files of the tiny model, in the current folder."""
    assert ported.bank is not None
    path = "mid_block.attentions.0.proj_in"
    out, into = ported.bank.targets.shapes["unet"][path][:2]  # type: ignore[union-attr]
    names = ["noto.safetensors", "twemoji.safetensors", "ink.safetensors"]
    for number, name in enumerate(names, 1):
        a, b = torch.full((2, into), float(number)), torch.ones(out, 2)
        write_adapter(name, [AdapterDelta("unet", path, a, b)])
    return names


def test_generate_applies_adapters_to_all_pictures(
    run: Run, sd1_folder: Path, ported: Engine, loras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heatsink.load", lambda *arguments, **options: ported)
    code, err = run(
        sd1_folder, "a dog", "--steps", 1, "--seed", 7,
        "--adapter", f"{loras[0]}:0.5", "--adapter", f"flat={loras[1]}:-0.25",
    )  # fmt: skip
    assert code == 0, err
    entries = json.loads(Path("out/receipts.json").read_text())
    digests = {name: info.digest for name, info in ported.adapters.items()}
    assert sorted(digests) == ["flat", "noto"]
    expected = ported.generate(
        ["a cat", "a dog"], seed=7, steps=1, adapters={"noto": 0.5, "flat": -0.25}
    )
    plain = ported.generate(["a cat", "a dog"], seed=7, steps=1)
    for entry, mine, bare in zip(entries, expected.receipts, plain.receipts, strict=True):
        assert entry["receipt"] == mine.as_dict()
        assert entry["receipt"]["image"] != bare.image
        assert entry["request"]["adapters"] == {"flat": -0.25, "noto": 0.5}
        assert {use["name"]: use["digest"] for use in entry["receipt"]["adapters"]} == digests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors:0.8"], "AdapterError: --adapter: missing.safetensors is missing"),
        (["noto.safetensors:much"], "InvalidRequest: --adapter: expected FILE:SCALE"),
        (["noto.safetensors:nan"], "adapters.noto: expected adapter names, each with a finite"),
        (["a=:0.5"], "AdapterError: --adapter: :0.5 is missing"),
        (["a="], "--adapter: expected NAME=FILE:WEIGHT, got 'a='"),
        (["noto.safetensors", "noto.safetensors:2"], "--adapter: two are called 'noto'"),
        (["noto.safetensors", "ink.safetensors", "t=twemoji.safetensors"], "CapacityError: "),
        (["noto.safetensors", "bad.safetensors"], "DamagedFile: bad.safetensors is truncated"),
    ],
)
def test_generate_refuses_adapters_before_any_work(
    run: Run,
    sd1_folder: Path,
    ported: Engine,
    loras: list[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("heatsink.load", lambda *arguments, **options: ported)
    monkeypatch.setattr(ported, "_components", {})
    Path("bad.safetensors").write_bytes(Path(loras[0]).read_bytes()[:-8])
    before = sorted(os.listdir())
    flags = [part for text in arguments for part in ("--adapter", text)]
    code, err = run(sd1_folder, *flags)
    assert code == (1 if message.startswith("Capacity") else 2)
    assert message in err
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_generate_refuses_more_adapters_than_a_row_has_room_for(
    run: Run, sd1_folder: Path, ported: Engine, loras: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heatsink.load", lambda *arguments, **options: ported)
    monkeypatch.setattr(ported, "_components", {})
    assert ported.bank is not None
    monkeypatch.setattr(ported.bank, "most", {"unet": 1})
    code, err = run(sd1_folder, "--adapter", loras[0], "--adapter", loras[1])
    assert code == 2
    assert "NotBuilt: adapters: this engine takes 1 at once in its unet, the request has 2" in err
    assert sorted(os.listdir()) == sorted(loras)
    assert ported.bank.stats().loads == 0


def test_an_engine_without_ports_takes_no_adapter(
    run: Run, sd1_folder: Path, loras: list[str]
) -> None:
    code, err = run(sd1_folder, "--adapter", loras[0])
    assert code == 2
    assert "NotBuilt: this engine has no adapter ports" in err
    assert "--adapters SLOTSxRANK" in err
    assert sorted(os.listdir()) == sorted(loras)


def test_adapter_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    for name in ("noto.safetensors", "a=b/c.safetensors", "d=e.safetensors"):
        Path(name).touch()
    texts = ["noto.safetensors:0.8", "n=noto.safetensors", "./a=b/c.safetensors:2"]
    assert flags.parse_named_adapters([*texts, "x=d=e.safetensors:-1"]) == {
        "noto": (Path("noto.safetensors"), 0.8),
        "n": (Path("noto.safetensors"), 1.0),
        "c": (Path("a=b/c.safetensors"), 2.0),
        "x": (Path("d=e.safetensors"), -1.0),
    }
    assert flags.parse_named_adapters([]) == {}
