"""Adapters on an optimised pipeline: Heatsink's merged ones, and diffusers' own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import write_adapter
from heatsink.runtime.errors import AdapterError, InvalidRequest

Pair = tuple[Any, Any]
Same = Callable[..., Tensor]
BOTH = ["unet", "text_encoder"]


@pytest.fixture(scope="module")
def pair(make_sd1: Callable[[], Any]) -> Pair:
    """A plain pipeline and an optimised one; every test leaves them without adapters."""
    plain, fast = make_sd1(), make_sd1()
    heatsink.optimize(fast, components=BOTH)
    return plain, fast


@pytest.fixture
def file(pair: Pair, deltas_for: Callable[..., list[AdapterDelta]], tmp_path: Path) -> Path:
    """An adapter of the UNet and the text encoder."""
    torch.manual_seed(3)
    path = tmp_path / "noto.safetensors"
    write_adapter(path, deltas_for(pair[0]))
    return path


def test_merged_adapters_reach_the_programs(pair: Pair, file: Path, same_images: Same) -> None:
    base = same_images(pair, prompt="a red apple")
    graphs = [getattr(pair[1], name).graphs() for name in BOTH]
    both = [heatsink.adapters(pipe) for pipe in pair]
    for adapters in both:
        adapters.add("noto", str(file))
        adapters.use({"noto": 0.8})
    merged = same_images(pair, prompt="a red apple")
    assert not torch.allclose(merged, base, atol=1e-3)
    for adapters in both:
        adapters.use({"noto": -0.5})
    assert not torch.allclose(same_images(pair, prompt="a red apple"), merged, atol=1e-3)
    for adapters in both:
        adapters.close()
    # Bit by bit what it was.
    assert torch.equal(same_images(pair, prompt="a red apple"), base)
    assert [getattr(pair[1], name).graphs() for name in BOTH] == graphs


def test_only_weights_of_the_adapter_are_read_again(pair: Pair, file: Path) -> None:
    _, fast = pair
    given = {"prompt": "a red apple", "num_inference_steps": 1, "output_type": "latent"}
    fast(**given)
    (component,) = fast.unet._programs.components

    def constants() -> dict[tuple[Any, str], Tensor]:
        parts = [*component._parts.values(), component._step]
        return {(part, name): v for part in parts for name, v in part._constants.items()}

    before = constants()
    pristine = {name: value.clone() for name, value in fast.unet.original.named_parameters()}
    with heatsink.adapters(fast) as adapters:
        adapters.add("noto", str(file))
        adapters.use({"noto": 0.8})
        fast(**given)
        again = {name for (part, name), v in constants().items() if v is not before[part, name]}
        touched = {
            name
            for name, value in fast.unet.original.named_parameters()
            if not torch.equal(value, pristine[name])
        }
    assert touched
    assert again == {
        name
        for name, parts in component.graph.origins.items()
        if touched & {part.parameter for part in parts}
    }


def test_a_pipeline_with_merged_adapters_is_optimised(
    file: Path, make_sd1: Callable[[], Any]
) -> None:
    pipe, ids = make_sd1(), torch.arange(32).reshape(2, 16)
    network = pipe.text_encoder
    found = []
    with torch.no_grad(), heatsink.adapters(pipe) as adapters:
        adapters.add("noto", str(file))
        adapters.use({"noto": 0.8})
        heatsink.optimize(pipe, components=["text_encoder"])
        for choice in ({"noto": 0.8}, {"noto": 0.1}, None):
            adapters.use(choice)
            found.append(pipe.text_encoder(ids)[0])
            assert torch.allclose(found[-1], network(ids)[0], atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[1], found[2], atol=1e-4)


def test_adapters_by_prompt_are_refused(pair: Pair, file: Path) -> None:
    with heatsink.adapters(pair[1]) as adapters:
        adapters.add("noto", str(file))
        with pytest.raises(
            AdapterError, match="text_encoder is optimised, and its program has no "
        ):
            adapters.use([{"noto": 0.8}, None])
        assert adapters.in_use is None


def test_a_pipeline_with_adapters_by_prompt_is_not_optimised(
    pair: Pair, file: Path, make_sd1: Callable[[], Any]
) -> None:
    pipe = make_sd1()
    with heatsink.adapters(pipe) as adapters:
        adapters.add("noto", str(file))
        adapters.use([{"noto": 0.8}])
        with pytest.raises(InvalidRequest, match="text_encoder: a hook changes what"):
            heatsink.optimize(pipe)
    assert heatsink.optimize(pipe).left == {}


def test_diffusers_adapters_run_as_pytorch_has_them_until_they_are_unloaded(
    pair: Pair, file: Path, same_images: Same, caplog: pytest.LogCaptureFixture
) -> None:
    request = {"prompt": "a red apple", "num_inference_steps": 2}
    base = same_images(pair, **request)
    with caplog.at_level(logging.WARNING, "heatsink"):
        for pipe in pair:
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="noto")
        loaded = same_images(pair, **request)
    assert not torch.allclose(loaded, base, atol=1e-3)
    assert caplog.text.count("has adapters of PEFT's and runs as PyTorch has it") == 2
    assert pair[1].unet.graphs() == pair[1].text_encoder.graphs() == []
    for pipe in pair:
        pipe.set_adapters(["noto"], [0.3])
    weaker = same_images(pair, **request)
    assert not torch.allclose(weaker, loaded, atol=1e-3)
    for pipe in pair:
        pipe.disable_lora()
    assert torch.allclose(same_images(pair, **request), base, atol=1e-3)
    weights = [{name: _state(getattr(pipe, name)) for name in BOTH} for pipe in pair]
    for pipe in pair:
        pipe.enable_lora()
        pipe.fuse_lora(components=BOTH, lora_scale=0.7)
        pipe.unload_lora_weights()
    fused = same_images(pair, **request)
    assert not torch.allclose(fused, base, atol=1e-3)
    assert len(pair[1].unet.graphs()) == 1
    for pipe, own in zip(pair, weights, strict=True):
        for name in BOTH:
            getattr(pipe, name).load_state_dict(own[name])
    assert torch.equal(same_images(pair, **request), base)


def _state(module: Any) -> dict[str, Tensor]:
    """The weights of a module with adapters of PEFT's in it, as they were without."""
    return {
        name.replace(".base_layer.", "."): value.clone()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }


def test_what_diffusers_fuses_between_two_calls_is_in_the_programs(pair: Pair, file: Path) -> None:
    ids = torch.arange(32).reshape(2, 16)
    own = [_state(pipe.text_encoder) for pipe in pair]

    def encoded() -> list[Tensor]:
        with torch.no_grad():
            return [pipe.text_encoder(ids)[0] for pipe in pair]

    plain, base = encoded()
    for pipe in pair:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora(components=BOTH, lora_scale=0.7)
        # Nothing of the module's structure tells afterwards, and PEFT writes through `.data`.
        pipe.unload_lora_weights()
    wanted, found = encoded()
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-3)
    for pipe, weights in zip(pair, own, strict=True):
        pipe.text_encoder.load_state_dict(weights)
    assert torch.equal(encoded()[1], base)
    assert torch.allclose(base, plain, atol=1e-5)
