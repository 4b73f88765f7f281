"""The latency benchmark on a tiny model, a few rounds: who gets a time, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.benchmarks import latency, latency_engines, latency_process, latency_report
from heatsink.benchmarks.latency import SYSTEMS, Bench, Wanted
from heatsink.benchmarks.latency_check import Check, Quality, psnr, relative
from heatsink.benchmarks.latency_engines import component_runner, step_runner
from heatsink.benchmarks.latency_results import LeftOut, Results, Row, Samples, Table
from heatsink.benchmarks.latency_systems import EAGER, STEP, WHOLE, Eager, Runner
from heatsink.benchmarks.latency_work import Artefacts, Prompts, Workload
from heatsink.kernels.timing import Spread
from heatsink.runtime.errors import HeatsinkError

STRICT, FAST = latency_engines.STRICT, latency_engines.FAST
ONNXRUNTIME, OPENVINO = latency_engines.ONNXRUNTIME, latency_engines.OPENVINO


@pytest.fixture(scope="module")
def prepared(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The tiny model, one thread; heatsink runs its UNet as a graph, no engine is built."""
    work = str(tmp_path_factory.mktemp("latency"))
    workload = Workload(str(tiny_sd1), work, "cpu", 1, rows=2, engines=False, steps=2)
    artefacts = Artefacts(workload)
    for component in ("unet", "vae_decoder", "text_encoder"):
        artefacts.onnx(component)
    for precision in ("fp32", "bf16"):
        artefacts.native("unet", precision)
    GRAPHS.update({(workload.model, *key): graph for key, graph in artefacts._graphs.items()})
    return replace(workload, ready=True)


