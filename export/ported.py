"""Builds a component's graph with adapter ports, beside the one without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heatsink.export import backends, exactness, parity, ported_exactness
from heatsink.export.backends import Written
from heatsink.export.manifest import KnownAnswer, Parity, PortedGraph, TensorSpec
from heatsink.export.plan import DTYPES
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.backends.native_ports import BankView
from heatsink.runtime.backends.session import Array, Session
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.model import Model
from heatsink.runtime.port_layout import PortLayout

if TYPE_CHECKING:
    from heatsink.export.plan import Plan, Report

WHICH = ("all", "linear", "attention")
MAX_SLOTS, MAX_RANK = 4096, 512
# The rows of the parity probe, and the adapters with weights that each has.
_MIXES = (((0, 0.75), (1, -0.5)), ((1, 1.25),))


def check_options(ports: tuple[int, int] | None, which: str) -> None:
    """Refuse what can't be built.

    Raises:
        InvalidRequest: a value is out of range.
    """
    if which not in WHICH:
        raise InvalidRequest(f"ports: expected one of {', '.join(WHICH)}, got {which!r}")
    if ports is None and which != WHICH[0]:
        raise InvalidRequest(f"ports: {which!r} says which layers get ports, and adapters none")
    for name, value, most in zip(
        ("slots", "rank"), ports or (), (MAX_SLOTS, MAX_RANK), strict=False
    ):
        if not 1 <= value <= most:
            raise InvalidRequest(f"adapters: expected 1 to {most} {name}, got {value}")


def layouts(
    model: Model, targets: Targets, ports: tuple[int, int] | None, which: str
) -> dict[str, PortLayout]:
    """The ports of every component that gets any, by name."""
    if ports is None:
        return {}
    slots, rank = ports
    found = {}
    for name in model.components:
        shapes = targets.shapes.get(name, {})
        chosen = {path: shape for path, shape in shapes.items() if _has_port(path, shape, which)}
        if chosen:
            found[name] = PortLayout.of(name, slots, rank, chosen)
    return found


def _has_port(path: str, shape: Sequence[int], which: str) -> bool:
    if which == "all":
        return True
    if len(shape) != 2:
        return False
    # `attn1`, `attn2` of a UNet, `self_attn` of CLIP.
    return which == "linear" or any("attn" in part for part in path.split("."))


def build(
    model: Model,
    plan: Plan,
    graph: Graph,
    twin: Written,
    known: KnownAnswer,
    strict: bool,
    report: Report,
) -> PortedGraph:
    """Write the graph with ports beside the one without, and check it.

    Args:
        model: the source.
        plan: of the component; it has a layout.
        graph: the graph without ports.
        twin: what was written of that.
        known: its known answer.
        strict: measure exactness.
        report: called with (what is being done, done, total).

    Raises:
        NotBuilt: a weight can't have a port.
        EngineMismatch: results are further from PyTorch's than rounding explains, or not exact.
    """
    layout = plan.layout
    assert layout is not None
    used = {origin.parameter for origins in graph.origins.values() for origin in origins}
    unused = [path for path in layout.places() if f"{path}.weight" not in used]
    backend = backends.backend(plan.backend)
    ported = run_passes(graph, [backend.add_ports(layout, unused)])
    path = backend.write_ported(ported, twin, opset=plan.opset)
    session = backend.open(
        plan.name, path, largest=plan.largest, threads=0, workspace=None, bank=BankView(layout)
    )
    specs, inputs = _specs(graph), _specs(ported)
    measured = _parity(model, plan, specs, session, set(layout.places()) - set(unused))
    counts, refused = list(backend.rooms), []
    answer, agrees = known.model_copy(update={"answers": []}), True
    if strict:
        counts, answer, agrees = ported_exactness.measure(
            session, specs, layout, backend.sizes(plan.largest), known,
            lambda done, total: report(f"exactness of {plan.name} with adapters", done, total),
            rooms=backend.rooms,
        )  # fmt: skip
        refused = [count for count in backend.rooms if count not in counts]
    return PortedGraph(
        graph=path.name, inputs=inputs, counts=counts, refused_counts=refused, twin=agrees,
        parity=measured, known=answer,
    )  # fmt: skip


def _specs(graph: Graph) -> list[TensorSpec]:
    return [
        TensorSpec(name=n, dtype=_given_dtype(s.dtype), shape=list(s.shape))
        for n, s in graph.inputs.items()
    ]


def _given_dtype(dtype: torch.dtype) -> str:
    """What a session takes: NumPy has no bfloat16."""
    return str(torch.float32 if dtype.is_floating_point else dtype).removeprefix("torch.")


def _parity(
    model: Model, plan: Plan, specs: list[TensorSpec], session: Session, ported: set[str]
) -> Parity:
    """The error on a probe whose rows have different adapters, merged in PyTorch row by row."""
    layout = plan.layout
    assert layout is not None
    values = exactness.probe(specs, len(_MIXES), parity.SEED)
    slots = [content % layout.slots for content in (0, 1)]
    bank = ported_exactness.bank_probe(layout, slots[: layout.slots], parity.SEED)
    mixes = [[(slots[content], weight) for content, weight in mix] for mix in _MIXES]
    room = ported_exactness.port_inputs(mixes, max(map(len, _MIXES)))
    found = session.run({**values, **bank, **room})
    merged = []
    for row, mix in enumerate(mixes):
        deltas = _deltas(layout, bank, mix, ported)
        one = {name: value[row : row + 1] for name, value in values.items()}
        merged.append(
            [
                parity.run_module(model, plan.name, plan.text_layer, one, dtype, deltas)
                for dtype in (torch.float64, DTYPES[plan.precision])
            ]
        )
    results = []
    for name in merged[0][0]:
        reference, plain = (np.concatenate([row[kind][name] for row in merged]) for kind in (0, 1))
        what = f"{plan.name} with adapters: output {name!r}"
        results.append(parity.compare(what, found[name], plain, reference, DTYPES[plan.precision]))
    return max(results, key=lambda each: each.max_abs / (each.allowed or 1.0))


def _deltas(
    layout: PortLayout,
    bank: Mapping[str, Array],
    mix: Sequence[tuple[int, float]],
    ported: set[str],
) -> dict[str, Any]:
    """What a row's adapters add to each weight, in float64."""
    deltas = {}
    for path, (group, port) in layout.places().items():
        if path not in ported:
            continue
        total: Any = 0.0
        for slot, weight in mix:
            row = port * layout.slots + slot
            a, b = (torch.from_numpy(bank[f"bank.{group}.{which}"][row]).double() for which in "ab")
            inputs = a.movedim(-1, 1)
            product = (b.T @ inputs.flatten(1)).reshape(b.shape[1], *inputs.shape[1:])
            total = total + weight * product
        deltas[f"{path}.weight"] = total
    return deltas
