"""An opened engine: requests in, images and receipts out.

It knows nothing of files: whoever opens an engine folder gives it a description and, for every component, a
function that runs rows. `heatsink.load` does that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heatsink.runtime import noise, pictures
from heatsink.runtime.backends.session import Array
from heatsink.runtime.conditions import Conditions, encode
from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import InvalidRequest, NotBuilt, NumericError
from heatsink.runtime.request import Request
from heatsink.runtime.result import Receipt, Result
from heatsink.runtime.sampler import Job, denoise, new_job
from heatsink.runtime.schedule import Schedule, ScheduleConfig, make_schedule
from heatsink.runtime.text import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

RunRows = Callable[[Mapping[str, Array]], dict[str, Array]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineSpec:
    """What the runtime must know of an engine besides its components.

    Attributes:
        name: of the model.
        digest: of the manifest; receipts name it.
        text_encoders: component names, in the order in which their hidden states are concatenated.
        tokenizers: one for each.
        schedule: the model's noise schedule.
        latent_channels: channels of the latents.
        vae_factor: pixels a latent, in each direction.
        default_size: (height, width) where a request names none.
        heights: smallest and largest height that was built.
        widths: smallest and largest width that was built.
        zero_empty_negative: see `conditions.encode`.
        adapters: names and scales of what was fused into the weights.
    """

    name: str
    digest: str
    text_encoders: Sequence[str]
    tokenizers: Sequence[Tokenizer]
    schedule: ScheduleConfig
    latent_channels: int
    vae_factor: int
    default_size: tuple[int, int]
    heights: tuple[int, int]
    widths: tuple[int, int]
    zero_empty_negative: bool = False
    adapters: Mapping[str, float] = field(default_factory=dict)


class Engine:
    """Turns requests into images; open one with `heatsink.load(folder)`.

    Args:
        spec: the description.
        components: for each component's name the function that runs its rows. A row's bits must not depend on
            the rows beside it; then an image depends on its request and this engine alone.
    """

    def __init__(self, spec: EngineSpec, components: Mapping[str, RunRows]) -> None:
        self.spec = spec
        self._components = components

    def __repr__(self) -> str:
        return f"<Engine {self.spec.name} {self.spec.digest[:12]} {sorted(self._components)}>"

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image | Sequence[Image] | None = None,
        strength: float | None = None,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance: float = 5.0,
        scheduler: str = "dpm++2m",
        size: tuple[int, int] | int | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Make an image of each prompt.

        Args:
            prompt: a text, or several.
            negative_prompt: what to keep away from: one text for all, or one for each prompt.
            image: start from this picture (or one for each prompt) instead of from noise.
            strength: with an image, the share of the steps that is run, (0, 1]; 0.8 where not given.
            seed: one number (prompt i takes seed + i), or one for each prompt; 0 <= seed < 2^64.
            steps: denoising steps, 1 to 1000.
            guidance: scale of classifier-free guidance; 1 turns it off and halves the work.
            scheduler: `euler`, `dpm++2m`, `ddim` or `lcm`.
            size: (height, width) in pixels, or one number for both; the engine's own where not given.
            progress: called with ("text" | "image" | "unet" | "vae", done, total).

        Returns:
            Images, requests and receipts in the order of the prompts.

        Raises:
            InvalidRequest: an argument is out of range or lists differ in length.
            NotBuilt: the engine was not built for the size, or has no VAE encoder for `image`.
            NumericError: a component gave NaN or infinity; names the request and the step.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts)
        height, width = (size, size) if isinstance(size, int) else (size or (None, None))
        images = _each("image", image, count)
        if isinstance(seed, int):
            seeds: list[Any] = [seed + i for i in range(count)]
        else:
            seeds = _each("seed", seed, count)
        negatives = _each("negative_prompt", negative_prompt, count)
        if strength is None and image is not None:
            strength = 0.8
        requests = [
            Request.parse(
                prompt=prompts[i],
                negative_prompt=negatives[i] or "",
                seed=seeds[i],
                steps=steps,
                guidance=float(guidance),
                scheduler=scheduler,
                height=height,
                width=width,
                strength=strength,
                image_digest=image_digest(images[i]) if images[i] is not None else None,
            )
            for i in range(count)
        ]
        return self.run(requests, images, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        images: Sequence[Image | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Result:
        """Answer validated requests in one batch; they may differ in everything, their size included.

        Args:
            requests: what to make.
            images: the picture of every image-to-image request, None for the others.
            progress: as in `generate`.
        """
        report = progress or (lambda stage, done, total: None)
        clock = _Clock()
        images = [None] * len(requests) if images is None else list(images)
        requests = [self._resolve(request) for request in requests]
        if not requests:
            return Result([], [], [], clock.seconds)
        plans = [self._plan(request) for request in requests]
        with clock.measure("text"):
            conditions = self._encode_text(requests)
            report("text", len(requests), len(requests))
        with clock.measure("image"):
            starts = [self._start(r, i) for r, i in zip(requests, images, strict=True)]
        jobs = [
            self._job(*parts)
            for parts in zip(requests, plans, conditions.rows, starts, strict=True)
        ]
        with clock.measure("unet"):
            self._denoise(jobs, lambda done, total: report("unet", done, total))
        with clock.measure("vae"):
            pixels = self._decode(jobs)
            report("vae", len(jobs), len(jobs))
        results = [pictures.to_image(p) for p in pixels]
        receipts = [
            self._receipt(request, job, image, notes)
            for request, job, image, notes in zip(
                requests, jobs, results, conditions.notes, strict=True
            )
        ]
        return Result(results, requests, receipts, clock.seconds)

    def _resolve(self, request: Request) -> Request:
        request = request.resolved(*self.spec.default_size)
        for name, limits in (("height", self.spec.heights), ("width", self.spec.widths)):
            value = getattr(request, name)
            if value % self.spec.vae_factor:
                raise InvalidRequest(
                    f"{name}: expected a multiple of {self.spec.vae_factor}, got {value}"
                )
            if not limits[0] <= value <= limits[1]:
                built = f"{limits[0]} to {limits[1]}" if limits[0] < limits[1] else f"{limits[0]}"
                raise NotBuilt(
                    f"{name}: this engine was built for {built} pixels, got {value}; "
                    "build another with `heatsink build MODEL -o ENGINE --size HEIGHTxWIDTH`"
                )
        if request.adapters:
            raise NotBuilt(
                f"adapters {sorted(request.adapters)}: this engine has no adapter ports; fuse one at build "
                "time with `heatsink build MODEL -o ENGINE --fuse FILE:SCALE`"
            )
        return request

    def _plan(self, request: Request) -> Schedule:
        return make_schedule(
            request.scheduler, request.steps, self.spec.schedule, strength=request.strength
        )

    def _run(self, component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if component not in self._components:
            raise NotBuilt(f"this engine was built without {component}")
        return self._components[component](inputs)

    def _encode_text(self, requests: Sequence[Request]) -> Conditions:
        return encode(
            requests, self.spec.text_encoders, self.spec.tokenizers, self._run,
            zero_empty_negative=self.spec.zero_empty_negative,
        )  # fmt: skip

    def _shape(self, request: Request) -> tuple[int, int, int]:
        assert request.height is not None and request.width is not None
        factor = self.spec.vae_factor
        return self.spec.latent_channels, request.height // factor, request.width // factor

    def _start(self, request: Request, image: Image | None) -> torch.Tensor | None:
        """The latents that an image-to-image request starts from, sampled from the VAE's posterior."""
        if image is None:
            if request.image_digest is not None:
                raise InvalidRequest("image: expected the picture that image_digest names, got none")
            return None
        if image_digest(image) != request.image_digest:
            raise InvalidRequest("image: its pixels are not those of the request's image_digest")
        assert request.height is not None and request.width is not None
        pixels = pictures.to_array(image, request.height, request.width)
        out = self._run("vae_encoder", {"image": pixels[None]})
        mean, std = (torch.from_numpy(out[name])[0] for name in ("mean", "std"))
        return mean + std * noise.normal(request.seed, noise.ENCODE, 0, tuple(mean.shape))

    def _job(
        self, request: Request, schedule: Schedule, rows: list[dict[str, Array]], start: torch.Tensor | None
    ) -> Job:
        name = f"request {request.digest[:12]} ({request.prompt!r}, seed {request.seed})"
        return new_job(
            name, request.seed, request.guidance, schedule, rows, self._shape(request), start
        )

    def _denoise(self, jobs: Sequence[Job], report: Callable[[int, int], None]) -> None:
        """Rows of one size share a batch."""
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(tuple(job.latents.shape), []).append(job)
        total = sum((len(job.schedule) - job.step) * len(job.conditions) for job in jobs)
        before = 0
        for group in groups.values():
            own = sum((len(job.schedule) - job.step) * len(job.conditions) for job in group)
            denoise(
                group,
                lambda inputs: self._run("unet", inputs)["out"],
                lambda done, _, b=before: report(b + done, total),  # type: ignore[misc]
            )
            before += own

    def _decode(self, jobs: Sequence[Job]) -> list[Any]:
        """Latents to pixels, the images of one size in one batch; in the order of the jobs."""
        pixels: list[Any] = [None] * len(jobs)
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, job in enumerate(jobs):
            groups.setdefault(tuple(job.latents.shape), []).append(place)
        for places in groups.values():
            stack = np.stack([jobs[place].latents.numpy() for place in places])
            out = self._run("vae_decoder", {"latents": stack})["image"]
            for place, image in zip(places, out, strict=True):
                if not np.isfinite(image).all():
                    raise NumericError(f"{jobs[place].name}: vae_decoder gave a non-finite value")
                pixels[place] = image
        return pixels

    def _receipt(self, request: Request, job: Job, image: Image, notes: list[str]) -> Receipt:
        return Receipt(
            request.digest, self.spec.digest, image_digest(image),
            len(job.schedule), len(job.conditions), tuple(notes),
        )  # fmt: skip


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begun


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all or a list of `count`, as a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise InvalidRequest(f"{name}: expected one for each of {count} prompts, got {len(value)}")
        return list(value)
    return [value] * count
