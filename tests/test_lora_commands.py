"""`heatsink lora`: what it prints and writes, and with which exit code."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heatsink import cli
from heatsink.runtime.adapter_file import (
    AdapterDelta,
    digest_deltas,
    fuse_model,
    read_adapter,
    scaled,
    write_adapter,
)
from heatsink.runtime.model import Model

TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Runs `heatsink lora` with arguments; the exit code, and what it printed."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def heatsink(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heatsink", "lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    yield heatsink
    signal.signal(signal.SIGTERM, handler)


def refused(outcome: tuple[int, str, str], message: str) -> None:
    """It failed as the caller's mistake, with one line that holds `message`."""
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("heatsink: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.fixture
def adapter(tiny_sd1: Path, tmp_path: Path, seed: int) -> Path:
    """A file in diffusers' format: a DoRA of a linear and of a 3x3 convolution."""
    torch.manual_seed(seed)
    weights = Model.open(tiny_sd1).weights("unet")
    deltas = []
    for path in (TO_K, "conv_in"):
        shape = weights.shape(f"{path}.weight")
        a, b = torch.randn(4, *shape[1:]) / 4, torch.randn(shape[0], 4) / 4
        deltas.append(AdapterDelta("unet", path, a.half(), b.half(), 0.5, torch.rand(shape[0]) + 1))
    file = tmp_path / "style.safetensors"
    write_adapter(file, deltas, metadata={"made": "here"})
    return file


def test_inspect_with_a_model(run: Run, adapter: Path, tiny_sd1: Path) -> None:
    code, out, err = run("inspect", adapter, "--model", tiny_sd1)
    assert (code, err) == (0, "")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line
    ]
    assert ["unet", TO_K, "linear, DoRA", "4", "0.5", "float16"] in rows
    assert ["unet", "conv_in", "conv 3x3, DoRA", "4", "0.5", "float16"] in rows
    digest = digest_deltas(read_adapter(adapter, Model.open(tiny_sd1)))
    for line in ("format: diffusers", "dtypes: float16, float32", "keys: 6 of 6 applied"):
        assert line in out.splitlines()
    assert f"digest: {digest}" in out


def test_inspect_without_a_model(run: Run, adapter: Path) -> None:
    code, out, _ = run("inspect", adapter)
    assert code == 0
    assert "keys: 6 of 6 understood; give --model to judge them" in out
    assert "note: no model was given" in out
    assert "digest" not in out
    code, out, _ = run("inspect", adapter, "--json")
    values = json.loads(out)
    assert (code, values["accepted"], values["digest"]) == (0, True, None)
    assert values["modules"][0] == {
        "component": "unet", "module": "conv_in", "kind": "conv 3x3, DoRA", "rank": 4,
        "scale": 0.5, "dtype": "float16", "shape": [32, 4, 3, 3],
    }  # fmt: skip


