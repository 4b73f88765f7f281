"""An image depends on its request and the engine alone, and is the one diffusers draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from heatsink.export.opening import OpenComponent
from heatsink.runtime import noise, pictures
from heatsink.runtime.digest import image_digest
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.request import Request
from heatsink.runtime.text import PromptTruncated

# Differences of float32 rounding show as single levels of a few pixels: 60 dB is one level off in
# one of 15 values, 1/255 of the range.
PSNR_DB = 60.0
SCHEDULERS = ["euler", "dpm++2m", "ddim", "lcm"]
LATENT = (4, 8, 8)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth coloured picture."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal to noise ratio in dB of two 8-bit images."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    assert a.shape == b.shape
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# The same request, the same pixels

Asked = tuple[Request, Image.Image | None]


def ask(prompt: str, seed: int, image: Image.Image | None = None, **fields: Any) -> Asked:
    if image is not None:
        fields = {"strength": 0.6, **fields, "image_digest": image_digest(image)}
    return Request.parse(prompt=prompt, seed=seed, **fields), image


def some_requests() -> list[Asked]:
    """Requests that differ in everything that may differ."""
    return [
        ask("a red apple", 7, steps=3, guidance=4.0),
        ask("a cat", 8, steps=2, guidance=1.0, scheduler="lcm"),
        ask("a boat", 9, picture(1), steps=5, guidance=2.0, scheduler="euler"),
        ask("a fox", 10, steps=4, guidance=7.5, scheduler="ddim", negative_prompt="grey"),
        ask("an owl", 11, picture(2, 80, 50), steps=4, guidance=1.0, scheduler="dpm++2m"),
    ]


def run(engine: Engine, asked: Sequence[Asked]) -> list[str]:
    result = engine.run([request for request, _ in asked], [image for _, image in asked])
    assert [receipt.image for receipt in result.receipts] == [
        image_digest(image) for image in result.images
    ]
    return [receipt.image for receipt in result.receipts]


@pytest.fixture(scope="module", params=["sd1", "sdxl", "sd1_onnx", "sdxl_onnx"])
def engine(request: pytest.FixtureRequest) -> Engine:
    opened: Engine = request.getfixturevalue(f"{request.param}_engine")
    return opened


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[str]:
    """What every request gives when it is the only one."""
    found = [run(engine, [asked])[0] for asked in some_requests()]
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize(
    "order",
    [[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0], [4, 2], [2, 4, 0], [0, 1, 2, 3, 4, 3, 2, 1, 0]],
)
def test_a_request_gives_the_same_pixels_in_any_company(
    engine: Engine, alone: list[str], order: list[int]
) -> None:
    # The last has more rows than the largest batch that was built.
    requests = some_requests()
    assert run(engine, [requests[place] for place in order]) == [alone[place] for place in order]


def test_the_engine_really_ran_its_batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = engine._components["unet"]
    assert isinstance(unet, OpenComponent)
    sizes: list[int] = []
    session = unet._session

    class Watch:
        name = "unet"

        def run(self, inputs: Any) -> Any:
            sizes.append(len(inputs["sample"]))
            return session.run(inputs)

    monkeypatch.setattr(unet, "_session", Watch())
    run(engine, [ask("a cat", seed, steps=1) for seed in range(5)])
    # Ten rows in the sizes that agree, none of them one by one where there are larger ones.
    assert sum(sizes) >= 10
    assert set(sizes) <= set(unet._known.buckets)
    assert max(sizes) == max(unet._known.buckets) > 1


def test_pictures_are_encoded_in_batches(
    sd1_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = sd1_engine._components["vae_encoder"]
    sizes: list[int] = []

    def watch(inputs: Any) -> Any:
        sizes.append(len(inputs["image"]))
        return encoder(inputs)

    monkeypatch.setitem(sd1_engine._components, "vae_encoder", watch)
    sd1_engine.generate(["a", "b", "c"], image=[picture(1), None, picture(2)], steps=2)
    assert sizes == [2]


def test_other_seeds_prompts_and_pictures_give_other_pixels(sd1_engine: Engine) -> None:
    base: dict[str, Any] = {"steps": 2, "guidance": 3.0}
    variants = [
        ask("a cat", 1, **base),
        ask("a cat", 2, **base),
        ask("a dog", 1, **base),
        ask("a cat", 1, **base, negative_prompt="a dog"),
        ask("a cat", 1, **{**base, "guidance": 1.0}),
        ask("a cat", 1, **{**base, "steps": 3}),
        ask("a cat", 1, **base, scheduler="euler"),
        ask("a cat", 1, picture(1), **base, strength=1.0),
        ask("a cat", 1, picture(2), **base, strength=1.0),
        ask("a cat", 1, picture(2), **base, strength=0.5),
    ]
    assert len(set(run(sd1_engine, variants))) == len(variants)


# Against diffusers

Pipeline = Any


def ready(pipeline: Pipeline) -> Pipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sd1_pipeline(tiny_sd1: Path) -> Pipeline:
    from diffusers import StableDiffusionPipeline

    return ready(StableDiffusionPipeline.from_pretrained(tiny_sd1))


@pytest.fixture(scope="module")
def sdxl_pipeline(tiny_sdxl: Path) -> Pipeline:
    from diffusers import StableDiffusionXLPipeline

    return ready(StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False))


def use_scheduler(pipeline: Pipeline, name: str) -> None:
    import diffusers

    kind = {
        "euler": diffusers.EulerDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
        "ddim": diffusers.DDIMScheduler,
        "lcm": diffusers.LCMScheduler,
    }[name]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)


@pytest.fixture
def our_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes diffusers' LCM draw this package's noise for a seed."""

    def install(seed: int) -> None:
        steps = iter(range(1000))

        def draw(shape: Any, **options: Any) -> torch.Tensor:
            return noise.normal(seed, noise.STEP, next(steps), shape[1:])[None]

        monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", draw)

    return install


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("guidance", "negative"), [(4.0, "grey fog"), (1.0, None), (3.0, None)])
def test_pictures_are_those_of_diffusers(
    request: pytest.FixtureRequest,
    our_steps: Callable[[int], None],
    kind: str,
    scheduler: str,
    guidance: float,
    negative: str | None,
) -> None:
    engine = request.getfixturevalue(f"{kind}_engine")
    pipeline = request.getfixturevalue(f"{kind}_pipeline")
    use_scheduler(pipeline, scheduler)
    our_steps(5)
    theirs = pipeline(
        "a red apple",
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=noise.normal_rows([5], noise.INITIAL, 0, LATENT),
    ).images[0]
    result = engine.generate(
        "a red apple",
        negative_prompt=negative,
        seed=5,
        steps=4,
        guidance=guidance,
        scheduler=scheduler,
    )
    assert psnr(result.images[0], theirs) >= PSNR_DB
    # A picture, not a surface that every other equals.
    assert np.asarray(theirs).std() > 2
    assert result.receipts[0].rows == (1 if guidance == 1 else 2)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 6), (1.0, 4), (0.3, 7)])
