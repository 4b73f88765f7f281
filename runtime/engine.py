"""An opened engine: requests in, images and receipts out.

It knows nothing of files: whoever opens an engine folder gives it a description and, for every
component, a function that runs rows. `heatsink.load` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heatsink.runtime import pictures
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_info import AdapterInfo
from heatsink.runtime.adapter_intake import add_file
from heatsink.runtime.adapter_lease import Lease
from heatsink.runtime.adapter_mix import Mix
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.arguments import Adapters, Controls, make_requests
from heatsink.runtime.backends.session import Array, Phased
from heatsink.runtime.buckets import alike
from heatsink.runtime.conditions import Conditions, encode
from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import InvalidRequest, NotBuilt, NumericError
from heatsink.runtime.request import Request
from heatsink.runtime.request_pictures import Pictures, check_pictures
from heatsink.runtime.result import Receipt, Result
from heatsink.runtime.sampler import Job, denoise, new_job
from heatsink.runtime.schedule import Schedule, make_schedule
from heatsink.runtime.spec import NO_PORTS, EngineSpec
from heatsink.runtime.stages import Clock, Progress, staged
from heatsink.runtime.starts import Start, encode_starts
from heatsink.runtime.steering import SteeredUNet, mark_rows, steers

if TYPE_CHECKING:
    from PIL.Image import Image

RunRows = Callable[[Mapping[str, Array]], dict[str, Array]]


class Engine:
    """Turns requests into images; open one with `heatsink.load(folder)`.

    Args:
        spec: the description.
        components: for each component's name the function that runs its rows. A row's bits must
            not depend on the rows beside it; then an image depends on its request and this engine
            alone. Those that the bank has a layout of also take `adapter_slots` and
            `adapter_scales`, and run without where no row has an adapter.
        bank: of an engine with adapter ports.
    """

    def __init__(
        self,
        spec: EngineSpec,
        components: Mapping[str, RunRows],
        bank: AdapterBank | None = None,
    ) -> None:
        self.spec = spec
        self.bank = bank
        self._components = components

    def __repr__(self) -> str:
        return f"<Engine {self.spec.name} {self.spec.digest[:12]} {sorted(self._components)}>"

    def add_adapter(
        self,
        name: str,
        adapter: str | Path | Iterable[AdapterDelta],
        *,
        ignore: Sequence[str] = (),
    ) -> AdapterInfo:
        """Make an adapter known under a name; requests under way are not disturbed.

        A name that is there already stands for the new content from then on.

        Args:
            name: what requests call it.
            adapter: a LoRA file (safetensors), or its deltas.
            ignore: keys of the file, or shell patterns of keys, to leave out.

        Returns:
            Its name and digest, the modules it changes, and the receipt of the file's keys.

        Raises:
            NotBuilt: the engine has no adapter ports.
            UnsafeFile, DamagedFile, AdapterError: it can't be applied whole, so nothing of it is;
                see `adapter_intake.add_file` and `adapter_stack.stack`. The engine is as before.
            InvalidRequest: the name is none, or `ignore` fits nothing.
        """
        bank = self._bank()
        if isinstance(adapter, str | Path):
            return add_file(bank, name, adapter, ignore=ignore)
        if ignore:
            raise InvalidRequest("ignore: expected a file beside it, got deltas")
        return bank.add(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests under way keep it.

        Raises:
            NotBuilt: the engine has no adapter ports.
            UnknownAdapter: there is none of that name.
        """
        self._bank().remove(name)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters by name: their digests, what they change, and where they are loaded."""
        return {} if self.bank is None else self.bank.infos()

    def _bank(self) -> AdapterBank:
        if self.bank is None:
            raise NotBuilt(NO_PORTS)
        return self.bank

    def resolve(self, request: Request) -> Request:
        """The request with its size filled in, if this engine can answer it now.

        Raises:
            InvalidRequest, NotBuilt: see `EngineSpec.resolve` and `AdapterBank.mix`.
            UnknownAdapter: it names an adapter that was not added.
        """
        request = self.spec.resolve(request, ports=self.bank is not None)
        if self.bank is not None:
            self.bank.mix(request.adapters)
        return request

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
        adapters: Adapters = None,
        mask: Image | Sequence[Image | None] | None = None,
        control: Controls = None,
        progress: Progress | None = None,
    ) -> Result:
        """Make an image of each prompt.

        Args:
            prompt: a text, or several.
            negative_prompt: what to keep away from: one text for all, or one for each prompt.
            image: start from this picture (or one for each prompt) instead of from noise.
            strength: with an image, the share of the steps that is run, (0, 1]; if not given 0.8,
                with a mask 1.
            seed: one number (prompt i takes seed + i), or one for each prompt; 0 <= seed < 2^64.
            steps: denoising steps, 1 to 1000.
            guidance: scale of classifier-free guidance; 1 turns it off and halves the work.
            scheduler: `euler`, `dpm++2m`, `ddim` or `lcm`.
            size: (height, width) in pixels, or one number for both; the engine's own if not given.
            adapters: `{name: weight}` of adapters that were added, or a name (weight 1), for all
                prompts; or a list with one of these or None for each prompt.
            mask: with an image, bright where it is painted anew and dark where it stays; one for
                all prompts, or one for each.
            control: `{name: picture}` or `{name: (picture, scale)}` of the ControlNets that the
                engine was built with, for all prompts; or a list with one of these or None for
                each. Several add up.
            progress: called with ("text" | "image" | "unet" | "vae", done, total).

        Returns:
            Images, requests and receipts in the order of the prompts.

        Raises:
            InvalidRequest: an argument is out of range or lists differ in length.
            NotBuilt: the engine was not built for the size, a ControlNet or so many adapters in one
                prompt, or has no VAE encoder for `image`.
            UnknownAdapter: an adapter was not added.
            CapacityError: the prompts need more different adapters than the bank has room for now.
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
            adapters=adapters,
            mask=mask,
            control=control,
        )
        return self.run(requests, images, progress=progress)

    def run(
        self,
        requests: Sequence[Request],
        images: Sequence[Image | Pictures | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Result:
        """Answer validated requests in one batch; they may differ in everything, size included.

        Args:
            requests: what to make.
            images: the pictures that every request names, None where it names none; an image
                alone is where it starts from.
            progress: as in `generate`.

        Raises:
            InvalidRequest: a size or number of steps does not fit the model, or a picture its
                request.
            NotBuilt, UnknownAdapter, CapacityError, NumericError: as `generate`.
        """
        report = progress or (lambda stage, done, total: None)
        clock = Clock()
        requests = [self.resolve(request) for request in requests]
        given = check_pictures(requests, images)
        plans = [self._plan(request) for request in requests]
        if not requests:
            return Result([], [], [], clock.seconds)
        with self._lease(requests) as lease:
            results, receipts = self._answer(requests, given, plans, lease, clock, report)
        return Result(results, requests, receipts, clock.seconds)

    def _lease(self, requests: Sequence[Request]) -> Lease:
        """Hold the adapters of all requests until the call is done."""
        if self.bank is None:
            return Lease([Mix((), {}) for _ in requests], {}, lambda slots: None)
        return self.bank.acquire(*(request.adapters for request in requests))

    def _answer(
        self,
        requests: Sequence[Request],
        given: Sequence[Pictures],
        plans: Sequence[Schedule],
        lease: Lease,
        clock: Clock,
        report: Progress,
    ) -> tuple[list[Image], list[Receipt]]:
        # By content from here on: what a name stands for may change while this runs.
        answered = [
            request.replace(adapters=mix.weights) if request.adapters else request
            for request, mix in zip(requests, lease.mixes, strict=True)
        ]
        lease.wait()
        with staged(clock, report, "text", len(answered)):
            conditions = self._encode_text(answered, lease)
        with staged(clock, report, "image", sum(own.image is not None for own in given)):
            starts = encode_starts(answered, given, self._run, self.spec)
        self._add_adapters(conditions.rows, lease)
        steering = [
            steers(request, own.controls) for request, own in zip(answered, given, strict=True)
        ]
        mark_rows(conditions.rows, steering, [start.kept for start in starts])
        unet = SteeredUNet(self._run, self.spec.residuals, steering)
        jobs = [
            self._job(*parts)
            for parts in zip(answered, plans, conditions.rows, starts, strict=True)
        ]
        with clock.measure("unet"):
            report("unet", 0, sum(len(job.schedule) * len(job.conditions) for job in jobs))
            self._denoise(jobs, unet, lambda done, total: report("unet", done, total))
        with staged(clock, report, "vae", len(jobs)):
            pixels = self._decode(jobs)
        results = [pictures.to_image(each) for each in pixels]
        receipts = [
            self._receipt(*parts)
            for parts in zip(answered, jobs, results, conditions.notes, lease.mixes, strict=True)
        ]
        return results, receipts

    def _plan(self, request: Request) -> Schedule:
        return make_schedule(
            request.scheduler, request.steps, self.spec.schedule, strength=request.strength
        )

    def _run(self, component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if component not in self._components:
            raise NotBuilt(f"this engine was built without {component}")
        return self._components[component](inputs)

    def _encode_text(self, requests: Sequence[Request], lease: Lease) -> Conditions:
        return encode(
            requests, self.spec.text_encoders, self.spec.tokenizers, self._run,
            zero_empty_negative=self.spec.zero_empty_negative, adapter_inputs=lease.row_inputs,
        )  # fmt: skip

    @staticmethod
    def _add_adapters(rows: Sequence[Sequence[dict[str, Array]]], lease: Lease) -> None:
        """Give every row of the UNet the adapters of its request."""
        owners = [place for place, own in enumerate(rows) for _ in own]
        inputs = lease.row_inputs("unet", owners)
        for index, row in enumerate(row for own in rows for row in own):
            row.update({name: values[index] for name, values in inputs.items()})

    def _job(
        self,
        request: Request,
        schedule: Schedule,
        rows: list[dict[str, Array]],
        start: Start,
    ) -> Job:
        name = f"request {request.digest[:12]} ({request.prompt!r}, seed {request.seed})"
        return new_job(
            name,
            request.seed,
            request.guidance,
            schedule,
            rows,
            self.spec.latent_shape(request),
            start.latents,
            start.mask,
            blend=not self.spec.inpainting,
        )

    def _denoise(
        self, jobs: Sequence[Job], unet: SteeredUNet, report: Callable[[int, int], None]
    ) -> None:
        """Rows of one size share a batch."""
        total, before = sum(job.rows_left for job in jobs), 0
        for places in alike([tuple(job.latents.shape) for job in jobs]):
            group = [jobs[place] for place in places]
            own = sum(job.rows_left for job in group)
            self._prepare(group, unet)
            denoise(
                group,
                unet,
                lambda done, _, before=before: report(before + done, total),  # type: ignore[misc]
            )
            before += own

    def _prepare(self, jobs: Sequence[Job], unet: SteeredUNet) -> None:
        """Let the networks compute before the loop what does not depend on the latents."""
        conditions = [condition for job in jobs for condition in job.conditions]
        times = [job.timesteps for job in jobs for _ in job.conditions]
        for name, inputs, own in unet.ahead(conditions, times):
            component = self._components.get(name)
            if isinstance(component, Phased):
                component.prepare(inputs, own)

    def forget(self) -> None:
        """Let go of what is kept of earlier requests; the next costs what a first one does."""
        for component in self._components.values():
            if isinstance(component, Phased):
                component.forget()

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

    def _receipt(
        self, request: Request, job: Job, image: Image, notes: list[str], mix: Mix
    ) -> Receipt:
        return Receipt(
            request.digest, self.spec.digest, image_digest(image),
            len(job.schedule), len(job.conditions), tuple(notes), mix.uses,
        )  # fmt: skip
