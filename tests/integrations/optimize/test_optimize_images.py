"""Whole generations of an optimised pipeline against the plain one, in the manner of diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.runtime.graph.phases import Phase

Pair = tuple[Any, Any]
Same = Callable[..., Tensor]
Quiet = Callable[[Any], Any]


def image(seed: int) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_a_batch_of_prompts_with_negative_ones(sd1: Pair, same_images: Same) -> None:
    prompts = ["a red apple", "a green pear"]
    images = same_images(sd1, prompt=prompts, negative_prompt=["blue", "grey"])
    assert not torch.equal(images[0], images[1])


def test_several_images_a_prompt(sd1: Pair, same_images: Same) -> None:
    images = same_images(sd1, prompt="a red apple", num_images_per_prompt=3)
    assert len(images) == 3


def test_what_prompts_and_times_decide_is_computed_once(sd1: Pair, same_images: Same) -> None:
    request = {"prompt": ["a blue plum", "a yellow plum"], "num_inference_steps": 2}
    same_images(sd1, **request)
    components = sd1[1].unet._programs.components
    (component,) = [c for c in components if c.graph.inputs["sample"].shape[2:] == (8, 8)]
    before = component.uses()
    same_images(sd1, **request)
    again = component.uses()
    for phase in (Phase.REQUEST, Phase.SCHEDULE):
        assert again[phase].rows == before[phase].rows > 0
        # Keys and values of four attentions, and more of the times.
        assert again[phase].launches >= 4
    assert again[Phase.STEP].rows > before[Phase.STEP].rows
    # The times of another schedule, for prompts that are known.
    same_images(sd1, **{**request, "num_inference_steps": 5})
    assert component.uses()[Phase.REQUEST].rows == before[Phase.REQUEST].rows
    assert component.uses()[Phase.SCHEDULE].rows > before[Phase.SCHEDULE].rows


def test_without_guidance(sd1: Pair, same_images: Same) -> None:
    same_images(sd1, prompt="a red apple", guidance_scale=1.0)


def test_prompt_embeddings_come_from_the_caller(sd1: Pair, same_images: Same) -> None:
    embeds = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    same_images(sd1, prompt_embeds=embeds, negative_prompt_embeds=-embeds)


def test_another_size_is_captured_when_it_comes(sd1: Pair, same_images: Same) -> None:
    _, fast = sd1
    before = len(fast.unet.graphs())
    same_images(sd1, prompt="a red apple", height=48, num_inference_steps=2)
    # 6 rows of latents are no multiple of what the upsampling wants: its size is forwarded.
    assert fast.unet.graphs()[-1].inputs["sample"].shape == ("batch", 4, 6, 8)
    assert len(fast.unet.graphs()) == before + 1


def test_a_callback_sees_and_changes_the_latents(sd1: Pair) -> None:
    seen: list[list[float]] = [[], []]

    def callback(which: int) -> Any:
        def at_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            seen[which].append(float(values["latents"].abs().mean()))
            values["latents"].mul_(0.9)
            return values

        return at_end

    images = [
        pipe(
            "a red apple", num_inference_steps=3, generator=torch.Generator().manual_seed(1),
            output_type="pt", callback_on_step_end=callback(which), height=64, width=64,
        ).images
        for which, pipe in enumerate(sd1)
    ]  # fmt: skip
    # PLMS takes its second step twice.
    assert len(seen[1]) == 4
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)
    assert torch.allclose(images[0], images[1], atol=1e-4)


def test_slicing_decodes_a_row_at_a_time(sd1: Pair, same_images: Same) -> None:
    _, fast = sd1
    for pipe in sd1:
        pipe.vae.enable_slicing()
    try:
        for component in fast.vae._programs.components:
            component.drop_programs()
        same_images(sd1, prompt=["a red apple"] * 3)
        decoders = [c for c in fast.vae._programs.components if "latents" in c.graph.inputs]
        assert [c.batches for c in decoders if c.batches] == [[1]]
    finally:
        for pipe in sd1:
            pipe.vae.disable_slicing()


def test_image_to_image(sd1: Pair, same_images: Same, quiet: Quiet) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pair: Any = [
        quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
        for pipe in sd1
    ]
    start = image(3)
    images = same_images(
        pair, prompt="a red apple", image=start, strength=0.7, height=None, width=None
    )
    assert not torch.equal(images, same_images(sd1, prompt="a red apple"))


def test_inpainting(sd1: Pair, same_images: Same, quiet: Quiet) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    pair: Any = [
        quiet(StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))
        for pipe in sd1
    ]
    start = image(3)
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    same_images(pair, prompt="a red apple", image=start, mask_image=mask, strength=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": "blue", "num_images_per_prompt": 2},
        {"guidance_scale": 1.0, "clip_skip": 1, "original_size": (32, 48)},
    ],
)
def test_sdxl(sdxl: Pair, options: dict[str, Any], same_images: Same) -> None:
    same_images(sdxl, prompt="a red apple", **options)


def test_sdxl_image_to_image(sdxl: Pair, same_images: Same, quiet: Quiet) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pair: Any = [
        quiet(StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False))
        for pipe in sdxl
    ]
    start = image(3)
    same_images(pair, prompt="a red apple", image=start, strength=0.7, height=None, width=None)


def test_sdxl_inpainting(sdxl: Pair, same_images: Same, quiet: Quiet) -> None:
    from diffusers import StableDiffusionXLInpaintPipeline

    pair: Any = [
        quiet(StableDiffusionXLInpaintPipeline(**pipe.components, add_watermarker=False))
        for pipe in sdxl
    ]
    start, mask = image(3), torch.zeros(1, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    same_images(pair, prompt="a red apple", image=start, mask_image=mask, strength=0.9)


@pytest.fixture(scope="module")
def control(sd1: Pair) -> Pair:
    """The SD1 pipeline with a ControlNet, plain and optimised."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    import heatsink

    torch.manual_seed(7)
    control = ControlNetModel.from_unet(sd1[0].unet)
    with torch.no_grad():
        for parameter in control.parameters():
            # Its last convolutions begin at zero, and would give nothing.
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    pair = []
    for optimised in (False, True):
        # The UNet's graph with residuals is another than without: only the controlnet is new.
        pipe = StableDiffusionControlNetPipeline(
            **sd1[0].components, controlnet=control, requires_safety_checker=False
        )
        if optimised:
            done = heatsink.optimize(pipe, components=["unet", "controlnet"])
            assert set(done.replaced) == {"unet", "controlnet"}
        pair.append(pipe)
    return pair[0], pair[1]


