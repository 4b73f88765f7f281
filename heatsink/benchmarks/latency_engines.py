"""The systems that run exported graphs: heatsink, ONNX Runtime, OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatsink.benchmarks.environment import why_not
from heatsink.benchmarks.latency_systems import STEP, WHOLE, Runner
from heatsink.benchmarks.latency_work import COMPONENTS, Artefacts, Level, Prompts, Request
from heatsink.runtime.backends.session import Array, Phased
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import NotBuilt

STRICT, FAST = "heatsink strict", "heatsink fast"
ONNXRUNTIME = "ONNX Runtime"
OPENVINO = "OpenVINO"
RunRows = Callable[[Mapping[str, Array]], dict[str, Array]]
Arrays = dict[str, Array]


def component_runner(run: RunRows, device: str = "cpu") -> Runner:
    """A component that computes everything, on arrays, or on a GPU on its tensors."""
    held: Arrays = {}

    def load(request: Request) -> None:
        held.update(_given(request, device))
        if isinstance(run, Phased):
            run.forget()

    return Runner(load, lambda: run(held), _first, WHOLE)


def step_runner(run: RunRows, device: str = "cpu") -> Runner:
    """The step alone: `load` computes what depends on text and time, with other latents."""
    held: Arrays = {}
    whole = component_runner(run, device)

    def load(request: Request) -> None:
        assert isinstance(request, Mapping)
        whole.load({**request, "sample": torch.zeros_like(request["sample"])})
        whole.run()
        held.update(_given(request, device))

    return Runner(load, lambda: run(held), _first, STEP)


def _given(request: Request, device: str) -> dict[str, Any]:
    assert isinstance(request, Mapping)
    if device == "cpu":
        return {name: value.numpy() for name, value in request.items()}
    return {name: value.to(device) for name, value in request.items()}


def _first(outputs: Mapping[str, Any]) -> Tensor:
    return torch.as_tensor(next(iter(outputs.values()))).float().cpu()


def engine_runner(engine: Engine, steps: int, guidance: float) -> Runner:
    """A generation by an engine; nothing is kept from one request to the next."""
    held: list[Prompts] = []

    def load(request: Request) -> None:
        assert isinstance(request, Prompts)
        held[:] = [request]
        engine.forget()

    def run() -> Any:
        (request,) = held
        return engine.generate(
            list(request.texts),
            negative_prompt=request.negative,
            seed=request.seed,
            steps=steps,
            guidance=guidance,
        ).images

    def result(images: Any) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]) / 255)

    return Runner(load, run, result)


class Heatsink:
    """This package's engines; where none is built, the captured graph as the engine runs it."""

    strict = True

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        workload = artefacts.workload
        if not workload.engines and not self.strict:
            raise NotBuilt("the same program as strict: no engine is built, no batch size measured")
        self._artefacts, self._precision = artefacts, precision
        self._engine: Engine | None = None
        self._components: dict[str, Any] = {}

    def runners(self, level: Level, count: int) -> list[Runner]:
        """The whole, and of the UNet the step too."""
        workload = self._artefacts.workload
        if level == "image":
            return [engine_runner(self._opened(), workload.steps, workload.guidance)]
        component = self._component(COMPONENTS[level])
        found = [component_runner(component, workload.device)]
        if level == "unet":
            found.append(step_runner(component, workload.device))
        return found

    def _opened(self) -> Engine:
        import heatsink

        if not self._artefacts.workload.engines:
            raise NotBuilt("no engine is built for a known configuration, nor for a GPU yet")
        if self._engine is None:
            folder = self._artefacts.engine(self._precision, self.strict)
            self._engine = heatsink.load(folder, threads=self._artefacts.workload.threads)
        return self._engine

    def _component(self, name: str) -> Any:
        if name not in self._components:
            make = self._of_engine if self._artefacts.workload.engines else self._of_graph
            self._components[name] = make(name)
        return self._components[name]

    def _of_engine(self, name: str) -> Any:
        from heatsink.export.backends import backend
        from heatsink.export.manifest import read_manifest
        from heatsink.export.opening import OpenComponent, open_session

        folder = self._artefacts.engine(self._precision, self.strict)
        manifest = read_manifest(folder)
        threads = self._artefacts.workload.threads
        return OpenComponent(
            open_session(manifest, folder, name, threads=threads),
            manifest.components[name],
            manifest.exactness.components[name],
            backend(manifest.backend).runs,
        )

    def _of_graph(self, name: str) -> Any:
        from heatsink.export.native import data_of
        from heatsink.runtime.backends.native import NativeSession, read_graph
        from heatsink.runtime.native.phased import PhasedComponent
        from heatsink.runtime.native.workspace import Workspace

        path = self._artefacts.native(name, self._precision)
        graph, workload = read_graph(path, data_of(path, name)), self._artefacts.workload
        if workload.device == "cpu":
            threads, rows = workload.threads, workload.rows
            return _Called(NativeSession(name, graph, Workspace(), largest=rows, threads=threads))
        return _Called(PhasedComponent(graph, device=workload.device))