@pytest.fixture
def workload(prepared: Workload, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """Whose files are there; components are captured once for all tests."""
    plain = Artefacts.graph

    def graph(self: Artefacts, component: str, precision: str) -> Any:
        key = self.workload.model, component, precision
        if key not in GRAPHS:
            GRAPHS[key] = plain(self, component, precision)
        return GRAPHS[key]

    monkeypatch.setattr(Artefacts, "graph", graph)
    return prepared


GRAPHS: dict[tuple[str, str, str], Any] = {}


def wanted(*systems: str, **changes: Any) -> Wanted:
    fields: dict[str, Any] = {
        "precisions": ("fp32",),
        "counts": {"unet": (1, 2)},
        "systems": systems,
        "rounds": 2,
        "cold": False,
    }
    return Wanted(**{**fields, **changes})


def row(system: str, precision: str = "fp32", count: int = 1, **changes: Any) -> Row:
    spread = Spread(0.5, 0.4, 0.7)
    fields: dict[str, Any] = {
        "includes": WHOLE,
        "base": STRICT,
        "ratio": spread,
        "samples": Samples.of([0.5, 0.4, 0.7]),
        "per_unit": 0.5 / count,
        "joules": None,
        "quality": Quality(error=1e-6, allowed=1e-5),
    }
    return Row(system=system, precision=precision, count=count, **{**fields, **changes})


def found(results: Results, level: str, precision: str) -> dict[tuple[str, int, str], Row]:
    (table,) = [t for t in results.tables if (t.level, t.precision) == (level, precision)]
    return {(each.system, each.count, each.includes): each for each in table.rows}


def test_all_systems_of_a_run_answer_the_same_requests(workload: Workload) -> None:
    told: list[tuple[str, int, int]] = []
    kept: list[int] = []
    asked = wanted(STRICT, FAST, EAGER, ONNXRUNTIME, precisions=("fp32", "bf16"))
    bench = Bench(
        workload,
        asked,
        progress=lambda *each: told.append(each),
        keep=lambda results: kept.append(len(results.tables)),
    )
    results = bench.run()
    rows = found(results, "unet", "fp32")
    keys = {(STRICT, WHOLE), (STRICT, STEP), (EAGER, WHOLE), (ONNXRUNTIME, WHOLE)}
    assert rows.keys() == {(name, count, what) for name, what in keys for count in (1, 2)}
    for (name, count, _), each in rows.items():
        assert len(each.samples.each) == 2
        assert each.base == STRICT
        assert each.per_unit == each.samples.seconds.median / count > 0
        assert each.quality.error is not None
        assert each.quality.allowed is not None
        assert 0 < each.quality.error <= each.quality.allowed < 1e-3, name
    assert rows[STRICT, 1, WHOLE].ratio == Spread(1.0, 1.0, 1.0)
    halves = found(results, "unet", "bf16")
    assert {name for name, _, _ in halves} == {STRICT, EAGER}
    # Three decimal digits fewer: another precision was indeed computed in.
    assert all(each.quality.error > 1e-4 for each in halves.values() if each.quality.error)
    reasons = {(one.system, one.precision): one.reason for one in results.left_out}
    assert "no engine is built" in reasons[FAST, "fp32"]
    assert "does not compute in bf16" in reasons[ONNXRUNTIME, "bf16"]
    assert results.refused == []
    assert kept
    assert told[-1][1] == told[-1][2]
    check_schema(json.loads(json.dumps(results.as_dict())))


def check_schema(document: dict[str, Any]) -> None:
    assert document.keys() == {
        "environment", "settings", "tables", "costs", "left_out", "refused", "unreached",
    }  # fmt: skip
    settings = document["settings"]
    assert settings["threads"] == 1
    assert settings["layout"].keys() == settings["layout_seconds"].keys()
    assert settings["layout"]
    for precision, seconds in settings["layout_seconds"].items():
        assert seconds.keys() == {"contiguous", "channels_last"}
        assert seconds[settings["layout"][precision]] == min(seconds.values())
    for table in document["tables"]:
        assert table.keys() == {"level", "precision", "unit", "rows"}
        for each in table["rows"]:
            assert each["precision"] == table["precision"]
            assert each.keys() == {
                "system", "precision", "count", "includes", "base", "ratio", "samples", "per_unit",
                "joules", "quality",
            }  # fmt: skip
            spread = each["samples"]["seconds"]
            assert 0 < spread["fastest"] <= spread["median"] <= spread["slowest"]
            assert each["quality"].keys() == {"error", "allowed", "psnr", "least"}


def test_a_table_takes_no_row_of_another_precision() -> None:
    table = Table("unet", "fp32")
    table.add(row("a"))
    with pytest.raises(ValueError, match=r"a table of fp32 takes no row of bf16 \(b\)"):
        table.add(row("b", "bf16"))
    assert [each.system for each in table.rows] == ["a"]


def test_rounds_of_several_groups_are_taken_together() -> None:
    table = Table("unet", "fp32")
    table.add(row("a", count=2))
    table.add(row("a", count=2, samples=Samples.of([0.9, 0.8])))
    table.add(row("a", count=2, includes=STEP))
    assert [each.includes for each in table.rows] == [WHOLE, STEP]
    assert table.rows[0].samples == Samples(Spread(0.7, 0.4, 0.9), (0.5, 0.4, 0.7, 0.9, 0.8))
    assert table.rows[0].per_unit == 0.35


class Off(Eager):
    """Right up to a factor."""

    factor = 1.001

    def runners(self, level: Any, count: int) -> list[Runner]:
        (runner,) = super().runners(level, count)
        right = runner.result
        runner.result = lambda out: right(out) * self.factor
        return [runner]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_gets_no_time(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setitem(SYSTEMS, "off", Off)
    monkeypatch.setattr(Off, "factor", factor)
    results = Bench(workload, wanted(EAGER, "off", counts={"unet": (2,)})).run()
    assert {name for name, _, _ in found(results, "unet", "fp32")} == {EAGER}
    (refused,) = results.refused
    assert (refused.system, refused.level, refused.count) == ("off", "unet", 2)
    assert refused.reason.startswith("wrong: its error is")
    assert "off, fp32, unet at 2: no time: wrong" in latency_report.markdown(results)


def test_images_are_compared_with_diffusers(workload: Workload) -> None:
    artefacts = Artefacts(workload)
    check = Check(artefacts, {"image": (2,)})
    (runner,) = Eager(artefacts, "fp32").runners("image", 2)
    runner.load(artefacts.request("image", 2, 0))
    images = runner.result(runner.run())
    assert images.shape == (2, 64, 64, 3)
    assert check("image", "fp32", images).least == 50
    # Of a batch of its own, one picture is the same up to rounding.
    runner.load(artefacts.request("image", 1, 0))
    assert check("image", "fp32", runner.result(runner.run())).psnr > 50  # type: ignore[operator]
    with pytest.raises(HeatsinkError, match=r"wrong: .* dB from diffusers in float32, at least 50"):
        check("image", "fp32", (images + 0.02).clamp(0, 1))


def test_psnr_is_that_of_the_worst_image() -> None:
    wanted = torch.full((2, 2, 2, 3), 0.5)
    off = wanted.clone()
    off[1] += 0.1
    assert psnr(off, wanted) == pytest.approx(20, abs=1e-4)
    assert psnr(wanted, wanted) == pytest.approx(120)
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]).double()) == 0.1


