"""The systems that are compared, and PyTorch's among them: diffusers eager, compiled, xformers.

A system gives a `Runner` for each level and count: `load` takes a request and is not timed, `run`
answers it. Whatever a library can't do here it says by an error, and is listed as left out.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heatsink.benchmarks.environment import why_not
from heatsink.benchmarks.latency_work import (
    COMPONENTS,
    DTYPES,
    Artefacts,
    Level,
    Prompts,
    Request,
    module_key,
)
from heatsink.runtime import noise
from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.components import input_dtype, wrap

EAGER = "diffusers eager"
COMPILE = "torch.compile"
XFORMERS = "xformers"
WHOLE, STEP = "whole", "step"
CONTIGUOUS = "contiguous"
LAYOUTS = {CONTIGUOUS: torch.contiguous_format, "channels_last": torch.channels_last}
# More than the counts of a run: past its limit, PyTorch falls back to eager in silence.
_RECOMPILES = 256
# Rounds in which layouts are compared: the least, and the most within so many seconds.
_LAYOUT_ROUNDS, _LAYOUT_SECONDS = (3, 15), 2.0


@dataclass
class Runner:
    """One system at one level and count.

    Attributes:
        load: takes a request; not timed.
        run: answers it, until the result is there for the host or queued on the device.
        result: of what `run` returned: float `(rows, ...)`, images `(N, H, W, 3)` in [0, 1].
        includes: `whole`, or `step`: what depends on text and time was computed by `load`.
    """

    load: Callable[[Request], None]
    run: Callable[[], Any]
    result: Callable[[Any], Tensor]
    includes: str = WHOLE


class System(Protocol):
    """A library with a model in it."""

    def runners(self, level: Level, count: int) -> list[Runner]:
        """What is timed at a level; a refusal is an error that says why."""
        ...


class Eager:
    """The library's own modules and pipeline: SDPA attention, inference mode, chosen layouts."""

    name = EAGER

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        self._artefacts = artefacts
        self._precision, self._dtype = precision, DTYPES[precision]
        self._device = torch.device(artefacts.workload.device)
        self._modules: dict[str, nn.Module] = {}
        self._pipe: Any = None

    def runners(self, level: Level, count: int) -> list[Runner]:
        """A module of the level, or the pipeline."""
        if level == "image":
            return [self._generation(self.pipeline())]
        return [self._call(COMPONENTS[level], self.module(COMPONENTS[level]))]

    def set_layout(self, layout: str) -> None:
        """Move the modules that are loaded."""
        for module in self._modules.values():
            _lay(module, layout)

    def module(self, component: str) -> nn.Module:
        """A component with the inputs that graphs have."""
        if component not in self._modules:
            inner = self._artefacts.model.load_module(component, self._dtype).to(self._device)
            key = module_key(component, self._precision)
            layout = self._artefacts.workload.layouts.get(key, CONTIGUOUS)
            self._modules[component] = wrap(component, _lay(inner, layout)).eval()
        return self._modules[component]

    def pipeline(self) -> Any:
        """The pipeline around the networks that are loaded."""
        import diffusers

        if self._pipe is None:
            xl = self._artefacts.model.kind == "sdxl"
            name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
            extra: dict[str, Any] = {} if xl else {"safety_checker": None}
            pipe = getattr(diffusers, name).from_pretrained(
                self._artefacts.workload.model,
                torch_dtype=self._dtype,
                local_files_only=True,
                unet=self.module("unet").model,
                # Without its encoder, which a generation from text has no use for.
                vae=self.module("vae_decoder").model,
                **extra,
            )
            schedulers: Any = diffusers.DPMSolverMultistepScheduler
            pipe.scheduler = schedulers.from_config(pipe.scheduler.config)
            pipe.to(self._device)
            pipe.set_progress_bar_config(disable=True)
            self._pipe = pipe
        return self._pipe

    def _call(self, component: str, call: Callable[..., Any]) -> Runner:
        held: list[Tensor] = []

        def load(request: Request) -> None:
            assert isinstance(request, Mapping)
            held[:] = [
                value.to(self._device, input_dtype(name, self._dtype))
                for name, value in request.items()
            ]

        def run() -> Tensor:
            with torch.inference_mode():
                out: Tensor = call(*held)[0]
            return out

        return Runner(load, run, lambda out: out.float().cpu())

    def _generation(self, pipe: Any) -> Runner:
        workload, shape = self._artefacts.workload, self._artefacts.latent_shape
        held: dict[str, Any] = {}

        def load(request: Request) -> None:
            assert isinstance(request, Prompts)
            count = len(request.texts)
            held.update(
                prompt=list(request.texts),
                negative_prompt=[request.negative] * count,
                seeds=range(request.seed, request.seed + count),
            )

        def run() -> Any:
            given = dict(held)
            # Heatsink's own noise for these seeds: drawing it is part of everybody's work.
            latents = noise.normal_rows(given.pop("seeds"), noise.INITIAL, 0, shape)
            with torch.inference_mode():
                return pipe(
                    **given,
                    num_inference_steps=workload.steps,
                    guidance_scale=workload.guidance,
                    latents=latents.to(self._device, self._dtype),
                    output_type="np",
                ).images

        return Runner(load, run, torch.from_numpy)


