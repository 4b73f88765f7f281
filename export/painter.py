"""Pictures of a model whose components run in chosen precisions, without an engine folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from heatsink.export import plan as planning
from heatsink.runtime.backends.session import Array
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import NATIVE, PASSES_NATIVE, precision_passes
from heatsink.runtime.model import Model
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.workspace import Workspace
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.text import Tokenizer

Pictures = npt.NDArray[np.uint8]
Watch = Callable[[Mapping[str, Array]], None]
# Of equal pictures, whose PSNR is infinite; JSON holds no infinity.
EQUAL_DB = 99.0


@dataclass(frozen=True)
class Subjects:
    """What is drawn: every prompt with every seed.

    Attributes:
        prompts: texts.
        seeds: of the noise.
        steps: of `scheduler`.
        guidance: scale of classifier-free guidance.
        scheduler: as requests name it.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "dpm++2m"

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds"):
            if not getattr(self, name):
                raise InvalidRequest(f"{name}: expected at least one, got none")

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture, in order."""
        return [(prompt, seed) for seed in self.seeds for prompt in self.prompts]


@dataclass(frozen=True)
class Setting:
    """What a component computes in: the arguments of `pipeline.precision_passes`."""

    precision: str = "fp32"
    high: tuple[str, ...] = ()


class Painter:
    """Draws the same subjects with components in any precision.

    Args:
        model: opened.
        subjects: what is drawn, at the model's own size.
        device: where it runs.
    """

    def __init__(
        self, model: Model, subjects: Subjects, device: torch.device | str = "cpu"
    ) -> None:
        self.subjects = subjects
        self._workspace = Workspace(device)
        self._whole: dict[str, NativeComponent] = {}
        size = planning.default_size(model)
        names = drawing(model)
        self._graphs = {name: _captured(model, name, size) for name in names}
        self._spec = EngineSpec(
            name=str(model.path),
            digest="",
            text_encoders=[name for name in names if name.startswith("text_encoder")],
            tokenizers=[Tokenizer(model.tokenizer_folder(i)) for i in range(model.tokenizer_count)],
            schedule=ScheduleConfig.from_diffusers(model.scheduler_config),
            latent_channels=model.config("vae_decoder").get("latent_channels", 4),
            vae_factor=planning.vae_factor(model),
            default_size=size,
            heights=(size[0], size[0]),
            widths=(size[1], size[1]),
            zero_empty_negative=bool(model.settings.get("force_zeros_for_empty_prompt")),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents."""
        factor, (height, width) = self._spec.vae_factor, self._spec.default_size
        return self._spec.latent_channels, height // factor, width // factor

    def graph(self, component: str) -> Graph:
        """A component in float32, before fusion.

        Raises:
            InvalidRequest: the model has no such component, or it draws nothing.
        """
        if component not in self._graphs:
            raise InvalidRequest(
                f"component: expected one of {list(self._graphs)}, got {component!r}"
            )
        return self._graphs[component]

    def draw(
        self,
        settings: Mapping[str, Setting] | None = None,
        watch: Mapping[str, Watch] | None = None,
    ) -> Pictures:
        """The pictures `(N, H, W, 3)`, in the order of the subjects.

        Args:
            settings: by component; the others are fp32.
            watch: by component, called with the inputs of every run.
        """
        settings, watch = settings or {}, watch or {}
        for name in (*settings, *watch):
            self.graph(name)
        components = {
            name: _runner(self._component(name, settings.get(name, Setting())), watch.get(name))
            for name in self._graphs
        }
        prompts, seeds = zip(*self.subjects.pairs, strict=True)
        result = Engine(self._spec, components).generate(
            prompts,
            seed=seeds,
            steps=self.subjects.steps,
            guidance=self.subjects.guidance,
            scheduler=self.subjects.scheduler,
        )
        return np.stack([np.asarray(image) for image in result.images])

    def _component(self, name: str, setting: Setting) -> NativeComponent:
        if setting == Setting() and name in self._whole:
            return self._whole[name]
        # The products of this package's CPU ops are float32 and bfloat16: PyTorch's do the rest.
        plain = setting.precision == "fp16" and self._workspace.device.type == "cpu"
        passes = [
            *precision_passes(setting.precision, setting.high),
            *([NATIVE["clean"]] if plain else PASSES_NATIVE),
        ]
        made = NativeComponent(
            self._graphs[name],
            device=self._workspace.device,
            passes=passes,
            workspace=self._workspace,
        )
        if setting == Setting():
            self._whole[name] = made
        return made


def drawing(model: Model) -> list[str]:
    """The components that a picture is drawn with."""
    return [name for name in model.components if name != "vae_encoder"]


def psnr(pictures: Pictures, reference: Pictures) -> list[float]:
    """Decibels of each picture against its reference, `EQUAL_DB` at most."""
    difference = pictures.astype(np.float64) - reference.astype(np.float64)
    errors = (difference**2).mean(axis=(1, 2, 3))
    return [min(EQUAL_DB, float(10 * np.log10(255**2 / e))) if e else EQUAL_DB for e in errors]


def _captured(model: Model, name: str, size: tuple[int, int]) -> Graph:
    plan = planning.plan(
        model, name, size, 1, opset=None, precision="fp32", backend="torch", report=_silent
    )
    graph = capture(
        name,
        model.module(name),
        model.weights(name),
        model.buffers(name),
        example_shapes=plan.shapes,
        text_layer=plan.text_layer,
    )
    return run_passes(graph, [NATIVE["clean"]])


def _silent(what: str, done: int, total: int) -> None:
    pass


def _runner(
    component: NativeComponent, watch: Watch | None
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if watch is not None:
            watch(inputs)
        found = component.run({name: torch.from_numpy(v) for name, v in inputs.items()})
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().numpy()
            for name, value in found.items()
        }

    return run


def summary(values: Sequence[float]) -> dict[str, float]:
    """Worst and mean of decibels, rounded for reports."""
    return {"worst": round(min(values), 2), "mean": round(float(np.mean(values)), 2)}