def test_no_round_asks_for_what_another_did(workload: Workload) -> None:
    artefacts = Artefacts(workload)
    drawn: dict[str, list[Tensor]] = {}
    for turn in range(4):
        request = artefacts.request("unet", 3, turn)
        assert isinstance(request, Mapping)
        fewer = artefacts.request("unet", 2, turn)
        assert isinstance(fewer, Mapping)
        for name, values in request.items():
            assert torch.equal(fewer[name], values[:2])
            drawn.setdefault(name, []).extend(values)
    for name, rows in drawn.items():
        assert len({each.numpy().tobytes() for each in rows}) == len(rows), name
    prompts = [artefacts.request("image", 8, turn) for turn in range(3)]
    texts = [t for p in prompts if isinstance(p, Prompts) for t in (*p.texts, p.negative)]
    assert len(set(texts)) == len(texts) == 27


class Phases:
    """A component that notes what is asked of it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def prepare(self, inputs: Any, timesteps: Any) -> None:
        raise AssertionError

    def forget(self) -> None:
        self.seen.append("forget")

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.seen.append({name: float(value.max()) for name, value in inputs.items()})
        return {"out": inputs["sample"]}


def test_a_step_has_its_phases_computed_before_and_a_whole_has_not() -> None:
    request = {"sample": torch.full((1, 2), 3.0), "timestep": torch.ones(1)}
    asked = {"sample": 3.0, "timestep": 1.0}
    whole = Phases()
    runner = component_runner(whole)
    runner.load(request)
    assert whole.seen == ["forget"]
    assert torch.equal(runner.result(runner.run()), request["sample"])
    assert whole.seen == ["forget", asked]
    step = Phases()
    runner = step_runner(step)
    runner.load(request)
    assert step.seen == ["forget", {"sample": 0.0, "timestep": 1.0}]
    runner.run()
    assert step.seen[2:] == [asked]


def test_a_library_that_is_not_there_is_listed_with_the_reason(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_engines, "why_not", lambda name: f"ImportError: no {name}")
    names = (EAGER, OPENVINO, "xformers", "TensorRT")
    results = Bench(workload, wanted(*names, counts={"unet": (1,)}, rounds=1)).run()
    left_out = {one.system: one.reason for one in results.left_out}
    assert left_out.keys() == {OPENVINO, "xformers", "TensorRT"}
    assert left_out[OPENVINO] == "ImportError: no openvino"
    assert "OpenVINO left out, fp32: ImportError: no openvino" in latency_report.notes(results)


def test_openvino_is_measured_where_it_is(workload: Workload) -> None:
    pytest.importorskip("openvino", reason="compares with it where it is installed")
    counts = {"unet": (1, 2), "vae": (1,)}
    results = Bench(workload, wanted(OPENVINO, counts=counts, rounds=1)).run()
    assert results.refused == []
    assert set(found(results, "unet", "fp32")) == {(OPENVINO, 1, WHOLE), (OPENVINO, 2, WHOLE)}


def test_each_by_itself_beside_the_first(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[list[str]] = []
    made = Bench._made

    def spied(self: Bench, precision: str, names: Any) -> Any:
        alive.append(list(names))
        return made(self, precision, names)

    monkeypatch.setattr(Bench, "_made", spied)
    asked = wanted(STRICT, EAGER, ONNXRUNTIME, together=False, counts={"unet": (1,)}, rounds=1)
    results = Bench(workload, asked).run()
    assert alive == [[STRICT, EAGER], [STRICT, ONNXRUNTIME]]
    rows = found(results, "unet", "fp32")
    assert {name for name, _, _ in rows} == {STRICT, EAGER, ONNXRUNTIME}
    assert all(each.ratio is not None for each in rows.values())
    # The first was beside both others, and has the rounds of both.
    assert len(rows[STRICT, 1, WHOLE].samples.each) == 2
    assert len(rows[EAGER, 1, WHOLE].samples.each) == 1


def test_what_the_time_did_not_suffice_for_is_named(workload: Workload) -> None:
    results = Bench(workload, wanted(EAGER, seconds=0.0, cold=True)).run()
    assert [table.rows for table in results.tables] == [[]]
    assert results.unreached == [f"unet, fp32, {count}: {EAGER}" for count in (1, 2)]
    assert latency_report.markdown(results).count("not reached") == 2


def test_an_engine_draws_what_diffusers_draws(
    workload: Workload, sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artefacts, "engine", lambda self, precision, strict: sd1_folder)
    with_engines = replace(workload, engines=True)
    counts = {"vae": (1,), "image": (2,)}
    results = Bench(with_engines, wanted(STRICT, FAST, EAGER, ONNXRUNTIME, counts=counts)).run()
    assert results.refused == []
    images = found(results, "image", "fp32")
    assert {name for name, _, _ in images} == {STRICT, FAST, EAGER, ONNXRUNTIME}
    assert min(each.quality.psnr for each in images.values() if each.quality.psnr) > 50
    assert {name for name, _, _ in found(results, "vae", "fp32")} == {name for name, _, _ in images}


def test_a_fresh_process_is_taken_apart(workload: Workload) -> None:
    cost = latency_process.measure(workload, ONNXRUNTIME, "fp32", "unet", 2, 120)
    assert (cost.system, cost.level, cost.count) == (ONNXRUNTIME, "unet", 2)
    parts = (cost.imports, cost.opening, cost.first)
    assert min(parts) > 0
    assert cost.cold == pytest.approx(sum(parts))
    assert 0 < cost.warm < cost.cold
    assert cost.memory is not None
    assert cost.memory > 0


def test_a_fresh_process_that_fails_says_why(workload: Workload) -> None:
    with pytest.raises(HeatsinkError, match=r"failed in a fresh process: .*NotBuilt.*bf16"):
        latency_process.measure(workload, ONNXRUNTIME, "bf16", "unet", 1, 120)


def test_tables_notes_and_picture(tmp_path: Path) -> None:
    results = Results({"processor": "a processor", "load": 0.1, "device": "cpu"}, {
        "model": "m", "size": "64x64", "device": "cpu", "threads": 2, "steps": 20,
        "guidance": 4.0, "layout": {"fp32": "contiguous"}, "energy": "not available here",
    })  # fmt: skip
    for precision in ("fp32", "bf16"):
        table = results.table("unet", precision)
        for count in (1, 2):
            table.add(row(STRICT, precision, count))
            table.add(row(EAGER, precision, count, joules=2.5))
    results.table("image", "fp32").add(row(EAGER, quality=Quality(psnr=120.0, least=50.0)))
    for precision in ("fp32", "bf16"):
        results.leave_out(LeftOut("xformers", precision, "it has no attention for a CPU"))
    results.costs.append(latency_process.Cost(EAGER, "image", "fp32", 1, 4, 1, 1, 2, 0.5, 1 << 21))
    text = latency_report.markdown(results)
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert [title.split(":")[0] for title in titles] == [
        "**A step of the UNet, fp32",
        "**A step of the UNet, bf16",
        "**Whole generations, fp32",
        "**A fresh process, fp32",
    ]
    assert (
        "| 2 | diffusers eager | whole | 0.50 (0.40 to 0.70) | 500.0 ms | 400.0 ms to 700.0 ms "
        "| 250.0 ms | 2.5 | 1.0e-06 |" in text
    )
    assert "| equal |" in text
    assert "| diffusers eager | 4.00 s | 1.00 s | 1.00 s | 2.00 s | 500.0 ms | 2 MiB |" in text
    assert "- xformers left out, fp32 and bf16: it has no attention for a CPU" in text
    pytest.importorskip("matplotlib", reason="draws the picture")
    latency_report.plot(results, tmp_path / "latency.png")
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / "latency.png").convert("RGB"))
    assert (pixels == (0xD9, 0x48, 0x0F)).all(-1).any(), "our line is there"


def test_float32_is_not_rounded_to_tf32(workload: Workload) -> None:
    before = torch.backends.cudnn.allow_tf32
    seen: list[bool] = []
    note: Callable[..., None] = lambda *_: seen.append(torch.backends.cudnn.allow_tf32)  # noqa: E731
    Bench(workload, wanted(EAGER, counts={"unet": (1,)}, rounds=1), keep=note).run()
    assert seen[0] is False
    assert torch.backends.cudnn.allow_tf32 is before
    assert latency.ROUNDS.keys() == {"unet", "vae", "image"}
