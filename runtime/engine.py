"""An opened engine: requests in, images and receipts out.

It knows nothing of files: whoever opens an engine folder gives it a description and, for every
component, a function that runs rows. `heatsink.load` does that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heatsink.runtime import pictures
from heatsink.runtime.arguments import make_requests
from heatsink.runtime.backends.session import Array
from heatsink.runtime.buckets import alike
from heatsink.runtime.conditions import Conditions, encode
from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import NotBuilt, NumericError
from heatsink.runtime.request import Request
from heatsink.runtime.result import Receipt, Result
from heatsink.runtime.sampler import Job, denoise, new_job
from heatsink.runtime.schedule import Schedule, make_schedule
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.starts import check_images, encode_images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

RunRows = Callable[[Mapping[str, Array]], dict[str, Array]]
Progress = Callable[[str, int, int], None]


class Engine:
    """Turns requests into images; open one with `heatsink.load(folder)`.

    Args:
        spec: the description.
        components: for each component's name the function that runs its rows. A row's bits must
            not depend on the rows beside it; then an image depends on its request and this engine
            alone.
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
        image: Image | Sequence[Image | None] | None = None,
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
            strength: with an image, the share of the steps that is run, (0, 1]; 0.8 if not given.
            seed: one number (prompt i takes seed + i), or one for each prompt; 0 <= seed < 2^64.
            steps: denoising steps, 1 to 1000.
            guidance: scale of classifier-free guidance; 1 turns it off and halves the work.
            scheduler: `euler`, `dpm++2m`, `ddim` or `lcm`.
            size: (height, width) in pixels, or one number for both; the engine's own if not given.
            progress: called with ("text" | "image" | "unet" | "vae", done, total).

        Returns:
            Images, requests and receipts in the order of the prompts.

        Raises:
            InvalidRequest: an argument is out of range or lists differ in length.
            NotBuilt: the engine was not built for the size, or has no VAE encoder for `image`.
            NumericError: a component gave NaN or infinity; names the request and the step.
        """
        requests, images = make_requests(
            prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            seed=seed,
            size=size,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
        )
        return self.run(requests, images, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        images: Sequence[Image | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Result:
        """Answer validated requests in one batch; they may differ in everything, size included.

        Args:
            requests: what to make.
            images: the picture of every image-to-image request, None for the others.
            progress: as in `generate`.

        Raises:
            InvalidRequest: a size or number of steps does not fit the model, or a picture its
                request.
            NotBuilt, NumericError: as `generate`.
        """
        report = progress or (lambda stage, done, total: None)
        clock = _Clock()
        requests = [self.spec.resolve(request) for request in requests]
        images = [None] * len(requests) if images is None else list(images)
        check_images(requests, images)
        plans = [self._plan(request) for request in requests]
        if not requests:
            return Result([], [], [], clock.seconds)
        with _stage(clock, report, "text", len(requests)):
            conditions = self._encode_text(requests)
        with _stage(clock, report, "image", sum(image is not None for image in images)):
            starts = encode_images(requests, images, self._run)
        jobs = [
            self._job(*parts)
            for parts in zip(requests, plans, conditions.rows, starts, strict=True)
        ]
        with clock.measure("unet"):
            report("unet", 0, sum(len(job.schedule) * len(job.conditions) for job in jobs))
            self._denoise(jobs, lambda done, total: report("unet", done, total))
        with _stage(clock, report, "vae", len(jobs)):
            pixels = self._decode(jobs)
        results = [pictures.to_image(each) for each in pixels]
        receipts = [
            self._receipt(*parts)
            for parts in zip(requests, jobs, results, conditions.notes, strict=True)
        ]
        return Result(results, requests, receipts, clock.seconds)

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

    def _job(
        self,
        request: Request,
        schedule: Schedule,
        rows: list[dict[str, Array]],
        start: torch.Tensor | None,
    ) -> Job:
        name = f"request {request.digest[:12]} ({request.prompt!r}, seed {request.seed})"
        return new_job(
            name,
            request.seed,
            request.guidance,
            schedule,
            rows,
            self.spec.latent_shape(request),
            start,
        )

    def _denoise(self, jobs: Sequence[Job], report: Callable[[int, int], None]) -> None:
        """Rows of one size share a batch."""
        total, before = sum(job.rows_left for job in jobs), 0
        for places in alike([tuple(job.latents.shape) for job in jobs]):
            group = [jobs[place] for place in places]
            own = sum(job.rows_left for job in group)
            denoise(
                group,
                lambda inputs: self._run("unet", inputs)["out"],
                lambda done, _, before=before: report(before + done, total),  # type: ignore[misc]
            )
            before += own

    def _decode(self, jobs: Sequence[Job]) -> list[Any]:
        """Latents to pixels, the images of one size in one batch; in the order of the jobs."""
        pixels: list[Any] = [None] * len(jobs)
        for places in alike([tuple(job.latents.shape) for job in jobs]):
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


@contextmanager
def _stage(clock: _Clock, report: Progress, name: str, total: int) -> Iterator[None]:
    """Time a stage and report its beginning and end; nothing is reported where nothing is done."""
    if total:
        report(name, 0, total)
    with clock.measure(name):
        yield
    if total:
        report(name, total, total)
