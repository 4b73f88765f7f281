"""The command line: what it writes, what it says, and with which exit code."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import heatsink
from heatsink import cli, console, flags
from heatsink.export import components
from heatsink.export.manifest import read_manifest
from heatsink.runtime.digest import image_digest
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest, NotBuilt

LONG = "a cat that goes on to the [bold] end"


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Runs `heatsink` with arguments, in this process and in an empty folder."""
    # Wide enough that nothing is wrapped.
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    handler = signal.getsignal(signal.SIGTERM)

    def heatsink(*arguments: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["heatsink", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, captured.out, captured.err)

    yield heatsink
    signal.signal(signal.SIGTERM, handler)


def refused(outcome: Outcome, message: str, code: int = 2) -> None:
    """It failed with one line on standard error that holds `message`."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("heatsink: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert message in outcome.err


# heatsink build


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "tensorrt"], "NotBuilt: backend 'tensorrt' is not built yet"),
        (["--precision", "fp16"], "NotBuilt: precision 'fp16' is not built yet"),
        (["--adapters", "4"], "InvalidRequest: --adapters: expected SLOTSxRANK, such as 8x16"),
        (["--adapters", "0x16"], "InvalidRequest: adapters: expected 1 to 4096 slots, got 0"),
        (["--adapters", "4x513"], "InvalidRequest: adapters: expected 1 to 512 rank, got 513"),
        (["--ports", "some"], "InvalidRequest: ports: expected one of all, linear, attention"),
        (["--ports", "linear"], "InvalidRequest: ports: 'linear' says which layers get ports"),
        (["--controlnet", "folder"], "ModelError: controlnet 'folder': there is no folder folder"),
        (["--controlnet", "A=b"], "InvalidRequest: controlnet: expected a name of up to 40 of"),
        (["--arch", "sm90"], "NotBuilt: --arch sm90: not built yet"),
        (["--size", "64x64:128x128"], "NotBuilt: --size 64x64:128x128: a range of sizes"),
        (["--batch", "0:8:4"], "InvalidRequest: batch: expected 1 <= min <= opt <= max"),
        (["--batch", "1:2"], "InvalidRequest: --batch: expected MIN:OPT:MAX"),
        (["--batch", "many"], "InvalidRequest: --batch: expected MIN:OPT:MAX"),
        (
            ["--size", "63x64"],
            "InvalidRequest: size: expected a height that is a positive multiple",
        ),
        (["--size", "big"], "InvalidRequest: --size: expected HEIGHTxWIDTH"),
        (["--fuse", "missing.safetensors"], "AdapterError: missing.safetensors is missing"),
        (["--fuse", "missing.safetensors:0.5"], "AdapterError: missing.safetensors is missing"),
        (["--fuse", "brand.safetensors:much"], "InvalidRequest: --fuse: expected FILE:SCALE"),
        (["--fuse", "brand.safetensors:nan"], "InvalidRequest: fuse: expected a finite scale"),
        (["--backend", "onnxruntime", "--opset", "12"], "NotBuilt: ONNX opset 12 is too old"),
        (
            ["--backend", "torch", "--opset", "23"],
            "InvalidRequest: opset: engines of torch hold no",
        ),
        (
            ["--high", "conv_out"],
            "InvalidRequest: --high: expected COMPONENT=MODULE, got 'conv_out'",
        ),
        (["--high", "unet=conv_out"], "InvalidRequest: high: everything is high in fp32"),
        (["--precision", "bf16", "--high", "net=x"], "InvalidRequest: high: the model has "),
        (
            ["--precision", "bf16", "--high", "unet=x"],
            "InvalidRequest: high: expected modules of unet",
        ),
        (["--opset", "new"], "heatsink: Invalid value for '--opset'"),
        (["--frobnicate"], "heatsink: No such option"),
    ],
)
def test_build_refuses_in_one_line(
    run: Run, tiny_sd1: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    refused(run("build", tiny_sd1, "-o", tmp_path / "engine", "-q", *arguments), message)
    assert not (tmp_path / "engine").exists()


def test_build_refuses_models_in_one_line(
    run: Run, tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    refused(run("build", "nowhere", "-o", "engine"), "ModelError: there is no model")
    model = copy_model(tiny_sd1)
    shutil.rmtree(model / "vae")
    refused(run("build", model, "-o", "engine"), "vae")
    refused(run("build", tiny_sd1), "heatsink: Missing option")
    assert os.listdir() == []


def test_build_reuses_prints_and_is_quiet(
    run: Run, tiny_sd1: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = run(
            "build", tiny_sd1, "-o", "engine", "--batch", "1:2:4", "--reuse", sd1_folder, "-q"
        )
    assert outcome.code == 0, outcome
    manifest = read_manifest(Path("engine"))
    assert manifest.digest == read_manifest(sd1_folder).digest
    assert outcome.out == f"engine  engine {manifest.digest}\n"
    # Nothing of the libraries' own is on the screen.
    assert outcome.err == ("built nothing; reused text_encoder, unet, vae_decoder, vae_encoder\n")


def test_an_interrupted_build_says_so(
    run: Run, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(components, "build", interrupted)
    outcome = run("build", tiny_sd1, "-o", "engine", "-q")
    assert outcome.code == 130
    assert outcome.err.strip() == "heatsink: interrupted; nothing half-written is left"
    assert os.listdir() == []


def test_a_terminated_build_leaves_nothing(
    run: Run, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        components, "build", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run("build", tiny_sd1, "-o", "engine", "-q").code == 128 + signal.SIGTERM
    assert os.listdir() == []


# heatsink generate


def test_generate_writes_pictures_and_receipts(
    run: Run, sd1_folder: Path, sd1_engine: Engine
) -> None:
    outcome = run(
        "generate", "a cat", "a dog", "--engine", sd1_folder, "--seed", 7, "--steps", 2,
        "-n", 2, "--guidance", 1, "-q",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    paths = [Path("out") / f"image-{seed}.png" for seed in (7, 8, 9, 10)]
    assert outcome.out.split() == [str(path) for path in paths]
    assert sorted(os.listdir("out")) == sorted([*(p.name for p in paths), "receipts.json"])
    entries = json.loads(Path("out/receipts.json").read_text())
    expected = sd1_engine.generate(
        ["a cat", "a cat", "a dog", "a dog"], seed=7, steps=2, guidance=1
    )
    for path, entry, receipt in zip(paths, entries, expected.receipts, strict=True):
        with Image.open(path) as image:
            assert image_digest(image) == receipt.image
        assert entry["file"] == path.name
        assert entry["receipt"] == receipt.as_dict()
    assert [entry["request"]["seed"] for entry in entries] == [7, 8, 9, 10]


def test_generate_replaces_no_picture_unasked(
    run: Run, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "a cat", "--engine", sd1_folder, "--steps", 1, "--guidance", 1, "-q"]
    assert run(*command, "--seed", 7).code == 0
    picture, receipts = Path("out/image-7.png").read_bytes(), Path("out/receipts.json").read_text()
    with monkeypatch.context() as patch:
        # It is told before anything is opened.
        patch.setattr("heatsink.load", pytest.fail)
        refused(run(*command, "--seed", 6, "-n", 2), "image-7.png would be replaced")
    assert sorted(os.listdir("out")) == ["image-7.png", "receipts.json"]
    assert Path("out/image-7.png").read_bytes() == picture
    # Beside it there is room, and its receipt stays.
    assert run(*command, "--seed", 8).code == 0
    entries = json.loads(Path("out/receipts.json").read_text())
    assert entries[:1] == json.loads(receipts)
    assert [entry["file"] for entry in entries] == ["image-7.png", "image-8.png"]
    outcome = run("generate", "a dog", *command[2:], "--seed", 7, "--overwrite")
    assert outcome.code == 0, outcome
    assert Path("out/image-7.png").read_bytes() != picture


def test_generate_from_a_picture(run: Run, sd1_folder: Path, sd1_engine: Engine) -> None:
    start = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    start.save("start.png")
    outcome = run(
        "generate", "a cat", "--engine", sd1_folder, "--image", "start.png", "--steps", 4,
        "--strength", 0.5, "-o", "deep/out", "-q",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    (entry,) = json.loads(Path("deep/out/receipts.json").read_text())
    mine = sd1_engine.generate("a cat", image=start, strength=0.5, steps=4)
    assert entry["receipt"]["image"] == mine.receipts[0].image
    assert entry["receipt"]["steps"] == 2


def test_generate_says_once_what_was_cut(run: Run, sd1_folder: Path) -> None:
    outcome = run("generate", LONG, "--engine", sd1_folder, "--steps", 1, "-n", 3, "-q")
    assert outcome.code == 0, outcome
    assert outcome.err.count("note: prompt cut to 16 tokens") == 1
    assert outcome.err.count("\n") == 1
    # Square brackets are not taken for markup.
    assert "[bold]" in outcome.err.replace(" ", "")
    for entry in json.loads(Path("out/receipts.json").read_text()):
        assert "cut to 16 tokens" in entry["receipt"]["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "nan"], "guidance: expected a finite number of at least 0, got nan"),
        (["--guidance", "-1"], "guidance: expected a finite number of at least 0"),
        (["--steps", "0"], "steps: expected an integer from 1 to 1000, got 0"),
        (["--steps", "two"], "Invalid value for '--steps'"),
        (["--seed", "-1"], "seed: expected an integer from 0 to 2^64 - 1, got -1"),
        (["--scheduler", "magic"], "scheduler: expected one of euler, dpm++2m, ddim, lcm"),
        (["--size", "63x64"], "height: expected a positive multiple of 8"),
        (["--size", "128x64"], "NotBuilt: height: this engine was built for 64 pixels, got 128"),
        (["--strength", "0.5"], "strength: expected an image beside it"),
        (["--image", "missing.png"], "--image: missing.png can't be read"),
        (["-n", "0"], "-n: expected at least 1, got 0"),
        (["--engine", "nowhere"], "EngineMismatch: nowhere is not an engine folder"),
        (["--out", "file"], "CallerError: file can't be written"),
    ],
)
def test_generate_refuses_in_one_line(
    run: Run, sd1_folder: Path, arguments: list[str], message: str
) -> None:
    Path("file").write_text("x")
    base = ["generate", "a cat", "--engine", sd1_folder, "--steps", "1", "-q"]
    refused(run(*base, *arguments), message)
    assert os.listdir() == ["file"]


def test_a_picture_that_is_none_is_refused(run: Run, sd1_folder: Path) -> None:
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    refused(
        run("generate", "a cat", "--engine", sd1_folder, "--image", "broken.png"),
        "InvalidRequest: --image: broken.png can't be read as a picture",
    )


def test_a_damaged_engine_is_refused(run: Run, sd1_folder: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(sd1_folder, tmp_path / "damaged"))
    data = bytearray((engine / "unet.safetensors").read_bytes())
    data[1000] ^= 1
    (engine / "unet.safetensors").write_bytes(data)
    refused(run("generate", "a cat", "--engine", engine, "-q"), "EngineMismatch: ")
    assert os.listdir() == []


def test_another_process_gives_the_same_pixels(
    sd1_folder: Path, sd1_engine: Engine, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-P", "-m", "heatsink.cli", "generate", "a red apple", LONG, "--engine",
        str(sd1_folder), "--seed", "7", "--steps", "3", "-q", "-o", "pictures",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.warns(UserWarning, match="prompt cut"):
        result = sd1_engine.generate(["a red apple", LONG], seed=7, steps=3)
    entries = json.loads((tmp_path / "pictures" / "receipts.json").read_text())
    assert [entry["receipt"] for entry in entries] == [r.as_dict() for r in result.receipts]
    # One note, and nothing of the libraries' own.
    assert done.stderr.startswith("note: prompt cut to 16 tokens")
    assert "Warning" not in done.stderr
    assert "torchvision" not in done.stderr


# The rest


def test_inspect_prints_what_an_engine_is(run: Run, sd1_folder: Path) -> None:
    outcome = run("inspect", sd1_folder)
    assert outcome.code == 0, outcome
    manifest = read_manifest(sd1_folder)
    for text in (manifest.digest[:16], "vae_encoder", "1,2,3,4", "64x64 pixels", "1:2:4", "strict"):
        assert text in outcome.out
    refused(run("inspect", "nowhere"), "EngineMismatch: nowhere is not an engine folder")


def test_version_and_help(run: Run) -> None:
    assert run("version").out == f"{heatsink.__version__}\n"
    assert "heatsink generate" in run("--help").out
    outcome = run()
    assert outcome.code == 2
    assert "generate" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("text", "size"), [("", None), ("64", (64, 64)), ("64x128", (64, 128)), ("64X128", (64, 128))]
)
def test_sizes(text: str, size: tuple[int, int] | None) -> None:
    assert flags.parse_size(text) == size


@pytest.mark.parametrize("text", ["x", "64x", "1x2x3", "-64x64", "6.4x64", "²x²"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--size"):
        flags.parse_size(text)


def test_flag_values() -> None:
    assert flags.parse_batch("16") == (1, 16, 16)
    assert flags.parse_batch("2:4:8") == (2, 4, 8)
    assert flags.parse_adapter("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert flags.parse_adapter("C:/a.safetensors:0.5") == (Path("C:/a.safetensors"), 0.5)
    with pytest.raises(NotBuilt, match="range"):
        flags.parse_size("64:128")


def test_libraries_are_quiet_inside_and_as_before_after() -> None:
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "torch")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with console.quiet_libraries():
            assert all(logger.level == logging.ERROR for logger in loggers)
            assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
            assert not sys.modules["diffusers.utils.logging"].is_progress_bar_enabled()
            warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.models")
            warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="heatsink.runtime.text")
    assert [str(each.message) for each in caught] == ["ours"]
    assert [logger.level for logger in loggers] == before
    assert os.environ.get("TRANSFORMERS_VERBOSITY") != "error"


def test_bars_show_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with console.bars() as progress:
        progress("building unet", 1, 2)
        progress("building unet", 2, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "building unet" in shown.err
    assert "100%" in shown.err
    with console.bars(quiet=True) as progress:
        progress("building unet", 1, 2)
    assert capsys.readouterr().err == ""