def test_controlnet_runs_as_a_program_and_its_residuals_reach_the_unet(
    control: Pair, same_images: Same, quiet: Quiet
) -> None:
    pair = quiet(control[0]), quiet(control[1])
    given = {"prompt": "a red apple", "image": image(3), "num_inference_steps": 2}
    weak = same_images(pair, **given, controlnet_conditioning_scale=0.5)
    strong = same_images(pair, **given, controlnet_conditioning_scale=1.5)
    guessed = same_images(pair, **given, guess_mode=True, guidance_scale=3.0)
    assert not torch.allclose(weak, strong, atol=1e-3)
    assert not torch.allclose(guessed, strong, atol=1e-3)


def test_controlnet_with_a_start_image_and_with_a_mask(
    control: Pair, same_images: Same, quiet: Quiet
) -> None:
    from diffusers import (
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
    )

    given = {"prompt": "a red apple", "image": image(4), "control_image": image(3)}
    graphs = len(control[1].unet.graphs())
    pair: Any = [
        quiet(
            StableDiffusionControlNetImg2ImgPipeline(
                **pipe.components, requires_safety_checker=False
            )
        )
        for pipe in control
    ]
    started = same_images(pair, **given, strength=0.7)
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    pair = [
        quiet(
            StableDiffusionControlNetInpaintPipeline(
                **pipe.components, requires_safety_checker=False
            )
        )
        for pipe in control
    ]
    masked = same_images(pair, **given, mask_image=mask, strength=0.7)
    assert not torch.allclose(started, masked, atol=1e-3)
    # They share the programs of the pipeline that they were made of.
    assert len(control[1].unet.graphs()) == max(graphs, 1)
