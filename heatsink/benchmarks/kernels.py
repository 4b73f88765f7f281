"""Measures every op on its cases against what a user would run otherwise.

For each case: inputs; the reference in float64; the op and every variant checked against it, and
those that fail not timed; then all timed in turn, round by round. A ratio is taken within a round.
Seconds are kept only from a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from heatsink.benchmarks.bundled import PREFIX
from heatsink.benchmarks.ceilings import Ceilings
from heatsink.benchmarks.check import Ready, Reference, make_ready, refusals
from heatsink.benchmarks.families import FAMILIES
from heatsink.benchmarks.family import Cost, Family, LeftOut, Variant, eager_variant
from heatsink.kernels._op import Case, Inputs, Op
from heatsink.kernels.timing import Spread, Timed, interleaved
from heatsink.kernels.tuning_gate import check_device, failures, one_line

OURS = "heatsink"
EAGER = "PyTorch eager"
COMPILE = "torch.compile"


@dataclass(frozen=True)
class Row:
    """What was found of one variant.

    Attributes:
        name: the variant's.
        ratio: its time as a multiple of the op's in the same round; above 1, the op is faster.
        seconds: of one call; None except on a GPU.
        max_error: the largest absolute difference from float64; None where values differ by design.
        relative_error: the difference's 2-norm over the reference's.
        of_ceiling: the share of the ceiling that it reached; None except on a GPU.
    """

    name: str
    ratio: Spread
    seconds: Spread | None
    max_error: float | None
    relative_error: float | None
    of_ceiling: float | None


@dataclass(frozen=True)
class CaseResult:
    """One case of one op.

    Attributes:
        op: the op's name.
        case: the case's name.
        cost: the least work.
        rows: the op first, then the variants.
        left_out: variants that can't be had here or whose result is wrong, and why.
        error: why the op itself was not timed; empty where it was.
    """

    op: str
    case: str
    cost: Cost | None = None
    rows: tuple[Row, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """The cases to measure, op by op, and the ops that are left out."""

    cases: list[tuple[Op, Family, Case]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def by_turns(self) -> list[tuple[Op, Family, Case]]:
        """Every op's first case, then every op's second: a limit on time cuts no op off whole."""
        seen: dict[str, int] = {}
        turns = []
        for one in self.cases:
            turns.append(seen.get(one[0].name, 0))
            seen[one[0].name] = turns[-1] + 1
        # Stable: ops keep their order within a turn.
        return [self.cases[i] for i in sorted(range(len(turns)), key=turns.__getitem__)]

    def in_order(self, results: Iterable[CaseResult]) -> list[CaseResult]:
        """Results op by op, as the cases are."""
        places = {(op.name, case.name): i for i, (op, _, case) in enumerate(self.cases)}
        return sorted(results, key=lambda result: places[result.op, result.case])


def make_plan(ops: Iterable[Op], device: torch.device, names: Sequence[str] = ()) -> Plan:
    """The cases to measure on a device.

    On a GPU these are the ops' cases; on the CPU those at the bundled model's shapes alone.

    Args:
        ops: in order.
        device: where.
        names: of cases; where given, those alone, on any device.
    """
    plan = Plan()
    for op in ops:
        family = FAMILIES.get(op.name)
        if family is None:
            plan.left_out.append(LeftOut(op.name, "nothing to compare it with is defined"))
            continue
        known = {case.name: case for case in (*family.bundled, *op.cases)}
        if names:
            cases = [known[name] for name in names if name in known]
        elif device.type == "cpu":
            cases = [case for case in known.values() if case.name.startswith(PREFIX)]
            if not cases:
                reason = "no case at the bundled model's shapes, and no GPU"
                plan.left_out.append(LeftOut(op.name, reason))
        else:
            cases = [case for case in op.cases if case.timed]
        plan.cases.extend((op, family, case) for case in cases)
    return plan


def measure(
    plan: Plan,
    device: torch.device,
    *,
    rounds: int,
    ceilings: Ceilings | None = None,
    compile: bool = True,
    deadline: float | None = None,
    measured: Callable[[CaseResult], None] = lambda result: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[CaseResult]:
    """Measure a plan, the ops by turns.

    Args:
        plan: from `make_plan`.
        device: where.
        rounds: samples of each variant.
        ceilings: of this device in this run, where it is a GPU.
        compile: whether `torch.compile` is among the variants.
        deadline: a reading of `time.monotonic` after which no case is begun.
        measured: called with each result as it is there.
        progress: called with (what, done, total).

    Returns:
        The results in the plan's order, op by op; cases that the time did not reach are missing.

    Raises:
        DeviceLost: if a failure took the device with it.
    """
    results: list[CaseResult] = []
    for done, (op, family, case) in enumerate(plan.by_turns()):
        progress("measuring", done, len(plan.cases))
        if deadline is not None and time.monotonic() >= deadline:
            break
        result = _measure_case(op, family, case, device, rounds, ceilings, compile)
        results.append(result)
        measured(result)
    progress("measuring", len(plan.cases), len(plan.cases))
    return plan.in_order(results)


def _measure_case(
    op: Op,
    family: Family,
    case: Case,
    device: torch.device,
    rounds: int,
    ceilings: Ceilings | None,
    compile: bool,
) -> CaseResult:
    # Each case compiles anew: a limit on recompilations would end it at some shape.
    torch.compiler.reset()
    left_out: list[LeftOut] = []
    try:
        inputs = case.make(device)
        ours = Variant(OURS, op.prepare, tolerance=family.tolerance(inputs))
        reference = Reference.of(family, inputs)
        ready = [make_ready(ours, inputs, reference)]
        cost = family.cost(inputs, ready[0].call())
    except failures() as error:
        check_device(device, f"{op.name} {case.name}")
        return CaseResult(op.name, case.name, error=one_line(error))
    for variant in _variants(family, inputs, compile, left_out):
        try:
            ready.append(make_ready(variant, inputs, reference))
        except refusals() as error:
            left_out.append(LeftOut(variant.name, one_line(error)))
            check_device(device, f"{op.name} {case.name}, {variant.name}")
    samples = interleaved([Timed(one.call, one.variant.scope) for one in ready], rounds, device)
    least = ceilings.least_seconds(cost) if ceilings else None
    rows = [
        _row(one, mine, samples[0], device, least) for one, mine in zip(ready, samples, strict=True)
    ]
    return CaseResult(op.name, case.name, cost, tuple(rows), tuple(left_out))


def _variants(
    family: Family, inputs: Inputs, compile: bool, left_out: list[LeftOut]
) -> list[Variant]:
    """The variants that may be had, plain PyTorch first; the others are added to `left_out`."""
    found = [eager_variant(EAGER, family.eager)]
    for variant in family.others(inputs):
        if isinstance(variant, LeftOut):
            left_out.append(variant)
        elif variant.name.startswith(COMPILE) and not compile:
            left_out.append(LeftOut(variant.name, "not asked for"))
        else:
            found.append(variant)
    return found


def _row(
    one: Ready,
    mine: Sequence[float],
    ours: Sequence[float],
    device: torch.device,
    least: float | None,
) -> Row:
    seconds = Spread.of(mine)
    ratio = Spread.of([a / b for a, b in zip(mine, ours, strict=True)])
    cuda = device.type == "cuda"
    return Row(
        one.variant.name,
        ratio,
        seconds if cuda else None,
        one.max_error,
        one.relative_error,
        least / seconds.median if cuda and least is not None else None,
    )
