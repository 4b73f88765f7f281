"""What systems are compared on: a model, its artefacts, and the requests of every round.

Requests are seeded by their round, and no two rounds ask for the same: what a system keeps of
one round (text, times) is of no use in the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from heatsink.export import plan as planning
from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import TextLayer, input_dtype, input_shapes
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, PASSES_ONNX
from heatsink.runtime.model import Model
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.text import Tokenizer

Level = Literal["unet", "vae", "image"]
LEVELS: tuple[Level, ...] = ("unet", "vae", "image")
COMPONENTS: dict[Level, str] = {"unet": "unet", "vae": "vae_decoder"}
UNITS: dict[Level, str] = {"unet": "row", "vae": "image", "image": "image"}
"""What is counted at a level: a row of the UNet, two of which are an image with guidance."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = (
    "a red apple",
    "a penguin",
    "a sunflower",
    "a hamburger",
    "a tiger face",
    "an owl",
    "a sailboat",
    "a rocket",
)


def module_key(component: str, precision: str) -> str:
    """How a run's settings name a component in a precision."""
    return f"{component}, {precision}"


@dataclass(frozen=True)
class Workload:
    """What is compared, in values that another process can be given.

    Attributes:
        model: a diffusers folder.
        work: where artefacts lie.
        device: `cpu` or `cuda`.
        threads: of every system on a CPU.
        rows: of the UNet, the most.
        layouts: of the eager modules in memory, `contiguous` or `channels_last`, by `module_key`;
            what is missing is contiguous.
        engines: whether heatsink runs as engines, built with all checks; else as a graph that was
            captured and written, of the UNet alone.
        steps: of DPM-Solver++(2M), in a generation.
        guidance: scale of classifier-free guidance.
        ready: whether artefacts lie there already.
    """

    model: str
    work: str
    device: str
    threads: int
    rows: int
    layouts: Mapping[str, str] = field(default_factory=dict)
    engines: bool = True
    steps: int = 20
    guidance: float = 4.0
    ready: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Prompts:
    """The request of a generation: a text and a seed of each image, and what to keep away from."""

    texts: Sequence[str]
    negative: str
    seed: int


Request = Mapping[str, Tensor] | Prompts


class Artefacts:
    """A workload's model, and the files that systems open, each written when first asked for."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.model = Model.open(workload.model)
        self.size = planning.default_size(self.model)
        self.folder = Path(workload.work)
        self._made: set[Path] = set()
        self._graphs: dict[tuple[str, str], Graph] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image's latents."""
        factor = planning.vae_factor(self.model)
        channels = self.model.config("vae_decoder").get("latent_channels", 4)
        return channels, self.size[0] // factor, self.size[1] // factor

    def graph(self, component: str, precision: str) -> Graph:
        """The component as captured, before any pass."""
        if (component, precision) not in self._graphs:
            self._graphs[component, precision] = capture(
                component,
                self.model.module(component),
                self.model.weights(component),
                self.model.buffers(component),
                example_shapes=self.shapes(component),
                dtype=DTYPES[precision],
                text_layer=self._text_layer(component),
            )
        return self._graphs[component, precision]

    def shapes(self, component: str) -> dict[str, tuple[int | str, ...]]:
        """Of its inputs, with `batch` for the rows."""
        _, height, width = self.latent_shape
        index = 1 if component == "text_encoder_2" else 0
        length = Tokenizer(self.model.tokenizer_folder(index)).max_length
        config = dict(self.model.config(component))
        return input_shapes(component, config, height=height, width=width, text_length=length)

    def onnx(self, component: str) -> Path:
        """Its ONNX file, float32, as an engine for ONNX Runtime holds it."""
        from heatsink.export.onnx import to_onnx

        path = self.folder / "onnx" / f"{component}.onnx"
        if self._to_make(path):
            to_onnx(run_passes(self.graph(component, "fp32"), PASSES_ONNX), path)
        return path

    def native(self, component: str, precision: str) -> Path:
        """Its graph as heatsink runs it, with weights beside it; nothing of it was checked."""
        from heatsink.export.native import to_native

        path = self.folder / f"native-{precision}" / f"{component}.graph.json"
        if self._to_make(path):
            to_native(run_passes(self.graph(component, precision), PASSES_NATIVE), path)
        return path

    def engine(self, precision: str, strict: bool) -> Path:
        """The engine's folder, built and checked as a user's is."""
        from heatsink.export.build import Options, build

        if precision not in ("fp32", "bf16"):
            raise NotBuilt(f"no engine is built in {precision}")
        folder = self.folder / f"engine-{precision}-{'strict' if strict else 'fast'}"
        if self._to_make(folder):
            rows = self.workload.rows
            options = Options(
                backend="torch",
                batch=(1, rows, rows),
                precision=precision,  # type: ignore[arg-type] # one of its names, see above
                strict=strict,
            )
            build(self.model, folder, options)
        return folder

    def spec(self) -> EngineSpec:
        """What heatsink's sampler must know to run another library's components."""
        model = self.model
        texts = [name for name in model.components if name.startswith("text_encoder")]
        height, width = self.size
        return EngineSpec(
            name=Path(self.workload.model).name,
            digest="",
            text_encoders=texts,
            tokenizers=[Tokenizer(model.tokenizer_folder(i)) for i in range(model.tokenizer_count)],
            schedule=ScheduleConfig.from_diffusers(model.scheduler_config),
            latent_channels=self.latent_shape[0],
            vae_factor=planning.vae_factor(model),
            default_size=self.size,
            heights=(height, height),
            widths=(width, width),
            zero_empty_negative=bool(model.settings.get("force_zeros_for_empty_prompt")),
        )

    def request(self, level: Level, count: int, turn: int) -> Request:
        """What is asked for in a round; another one in every round.

        A row does not depend on how many there are. Turn 0 is the one that results are checked on.
        """
        if level == "image":
            more = f", {turn}" if turn else ""
            texts = [PROMPTS[i % len(PROMPTS)] + more for i in range(count)]
            return Prompts(texts, f"blurry{more}", turn * 1000)
        component = COMPONENTS[level]
        drawn: dict[str, Tensor] = {}
        for place, (name, shape) in enumerate(self.shapes(component).items()):
            rows = []
            for row in range(count):
                generator = torch.Generator().manual_seed((turn * 64 + place) * 4096 + row)
                sizes = [int(size) for size in shape if size != BATCH]
                if name == "timestep":
                    rows.append(torch.rand((), generator=generator) * 900 + 1)
                elif name == "time_ids":
                    height, width = self.size
                    rows.append(torch.tensor([height, width, 0, 0, height, width - turn % 64]))
                else:
                    rows.append(torch.randn(sizes, generator=generator))
            drawn[name] = torch.stack(rows).to(input_dtype(name, torch.float32))
        return drawn

    def _to_make(self, path: Path) -> bool:
        """Whether it must be written now: once in the process that prepares."""
        if self.workload.ready or path in self._made:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._made.add(path)
        return True

    def _text_layer(self, component: str) -> TextLayer | None:
        if not component.startswith("text_encoder"):
            return None
        return "penultimate" if self.model.kind == "sdxl" else "last"
