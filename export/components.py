"""Builds one component of an engine: capture, passes, ONNX file, parity with PyTorch, exactness."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from heatsink.export import exactness, ported
from heatsink.export.manifest import (
    Artefact,
    Component,
    KnownAnswer,
    Parity,
    PortedGraph,
    Preflight,
    TensorSpec,
)
from heatsink.export.onnx import OnnxFile, to_onnx
from heatsink.export.parity import check_parity
from heatsink.export.plan import Plan, Report
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes, to_fixpoint
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.flat_sums import flatten_sums
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.model import Model

PASSES = (to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code),)
# Of a graph with ports and of its twin without: else their rows differ in the last bits.
PORT_PASSES = (*PASSES, flatten_sums)


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
    graph = _captured(model, plan)
    report(f"building {name}", 1, stages)
    onnx = to_onnx(graph, folder / f"{name}.onnx", opset=plan.opset)
    report(f"building {name}", 2, stages)
    specs = [_spec(n, spec.shape, spec.dtype) for n, spec in graph.inputs.items()]
    session = OnnxRuntimeSession(name, onnx.path)
    parity = check_parity(model, plan.text_layer, specs, session)
    report(f"building {name}", 3, stages)
    known = _known_answer(session, specs, plan.largest, strict, report)
    # Its weights are twice in memory until then.
    del session
    gc.collect()
    extra = None
    if plan.layout is not None:
        report(f"building {name}", 4, stages)
        extra = ported.build(model, plan, graph, onnx, known, strict, report)
        gc.collect()
    component = _component(plan, graph, onnx, specs, parity, folder, strict)
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


def _captured(model: Model, plan: Plan) -> Graph:
    graph = capture(
        plan.name,
        model.module(plan.name),
        model.weights(plan.name),
        model.buffers(plan.name),
        example_shapes=plan.shapes,
        dtype=torch.float32,
        text_layer=plan.text_layer,
    )
    return run_passes(graph, PASSES if plan.layout is None else PORT_PASSES)


def _known_answer(
    session: OnnxRuntimeSession, specs: list[TensorSpec], largest: int, strict: bool, report: Report
) -> KnownAnswer:
    if not strict:
        sizes = exactness.bucket_sizes(largest)
        return KnownAnswer(buckets=sizes, probe_seed=exactness.PROBE_SEED, answers=[])
    return exactness.measure(
        session,
        specs,
        largest,
        lambda done, total: report(f"exactness of {session.name}", done, total),
    )


def _component(
    plan: Plan,
    graph: Graph,
    onnx: OnnxFile,
    specs: list[TensorSpec],
    parity: Parity,
    folder: Path,
    strict: bool,
) -> Component:
    origins = folder / f"{plan.name}.origins.json"
    table = {name: [origin.as_list() for origin in parts] for name, parts in onnx.origins.items()}
    text = json.dumps(table, indent=0, sort_keys=True)
    origins.write_text(text + "\n", encoding="utf-8")
    names = [onnx.path.name, origins.name] + ([onnx.data.name] if onnx.data else [])
    return Component(
        artefacts=[artefact(folder, name) for name in names],
        graph=onnx.path.name,
        inputs=specs,
        outputs=[_spec(n, spec.shape, spec.dtype) for n, spec in graph.outputs.items()],
        precision="fp32",
        opset=onnx.opset,
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
    return TensorSpec(name=name, dtype=str(dtype).removeprefix("torch."), shape=list(shape))
