"""The tuner's logic, with kernels under the interpreter and a stopwatch of the test's own."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _config, tune, tuning_file, tuning_gate
from heatsink.kernels._config import Config, Target
from heatsink.kernels._launch import Launch
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels.catalog import ops
from heatsink.kernels.errors import DeviceLost, MissingDevice
from heatsink.kernels.precompile import precompile
from heatsink.kernels.silu_mul import OP
from heatsink.kernels.silu_mul import plan as plan_silu_mul

CPU = torch.device("cpu")
SM80 = Target("", 80)
WIDE = {"BLOCK_R": 1, "BLOCK_W": 256, "warps": 4}
NARROW = {"BLOCK_R": 2, "BLOCK_W": 64, "warps": 4}
Cost = Callable[[Launch], float]


def case(name: str, rows: int, width: int) -> Case:
    def make(device: torch.device) -> Inputs:
        gate = normal((rows, width), torch.float32, device, seed=rows)
        return {"gate": gate, "up": normal((rows, width), torch.float32, device, seed=9)}

    return Case(name, make)


def small(configs: Sequence[Config] = (WIDE, NARROW), **changes: Any) -> Op:
    """The op with small cases: two of one width, one of another."""
    cases = (case("few", 2, 96), case("many", 7, 96), case("other", 3, 40))
    changed = {"cases": cases, "space": lambda key, arch: list(configs), **changes}
    return dataclasses.replace(OP, **changed)


def stopwatch(cost: Cost) -> tune.Timer:
    """A timer that reads the seconds off each launch."""

    def measure(candidates: Sequence[Sequence[Launch]], rounds: int) -> list[float]:
        assert rounds in (tune.QUICK_ROUNDS, tune.FINAL_ROUNDS)
        return [sum(map(cost, launches)) for launches in candidates]

    return measure


def by_block(**seconds: float) -> Cost:
    return lambda launch: seconds[f"w{launch.constants['BLOCK_W']}"]


def tuned(op: Op, cost: Cost, seconds: float = 60.0) -> list[tune.Choice]:
    found, left_out = tune.groups([op], SM80)
    assert left_out == []
    return tune.tune(found, CPU, stopwatch(cost), deadline=time.monotonic() + seconds)


def test_cases_of_one_key_are_one_choice() -> None:
    found, left_out = tune.groups([small()], SM80)
    assert left_out == []
    assert [(g.key, [c.name for c in g.cases]) for g in found] == [
        ({"width": 96}, ["few", "many"]),
        ({"width": 40}, ["other"]),
    ]
    default = _config.lookup("silu_mul", {"width": 96}, SM80)
    assert [g.default for g in found] == [default, default]
    assert found[0].others == (WIDE, NARROW)


def test_the_default_is_not_tried_against_itself() -> None:
    default = _config.lookup("silu_mul", {"width": 96}, SM80)
    found, _ = tune.groups([small([WIDE, default])], SM80)
    assert found[0].others == (WIDE,)


def test_an_architecture_without_kernel_and_a_key_without_default_are_left_out() -> None:
    new = tuple(dataclasses.replace(kernel, archs=(90, 100)) for kernel in OP.kernels)
    found, left_out = tune.groups(
        [small(kernels=new, name="late"), small(name="nameless"), small()], SM80
    )
    assert {group.op.name for group in found} == {"silu_mul"}
    assert left_out[0] == "late: no kernel for sm_80"
    assert "nameless: expected a configuration" in left_out[1]


def test_the_fastest_is_chosen_with_its_times() -> None:
    first, second = tuned(small(), by_block(w1024=2.0, w256=1.5, w64=1.0))
    assert (first.config, first.default["BLOCK_W"], first.tried) == (NARROW, 1024, 3)
    assert first.seconds == {"few": 1.0, "many": 1.0}
    assert first.default_seconds == {"few": 2.0, "many": 2.0}
    assert (first.skipped, first.complete, first.error) == ([], True, "")
    assert second.seconds == {"other": 1.0}


def test_cases_weigh_by_ratio_not_by_seconds() -> None:
    # Long rows of the second case would outvote the first, were seconds added.
    def cost(launch: Launch) -> float:
        few = launch.args["rows"] == 2
        costs = {1024: (1.0, 100.0), 256: (0.25, 110.0), 64: (1.0, 95.0)}
        return costs[launch.constants["BLOCK_W"]][0 if few else 1]

    first, _ = tuned(small(), cost)
    assert first.config == WIDE
    assert math.sqrt(0.25 * 1.1) < math.sqrt(0.95)


@pytest.mark.parametrize(("seconds", "wins"), [(0.99, False), (0.97, True), (1.5, False)])
def test_the_default_stays_unless_beaten_by_the_margin(seconds: float, wins: bool) -> None:
    first, _ = tuned(small([WIDE]), by_block(w1024=1.0, w256=seconds))
    assert (first.config == WIDE) is wins
    assert first.seconds == dict.fromkeys(("few", "many"), seconds if wins else 1.0)


def test_what_cannot_be_compiled_is_skipped_with_its_reason() -> None:
    def plan(config: Config, gate: Tensor, up: Tensor) -> Any:
        if config == NARROW:
            raise RuntimeError("out of resource: shared memory")
        return plan_silu_mul(config, gate, up)

    first, _ = tuned(small(plan=plan), by_block(w1024=2.0, w256=1.9))
    assert first.config == WIDE
    reason = "RuntimeError: out of resource: shared memory"
    assert first.skipped == [{"config": NARROW, "reason": reason}]


def test_a_wrong_result_is_never_chosen_however_fast() -> None:
    def plan(config: Config, gate: Tensor, up: Tensor) -> Any:
        return plan_silu_mul(config, gate, up * 1.001 if config == NARROW else up)

    first, _ = tuned(small(plan=plan), by_block(w1024=2.0, w256=1.9, w64=0.1))
    assert first.config == WIDE
    assert "WrongResult: differs from the default by" in first.skipped[0]["reason"]


def test_a_default_that_fails_leaves_its_key_alone_and_the_next_is_tuned() -> None:
    def plan(config: Config, gate: Tensor, up: Tensor) -> Any:
        if gate.shape[-1] == 96:
            raise ValueError("no")
        return plan_silu_mul(config, gate, up)

    first, second = tuned(small(plan=plan), by_block(w1024=2.0, w256=1.5, w64=1.0))
    assert first.error == "the default configuration: ValueError: no"
    assert second.config == NARROW


def refusing(failing: Callable[[int], bool], cost: Cost) -> tune.Timer:
    """A timer that refuses, in the final race alone, launches of some widths of a block."""

    def measure(candidates: Sequence[Sequence[Launch]], rounds: int) -> list[float]:
        widths = {launch.constants["BLOCK_W"] for launches in candidates for launch in launches}
        if rounds == tune.FINAL_ROUNDS and any(map(failing, widths)):
            raise RuntimeError("out of memory")
        return stopwatch(cost)(candidates, rounds)

    return measure


@pytest.mark.parametrize(
    ("failing", "wins", "seconds"),
    [({64}, WIDE, 1.5), ({256}, NARROW, 1.0), ({64, 256}, None, 2.0)],
)
def test_a_finalist_that_fails_takes_no_other_along(
    failing: set[int], wins: Config | None, seconds: float
) -> None:
    found, _ = tune.groups([small()], SM80)
    timer = refusing(failing.__contains__, by_block(w1024=2.0, w256=1.5, w64=1.0))
    choices = tune.tune(found, CPU, timer, deadline=time.monotonic() + 60)
    assert len(choices) == 2
    for choice in choices:
        assert (choice.config, choice.error) == (wins or choice.default, "")
        assert set(choice.seconds.values()) == {seconds}
        assert set(choice.default_seconds.values()) == {2.0}
        assert {skip["config"]["BLOCK_W"] for skip in choice.skipped} == failing
        assert {skip["reason"] for skip in choice.skipped} == {"RuntimeError: out of memory"}


def test_a_default_that_fails_at_last_leaves_its_key_alone() -> None:
    found, _ = tune.groups([small()], SM80)
    timer = refusing(lambda width: width == 1024, by_block(w1024=2.0, w256=1.5, w64=1.0))
    first, second = tune.tune(found, CPU, timer, deadline=time.monotonic() + 60)
    for choice in (first, second):
        assert choice.error == "the default configuration: RuntimeError: out of memory"
        assert (choice.config, choice.seconds) == (choice.default, {})


def test_a_device_lost_in_the_final_race_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device, what: str) -> None:
        raise DeviceLost(what)

    monkeypatch.setattr(tune, "check_device", lost)
    found, _ = tune.groups([small()], SM80)
    timer = refusing(lambda width: width == 64, by_block(w1024=2.0, w256=1.5, w64=1.0))
    with pytest.raises(DeviceLost, match=r"silu_mul.* with .*1024.* or .*64.* or .*256"):
        tune.tune(found, CPU, timer, deadline=time.monotonic() + 60)


def test_a_fault_of_the_tuner_itself_is_not_taken_for_a_configuration_that_fails() -> None:
    def plan(config: Config, gate: Tensor, up: Tensor) -> Any:
        return plan_silu_mul({"BLOCK_R": 1} if config == NARROW else config, gate, up)

    with pytest.raises(KeyError, match="BLOCK_W"):
        tuned(small(plan=plan), by_block(w1024=2.0, w256=1.9))


def test_what_will_be_tried_is_prepared_before_without_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "CHUNK", 2)
    events: list[tuple[str, int]] = []

    def prepare(launches: Sequence[Launch]) -> None:
        for launch in launches:
            out = launch.args["out_ptr"]
            assert isinstance(out, Tensor)
            assert out.device.type == "meta"
            events.append(("prepared", launch.constants["BLOCK_W"]))

    def cost(launch: Launch) -> float:
        events.append(("timed", launch.constants["BLOCK_W"]))
        return 1.0

    many = [{"BLOCK_R": 1, "BLOCK_W": 2**n, "warps": 4} for n in (5, 6, 7)]
    found, _ = tune.groups([small(many, cases=(case("one", 2, 96),))], SM80)
    deadline = time.monotonic() + 60
    tune.tune(found, CPU, stopwatch(cost), deadline=deadline, prepare=prepare)
    assert [width for what, width in events if what == "prepared"] == [32, 64, 128]
    assert events.index(("timed", 32)) > events.index(("prepared", 64))
    assert events.index(("timed", 64)) < events.index(("prepared", 128))


def test_time_is_shared_and_what_is_not_reached_is_missing() -> None:
    assert tuned(small(), by_block(w1024=2.0, w256=1.9, w64=1.0), seconds=0) == []

    def slow(launch: Launch) -> float:
        time.sleep(0.05)
        return 1.0

    many = [{"BLOCK_R": 1, "BLOCK_W": 2**n, "warps": 4} for n in (5, 6, 7, 8)]
    first = tuned(small(many), slow, seconds=0.3)[0]
    assert not first.complete
    assert 1 < first.tried < 5


def test_bits_that_are_specified_are_compared_as_bits() -> None:
    exact = small(kernels=tuple(dataclasses.replace(k, fusion=False) for k in OP.kernels))
    x = torch.tensor([1.0, 2.0])
    near = torch.nextafter(x, torch.tensor(3.0))
    tuning_gate.check(OP, {}, [near], [x])
    with pytest.raises(tuning_gate.WrongResult, match="other bits"):
        tuning_gate.check(exact, {}, [near], [x])
    with pytest.raises(tuning_gate.WrongResult, match="other bits"):
        tuning_gate.check(OP, {}, [torch.tensor([1])], [torch.tensor([2])])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(value: float) -> None:
    with pytest.raises(tuning_gate.WrongResult, match="differs"):
        tuning_gate.check(OP, {}, [torch.tensor([value, 1.0])], [torch.tensor([1.0, 1.0])])


def test_quantised_ops_have_a_budget_in_the_norm() -> None:
    op = small(name="attention_fp8")
    x = torch.ones(100)
    tuning_gate.check(op, {"pure": 0}, [x * 1.03], [x])
    tuning_gate.check(op, {"pure": 1}, [x * 1.13], [x])
    for pure, factor in ((0, 1.05), (1, 1.15)):
        with pytest.raises(tuning_gate.WrongResult, match="differs"):
            tuning_gate.check(op, {"pure": pure}, [x * factor], [x])


def test_nothing_is_timed_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDevice, match="expected a CUDA device, got cpu"):
        tune.device_timer(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDevice, match="expected a CUDA device, found none"):
        tune.cuda_target()


def test_a_lost_device_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(DeviceLost, match=r"silu_mul: the device is lost.*illegal memory"):
        tuning_gate.check_device(torch.device("cuda"), "silu_mul")
    tuning_gate.check_device(CPU, "silu_mul")


def choice(width: int, block: int, seconds: float = 1e-5) -> tune.Choice:
    config = {"BLOCK_R": 1, "BLOCK_W": block, "warps": 4}
    times = {"few": seconds}
    return tune.Choice("silu_mul", {"width": width}, config, WIDE, times, {"few": 2e-5}, 3)


def merged(before: Any, *choices: tune.Choice, when: str = "first", torch: str = "1") -> Any:
    return tuning_file.merge(
        before, choices, arch=90, device="NVIDIA H200", when=when, versions={"torch": torch}
    )


def test_the_file_is_what_the_look_up_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    document = merged(None, choice(96, 64), choice(40, 32))
    assert document["arch"] == 90
    assert [entry["key"]["arch"] for entry in document["ops"]["silu_mul"]] == [90, 90]
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(document))
    monkeypatch.setattr(_config, "FOLDER", tmp_path)
    _config._entries.cache_clear()
    try:
        target = Target(_config.file_name("NVIDIA H200"), 90)
        assert _config.lookup("silu_mul", {"width": 40}, target)["BLOCK_W"] == 32
        assert _config.lookup("silu_mul", {"width": 96}, target)["BLOCK_W"] == 64
    finally:
        _config._entries.cache_clear()


def test_a_later_run_replaces_what_it_tuned_and_keeps_the_rest() -> None:
    first = merged(None, choice(96, 64), choice(40, 32))
    second = merged(first, choice(96, 128), when="second", torch="2")
    entries = {entry["key"]["width"]: entry for entry in second["ops"]["silu_mul"]}
    assert {width: entry["config"]["BLOCK_W"] for width, entry in entries.items()} == {
        96: 128,
        40: 32,
    }
    assert {width: entry["run"] for width, entry in entries.items()} == {96: "second", 40: "first"}
    assert second["source"]["runs"] == {"first": {"torch": "1"}, "second": {"torch": "2"}}
    assert entries[96]["microseconds"] == {"few": 10.0}
    third = merged(second, choice(40, 16), when="third")
    assert set(third["source"]["runs"]) == {"second", "third"}


def test_what_could_not_be_tuned_leaves_the_file_as_it_was() -> None:
    first = merged(None, choice(96, 64))
    failed = tune.Choice("silu_mul", {"width": 96}, WIDE, WIDE, error="the default: no")
    assert merged(first, failed, when="second") == first


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_every_case_has_a_default_and_something_to_try_against_it(arch: int) -> None:
    found, left_out = tune.groups(ops().values(), Target("", arch))
    assert [reason for reason in left_out if "no kernel for" not in reason] == []
    assert {group.op.name for group in found} >= {"silu_mul"}
    meta = torch.device("meta")
    for group in found:
        assert group.others, f"{group.op.name} {group.key}: nothing to try"
        for config in (group.default, group.others[0], group.others[-1]):
            _, launches = group.op.plan(config, **group.cases[0].make(meta))
            assert launches, f"{group.op.name} {group.key} {config}"


def test_configurations_that_launch_the_same_are_tried_once() -> None:
    default = _config.lookup("silu_mul", {"width": 96}, SM80)
    same = [{**config, "UNUSED": 1} for config in (default, WIDE)]
    (group, _), _ = tune.groups([small([WIDE, NARROW, *same])], SM80)
    assert tune.distinct(group) == [WIDE, NARROW]
    broken = {"BLOCK_R": 1, "BLOCK_W": 0, "warps": 4}

    def plan(config: Config, gate: Tensor, up: Tensor) -> Any:
        if config == broken:
            raise ValueError("no")
        return plan_silu_mul(config, gate, up)

    (group, _), _ = tune.groups([small([broken, WIDE], plan=plan)], SM80)
    assert tune.distinct(group) == [broken, WIDE]


def test_neighbours_of_the_default_are_tried_first() -> None:
    default = _config.lookup("silu_mul", {"width": 96}, SM80)
    far = {"BLOCK_R": 2, "BLOCK_W": 64, "warps": 8}
    near = {**default, "warps": 8}
    (group, _), _ = tune.groups([small([far, NARROW, near])], SM80)
    assert tune.distinct(group) == [near, NARROW, far]


@pytest.mark.gpu
def test_tuning_on_the_device() -> None:
    device, target = tune.cuda_target()
    found, _ = tune.groups([small()], target)
    timer = tune.device_timer(device)
    deadline = time.monotonic() + 60
    choices = tune.tune(found, device, timer, deadline=deadline, prepare=precompile)
    assert [c.error for c in choices] == ["", ""]
    assert all(value > 0 for c in choices for value in c.seconds.values())