class HeatsinkFast(Heatsink):
    """Any batch size, whatever bits it gives."""

    strict = False


class _Called:
    """A session, or a component, as an opened component is called."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.prepare, self.forget = session.prepare, session.forget

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._session.run(inputs)
        return found


class _Exported:
    """A library that runs the ONNX files; its generations are sampled by heatsink's engine."""

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        self._artefacts, self._precision = artefacts, precision

    def runners(self, level: Level, count: int) -> list[Runner]:
        """The component's rows in one call."""
        workload = self._artefacts.workload
        if level != "image":
            return [component_runner(self._rows(COMPONENTS[level]))]
        names = [n for n in self._artefacts.model.components if n != "vae_encoder"]
        components = {name: self._rows(name) for name in names}
        engine = Engine(self._artefacts.spec(), components)
        return [engine_runner(engine, workload.steps, workload.guidance)]

    def _rows(self, component: str) -> RunRows:
        raise NotImplementedError


class OnnxRuntime(_Exported):
    """ONNX Runtime on the CPU, as it comes."""

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        super().__init__(artefacts, precision)
        if artefacts.workload.device != "cpu":
            raise NotBuilt("it is measured on a CPU only")
        if precision != "fp32":
            raise NotBuilt(f"its CPU provider does not compute in {precision}")
        self._sessions: dict[str, RunRows] = {}

    def _rows(self, component: str) -> RunRows:
        from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession

        if component not in self._sessions:
            path = self._artefacts.onnx(component)
            threads = self._artefacts.workload.threads
            self._sessions[component] = OnnxRuntimeSession(component, path, threads=threads).run
        return self._sessions[component]


class OpenVino(_Exported):
    """OpenVINO on the CPU: static shapes, the LATENCY hint, the precision as its own hint asks."""

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        super().__init__(artefacts, precision)
        if artefacts.workload.device != "cpu":
            raise NotBuilt("it is measured on a CPU only")
        if reason := why_not("openvino"):
            raise NotBuilt(reason)
        self._models: dict[tuple[str, int], Any] = {}

    def _rows(self, component: str) -> RunRows:
        def run(inputs: Mapping[str, Array]) -> Arrays:
            count = len(next(iter(inputs.values())))
            found = self._compiled(component, count)(dict(inputs))
            return {key.get_any_name(): value for key, value in found.items()}

        return run

    def _compiled(self, component: str, count: int) -> Any:
        """The model for exactly so many rows; one count of a component is kept at a time."""
        if (component, count) not in self._models:
            for key in [key for key in self._models if key[0] == component]:
                del self._models[key]
            self._models[component, count] = self._compile(component, count)
        return self._models[component, count]

    def _compile(self, component: str, count: int) -> Any:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(self._artefacts.onnx(component)))
        shapes = self._artefacts.shapes(component)
        model.reshape(
            {
                name: [count if isinstance(size, str) else size for size in shape]
                for name, shape in shapes.items()
            }
        )
        wanted = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[self._precision]
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": self._artefacts.workload.threads,
                "INFERENCE_PRECISION_HINT": wanted,
            },
        )
        if (taken := compiled.get_property("INFERENCE_PRECISION_HINT")) != wanted:
            raise NotBuilt(f"asked for {self._precision}, it computes in {taken} on this processor")
        return compiled
