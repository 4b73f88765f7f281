"""Adapters by prompt in one batch of a pipeline.

PyTorch's own linears and convolutions on the CPU may give a row other bits in another batch size.
So bits are compared where batches have one shape; elsewhere, within what float32 leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import heatsink
from heatsink.integrations.row_adapters import RowAdapters
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import write_adapter

Make = Callable[..., list[AdapterDelta]]
PROMPT = "a red apple"
STYLES: list[dict[str, float] | None] = [{"a": 1.0}, {"b": 0.7}, {"b": 0.3, "a": 0.6}, None]


def start(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8)


def near(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for float32's roundings through some hundred layers."""
    return bool((value - other).abs().max() < 1e-5 * other.abs().max())


def test_four_styles_in_one_batch_equal_four_batches_of_one_style(
    styled: Any, latents_of: Any
) -> None:
    adapters, noise = heatsink.adapters(styled), start(1)
    adapters.use(STYLES)
    images = {"output_type": "np"}
    rows = latents_of(styled, [PROMPT] * 4, noise.expand(4, -1, -1, -1))
    pixels = latents_of(styled, [PROMPT] * 4, noise.expand(4, -1, -1, -1), **images)
    for place, style in enumerate(STYLES):
        adapters.use([style] * 4)
        # A batch of the same shape: the same pixels, bit by bit.
        alike = latents_of(styled, [PROMPT] * 4, noise.expand(4, -1, -1, -1), **images)
        assert (alike[place] == pixels[place]).all()
        for choice in ([style], style):
            # Alone by prompt, and merged: other ways to the same image.
            adapters.use(choice)
            assert near(latents_of(styled, PROMPT, noise)[0], rows[place])
    for first, second in permutations(rows, 2):
        assert not near(first, second)
        assert (first - second).abs().max() > 1e-2


