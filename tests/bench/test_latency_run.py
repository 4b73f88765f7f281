"""What the latency benchmark is asked for: options, models of known configurations, meters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from heatsink.bench_command import app
from heatsink.benchmarks import latency_models, latency_run, stages
from heatsink.benchmarks.energy import NoMeter, Rapl, meter
from heatsink.benchmarks.latency import SYSTEMS
from heatsink.benchmarks.latency_run import Asked
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.model import Model
from heatsink.runtime.text import Tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "sd3"}, "--config: expected one of sd15, sdxl, got 'sd3'"),
        ({"device": "tpu"}, "--device: expected one of cpu, cuda, got 'tpu'"),
        ({"precisions": ["fp16"]}, "--precision: expected one of fp32, bf16, got 'fp16'"),
        ({"levels": ["text"]}, "--level: expected one of unet, vae, image, got 'text'"),
        ({"systems": ["mine"]}, "--system: expected one of heatsink strict, .*, got 'mine'"),
        ({"rows": [0]}, "--rows: expected numbers from 1 to 256, got 0"),
        ({"images": [257]}, "--images: expected numbers from 1 to 256, got 257"),
        ({"rounds": -1}, "--rounds: expected at least 0, got -1"),
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"threads": -1}, "--threads: expected at least 0, got -1"),
    ],
)
def test_what_can_not_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        latency_run.bench(Asked(**{"device": "cpu", **changes}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_none_is_measured() -> None:
    with pytest.raises(InvalidRequest, match="--device: expected a CUDA device for cuda"):
        Asked(device="cuda").check()


def test_what_is_measured_by_default() -> None:
    folder = Asked(device="cpu")
    assert folder.counts() == {"unet": (1, 2, 4, 8, 16), "vae": (1, 2, 4, 8), "image": (1, 2, 4, 8)}
    assert folder.wanted().precisions == ("fp32", "bf16")
    assert folder.wanted().systems == tuple(SYSTEMS)
    assert folder.wanted().together
    # A step of a whole checkpoint takes seconds on a CPU.
    large = Asked(device="cpu", config="sd15").wanted()
    assert (large.counts, large.rounds, large.together) == ({"unet": (2,)}, 3, False)
    # What preparing took is no longer there for measuring.
    assert Asked(device="cpu", seconds=10.0).wanted(4.0).seconds == 6.0
    assert Asked(device="cpu", seconds=10.0).wanted(40.0).seconds == 0.0
    gpu = Asked(device="cuda", config="sdxl", systems=["xformers", "heatsink strict"]).wanted()
    assert (gpu.precisions, gpu.together) == (("bf16",), True)
    assert gpu.systems == ("heatsink strict", "xformers")
    assert gpu.counts["image"] == (1, 2, 4, 8)


def test_the_command_writes_tables_and_json(tiny_sd1: Path, tmp_path: Path) -> None:
    arguments = [
        "latency", "--model", str(tiny_sd1), "--device", "cpu", "--precision", "fp32",
        "--level", "vae", "--images", "2", "--system", "diffusers eager", "--rounds", "1",
        "--threads", "1", "--no-cold", "--out", str(tmp_path), "-q",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads((tmp_path / "latency.json").read_text())
    ((row,),) = [table["rows"] for table in document["tables"]]
    assert (row["system"], row["count"]) == ("diffusers eager", 2)
    assert "The VAE's decoding, fp32: tiny-sd1, 64x64" in (tmp_path / "latency.md").read_text()
    assert str(tmp_path / "latency.json") in done.stdout


def test_the_command_refuses_what_is_no_number() -> None:
    with pytest.raises(InvalidRequest, match="--rows: expected numbers, such as 1,2,4, got '1,x'"):
        CliRunner().invoke(app, ["latency", "--rows", "1,x"], catch_exceptions=False)


def config_of(folder: Path) -> dict[str, Any]:
    parts = ("text_encoder", "unet", "vae")
    config = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    scheduler = (folder / "scheduler" / "scheduler_config.json").read_text()
    return {**config, "scheduler": json.loads(scheduler)}


def test_a_model_of_random_weights_is_whole(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = latency_models.write_model("sd1", config_of(tiny_sd1), tmp_path / "random")
    model = Model.open(folder)
    model.check()
    model.check_finite()
    text = Tokenizer(model.tokenizer_folder(0))
    assert text.max_length == 16
    again = latency_models.write_model("sd1", config_of(tiny_sd1), tmp_path / "other")
    weights = [
        (each / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for each in (folder, again)
    ]
    assert weights[0] == weights[1]
    unet: Any = model.load_module("unet", torch.float32)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    text_states = torch.randn(1, 16, 32, generator=generator)
    with torch.inference_mode():
        (out,) = unet(sample, torch.tensor([500.0]), text_states, return_dict=False)
    # Neither nothing nor too much: activations keep their size.
    assert 1e-3 < float(out.std()) < 1e3


def test_a_model_that_is_whole_is_not_written_again(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = latency_models.write_model("sd1", config_of(tiny_sd1), tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text("kept")
    assert latency_models.write_model("sd1", config_of(tiny_sd1), folder) == folder
    assert path.read_text() == "kept"


@pytest.mark.parametrize(("name", "side"), [("sd15", 64), ("sdxl", 128)])
def test_known_configurations_are_the_real_ones(name: str, side: int) -> None:
    config = latency_models.known_config(name)
    assert config["unet"]["sample_size"] == side
    assert config["unet"]["block_out_channels"][0] == 320
    with pytest.raises(InvalidRequest, match="config: expected one of sd15, sdxl, got 'x'"):
        latency_models.known_config("x")


def write_zone(root: Path, zone: str, name: str, energy: int, most: int = 999) -> Path:
    folder = root / zone
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_packages_are_metered_over_the_end_of_their_counters(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 900)
    # A part of a package, and the platform, would count twice.
    write_zone(tmp_path, "intel-rapl:0:0", "core", 5)
    write_zone(tmp_path, "intel-rapl:2", "psys", 5)
    rapl = Rapl(tmp_path)
    start = rapl.start()
    assert start == [100, 900]
    write_zone(tmp_path, "intel-rapl:0", "package-0", 350)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 50)
    assert rapl.joules(start) == pytest.approx((250 + 150) / 1e6)


def test_without_counters_the_reason_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match="not available here: no package of intel-rapl"):
        Rapl(tmp_path)
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / "energy_uj").unlink()
    with pytest.raises(NotBuilt, match=r"not available here: .*energy_uj"):
        Rapl(tmp_path)
    found = meter("cpu", tmp_path)
    assert isinstance(found, NoMeter)
    assert found.name.startswith("not available here")


def test_the_gpu_suites_stage_lists_what_it_would_measure() -> None:
    lines = stages.WORKERS["latency"].listing(Path())
    assert lines[0].startswith("sd15, bf16: unet [1, 2, 4, 8, 16], vae [1, 2, 4, 8]")
    assert lines[1].startswith("sdxl, bf16: ")
    assert "heatsink strict" in lines[2]
