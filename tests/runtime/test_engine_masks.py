"""Inpainting: the pictures of diffusers, and what the mask keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heatsink
from heatsink.runtime import noise, pictures
from heatsink.runtime.arguments import make_requests
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Request
from heatsink.runtime.request_pictures import Pictures
from heatsink.runtime.sampler import Keep, denoise, new_job
from heatsink.runtime.schedule import ScheduleConfig, make_schedule

PSNR_DB = 60.0
LATENT = (4, 8, 8)
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
}
FIELDS = {"negative_prompt": None, "strength": None, "size": None, "steps": 3, "guidance": 4.0}


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth coloured picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def half(side: str = "left", size: int = 64) -> Image.Image:
    """A mask that paints one half anew."""
    grey = np.zeros((size, size), np.uint8)
    grey[:, slice(0, size // 2) if side == "left" else slice(size // 2, None)] = 255
    return Image.fromarray(grey)


def psnr(first: Image.Image, second: Image.Image) -> float:
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# Against diffusers

Paint = Callable[..., Image.Image]


@pytest.fixture
def diffusers_paints(monkeypatch: pytest.MonkeyPatch) -> Paint:
    """Paints with diffusers' pipeline and this package's noise of seed 5."""
    import diffusers

    def paint(model: Path, scheduler: str, image: Image.Image, **arguments: Any) -> Image.Image:
        pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(model)
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pixels = torch.from_numpy(pictures.to_array(image, 64, 64))[None]

        def encode(image: torch.Tensor, generator: Any = None) -> torch.Tensor:
            whole = torch.allclose(image, pixels, atol=1e-6)
            draw = noise.normal(5, noise.ENCODE if whole else noise.ENCODE_KEPT, 0, LATENT)
            with torch.no_grad():
                posterior = pipe.vae.encode(image).latent_dist
            latents: torch.Tensor = posterior.mean + posterior.std * draw
            return latents * float(pipe.vae.config.scaling_factor)

        monkeypatch.setattr(pipe, "_encode_vae_image", encode)
        first = noise.normal_rows([5], noise.INITIAL, 0, LATENT)
        where = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
        monkeypatch.setattr(f"{where}.randn_tensor", lambda *args, **options: first)
        found: Image.Image = pipe(
            "a red apple", image=image, height=64, width=64, **arguments
        ).images[0]
        return found

    return paint


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("strength", "steps", "guidance"), [(1.0, 4, 3.0), (0.6, 5, 1.0)])
def test_pictures_are_those_of_diffusers(
    sd1_engine: Engine,
    tiny_sd1: Path,
    diffusers_paints: Paint,
    scheduler: str,
    strength: float,
    steps: int,
    guidance: float,
) -> None:
    # A mask with greys and of another size, which both resize and cut at the middle.
    mask = half(size=50).resize((40, 40), Image.Resampling.BICUBIC).rotate(30)
    theirs = diffusers_paints(
        tiny_sd1,
        scheduler,
        picture(3),
        mask_image=mask,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    given: dict[str, Any] = {
        "image": picture(3),
        "strength": strength,
        "seed": 5,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
    }
    result = sd1_engine.generate("a red apple", mask=mask, **given)
    assert psnr(result.images[0], theirs) >= PSNR_DB
    assert psnr(sd1_engine.generate("a red apple", **given).images[0], theirs) < 50


@pytest.fixture(scope="module")
def inpainting(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inpainting model, whose UNet also takes the mask and the latents that it keeps."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1)
    torch.manual_seed(11)
    unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    parts = {**pipe.components, "unet": unet, "requires_safety_checker": False}
    folder = tmp_path_factory.mktemp("models") / "inpainting"
    diffusers.StableDiffusionInpaintPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def painter(inpainting: Path, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("engines") / "inpainting"
    report = heatsink.build(inpainting, out, backend="torch", batch=(1, 2, 4), reuse=[sd1_folder])
    assert report.built == ["unet"]
    return heatsink.load(out, threads=1)


@pytest.mark.parametrize(("strength", "steps", "guidance"), [(1.0, 4, 3.0), (0.6, 5, 1.0)])
def test_an_inpainting_models_are_those_of_diffusers(
    painter: Engine,
    inpainting: Path,
    diffusers_paints: Paint,
    strength: float,
    steps: int,
    guidance: float,
) -> None:
    theirs = diffusers_paints(
        inpainting,
        "euler",
        picture(3),
        mask_image=half(),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    given: dict[str, Any] = {"strength": strength, "seed": 5, "steps": steps}
    given |= {"guidance": guidance, "scheduler": "euler", "image": picture(3)}
    result = painter.generate("a red apple", mask=half(), **given)
    assert psnr(result.images[0], theirs) >= PSNR_DB
    other = painter.generate("a red apple", mask=half("right"), **given)
    assert psnr(other.images[0], theirs) < 40


def test_an_inpainting_model_wants_a_mask(painter: Engine) -> None:
    arguments: list[dict[str, Any]] = [{}, {"image": picture(1)}]
    for given in arguments:
        with pytest.raises(InvalidRequest, match="expected an image and a mask, since this is an"):
            painter.generate("a cat", **given)


# The same request, the same pixels

ASKED: list[dict[str, Any]] = [
    {"prompt": "a red apple", "image": picture(1), "mask": half()},
    {"prompt": "a cat", "guidance": 1.0, "image": picture(2), "mask": half(), "strength": 0.7},
    {"prompt": "a cat", "guidance": 1.0, "image": picture(2), "mask": half("right")},
    {"prompt": "a cat"},
    {"prompt": "a cat", "image": picture(2)},
]


def asked(place: int) -> tuple[Request, Pictures]:
    given = {"image": None, **FIELDS, **ASKED[place]}
    (request,), (own,) = make_requests(seed=20 + place, **given)
    return request, own


def images(engine: Engine, places: list[int]) -> list[str]:
    requests, own = zip(*map(asked, places), strict=True)
    return [receipt.image for receipt in engine.run(requests, own).receipts]


def test_a_request_gives_the_same_pixels_in_any_company(
    sd1_engine: Engine, painter: Engine
) -> None:
    for engine, count in ((sd1_engine, 5), (painter, 3)):
        alone = [images(engine, [place])[0] for place in range(count)]
        assert len(set(alone)) == len(alone)
        for order in ([0, 1], [2, 1, 0], list(range(count)), [1, 1, 0]):
            assert images(engine, order) == [alone[place] for place in order]


# The mask


CONFIG = ScheduleConfig.from_diffusers(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m", "lcm"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_kept_is_the_picture_with_the_steps_own_noise(
    scheduler: str, strength: float
) -> None:
    schedule = make_schedule(scheduler, 4, CONFIG, strength=strength)
    image = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros((1, 8, 8), dtype=torch.bool)
    mask[:, :3] = True
    job = new_job("a", 5, 1.0, schedule, [{}], LATENT, image, mask)
    fresh = noise.normal(5, noise.INITIAL, 0, LATENT)
    # All of the steps begin with noise alone, fewer with the picture under it.
    blank = torch.equal(job.latents, torch.tensor(schedule.init_sigma).float() * fresh)
    assert blank == (strength == 1.0)
    seen = []

    def run(inputs: dict[str, Any]) -> Any:
        seen.append(job.latents)
        return np.tanh(inputs["sample"])

    denoise([job], run)
    for step, latents in enumerate(seen[1:], 1):
        a, b = schedule.levels[step].astype(np.float32)
        assert torch.equal(latents[:, 3:], (float(a) * image + float(b) * fresh)[:, 3:])
        assert not torch.allclose(latents[:, :3], (float(a) * image + float(b) * fresh)[:, :3])
    # In the end it is the picture itself.
    assert torch.equal(job.latents[:, 3:], image[:, 3:])
    assert isinstance(job.keep, Keep)


def test_nothing_in_the_painted_part_depends_on_the_others_latents_where_kept(
    sd1_engine: Engine,
) -> None:
    # A mask of nothing gives the picture back, as the autoencoder sees it.
    nothing, everything = (Image.new("L", (64, 64), value) for value in (0, 255))
    given: dict[str, Any] = {"image": picture(1), "steps": 2, "seed": 3}
    kept, again = (
        sd1_engine.generate(prompt, mask=nothing, **given).receipts[0].image
        for prompt in ("a cat", "a dog")
    )
    assert kept == again
    # One of everything is a picture from noise alone.
    painted = sd1_engine.generate("a cat", mask=everything, **given).receipts[0]
    plain = sd1_engine.generate("a cat", steps=2, seed=3).receipts[0]
    assert painted.image == plain.image
    assert painted.request != plain.request


def test_masks_are_cut_at_the_middle_grey() -> None:
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert pictures.to_mask(grey, 1, 4).tolist() == [[False, False, True, True]]
    assert (
        pictures.to_mask(half(size=10).convert("RGB"), 64, 64)[:, [0, 63]].tolist()
        == [[True, False]] * 64
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": half()}, "mask: expected an image beside it"),
        ({"image": picture(1), "mask": "mask.png"}, "mask: expected a PIL image, got a str"),
        ({"image": picture(1), "mask": [half()] * 2}, "mask: expected one for each of 1 prompts"),
        ({"image": [None], "mask": half()}, "mask: expected an image beside it"),
    ],
)
def test_wrong_masks_are_named(sd1_engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sd1_engine.generate("a cat", **arguments)


def test_a_mask_must_be_the_requests_own(sd1_engine: Engine) -> None:
    request, own = asked(0)
    for given, message in (
        (Pictures(own.image), "mask: expected the picture that mask_digest names, got none"),
        (Pictures(own.image, half("right")), "mask: its pixels are not those of the request's"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            sd1_engine.run([request], [given])


def test_all_steps_are_run_with_a_mask_unless_told(sd1_engine: Engine) -> None:
    for given, steps in (({"mask": half()}, 5), ({}, 4), ({"mask": half(), "strength": 0.6}, 3)):
        result = sd1_engine.generate("a cat", image=picture(1), steps=5, **given)
        assert result.receipts[0].steps == steps
