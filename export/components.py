"""Builds one component of an engine: capture, passes, files, parity with PyTorch, exactness."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from heatsink.export import backends, exactness, ported
from heatsink.export.backends import Backend, Written
from heatsink.export.manifest import (
    Artefact,
    Component,
    KnownAnswer,
    Parity,
    PortedGraph,
    Preflight,
    TensorSpec,
)
from heatsink.export.parity import check_parity
from heatsink.export.plan import DTYPES, Plan, Report
from heatsink.runtime.backends.session import Session
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import precision_passes
from heatsink.runtime.model import Model


@dataclass(frozen=True)
class Built:
    """A component in the engine's folder, and what the manifest says of it."""

    component: Component
    known: KnownAnswer
    preflight: Preflight
    ported: PortedGraph | None = None


def build(model: Model, plan: Plan, folder: Path, strict: bool, report: Report) -> Built:
    """Build one component into `folder` and check it against PyTorch.

    Raises:
        NotBuilt: the network can't be captured or exported.
        EngineMismatch: the backend's results are further from PyTorch's than rounding explains.
        NonFiniteWeights: the network's results are not finite.
        ResourceError: its files can't be written.
    """
    begun = time.perf_counter()
    name, stages = plan.name, 4 if plan.layout is None else 5
    report(f"building {name}", 0, stages)
    backend = backends.backend(plan.backend)
    graph = _captured(model, plan, backend)
    report(f"building {name}", 1, stages)
    written = backend.write(graph, folder, opset=plan.opset)
    report(f"building {name}", 2, stages)
    specs = [_spec(n, spec.shape, spec.dtype) for n, spec in graph.inputs.items()]
    session = backend.open(name, written.graph, largest=plan.largest, threads=0, workspace=None)
    dtype = DTYPES[plan.precision]
    parity = check_parity(model, plan.text_layer, specs, session, dtype)
    report(f"building {name}", 3, stages)
    known = _known_answer(session, specs, backend.sizes(plan.largest), strict, report)
    # Its weights are twice in memory until then.
    del session
    gc.collect()
    extra = None
    if plan.layout is not None:
        report(f"building {name}", 4, stages)
        extra = ported.build(model, plan, graph, written, known, strict, report)
        gc.collect()
    component = _component(plan, graph, written, specs, parity, folder, strict)
    if extra is not None:
        listed = [*component.artefacts, artefact(folder, extra.graph)]
        component = component.model_copy(update={"artefacts": listed})
    report(f"building {name}", stages, stages)
    measured = Preflight(
        disk_bytes_predicted=plan.disk_bytes,
        disk_bytes_measured=sum(a.bytes for a in component.artefacts),
    )
    report(f"built {name} in {time.perf_counter() - begun:.1f} s", 1, 1)
    return Built(component, known, measured, extra)


def _captured(model: Model, plan: Plan, backend: Backend) -> Graph:
    graph = capture(
        plan.name,
        model.module(plan.name),
        model.weights(plan.name),
        model.buffers(plan.name),
        example_shapes=plan.shapes,
        dtype=torch.float32,
        text_layer=plan.text_layer,
    )
    passes = backend.passes(ports=plan.layout is not None)
    return run_passes(graph, [*precision_passes(plan.precision, plan.high), *passes])


def _known_answer(
    session: Session, specs: list[TensorSpec], sizes: list[int], strict: bool, report: Report
) -> KnownAnswer:
    if not strict:
        return KnownAnswer(buckets=sizes, probe_seed=exactness.PROBE_SEED, answers=[])
    return exactness.measure(
        session,
        specs,
        sizes,
        lambda done, total: report(f"exactness of {session.name}", done, total),
    )


def _component(
    plan: Plan,
    graph: Graph,
    written: Written,
    specs: list[TensorSpec],
    parity: Parity,
    folder: Path,
    strict: bool,
) -> Component:
    origins = folder / f"{plan.name}.origins.json"
    table = {
        name: [origin.as_list() for origin in parts] for name, parts in written.origins.items()
    }
    text = json.dumps(table, indent=0, sort_keys=True)
    origins.write_text(text + "\n", encoding="utf-8")
    names = [*(path.name for path in written.files), origins.name]
    return Component(
        artefacts=[artefact(folder, name) for name in names],
        graph=written.graph.name,
        inputs=specs,
        outputs=[_spec(n, spec.shape, spec.dtype) for n, spec in graph.outputs.items()],
        precision=plan.precision,
        high=list(plan.high),
        opset=written.opset,
        parameters=plan.parameters,
        origins=origins.name,
        source_digest=plan.source_digest,
        build_key=plan.key(strict),
        parity=parity,
    )


def artefact(folder: Path, name: str) -> Artefact:
    """The manifest's entry of a file of the folder."""
    path = folder / name
    return Artefact(path=name, sha256=sha256_file(path), bytes=path.stat().st_size)


def _spec(name: str, shape: tuple[int | str, ...], dtype: torch.dtype) -> TensorSpec:
    # What a session takes and gives: NumPy has no bfloat16.
    given = torch.float32 if dtype.is_floating_point else dtype
    return TensorSpec(name=name, dtype=str(given).removeprefix("torch."), shape=list(shape))
