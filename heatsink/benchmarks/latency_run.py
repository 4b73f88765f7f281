"""A run of the latency benchmark from what a command line says, and its files."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heatsink.benchmarks import latency_models, latency_report
from heatsink.benchmarks.latency import SYSTEMS, Bench, Progress, Wanted
from heatsink.benchmarks.latency_results import Results
from heatsink.benchmarks.latency_work import DTYPES, LEVELS, Level, Workload
from heatsink.export.build import MAX_BATCH
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.files import make_folder, write_whole

NAME = "latency"
ROWS = (1, 2, 4, 8, 16)
IMAGES = (1, 2, 4, 8)
# Of a whole checkpoint on a CPU, where a step takes seconds.
_FEW_ROWS, _FEW_ROUNDS = (2,), 3


@dataclass(frozen=True)
class Asked:
    """What was asked for; empty values take what suits the model and the device.

    Attributes:
        model: a diffusers folder.
        config: `sd15` or `sdxl` with random weights, instead of the folder.
        device: `cpu` or `cuda`; a GPU where there is one.
        precisions, levels, systems: by name.
        rows: of the UNet.
        images: of the other levels.
        rounds: timed rounds; 0: the default.
        steps: of a generation.
        guidance: of a generation.
        threads: of every system on a CPU; 0 takes PyTorch's.
        cold: whether fresh processes are measured.
        seconds: after which nothing more is begun.
        work: where artefacts go and stay; a temporary folder where None.
    """

    model: Path = Path("models/emoji")
    config: str = ""
    device: str = ""
    precisions: Sequence[str] = ()
    levels: Sequence[str] = ()
    systems: Sequence[str] = ()
    rows: Sequence[int] = ()
    images: Sequence[int] = ()
    rounds: int = 0
    steps: int = 20
    guidance: float = 4.0
    threads: int = 0
    cold: bool = True
    seconds: float | None = None
    work: Path | None = None

    @property
    def on(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def large(self) -> bool:
        """Whether one step takes seconds, and two systems fill the memory."""
        return bool(self.config) and self.on == "cpu"

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InvalidRequest: names the option, what was expected and what came.
        """
        for option, given, known in (
            ("config", [self.config] if self.config else [], latency_models.CONFIGS),
            ("device", [self.on], ("cpu", "cuda")),
            ("precision", self.precisions, tuple(DTYPES)),
            ("level", self.levels, LEVELS),
            ("system", self.systems, tuple(SYSTEMS)),
        ):
            for one in given:
                if one not in known:
                    raise InvalidRequest(
                        f"--{option}: expected one of {', '.join(known)}, got {one!r}"
                    )
        for option, counts in (("rows", self.rows), ("images", self.images)):
            for count in counts:
                if not 1 <= count <= MAX_BATCH:
                    raise InvalidRequest(
                        f"--{option}: expected numbers from 1 to {MAX_BATCH}, got {count}"
                    )
        for option, number, least in (
            ("rounds", self.rounds, 0),
            ("steps", self.steps, 1),
            ("threads", self.threads, 0),
        ):
            if number < least:
                raise InvalidRequest(f"--{option}: expected at least {least}, got {number}")
        if self.on == "cuda" and not torch.cuda.is_available():
            raise InvalidRequest("--device: expected a CUDA device for cuda, found none")

    def counts(self) -> dict[Level, tuple[int, ...]]:
        """Of each level that is measured, ascending."""
        levels = self.levels or (("unet",) if self.large else LEVELS)
        rows = tuple(sorted(set(self.rows))) or (_FEW_ROWS if self.large else ROWS)
        images = tuple(sorted(set(self.images))) or ((1,) if self.large else IMAGES)
        return {level: rows if level == "unet" else images for level in LEVELS if level in levels}

    def wanted(self, spent: float = 0.0) -> Wanted:
        """For the run, after so many seconds of preparing."""
        precisions = tuple(dict.fromkeys(self.precisions))
        systems = tuple(name for name in SYSTEMS if not self.systems or name in self.systems)
        return Wanted(
            precisions or (("bf16",) if self.on == "cuda" else ("fp32", "bf16")),
            self.counts(),
            systems,
            self.rounds or (_FEW_ROUNDS if self.large else 0),
            together=not self.large,
            cold=self.cold,
            seconds=None if self.seconds is None else max(0.0, self.seconds - spent),
        )


def bench(
    asked: Asked,
    *,
    progress: Progress = lambda what, done, total: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Make what is missing and measure.

    Args:
        asked: what.
        progress: called with (what, done, total).
        keep: called with the results as they grow.

    Raises:
        InvalidRequest: see `Asked.check`.
        ModelError: the folder is no model.
    """
    asked.check()
    begun, counts = time.monotonic(), asked.counts()
    with _folder(asked.work) as work:
        model = asked.model
        if asked.config:
            # Kept from one run to the next, as all in a folder that was named.
            model = latency_models.random_model(
                asked.config, work / "models" / asked.config, progress
            )
        workload = Workload(
            str(model),
            str(work),
            asked.on,
            asked.threads or torch.get_num_threads(),
            _most_rows(counts),
            engines=asked.on == "cpu" and not asked.config,
            steps=asked.steps,
            guidance=asked.guidance,
        )
        wanted = asked.wanted(time.monotonic() - begun)
        return Bench(workload, wanted, progress=progress, keep=keep).run()


def _most_rows(counts: Mapping[Level, Sequence[int]]) -> int:
    """Of the UNet; with guidance an image has two."""
    most = [1]
    for level, values in counts.items():
        most.append(max(values) * (1 if level == "unet" else 2))
    return max(most)


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        make_folder(work)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="heatsink-latency-") as folder:
        yield Path(folder)


def keep(results: Results, folder: Path, name: str = NAME) -> None:
    """Write what there is so far, as JSON."""
    make_folder(folder)
    _write_text(folder / f"{name}.json", json.dumps(results.as_dict(), indent=2) + "\n")


def write(results: Results, folder: Path, name: str = NAME) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is there, a picture; the paths."""
    keep(results, folder, name)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    _write_text(paths[1], latency_report.markdown(results) + "\n")
    picture = folder / f"{name}.png"
    try:
        latency_report.plot(results, picture)
    except ImportError:
        return paths
    return [*paths, picture] if picture.exists() else paths


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
