"""Adapters by prompt: what is refused, and what fails, with its reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import heatsink
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import AdapterError, CallerError, InvalidRequest

Make = Callable[..., list[AdapterDelta]]
PROMPT = "a red apple"
STYLES: list[dict[str, float] | None] = [{"a": 1.0}, {"b": 0.7}, {"b": 0.3, "a": 0.6}, None]


def start(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 8, 8)


def near(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for float32's roundings through some hundred layers."""
    return bool((value - other).abs().max() < 1e-5 * other.abs().max())


def test_embeddings_of_prompts_are_refused_where_an_adapter_changes_the_encoder(
    styled: Any, latents_of: Any
) -> None:
    adapters, noise = heatsink.adapters(styled), start(2)
    embeds, negative = (e.detach() for e in styled.encode_prompt([PROMPT] * 2, "cpu", 1, True))
    both = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    adapters.use([{"b": 1.0}, {"a": 1.0}])
    for prompts, given in (
        (None, both),
        ([PROMPT] * 2, {"negative_prompt_embeds": negative}),
    ):
        message = f"{next(iter(given))} is given, but an adapter in use changes the text encoders"
        with pytest.raises(InvalidRequest, match=message):
            latents_of(styled, prompts, noise, **given)
    latents_of(styled, [PROMPT] * 2, noise)
    for choice in ([{"b": 1.0}, {"a": 0.0}], [None, None]):
        adapters.use(choice)
        latents_of(styled, None, noise, **both)


def test_calls_that_do_not_fit_the_prompts_are_refused(styled: Any, latents_of: Any) -> None:
    adapters = heatsink.adapters(styled)
    adapters.use([{"a": 1.0}, None])
    for prompts, count in ((PROMPT, 1), ([PROMPT] * 3, 3), ([PROMPT] * 4, 4)):
        with pytest.raises(InvalidRequest, match=f"for 2 prompts, .* called with {count}"):
            latents_of(styled, prompts, start(count))
    # One prompt and two images would divide, and be wrong.
    with pytest.raises(InvalidRequest, match="called with 1"):
        latents_of(styled, PROMPT, start(2), num_images_per_prompt=2)
    latents_of(styled, [PROMPT] * 2, start(2))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(InvalidRequest, match="text_encoder ran outside of a call"):
        styled.text_encoder(ids)
    with pytest.raises(InvalidRequest, match="unet ran outside of a call"):
        styled.unet(start(2), 1, torch.zeros(2, 16, 32))
    layer = styled.unet.mid_block.resnets[0].conv1
    with pytest.raises(InvalidRequest, match=r"mid_block\.resnets\.0\.conv1 computes 2 rows"):
        layer(torch.zeros(2, 64, 4, 4))
    adapters.remove()
    styled.text_encoder(ids)


