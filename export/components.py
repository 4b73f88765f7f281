"""Builds one component of an engine: capture, passes, ONNX file, parity with PyTorch, exactness."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heatsink.export import environment, exactness
from heatsink.export.manifest import (
    Artefact,
    Component,
    KnownAnswer,
    Parity,
    Preflight,
    TensorSpec,
)
from heatsink.export.onnx import DEFAULT_OPSET, OnnxFile, to_onnx
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.backends.session import Array, Session
from heatsink.runtime.digest import canonical_json, sha256_bytes, sha256_file
from heatsink.runtime.errors import EngineMismatch, InvalidRequest, NumericError
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import INTERFACES, TextLayer, input_shapes, wrap
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes, to_fixpoint
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.model import Model
from heatsink.runtime.text import Tokenizer

Report = Callable[[str, int, int], None]
PASSES = (to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code),)
PARITY_ROWS = 2
# Recorded in the build key: raise it when capture, passes or export change what they make.
RECIPE = 1


@dataclass(frozen=True)
class Plan:
    """All that decides a component's files and known answers."""

    name: str
    shapes: dict[str, tuple[int | str, ...]]
    text_layer: TextLayer | None
    largest: int
    opset: int
    precision: str
    source_digest: str
    parameters: int

    @property
    def disk_bytes(self) -> int:
        """Bytes its files will take, about."""
        return 4 * self.parameters + (1 << 20)

    def key(self, strict: bool) -> str:
        """SHA-256 of everything above, the libraries and the processor."""
        values: dict[str, Any] = {
            **{k: v for k, v in self.__dict__.items() if k != "shapes"},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "strict": strict,
            "recipe": RECIPE,
            "heatsink": environment.version(),
            "libraries": environment.libraries(),
            "device": environment.processor(),
        }
        return sha256_bytes(canonical_json(values))


@dataclass(frozen=True)
class Built:
    """A component in the engine's folder, and what the manifest says of it."""

    component: Component
    known: KnownAnswer
    preflight: Preflight


def vae_factor(model: Model) -> int:
    """Pixels a latent, in each direction."""
    levels = len(model.config("vae_decoder").get("block_out_channels", [0]))
    return int(2 ** (levels - 1))


def default_size(model: Model) -> tuple[int, int]:
    """The (height, width) in pixels that the UNet was made for."""
    size = model.config("unet").get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    factor = vae_factor(model)
    return height * factor, width * factor


def check_size(model: Model, size: tuple[int, int]) -> None:
    """Refuse a size that the networks' down- and upsampling can't make.

    Raises:
        InvalidRequest: names the multiple that height and width must be of.
    """
    levels = len(model.config("unet").get("block_out_channels", [0]))
    multiple = vae_factor(model) * int(2 ** (levels - 1))
    for name, value in zip(("height", "width"), size, strict=True):
        if value <= 0 or value % multiple:
            raise InvalidRequest(
                f"size: expected a {name} that is a positive multiple of {multiple} for this model, got {value}"
            )


