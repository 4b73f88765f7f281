"""ControlNets in engines: the pictures of diffusers, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import heatsink
from heatsink.runtime import noise, pictures
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.request import Request
from heatsink.runtime.request_pictures import Pictures
from heatsink.runtime.steering import SteeredUNet

PSNR_DB = 60.0
LATENT = (4, 8, 8)


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """A smooth coloured picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def psnr(first: Image.Image, second: Image.Image) -> float:
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def open_built(model: Path, nets: dict[str, Path], reuse: Path, out: Path, backend: str) -> Engine:
    heatsink.build(model, out, backend=backend, batch=(1, 2, 4), controlnets=nets, reuse=[reuse])
    return heatsink.load(out, threads=1)


@pytest.fixture(scope="module")
def native(
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    sd1_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    out = tmp_path_factory.mktemp("controlled") / "torch"
    return open_built(tiny_sd1, sd1_controlnets, sd1_folder, out, "torch")


@pytest.fixture(scope="module")
def onnx(
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    sd1_onnx_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    out = tmp_path_factory.mktemp("controlled") / "onnx"
    return open_built(tiny_sd1, sd1_controlnets, sd1_onnx_folder, out, "onnxruntime")


@pytest.fixture(scope="module")
def sdxl(
    tiny_sdxl: Path,
    sdxl_controlnets: dict[str, Path],
    sdxl_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    out = tmp_path_factory.mktemp("controlled") / "sdxl"
    return open_built(tiny_sdxl, sdxl_controlnets, sdxl_folder, out, "torch")


@pytest.fixture(params=["native", "onnx"])
def engine(request: pytest.FixtureRequest) -> Engine:
    opened: Engine = request.getfixturevalue(request.param)
    return opened


# Against diffusers


def pipeline(kind: str, model: Path, nets: Sequence[Path]) -> Any:
    import diffusers

    found = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    options = {"add_watermarker": False} if "XL" in kind else {}
    made = getattr(diffusers, kind).from_pretrained(
        model, controlnet=found[0] if len(found) == 1 else found, **options
    )
    made.scheduler = diffusers.EulerDiscreteScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def initial(seed: int) -> torch.Tensor:
    return noise.normal_rows([seed], noise.INITIAL, 0, LATENT)


@pytest.mark.parametrize(
    ("guidance", "negative", "scale"), [(4.0, "grey fog", 1.0), (1.0, None, 0.6), (3.0, None, 1.5)]
)
def test_pictures_are_those_of_diffusers(
    engine: Engine,
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    guidance: float,
    negative: str | None,
    scale: float,
) -> None:
    pipe = pipeline("StableDiffusionControlNetPipeline", tiny_sd1, [sd1_controlnets["lines"]])
    # Of another size, so both resize it.
    lines = picture(1, 90, 50)
    theirs = pipe(
        "a red apple",
        image=lines,
        height=64,
        width=64,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=guidance,
        controlnet_conditioning_scale=scale,
        latents=initial(5),
    ).images[0]
    given: dict[str, Any] = {
        "negative_prompt": negative,
        "seed": 5,
        "steps": 4,
        "guidance": guidance,
        "scheduler": "euler",
    }
    result = engine.generate("a red apple", control={"lines": (lines, scale)}, **given)
    assert psnr(result.images[0], theirs) >= PSNR_DB
    # It does steer.
    assert psnr(engine.generate("a red apple", **given).images[0], theirs) < 40
    assert result.receipts[0].rows == (1 if guidance == 1 else 2)


def test_several_controlnets_add_up(
    native: Engine, tiny_sd1: Path, sd1_controlnets: dict[str, Path]
) -> None:
    nets = [sd1_controlnets[name] for name in ("lines", "depth")]
    pipe = pipeline("StableDiffusionControlNetPipeline", tiny_sd1, nets)
    theirs = pipe(
        "a red apple",
        image=[picture(1), picture(2)],
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=[0.5, 0.8],
        latents=initial(5),
    ).images[0]
    given: dict[str, Any] = {"seed": 5, "steps": 4, "guidance": 3.0, "scheduler": "euler"}
    both = {"lines": (picture(1), 0.5), "depth": (picture(2), 0.8)}
    result = native.generate("a red apple", control=both, **given)
    assert psnr(result.images[0], theirs) >= PSNR_DB
    # In the order of their names, whichever was given first.
    other = native.generate("a red apple", control=dict(reversed(both.items())), **given)
    assert other.receipts == result.receipts
    alone = native.generate("a red apple", control={"lines": (picture(1), 0.5)}, **given)
    assert psnr(alone.images[0], theirs) < 40


def test_sdxl_is_that_of_diffusers(
    sdxl: Engine, tiny_sdxl: Path, sdxl_controlnets: dict[str, Path]
) -> None:
    pipe = pipeline("StableDiffusionXLControlNetPipeline", tiny_sdxl, [*sdxl_controlnets.values()])
    theirs = pipe(
        "a red apple",
        image=picture(1),
        negative_prompt="grey",
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=1.0,
        latents=initial(5),
    ).images[0]
    result = sdxl.generate(
        "a red apple", negative_prompt="grey", control={"lines": picture(1)},
        seed=5, steps=4, guidance=3.0, scheduler="euler",
    )  # fmt: skip
    assert psnr(result.images[0], theirs) >= PSNR_DB


def test_image_to_image_with_a_controlnet_is_that_of_diffusers(
    engine: Engine,
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = pipeline(
        "StableDiffusionControlNetImg2ImgPipeline", tiny_sd1, [sd1_controlnets["lines"]]
    )
    start = picture(3)
    pixels = torch.from_numpy(pictures.to_array(start, 64, 64))[None]
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    sample = posterior.mean + posterior.std * noise.normal(5, noise.ENCODE, 0, LATENT)
    where = "diffusers.pipelines.controlnet.pipeline_controlnet_img2img.randn_tensor"
    monkeypatch.setattr(where, lambda *args, **options: initial(5))
    theirs = pipe(
        "a red apple",
        image=sample * pipe.vae.config.scaling_factor,
        control_image=picture(1),
        strength=0.5,
        num_inference_steps=6,
        guidance_scale=3.0,
        controlnet_conditioning_scale=1.0,
    ).images[0]
    result = engine.generate(
        "a red apple", image=start, strength=0.5, control={"lines": picture(1)},
        seed=5, steps=6, guidance=3.0, scheduler="euler",
    )  # fmt: skip
    assert psnr(result.images[0], theirs) >= PSNR_DB


# The same request, the same pixels

ASKED: list[dict[str, Any]] = [
    {"prompt": "a red apple"},
    {"prompt": "a red apple", "control": {"lines": picture(1)}},
    {"prompt": "a cat", "control": {"depth": (picture(2), 0.5)}, "guidance": 1.0, "steps": 4},
    {
        "prompt": "a boat",
        "control": {"lines": (picture(3), 1.5), "depth": picture(4)},
        "image": picture(5),
    },
    {"prompt": "an owl", "guidance": 1.0, "image": picture(6)},
]
FIELDS = {"negative_prompt": None, "strength": None, "size": None, "steps": 3, "guidance": 4.0}


def asked(place: int) -> tuple[Request, Pictures]:
    from heatsink.runtime.arguments import make_requests

    given = {"image": None, **FIELDS, **ASKED[place]}
    (request,), (own,) = make_requests(seed=20 + place, **given)
    return request, own


def images(engine: Engine, places: Sequence[int]) -> list[str]:
    requests, own = zip(*map(asked, places), strict=True)
    return [receipt.image for receipt in engine.run(requests, own).receipts]


def test_a_request_gives_the_same_pixels_in_any_company(engine: Engine) -> None:
    alone = [images(engine, [place])[0] for place in range(len(ASKED))]
    assert len(set(alone)) == len(alone)
    for order in ([0, 1], [1, 0, 2], [4, 3, 2, 1, 0], [0, 4], [1, 1, 3, 0, 2, 4]):
        assert images(engine, order) == [alone[place] for place in order]


def test_without_a_controlnet_they_are_those_of_the_engine_without(
    native: Engine, onnx: Engine, sd1_engine: Engine, sd1_onnx_engine: Engine
) -> None:
    for built, plain in ((native, sd1_engine), (onnx, sd1_onnx_engine)):
        expected = images(plain, [0, 4])
        assert images(built, [0, 4]) == expected
        # Beside one that has one.
        assert images(built, [1, 0, 4])[1:] == expected


def test_a_controlnet_runs_the_rows_that_it_steers(
    native: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, list[int]] = {"controlnet_lines": [], "controlnet_depth": [], "unet": []}
    for name, seen in rows.items():
        run = native._components[name]

        def watch(inputs: Any, run: Any = run, seen: list[int] = seen) -> Any:
            seen.append(len(inputs["sample"]))
            return run(inputs)

        monkeypatch.setitem(native._components, name, watch)
    native.generate(
        ["a", "b", "c"],
        control=[None, {"lines": picture(1)}, {"lines": picture(1), "depth": (picture(2), 0.0)}],
        steps=2,
    )
    # At a scale of 0 there is nothing to run.
    assert rows == {"controlnet_lines": [4, 4], "controlnet_depth": [], "unet": [6, 6]}


def test_what_a_row_gets_is_the_sum_over_its_controlnets() -> None:
    given: dict[str, Any] = {}

    def run(component: str, inputs: dict[str, Any]) -> dict[str, Any]:
        if component == "unet":
            given.update(inputs)
            return {"out": inputs["sample"]}
        factor = np.float32({"controlnet_a": 1, "controlnet_b": 10}[component])
        value = inputs["conditioning_scale"] * factor + inputs["controlnet_cond"][:, 0, 0, 0]
        return {"down_residual_0": value[:, None], "mid_residual": -value[:, None]}

    from heatsink.runtime.steering import OWNER, Steer

    def steer(value: float, scale: float) -> Steer:
        return Steer(np.full((3, 2, 2), value, np.float32), scale)

    owners: list[dict[str, Steer]] = [
        {"a": steer(100, 1)},
        {},
        {"b": steer(300, 3), "a": steer(200, 2)},
    ]
    unet = SteeredUNet(run, {"down_residual_0": (1,), "mid_residual": (1,)}, owners)
    sample = np.arange(4, dtype=np.float32)[:, None]
    whose = np.array([2, 1, 0, 2])
    out = unet({"sample": sample, "timestep": sample[:, 0], OWNER: whose})
    assert np.array_equal(out, sample)
    assert set(given) == {"sample", "timestep", "down_residual_0", "mid_residual"}
    assert given["down_residual_0"][:, 0].tolist() == [532, 0, 101, 532]
    assert np.signbit(given["down_residual_0"][1, 0])
    assert given["mid_residual"][:, 0].tolist() == [-532, 0, -101, -532]
    # None is steered: nothing but zeros that change no bit.
    unet({"sample": sample[:2], "timestep": sample[:2, 0], OWNER: np.array([1, 1])})
    assert np.signbit(given["mid_residual"]).all()
    assert not given["mid_residual"].any()


# What is refused


@pytest.mark.parametrize(
    ("control", "kind", "message"),
    [
        (
            {"edges": picture(1)},
            NotBuilt,
            r"no ControlNet edges \(it has: depth, lines\).*--contro",
        ),
        ({"lines": "lines.png"}, InvalidRequest, "control 'lines': expected a PIL image, got a"),
        ({"lines": None}, InvalidRequest, "control 'lines': expected a picture, got None"),
        ({"lines": (picture(1), "much")}, InvalidRequest, r"controls\.lines\.scale: expected"),
        ({"lines": (picture(1), float("inf"))}, InvalidRequest, r"controls\.lines\.scale"),
        (picture(1), InvalidRequest, "control: expected {ControlNet: picture or"),
        ([{}, {}], InvalidRequest, "control: expected one for each of 1 prompts, got 2"),
        ({str(i): picture(1) for i in range(5)}, InvalidRequest, "controls: expected up to 4"),
    ],
)
def test_wrong_controls_are_named(
    native: Engine, control: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        native.generate("a cat", control=control)


def test_an_engine_without_controlnets_says_how_to_get_them(sd1_engine: Engine) -> None:
    with pytest.raises(
        NotBuilt, match=r"no ControlNet lines \(it has: none\); build one .*=FOLDER"
    ):
        sd1_engine.generate("a cat", control={"lines": picture(1)})


def test_another_size_is_refused(native: Engine) -> None:
    with pytest.raises(NotBuilt, match="this engine was built for 64 pixels, got 128"):
        native.generate("a cat", control={"lines": picture(1, 128, 128)}, size=128)


def test_a_picture_must_be_the_requests_own(native: Engine) -> None:
    request, own = asked(1)
    plain, _ = asked(0)
    for one, given, message in (
        (request, None, "control 'lines': expected the picture that image_digest names, got none"),
        (request, Pictures(controls={"lines": picture(2)}), "control 'lines': its pixels are not"),
        (plain, own, "control 'lines': its pixels are not"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            native.run([one], [given])