def test_batches_that_do_not_divide_are_refused(
    styled: Any, latents_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heatsink.adapters(styled).use([{"a": 1.0}, None])
    forward = styled.unet.forward

    def other_batch(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        for rows in (1, 2, 3, 5, 8):
            with pytest.raises(InvalidRequest, match=f"unet has a batch of {rows}, expected 4"):
                pipe.unet(start(rows), 1, torch.zeros(rows, 16, 32))
        seen.append(step)
        return given

    seen: list[int] = []
    latents_of(styled, [PROMPT] * 2, start(2), callback_on_step_end=other_batch)
    # The scheduler takes its second step twice.
    assert len(seen) == 4

    def without_guidance(pipe: Any, step: int, timestep: Any, given: Any) -> Any:
        # How guidance is left out half way: the batch halves, and so do its rows.
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"][-2:]}

    mixed = latents_of(
        styled,
        [PROMPT] * 2,
        noise := start(2),
        callback_on_step_end=without_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    heatsink.adapters(styled).use({"a": 1.0})
    merged = latents_of(
        styled,
        [PROMPT] * 2,
        noise,
        callback_on_step_end=without_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert near(mixed[0], merged[0])
    assert forward == styled.unet.forward


def test_chunked_rows_are_refused(styled: Any, latents_of: Any) -> None:
    adapters = heatsink.adapters(styled)
    adapters.use([{"a": 1.0}, None])
    (block,) = styled.unet.down_blocks[0].attentions[0].transformer_blocks
    block.set_chunk_feed_forward(1, 0)
    with pytest.raises(InvalidRequest, match="computes 1 rows where unet has 4"):
        latents_of(styled, [PROMPT] * 2, start(2))
    block.set_chunk_feed_forward(None, 0)
    latents_of(styled, [PROMPT] * 2, start(2))


def test_what_can_not_be_done_by_row_is_refused_with_its_reason(
    styled: Any, deltas_for: Make, latents_of: Any
) -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    adapters, noise = heatsink.adapters(styled), start(2)
    adapters.add("dora", deltas_for(styled, dora=True))
    twice = deltas_for(styled)
    adapters.add("twice", [*twice, twice[0]])
    adapters.use([{"a": 1.0}, None])
    before = latents_of(styled, [PROMPT] * 2, noise)
    for choice, message in (
        ([{"dora": 1.0}, None], "dora is a DoRA: .* merge it for all prompts"),
        ([{"twice": 1.0}, None], "twice changes unet.* twice"),
    ):
        with pytest.raises(AdapterError, match=message):
            adapters.use(choice)
    assert adapters.in_use == [{"a": 1.0}, None]
    assert torch.equal(latents_of(styled, [PROMPT] * 2, noise), before)
    adapters.use({"dora": 1.0, "twice": 0.5})
    styled.unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(AdapterError, match="the unet is compiled"):
        adapters.use([{"a": 1.0}])
    adapters.close()
    parts = {**styled.components, "requires_safety_checker": False}
    other = StableDiffusionInstructPix2PixPipeline(**parts)
    adapters = heatsink.adapters(other)
    adapters.add("a", deltas_for(styled))
    with pytest.raises(AdapterError, match="the rows of a StableDiffusionInstructPix2PixPipeline"):
        adapters.use([{"a": 1.0}])
    adapters.use({"a": 1.0})
    adapters.close()
    with pytest.raises(CallerError, match="are closed"):
        adapters.use(None)


@pytest.mark.parametrize("in_use", [{"a": 1.0}, [{"a": 1.0}, None], None])
@pytest.mark.parametrize("broken", ["first hook", "last hook", "wrapping", "removing"])
def test_a_change_to_rows_that_fails_changes_nothing(
    in_use: Any, broken: str, styled: Any, latents_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, noise = heatsink.adapters(styled), start(2)
    adapters.use(in_use)
    before = latents_of(styled, [PROMPT] * 2, noise)
    weights = {name: value.clone() for name, value in styled.unet.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in styled.unet.modules()]
    own = set(vars(styled))

    def once(plain: Any) -> Any:
        # What is put back must not fail as well.
        left = iter([True])

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left, False):
                raise KeyboardInterrupt
            return plain(*args, **kwargs)

        return call

    last = styled.unet.get_submodule(adapters._deltas["b"][-1].module_path)
    owner, name = {
        "wrapping": (inspect, "signature"),
        "first hook": (styled.unet, "register_forward_pre_hook"),
        "last hook": (last, "register_forward_hook"),
        "removing": (adapters._merger, "remove"),
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, once(getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            adapters.use([{"b": 1.0}, {"a": 1.0}])
    assert adapters.in_use == in_use
    assert set(vars(styled)) == own
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in styled.unet.modules()
    ]
    assert all(torch.equal(v, weights[n]) for n, v in styled.unet.state_dict().items())
    assert torch.equal(latents_of(styled, [PROMPT] * 2, noise), before)
    adapters.use([{"b": 1.0}, {"a": 1.0}])


def test_values_that_the_layers_can_not_hold_are_refused(
    tiny_sd1: Path, load_pipeline: Callable[..., Any], deltas_for: Make, seed: int
) -> None:
    torch.manual_seed(seed)
    pipe = load_pipeline(tiny_sd1, torch.float16)
    adapters = heatsink.adapters(pipe)
    large = [AdapterDelta(d.component, d.module_path, d.a * 1e6, d.b) for d in deltas_for(pipe)]
    adapters.add("large", large)
    with pytest.raises(AdapterError, match=r"values that torch\.float16 can't"):
        adapters.use([{"large": 1.0}])
    assert adapters.in_use is None
