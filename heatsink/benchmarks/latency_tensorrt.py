"""TensorRT among the compared systems, where it is installed; it has never run here.

An engine is built from the ONNX file for exactly one count, with bfloat16 allowed where that is
the table's precision and TF32 forbidden. Generations are sampled by heatsink's engine on the host,
whose copies to the device and back are part of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heatsink.benchmarks.environment import why_not
from heatsink.benchmarks.latency_engines import Arrays, engine_runner
from heatsink.benchmarks.latency_systems import Runner
from heatsink.benchmarks.latency_work import COMPONENTS, Artefacts, Level, Request
from heatsink.runtime.backends.session import Array
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import EngineMismatch, NotBuilt

NAME = "TensorRT"


class TensorRt:
    """The ONNX files' networks, built for the device that is there."""

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        if artefacts.workload.device != "cuda":
            raise NotBuilt("it needs a GPU")
        if reason := why_not("tensorrt"):
            raise NotBuilt(reason)
        self._artefacts, self._precision = artefacts, precision
        self._networks: dict[tuple[str, int], _Network] = {}

    def runners(self, level: Level, count: int) -> list[Runner]:
        """The component on the device's own tensors, or the engine's sampler around it."""
        workload = self._artefacts.workload
        if level == "image":
            names = [n for n in self._artefacts.model.components if n != "vae_encoder"]
            components = {name: self._on_host(name) for name in names}
            engine = Engine(self._artefacts.spec(), components)
            return [engine_runner(engine, workload.steps, workload.guidance)]
        network = self._network(COMPONENTS[level], count)
        held: dict[str, Tensor] = {}

        def load(request: Request) -> None:
            assert isinstance(request, Mapping)
            held.update({name: value.cuda() for name, value in request.items()})

        return [Runner(load, lambda: network(held), lambda out: _first(out).float().cpu())]

    def _on_host(self, component: str) -> Any:
        def run(inputs: Mapping[str, Array]) -> Arrays:
            count = len(next(iter(inputs.values())))
            given = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
            found = self._network(component, count)(given)
            return {name: value.float().cpu().numpy() for name, value in found.items()}

        return run

    def _network(self, component: str, count: int) -> _Network:
        """For exactly so many rows; one count of a component is kept at a time."""
        if (component, count) not in self._networks:
            for key in [key for key in self._networks if key[0] == component]:
                del self._networks[key]
            network = _Network(self._artefacts, component, count, self._precision)
            self._networks[component, count] = network
        return self._networks[component, count]


def _first(outputs: Mapping[str, Tensor]) -> Tensor:
    return next(iter(outputs.values()))


class _Network:
    """One component, built for one count."""

    def __init__(self, artefacts: Artefacts, component: str, count: int, precision: str) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(artefacts.onnx(component))):
            raise EngineMismatch(f"TensorRT can't read {component}: {parser.get_error(0)}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.clear_flag(trt.BuilderFlag.TF32)
        if precision == "bf16":
            config.set_flag(trt.BuilderFlag.BF16)
        self._shapes = {
            name: tuple(count if isinstance(size, str) else size for size in shape)
            for name, shape in artefacts.shapes(component).items()
        }
        for name, shape in self._shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineMismatch(f"TensorRT can't build {component}")
        # Held: the engine's memory goes with it.
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._outputs = self._bind(trt)

    def _bind(self, trt: Any) -> dict[str, Tensor]:
        """Fix the shapes, and give every output its memory."""
        for name, shape in self._shapes.items():
            self._context.set_input_shape(name, shape)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        outputs = {}
        for name in names:
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                shape = tuple(self._context.get_tensor_shape(name))
                dtype = {trt.float32: torch.float32, trt.bfloat16: torch.bfloat16}[
                    self._engine.get_tensor_dtype(name)
                ]
                outputs[name] = torch.empty(shape, dtype=dtype, device="cuda")
                self._context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Queue it on the current stream."""
        for name, value in inputs.items():
            self._context.set_tensor_address(name, value.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineMismatch("TensorRT refused to run")
        return self._outputs