def plan(
    model: Model, name: str, size: tuple[int, int], rows: int, opset: int | None, precision: str, report: Report
) -> Plan:
    """Work out a component's shapes and digest; reads its weights once."""
    config = dict(model.config(name))
    factor = vae_factor(model)
    height, width = size if name == "vae_encoder" else (size[0] // factor, size[1] // factor)
    shapes = input_shapes(name, config, height=height, width=width, text_length=_text_length(model, name))
    layer: TextLayer | None = None
    if name.startswith("text_encoder"):
        layer = "penultimate" if model.kind == "sdxl" else "last"
    # An image is one row of the VAE and up to two of the UNet.
    largest = max(1, rows // 2) if name.startswith("vae") else rows
    weights = model.weights(name)
    parameters = sum(int(np.prod(entry.shape)) for entry in weights.entries.values())
    digest = model.digest(name, lambda done, total: report(f"digesting {name}", done, total))
    return Plan(
        name, shapes, layer, largest, DEFAULT_OPSET if opset is None else opset, precision, digest, parameters
    )  # fmt: skip


def _text_length(model: Model, name: str) -> int:
    index = 1 if name == "text_encoder_2" else 0
    return Tokenizer(model.tokenizer_folder(index)).max_length


def build(model: Model, plan: Plan, folder: Path, strict: bool, report: Report) -> Built:
    """Build one component into `folder` and check it against PyTorch.

    Raises:
        NotBuilt: the network can't be captured or exported.
        EngineMismatch: the backend's results are further from PyTorch's than rounding explains.
        NumericError: the network's results are not finite.
    """
    begun = time.perf_counter()
    name, stages = plan.name, 4
    report(f"building {name}", 0, stages)
    graph = capture(
        name, model.module(name), model.weights(name), model.buffers(name),
        example_shapes=plan.shapes, dtype=torch.float32, text_layer=plan.text_layer,
    )  # fmt: skip
    graph = run_passes(graph, PASSES)
    report(f"building {name}", 1, stages)
    onnx = to_onnx(graph, folder / f"{name}.onnx", opset=plan.opset)
    report(f"building {name}", 2, stages)
    specs = [_spec(n, spec.shape, spec.dtype) for n, spec in graph.inputs.items()]
    session = OnnxRuntimeSession(name, onnx.path)
    parity = check_parity(model, plan, specs, session)
    report(f"building {name}", 3, stages)
    if strict:
        known = exactness.measure(
            session, specs, plan.largest, lambda done, total: report(f"exactness of {name}", done, total)
        )
    else:
        known = KnownAnswer(
            buckets=exactness.bucket_sizes(plan.largest), probe_seed=exactness.PROBE_SEED, answers=[]
        )
    del session
    gc.collect()
    component = _component(plan, graph, onnx, specs, parity, folder, strict)
    report(f"building {name}", stages, stages)
    measured = Preflight(
        disk_bytes_predicted=plan.disk_bytes,
        disk_bytes_measured=sum(a.bytes for a in component.artefacts),
    )
    report(f"built {name} in {time.perf_counter() - begun:.1f} s", 1, 1)
    return Built(component, known, measured)


def _component(
    plan: Plan, graph: Graph, onnx: OnnxFile, specs: list[TensorSpec], parity: Parity, folder: Path, strict: bool
) -> Component:
    origins = folder / f"{plan.name}.origins.json"
    table = {
        name: [[o.parameter, o.slice, o.transform] for o in parts] for name, parts in onnx.origins.items()
    }
    origins.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n", encoding="utf-8")
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


def check_parity(model: Model, plan: Plan, specs: list[TensorSpec], session: Session) -> Parity:
    """Compare the built component with the library's own module in PyTorch, on a seeded probe.

    The reference is the module in float64. What is allowed is twice the error of the module in float32, or of
    one rounding of the largest value.

    Raises:
        EngineMismatch: the error is larger.
        NumericError: the module's results are not finite.
    """
    values = exactness.probe(specs, PARITY_ROWS, exactness.PROBE_SEED + 1)
    found = session.run(values)
    reference = _run_module(model, plan, values, torch.float64)
    plain = _run_module(model, plan, values, torch.float32)
    worst: Parity | None = None
    for name, expected in reference.items():
        largest = float(np.abs(expected).max())
        if not np.isfinite(expected).all():
            raise NumericError(f"{plan.name}: output {name!r} is not finite in float64")
        error = float(np.abs(found[name] - expected).max())
        own = float(np.abs(plain[name] - expected).max())
        allowed = 2 * (own + float(np.finfo(np.float32).eps) * largest)
        parity = Parity(
            max_abs=error, reference_max_abs=largest, relative=error / (largest or 1.0), allowed=allowed
        )
        if not error <= allowed:
            raise EngineMismatch(
                f"{plan.name}: output {name!r} is {error:.3g} away from PyTorch in float64, allowed are "
                f"{allowed:.3g} (twice PyTorch's own float32 error)"
            )
        if worst is None or parity.max_abs * worst.allowed > worst.max_abs * parity.allowed:
            worst = parity
    assert worst is not None
    return worst


def _run_module(
    model: Model, plan: Plan, values: dict[str, Array], dtype: torch.dtype
) -> dict[str, Array]:
    module = wrap(plan.name, model.load_module(plan.name, dtype), plan.text_layer).eval()
    inputs = [torch.from_numpy(np.asarray(values[name])) for name in plan.shapes]
    with torch.inference_mode():
        outputs = module(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    return {
        name: value.double().numpy()
        for name, value in zip(INTERFACES[plan.name].outputs, outputs, strict=True)
    }