def test_image_to_image_is_that_of_diffusers(
    sd1_engine: Engine,
    sd1_pipeline: Pipeline,
    our_steps: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    scheduler: str,
    strength: float,
    steps: int,
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    use_scheduler(sd1_pipeline, scheduler)
    parts = {**sd1_pipeline.components, "requires_safety_checker": False}
    pipeline = ready(StableDiffusionImg2ImgPipeline(**parts))
    start = picture(3)
    # The posterior's sample with this package's noise; diffusers takes latents as they are.
    pixels = torch.from_numpy(pictures.to_array(start, 64, 64))[None]
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    sample = posterior.mean + posterior.std * noise.normal(5, noise.ENCODE, 0, LATENT)
    latents = sample * pipeline.vae.config.scaling_factor
    initial = noise.normal(5, noise.INITIAL, 0, LATENT)[None]
    where = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    monkeypatch.setattr(where, lambda *args, **options: initial)
    our_steps(5)
    theirs = pipeline(
        "a red apple",
        image=latents,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=3.0,
    ).images[0]
    result = sd1_engine.generate(
        "a red apple",
        image=start,
        strength=strength,
        seed=5,
        steps=steps,
        guidance=3.0,
        scheduler=scheduler,
    )
    assert result.receipts[0].steps == int(steps * strength)
    assert psnr(result.images[0], theirs) >= PSNR_DB


# Arguments


def test_a_list_takes_the_seeds_that_follow(sd1_engine: Engine) -> None:
    several = sd1_engine.generate(["a cat"] * 3, seed=40, steps=1)
    assert [request.seed for request in several.requests] == [40, 41, 42]
    last = sd1_engine.generate("a cat", seed=42, steps=1)
    assert last.receipts[0].image == several.receipts[2].image
    given = sd1_engine.generate(["a cat"] * 2, seed=[42, 40], steps=1)
    assert [receipt.image for receipt in given.receipts] == [
        several.receipts[2].image,
        several.receipts[0].image,
    ]
    numpy = sd1_engine.generate(["a cat"] * 2, seed=np.int64(41), steps=1)  # type: ignore[arg-type]
    assert [request.seed for request in numpy.requests] == [41, 42]


def test_receipts_and_results_tell_what_was_done(sd1_engine: Engine) -> None:
    seen: list[tuple[str, int, int]] = []
    result = sd1_engine.generate(
        ["a cat", "a dog"], seed=3, steps=3, progress=lambda *args: seen.append(args)
    )
    assert len(result) == 2
    assert list(result) == result.images
    for request, receipt in zip(result.requests, result.receipts, strict=True):
        assert (request.height, request.width) == (64, 64)
        assert receipt.request == request.digest
        assert receipt.engine == sd1_engine.spec.digest
        assert (receipt.steps, receipt.rows, receipt.notes) == (3, 2, ())
    assert seen == [
        ("text", 0, 2), ("text", 2, 2), ("unet", 0, 12), ("unet", 4, 12), ("unet", 8, 12),
        ("unet", 12, 12), ("vae", 0, 2), ("vae", 2, 2),
    ]  # fmt: skip
    assert set(result.seconds) == {"text", "image", "unet", "vae"}
    assert len(sd1_engine.generate([])) == 0


def test_what_was_cut_of_a_prompt_is_in_its_receipt(sd1_engine: Engine) -> None:
    with pytest.warns(PromptTruncated, match="the end"):
        result = sd1_engine.generate(["a cat", "a cat that goes on to the end"], steps=1)
    assert result.receipts[0].notes == ()
    (note,) = result.receipts[1].notes
    assert "cut to 16 tokens" in note
    assert "the end" in note


def test_pictures_of_another_size_are_resized(sd1_engine: Engine) -> None:
    wide = picture(4, 100, 30)
    resized = wide.resize((64, 64), Image.Resampling.LANCZOS)
    images = [
        sd1_engine.generate("a", image=each, steps=2).receipts[0].image for each in (wide, resized)
    ]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 5}, "prompt: expected a text or a list of texts"),
        ({"prompt": ["a", 5]}, "prompt: expected a text"),
        ({"steps": 0}, "steps: expected an integer from 1 to 1000"),
        ({"steps": 2.5}, "steps: expected an integer"),
        ({"guidance": float("nan")}, "guidance: expected a finite number"),
        ({"guidance": "much"}, "guidance: expected a finite number"),
        ({"seed": -1}, r"seed: expected an integer from 0 to 2\^64 - 1"),
        ({"seed": 2**64}, "seed: expected an integer from 0"),
        ({"seed": True}, "seed: expected an integer or a list"),
        ({"seed": 1.5}, "seed: expected an integer or a list"),
        ({"seed": [1, 2]}, "seed: expected one for each of 1 prompts, got 2"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one for each of 1"),
        ({"scheduler": "magic"}, "scheduler: expected one of euler, "),
        ({"size": 63}, "height: expected a positive multiple of 8"),
        ({"size": (64,)}, r"size: expected \(height, width\)"),
        ({"strength": 0.5}, "strength: expected an image beside it"),
        ({"image": "cat.png"}, "image: expected a PIL image, got a str"),
        ({"image": picture(1), "strength": 0.0}, "strength: expected a number above 0"),
        ({"image": picture(1), "steps": 1, "strength": 0.5}, "strength: expected at least one"),
    ],
)
def test_wrong_arguments_are_named(
    sd1_engine: Engine, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sd1_engine.generate(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize("size", [(128, 64), (64, 56), 8])
def test_a_size_that_was_not_built_is_refused(sd1_engine: Engine, size: Any) -> None:
    with pytest.raises(NotBuilt, match=r"this engine was built for 64 pixels, got .*--size"):
        sd1_engine.generate("a cat", size=size)


def test_an_adapter_is_refused(sd1_engine: Engine) -> None:
    request = Request.parse(prompt="a cat", seed=1, adapters={"brand": 1.0})
    with pytest.raises(NotBuilt, match=r"adapters \['brand'\].*--fuse"):
        sd1_engine.run([request])


def test_a_picture_must_be_the_requests_own(sd1_engine: Engine) -> None:
    request, image = ask("a cat", 1, picture(1))
    plain, _ = ask("a cat", 1)
    for requests, images, message in (
        ([request], None, "expected the picture that image_digest names"),
        ([request], [picture(2)], "not those of the request's image_digest"),
        ([plain], [image], "not those of the request's image_digest"),
        ([plain], [None, None], r"images: expected one \(or None\) for each of 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            sd1_engine.run(requests, images)