def test_a_row_depends_on_its_own_adapters_alone(styled: Any, latents_of: Any) -> None:
    adapters, noise = heatsink.adapters(styled), start(1).expand(4, -1, -1, -1)
    prompts = [PROMPT, "two cats", "x", "y z"]
    mixed = {}
    for choice in (
        STYLES,
        [STYLES[0], None, STYLES[1], None],
        [STYLES[0], None, STYLES[2], STYLES[1]],
    ):
        adapters.use(choice)
        mixed[repr(choice)] = latents_of(styled, prompts, noise)
    first, second, third = mixed.values()
    # The batch has one shape: bit by bit, whatever the neighbours have.
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])
    assert torch.equal(second[1], third[1])
    assert not torch.equal(first[1], second[1])
    adapters.remove()
    base = latents_of(styled, prompts, noise)
    assert torch.equal(base[3], first[3])
    assert torch.equal(base[[1, 3]], second[[1, 3]])
    assert not torch.equal(base[0], first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_adapters_are_the_base_model_bit_by_bit(
    dtype: torch.dtype,
    tiny_sd1: Path,
    load_pipeline: Callable[..., Any],
    deltas_for: Make,
    latents_of: Any,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    pipe = load_pipeline(tiny_sd1, dtype)
    adapters, prompts = heatsink.adapters(pipe), [PROMPT, "two cats", "z"]
    noise = torch.randn(3, 4, 8, 8, dtype=dtype)
    base = latents_of(pipe, prompts, noise)
    adapters.add("a", deltas_for(pipe))
    adapters.use([None, {"a": 1.0}, {"a": 0.0}])
    mixed = latents_of(pipe, prompts, noise)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert (mixed[1] - base[1]).abs().max() > 1e-2
    adapters.use([None, None, {}])
    assert torch.equal(latents_of(pipe, prompts, noise), base)
    adapters.remove()
    assert torch.equal(latents_of(pipe, prompts, noise), base)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("given", ["prompts", "embeddings"])
def test_every_image_of_a_prompt_has_its_adapters(
    guidance_scale: float, images: int, given: str, styled: Any, latents_of: Any
) -> None:
    adapters, noise = heatsink.adapters(styled), start(2 * images)
    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": images}
    prompts: Any = [PROMPT, "two cats"]
    name = "a"
    if given == "embeddings":
        # One that leaves the text encoder alone.
        name = "b"
        embeds, negative = styled.encode_prompt(prompts, "cpu", 1, True)
        # Those of the base model, whatever is in use later.
        options |= {"prompt_embeds": embeds.detach(), "negative_prompt_embeds": negative.detach()}
        prompts = None
    base = latents_of(styled, prompts, noise, **options)
    adapters.use([{name: 1.0}, None])
    mixed = latents_of(styled, prompts, noise, **options)
    adapters.use([{name: 1.0}, {name: 1.0}])
    both = latents_of(styled, prompts, noise, **options)
    adapters.use({name: 1.0})
    merged = latents_of(styled, prompts, noise, **options)
    assert torch.equal(mixed[images:], base[images:])
    assert torch.equal(mixed[:images], both[:images])
    # Negative and positive rows alike: as if the adapter were merged.
    assert near(mixed[:images], merged[:images])
    assert (mixed[:images] - base[:images]).abs().max() > 1e-2


def test_sdxl_and_both_its_text_encoders(
    tiny_sdxl: Path, load_pipeline: Callable[..., Any], deltas_for: Make, latents_of: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    pipe = load_pipeline(tiny_sdxl)
    adapters, noise = heatsink.adapters(pipe), start(2)
    adapters.add("text", deltas_for(pipe, components=("text_encoder", "text_encoder_2")))
    adapters.add("unet", deltas_for(pipe, components=("unet",)))
    prompts, negative = [PROMPT, "two cats"], {"negative_prompt": "grey"}
    base = latents_of(pipe, prompts, noise, **negative)
    for choice in ({"text": 1.0}, {"unet": 0.5}, {"unet": 1.0, "text": -0.5}):
        adapters.use([None, choice])
        mixed = latents_of(pipe, prompts, noise, **negative)
        adapters.use(choice)
        merged = latents_of(pipe, prompts, noise, **negative)
        assert torch.equal(mixed[0], base[0])
        assert near(mixed[1], merged[1])
        assert (mixed[1] - base[1]).abs().max() > 1e-3


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_has_its_rows(
    guess_mode: bool, styled: Any, deltas_for: Make, latents_of: Any, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    heatsink.adapters(styled).close()
    controlnet = ControlNetModel.from_unet(
        styled.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
                parameter.normal_(std=0.1)
    pipe = StableDiffusionControlNetPipeline(
        **{**styled.components, "controlnet": controlnet}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    adapters, noise = heatsink.adapters(pipe), start(2)
    write_adapter(tmp_path / "c", deltas_for(pipe, components=("unet", "controlnet")))
    adapters.add("c", tmp_path / "c")
    options = {
        "image": torch.rand(2, 3, 16, 16),
        "guess_mode": guess_mode,
        "height": 16,
        "width": 16,
    }
    noise = torch.randn(2, 4, 2, 2)
    prompts = [PROMPT, "two cats"]
    base = latents_of(pipe, prompts, noise, **options)
    adapters.use([{"c": 1.0}, None])
    mixed = latents_of(pipe, prompts, noise, **options)
    adapters.use({"c": 1.0})
    merged = latents_of(pipe, prompts, noise, **options)
    assert torch.equal(mixed[1], base[1])
    assert near(mixed[0], merged[0])
    assert (mixed[0] - base[0]).abs().max() > 1e-2


def test_launches_do_not_depend_on_rows_or_adapters(
    styled: Any, latents_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, calls = heatsink.adapters(styled), [0]
    names = RowAdapters._add.__globals__
    plain = names["lora_rows"]

    def counted(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        plain(*args, **kwargs)

    monkeypatch.setitem(names, "lora_rows", counted)
    counts = []
    for choice in ([{"a": 1.0}], STYLES[:3], [{"a": 0.5}, *STYLES]):
        calls[0] = 0
        adapters.use(choice)
        latents_of(styled, [PROMPT] * len(choice), start(len(choice)))
        counts.append(calls[0])
    assert counts[0] > 0
    assert len(set(counts)) == 1
    calls[0] = 0
    adapters.use([None, None])
    latents_of(styled, [PROMPT] * 2, start(2))
    assert calls[0] == 0