def _lay(module: Any, layout: str) -> Any:
    """The module with its weights in a layout."""
    return module.to(memory_format=LAYOUTS[layout])


class Compiled(Eager):
    """The same modules through `torch.compile`: max-autotune on a GPU, the default on a CPU.

    A network is compiled for exactly the counts that it meets, at the first call of each; steps and
    generations share what is compiled. The pipeline's loop and its scheduler stay Python.
    """

    name = COMPILE

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        import torch._dynamo.config as config

        super().__init__(artefacts, precision)
        config.recompile_limit = config.accumulated_recompile_limit = _RECOMPILES
        self._mode = "max-autotune" if self._device.type == "cuda" else "default"
        self._compiled: dict[str, Any] = {}

    def runners(self, level: Level, count: int) -> list[Runner]:
        """The compiled component, or the pipeline around all of them."""
        if level == "image":
            return [self._generation(self.pipeline())]
        return [self._call(COMPONENTS[level], self._component(COMPONENTS[level]))]

    def pipeline(self) -> Any:
        """With every network compiled."""
        made = self._pipe is not None
        pipe = super().pipeline()
        if not made:
            self._component("vae_decoder")
            # Past the pipeline's `__setattr__`, which would write them into its configuration.
            object.__setattr__(pipe, "unet", _UNet(pipe.unet, self._component("unet")))
            for name in ("text_encoder", "text_encoder_2"):
                if getattr(pipe, name, None) is not None:
                    object.__setattr__(pipe, name, self._compile(getattr(pipe, name)))
        return pipe

    def _component(self, name: str) -> Any:
        if name not in self._compiled:
            module: Any = self.module(name)
            if name == "vae_decoder":
                # What the pipeline calls, too.
                object.__setattr__(module.model, "decode", self._compile(module.model.decode))
            self._compiled[name] = module if name == "vae_decoder" else self._compile(module)
        return self._compiled[name]

    def _compile(self, call: Any) -> Any:
        return torch.compile(call, mode=self._mode, dynamic=False)


class _UNet:
    """A compiled UNet with graphs' inputs as the pipeline calls its own."""

    def __init__(self, model: Any, call: Any) -> None:
        self._model, self._compiled = model, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        """Predict; what the pipeline has no value for is None."""
        given = {name for name, value in others.items() if value is not None}
        if given - {"return_dict"}:
            raise NotBuilt(f"the pipeline gives the UNet {sorted(given)}")
        times = timestep.to(sample.device, torch.float32).expand(len(sample)).contiguous()
        added = added_cond_kwargs or {}
        more = [added[name] for name in ("text_embeds", "time_ids") if name in added]
        return self._compiled(sample, times, encoder_hidden_states, *more)


class Xformers(Eager):
    """The same modules with xformers' attention; it has kernels for a GPU alone."""

    name = XFORMERS

    def __init__(self, artefacts: Artefacts, precision: str) -> None:
        super().__init__(artefacts, precision)
        if self._device.type != "cuda":
            raise NotBuilt("it has no attention for a CPU")
        if reason := why_not("xformers.ops"):
            raise NotBuilt(reason)

    def module(self, component: str) -> nn.Module:
        """With its attention replaced."""
        module = super().module(component)
        model: Any = module.model
        model.enable_xformers_memory_efficient_attention()
        return module


def time_layouts(
    artefacts: Artefacts, precision: str, level: Level, count: int
) -> dict[str, float]:
    """Seconds of the level's eager module in each layout, the least of all rounds.

    The layouts take turns, so that what else the machine does for a while decides nothing: a slower
    layout would be a weaker baseline.
    """
    system = Eager(artefacts, precision)
    (runner,) = system.runners(level, count)
    seconds = dict.fromkeys(LAYOUTS, math.inf)
    turn, ends = 0, time.perf_counter() + _LAYOUT_SECONDS
    while turn < _LAYOUT_ROUNDS[0] or (turn < _LAYOUT_ROUNDS[1] and time.perf_counter() < ends):
        turn += 1
        for layout in LAYOUTS:
            system.set_layout(layout)
            runner.load(artefacts.request(level, count, turn))
            # Untimed: the weights were just moved.
            runner.run()
            with synchronised(artefacts.workload.device) as clock:
                runner.run()
            seconds[layout] = min(seconds[layout], clock())
    return seconds


@contextlib.contextmanager
def synchronised(device: str) -> Iterator[Callable[[], float]]:
    """Wait for the device before and after the block; gives a function of the seconds between."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    ended = begun

    def seconds() -> float:
        return ended - begun

    yield seconds
    wait()
    ended = time.perf_counter()
