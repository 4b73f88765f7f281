"""`heatsink bench kernels`: what it checks before it times, what it counts, what it writes."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink import cli
from heatsink.benchmarks import bundled, check, families, gates, kernels, kernels_run, report
from heatsink.benchmarks.family import (
    Cost,
    Family,
    LeftOut,
    Variant,
    eager_variant,
)
from heatsink.kernels._op import Case
from heatsink.kernels.silu_mul import OP
from heatsink.kernels.timing import Spread

CPU = torch.device("cpu")
CASE = Case("small", lambda device: {"gate": torch.ones(3, 8), "up": torch.full((3, 8), 2.0)})


def measure_one(family: Family, op: Any = OP, case: Case = CASE) -> kernels.CaseResult:
    """One case, without compiling."""
    plan = kernels.Plan(cases=[(op, family, case)])
    (result,) = kernels.measure(plan, CPU, rounds=3, compile=False)
    return result


def variants(*made: Variant | LeftOut) -> Family:
    return dataclasses.replace(families.FAMILIES["silu_mul"], others=lambda inputs: made)


def test_a_right_variant_is_timed_in_every_round_with_its_error() -> None:
    result = measure_one(variants(eager_variant("again", gates.silu_mul)))
    assert [row.name for row in result.rows] == ["heatsink", "PyTorch eager", "again"]
    ours, *others = result.rows
    assert ours.ratio == Spread(1.0, 1.0, 1.0)
    for row in others:
        assert 0 < row.ratio.fastest <= row.ratio.median <= row.ratio.slowest
        assert row.max_error is not None
        assert row.max_error < 1e-6
        # Absolute times come only from a GPU.
        assert (row.seconds, row.of_ceiling) == (None, None)
    assert result.cost == Cost(bytes=3 * 8 * 4 * 3)


def test_a_wrong_variant_is_left_out_and_not_timed() -> None:
    calls = []

    def wrong(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(1)
        return gates.silu_mul(gate, up) * 1.001

    result = measure_one(variants(eager_variant("wrong", wrong)))
    assert [row.name for row in result.rows] == ["heatsink", "PyTorch eager"]
    assert len(calls) == 1
    assert result.left_out[0].name == "wrong"
    assert "Disagrees: error 1" in result.left_out[0].reason


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (torch.full((3, 8), float("nan")), "error nan"),
        (torch.ones(8, 3), r"shape (8, 3), expected (3, 8)"),
    ],
)
def test_nan_and_other_shapes_are_wrong(made: Tensor, reason: str) -> None:
    result = measure_one(variants(eager_variant("odd", lambda gate, up: made)))
    assert reason in result.left_out[0].reason


def test_what_computes_with_fewer_bits_has_a_budget_of_its_own() -> None:
    def scaled(by: float) -> Variant:
        variant = eager_variant(str(by), lambda gate, up: gates.silu_mul(gate, up) * by)
        return dataclasses.replace(variant, tolerance=0.05)

    result = measure_one(variants(scaled(1.04), scaled(1.06)))
    assert [row.name for row in result.rows] == ["heatsink", "PyTorch eager", "1.04"]
    assert result.rows[-1].relative_error == pytest.approx(0.04, rel=1e-3)
    assert "relative error" in result.left_out[0].reason


def test_other_values_by_design_are_timed_unchecked() -> None:
    other = dataclasses.replace(
        eager_variant("other", lambda gate, up: torch.zeros(1)), comparable=False
    )
    row = measure_one(variants(other)).rows[-1]
    assert (row.name, row.max_error, row.relative_error) == ("other", None, None)


@pytest.mark.parametrize("error", [ImportError("no"), RuntimeError("no"), TypeError("no")])
def test_what_refuses_is_left_out_with_its_reason(error: Exception) -> None:
    def refuse(gate: Tensor, up: Tensor) -> Tensor:
        raise error

    result = measure_one(variants(LeftOut("absent", "why"), eager_variant("refuses", refuse)))
    assert result.left_out == (
        LeftOut("absent", "why"),
        LeftOut("refuses", f"{type(error).__name__}: no"),
    )


def test_an_op_that_is_wrong_itself_is_not_timed() -> None:
    op = dataclasses.replace(OP, public=lambda gate, up: gate)
    result = measure_one(variants(), op)
    assert result.rows == ()
    assert "Disagrees" in result.error


def test_integers_must_be_equal() -> None:
    reference = check.Reference([torch.tensor([5])], [1.0])
    assert reference.check([torch.tensor([5])]) == (0.0, 0.0)
    with pytest.raises(check.Disagrees, match="other integers"):
        reference.check([torch.tensor([4])], tolerance=0.5)


def test_time_that_is_up_leaves_cases_unreached() -> None:
    family = variants()
    plan = kernels.Plan(cases=[(OP, family, CASE)] * 2)
    assert kernels.measure(plan, CPU, rounds=1, deadline=time.monotonic() - 1) == []


def test_ops_take_turns_and_results_stand_op_by_op() -> None:
    other = dataclasses.replace(OP, name="geglu")
    cases = [dataclasses.replace(CASE, name=name) for name in "abc"]
    plan = kernels.Plan([(OP, variants(), case) for case in cases])
    plan.cases.extend((other, variants(), case) for case in cases[:2])
    turns = [(op.name, case.name) for op, _, case in plan.by_turns()]
    assert turns == [
        ("silu_mul", "a"),
        ("geglu", "a"),
        ("silu_mul", "b"),
        ("geglu", "b"),
        ("silu_mul", "c"),
    ]
    seen: list[str] = []
    results = kernels.measure(
        plan, CPU, rounds=1, compile=False, measured=lambda result: seen.append(result.op)
    )
    assert seen == ["silu_mul", "geglu", "silu_mul", "geglu", "silu_mul"]
    assert [result.op for result in results] == ["silu_mul"] * 3 + ["geglu"] * 2


def test_an_op_without_family_or_small_cases_is_named() -> None:
    nameless = dataclasses.replace(OP, name="nameless")
    plan = kernels.make_plan([nameless, OP], CPU)
    assert plan.left_out == [LeftOut("nameless", "nothing to compare it with is defined")]
    assert all(case.name.startswith(bundled.PREFIX) for _, _, case in plan.cases)
    rotary = dataclasses.replace(OP, name="rotary")
    assert kernels.make_plan([rotary], CPU).left_out[0].name == "rotary"


def test_a_gpu_is_given_the_real_cases_and_named_ones_go_anywhere() -> None:
    cuda = kernels.make_plan([OP], torch.device("cuda"))
    assert [case.name for _, _, case in cuda.cases] == [case.name for case in OP.cases]
    named = kernels.make_plan([OP], CPU, ["small-77x768-fp32"])
    assert [case.name for _, _, case in named.cases] == ["small-77x768-fp32"]


def test_an_ops_own_small_cases_join_the_shared_ones() -> None:
    own = dataclasses.replace(CASE, name=f"{bundled.PREFIX}own")
    op = dataclasses.replace(OP, cases=(*OP.cases, own))
    found = [case for _, _, case in kernels.make_plan([op], CPU).cases]
    assert found == [*families.FAMILIES["silu_mul"].bundled, own]


# What is written


def gpu_result() -> kernels.CaseResult:
    """As a GPU would give it; the numbers are made up and leave no test."""

    def row(name: str, ratio: float) -> kernels.Row:
        spread = Spread(ratio, ratio / 2, ratio * 2)
        return kernels.Row(name, spread, Spread(1e-3, 5e-4, 2e-3), 1e-3, 1e-4, 0.5)

    cost = Cost(10**9, {"fp16": 10**12, "int8": 10**12})
    return kernels.CaseResult(
        "attention", "case", cost, (row("heatsink", 1.0), row("other", 1.5)), (LeftOut("x", "y"),)
    )


def test_the_table_has_rates_and_ceilings_only_where_they_were_measured() -> None:
    header, rows = report.filled([gpu_result()])
    assert header == list(report.HEADER)
    assert rows[1][:3] == ["attention case", "other", "1.50 (0.75 to 3.00)"]
    assert rows[1][4:] == ["1000.0 us", "2000 TFLOP/s", "50%"]
    cpu = measure_one(variants())
    header, rows = report.filled([cpu])
    assert header == list(report.HEADER[:4])
    memory = dataclasses.replace(gpu_result(), cost=Cost(10**9))
    assert report.filled([memory])[1][0][5] == "1000 GB/s"


def test_notes_say_once_what_is_left_out_everywhere() -> None:
    lines = report.notes([gpu_result()] * 3, [LeftOut("op", "why")], ["attention late"])
    assert lines == [
        "x left out of attention case and 2 more: y",
        "op left out: why",
        "not reached, the time was up: attention late",
    ]


@pytest.mark.parametrize(("load", "busy"), [(2.5, True), (2.0, False)])
def test_a_busy_machine_is_noted(load: float, busy: bool) -> None:
    environment = {"load": load, "processors": 2}
    run = kernels_run.Run(CPU, environment, 1, kernels.Plan(), None, [])
    note = "the machine was busy: a load of 2.5 on 2 processors"
    assert run.notes() == ([note] if busy else [])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    words = ["heatsink", "bench", "kernels", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_measures_and_writes_all_three(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: Sequence[Any] = ("--device", "cpu", "--op", "silu_mul", "--rounds", 2, "--no-compile")
    assert command(monkeypatch, *words, "-o", tmp_path, "--quiet") == 0
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["environment"]["device"] == "cpu"
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert {"op", "case", "cost", "rows", "left_out", "error"} <= set(written["cases"][0])
    assert written["cases"][0]["rows"][1]["seconds"] is None
    assert written["cases"][0]["left_out"] == [{"name": "torch.compile", "reason": "not asked for"}]
    assert "| PyTorch eager |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert printed.out.split() == [
        str(tmp_path / f"kernels.{end}") for end in ("json", "md", "png")
    ]
    assert "PyTorch eager" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "tpu"), "--device: expected cuda or cpu, got 'tpu'"),
        (("--op", "gelu"), "--op: expected one of"),
        (("--device", "cpu", "--case", "huge"), "--case: no chosen op has a case 'huge'"),
        (("--device", "cpu", "--rounds", "-1"), "--rounds: expected 1 or more, got -1"),
        (("--device", "cpu", "--seconds", "0"), "--seconds: expected more than 0, got 0"),
        (("--device", "cuda"), "MissingDevice: --device cuda: expected a CUDA device, found none"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_torch_compile_is_measured_where_a_compiler_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("--device", "cpu", "--op", "silu_mul", "--rounds", 2, "--quiet")
    assert command(monkeypatch, *words, "-o", tmp_path) == 0
    (case,) = json.loads((tmp_path / "kernels.json").read_text())["cases"]
    names = [row["name"] for row in case["rows"]]
    assert "torch.compile" in names or case["left_out"][0]["name"] == "torch.compile"