def test_inspect_refuses_with_exit_code_2(
    run: Run, adapter: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({**load_file(adapter), "unet.[red]x.alpha": torch.ones(1)}, bad)
    code, out, _ = run("inspect", bad, "--model", tiny_sd1)
    assert code == 2
    assert "unet.[red]x.alpha" in out
    assert "unknown target: unet has no linear or convolution [red]x" in out
    assert "keys: 6 of 7 fit; none is applied" in out
    code, out, _ = run("inspect", bad, "--model", tiny_sd1, "--json")
    values = json.loads(out)
    assert (code, values["accepted"], values["modules"]) == (2, False, [])
    assert list(values["refused"]) == ["unet.[red]x.alpha"]
    ignored = ("--ignore", "unet.[red]x.alpha")
    code, out, _ = run("inspect", bad, "--model", tiny_sd1, *ignored)
    assert (code, "ignored: unet.[red]x.alpha" in out) == (0, True)
    refused(run("inspect", bad, "--ignore", "none*"), "ignore: 'none*' matches no key")
    bad.write_bytes(b"")
    refused(run("inspect", bad), "DamagedFile: ")
    refused(run("inspect", tmp_path / "no.safetensors"), "missing or not a file")


def test_convert_there_and_back(run: Run, adapter: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    digest = digest_deltas(read_adapter(adapter, model))
    flat, folder, back = tmp_path / "new/flat.safetensors", tmp_path / "peft", tmp_path / "back"
    code, out, _ = run("convert", adapter, "-o", flat, "--format", "kohya")
    assert (code, out) == (0, f"{flat}\n")
    refused(run("convert", flat, "-o", folder, "--format", "peft"), "only a model tells from dots")
    code, out, _ = run("convert", flat, "-o", folder, "--format", "peft", "--model", tiny_sd1)
    assert (code, out) == (0, f"{folder / 'adapter_model.safetensors'}  {digest}\n")
    assert {p.name for p in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    file = folder / "adapter_model.safetensors"
    assert run("convert", file, "-o", back, "--format", "diffusers", "--model", tiny_sd1)[0] == 0
    assert digest_deltas(read_adapter(back, model)) == digest
    first, last = load_file(adapter), load_file(back)
    assert {k: v.dtype for k, v in first.items()} == {k: v.dtype for k, v in last.items()}
    assert all(torch.equal(first[key], last[key]) for key in first)
    with safe_open(back, "pt") as handle:
        assert handle.metadata()["made"] == "here"


def test_convert_refuses(run: Run, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run("convert", adapter, "-o", out, "--format", "lycoris"), "--format: expected one of")
    out.write_text("mine")
    refused(run("convert", adapter, "-o", out, "--format", "kohya"), "only with --overwrite")
    assert out.read_text() == "mine"
    assert run("convert", adapter, "-o", out, "--format", "kohya", "--overwrite")[0] == 0
    refused(
        run("convert", adapter, "-o", adapter, "--format", "kohya", "--overwrite"),
        "is the file that is read",
    )
    bad = tmp_path / "bad"
    save_file({**load_file(adapter), "strange": torch.ones(1)}, bad)
    refused(run("convert", bad, "-o", tmp_path / "x", "--format", "kohya"), "1 of 7 keys can't")
    assert not (tmp_path / "x").exists()


def test_merge(run: Run, adapter: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    deltas = read_adapter(adapter, model)
    plain = tmp_path / "plain.safetensors"
    write_adapter(plain, [replace(d, magnitude=None) for d in deltas])
    out = tmp_path / "new/merged"
    code, printed, err = run("merge", tiny_sd1, f"{adapter}:0.5", plain, "-o", out, "-q")
    assert (code, err) == (0, "")
    assert printed.splitlines()[0].endswith(f"0.5  2 modules  {digest_deltas(deltas)}")
    assert printed.splitlines()[-1] == str(out)
    wanted = fuse_model(model, [*scaled(deltas, 0.5), *read_adapter(plain, model)])
    assert Model.open(out).digest("unet") == wanted.digest("unet")
    refused(run("merge", tiny_sd1, plain, "-o", out), "replaced only with --overwrite")
    assert Model.open(out).digest("unet") == wanted.digest("unet")
    assert run("merge", tiny_sd1, f"{plain}:0", "-o", out, "--overwrite", "-q")[0] == 0
    assert Model.open(out).digest("unet") == model.digest("unet")
    assert [p.name for p in out.parent.iterdir()] == ["merged"]


def test_merge_refuses_and_leaves_nothing(
    run: Run, adapter: Path, tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("a")
    before = {path.name for path in tmp_path.iterdir()}
    refused(run("merge", tiny_sd1, adapter, "-o", mine, "--overwrite"), "is not a model folder")
    refused(run("merge", tiny_sd1, adapter, "-o", adapter), "is not a model folder")
    refused(run("merge", tiny_sd1, adapter, "-o", tiny_sd1, "--overwrite"), "overlaps the model")
    refused(run("merge", tiny_sd1, adapter, "-o", tiny_sd1 / "x"), "overlaps the model")
    refused(run("merge", tiny_sd1, f"{adapter}:nan", "-o", "x"), "expected FILE:SCALE")
    refused(run("merge", tiny_sd1, "no.safetensors", "-o", "x", "-q"), "missing or not a file")
    refused(run("merge", adapter, adapter, "-o", "x", "-q"), "ModelError")
    # Each is fine alone, and too much for its weights' dtype.
    huge = tmp_path / "huge.safetensors"
    write_adapter(huge, read_adapter(adapter, Model.open(tiny_sd1)), alpha=1.0)
    save_file({**load_file(huge), "strange": torch.ones(1)}, huge)
    refused(run("merge", tiny_sd1, adapter, huge, "-o", "x", "-q"), "1 of 7 keys can't be applied")
    assert {path.name for path in tmp_path.iterdir()} == before | {"huge.safetensors"}
    other = copy_model(tiny_sd1)
    inside = other / "style.safetensors"
    inside.write_bytes(adapter.read_bytes())
    refused(run("merge", tiny_sd1, inside, "-o", other, "--overwrite"), "which would be removed")


def test_a_file_whose_name_holds_a_colon(
    run: Run, adapter: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    named = adapter.rename(tmp_path / "a:b")
    assert run("merge", tiny_sd1, named, "-o", tmp_path / "out", "-q")[0] == 0
    assert run("merge", tiny_sd1, f"{named}:0.5", "-o", tmp_path / "half", "-q")[0] == 0
    digests = {Model.open(tmp_path / name).digest("unet") for name in ("out", "half")}
    assert len(digests) == 2
