"""Networks that are shared, replaced, left behind or not what adapters need."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink
from heatsink.integrations.diffusers import Adapters
from heatsink.kernels.merge_plan import MergePlan
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import write_adapter
from heatsink.runtime.errors import (
    AdapterError,
)

Make = Callable[..., list[AdapterDelta]]
PROMPTS = ["a red apple", "two cats"]


def state(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": value.detach().clone()
        for component in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, component, None) is not None
        for name, value in getattr(pipe, component).named_parameters()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_networks_shared_by_pipelines_have_one_owner(sd1: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**sd1.components, requires_safety_checker=False)
    adapters = heatsink.adapters(sd1)
    with pytest.raises(AdapterError, match="has adapters from another pipeline"):
        heatsink.adapters(other)
    adapters.close()
    assert isinstance(heatsink.adapters(other), Adapters)


@pytest.mark.parametrize(
    "choice", [None, {"a": 1.0}, {"a": 0.0}, [{"a": 1.0}, None], [[{"a": 1.0}, None], {"a": 0.5}]]
)
def test_a_pipeline_that_is_gone_leaves_networks_that_can_have_adapters(
    choice: Any, sd1: Any, deltas_for: Make, latents_of: Any, seed: int
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    torch.manual_seed(seed)
    base, deltas, noise = state(sd1), deltas_for(sd1), torch.randn(2, 4, 8, 8)
    plain = latents_of(sd1, PROMPTS, noise)
    other = StableDiffusionImg2ImgPipeline(**sd1.components, requires_safety_checker=False)
    adapters = heatsink.adapters(other)
    adapters.add("a", deltas)
    for each in choice if isinstance(choice, list) and isinstance(choice[0], list) else [choice]:
        adapters.use(each)
        merged = isinstance(each, dict) and each["a"] != 0
    gone = weakref.ref(other)
    del other, adapters
    gc.collect()
    assert gone() is None
    # Nobody took them off yet; hooks are gone, for rows are no more.
    assert same(state(sd1), base) != merged
    assert torch.equal(latents_of(sd1, PROMPTS, noise), plain) != merged
    mine = heatsink.adapters(sd1)
    assert same(state(sd1), base)
    assert torch.equal(latents_of(sd1, PROMPTS, noise), plain)
    mine.add("a", deltas)
    mine.use({"a": 1.0})
    assert not same(state(sd1), base)
    mine.close()
    assert same(state(sd1), base)


def test_what_a_pipeline_that_is_gone_left_is_not_put_over_other_weights(
    sd1: Any, deltas_for: Make, seed: int
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    torch.manual_seed(seed)
    other = StableDiffusionImg2ImgPipeline(**sd1.components, requires_safety_checker=False)
    adapters = heatsink.adapters(other)
    adapters.add("a", deltas_for(sd1))
    adapters.use({"a": 1.0})
    del other, adapters
    gc.collect()
    new = {name: torch.randn_like(value) for name, value in sd1.unet.state_dict().items()}
    sd1.unet.load_state_dict(new)
    with pytest.raises(AdapterError, match=r"gone, and unet\..* was .* written since"):
        heatsink.adapters(sd1)
    assert all(torch.equal(value, new[name]) for name, value in sd1.unet.state_dict().items())


def refused(pipe: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        heatsink.adapters(pipe)
    assert "_heatsink_adapters" not in vars(pipe)


def test_what_stands_between_weights_and_results_is_refused(
    sd1: Any, deltas_for: Make, seed: int
) -> None:
    torch.manual_seed(seed)
    sd1.fuse_qkv_projections(vae=False)
    refused(sd1, "its projections are fused into copies")
    sd1.unfuse_qkv_projections(vae=False)
    hook = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    # What enable_model_cpu_offload and enable_sequential_cpu_offload put on a network.
    hook.add_hook_to_module(sd1.text_encoder, hook.ModelHook())
    refused(sd1, "text_encoder: accelerate moves these weights")
    hook.remove_hook_from_module(sd1.text_encoder)
    adapters = heatsink.adapters(sd1)
    adapters.add("a", deltas_for(sd1))
    adapters.use({"a": 1.0})
    merged = state(sd1)
    hook.add_hook_to_module(sd1.unet, hook.ModelHook())
    with pytest.raises(AdapterError, match="unet: accelerate moves"):
        adapters.use({"a": 0.5})
    assert same(state(sd1), merged)
    hook.remove_hook_from_module(sd1.unet)
    adapters.close()
    sd1.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refused(sd1, "a hook of diffusers .* moves or casts")


@pytest.mark.parametrize("choice", [{"a": 1.0}, [{"a": 1.0}, None], {"a": 0.0}])
@pytest.mark.parametrize("change", ["network", "assign", "layer"])
def test_what_was_replaced_is_not_taken_for_what_is_computed_with(
    change: str, choice: Any, sd1: Any, deltas_for: Make, latents_of: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    noise, base = torch.randn(2, 4, 8, 8), state(sd1)
    plain, unet = latents_of(sd1, PROMPTS, noise), sd1.unet
    for in_use in (None, {"a": 1.0}, [{"a": 1.0}, None]):
        adapters = heatsink.adapters(sd1)
        adapters.add("a", deltas_for(sd1))
        adapters.use(in_use)
        if change == "network":
            message = "another unet than these adapters: close"
            sd1.unet = copy.deepcopy(unet)
        elif change == "assign":
            message = r"unet\..* is another tensor .* load_state_dict\(assign=True\)"
            new = {n: base[f"unet.{n}"].clone() for n in dict(unet.named_parameters())}
            unet.load_state_dict(new, assign=True)
        else:
            message = r"unet\.conv_in\.weight is another tensor"
            unet.conv_in = copy.deepcopy(unet.conv_in)
        with pytest.raises(AdapterError, match=message) as caught:
            adapters.use(choice)
        assert "compiled" not in str(caught.value)
        assert adapters.in_use == in_use
        if in_use is not None and (change == "network" or isinstance(in_use, dict)):
            with pytest.raises(AdapterError, match="close"):
                latents_of(sd1, PROMPTS, noise)
        adapters.close()
        sd1.unet = unet
        assert same(state(sd1), base)
        assert torch.equal(latents_of(sd1, PROMPTS, noise), plain)
    with heatsink.adapters(sd1) as adapters:
        adapters.add("a", deltas_for(sd1))
        adapters.use({"a": 1.0})
        assert not torch.equal(latents_of(sd1, PROMPTS, noise), plain)


def test_no_image_is_made_of_a_torn_merge(
    sd1: Any, deltas_for: Make, latents_of: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    noise, base = torch.randn(2, 4, 8, 8), state(sd1)
    plain = latents_of(sd1, PROMPTS, noise)
    adapters = heatsink.adapters(sd1)
    adapters.add("a", deltas_for(sd1))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MergePlan, "_call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapters.use({"a": 1.0})
    assert adapters.in_use is None
    with pytest.raises(AdapterError, match="broken off half way"):
        latents_of(sd1, PROMPTS, noise)
    adapters.remove()
    assert same(state(sd1), base)
    assert torch.equal(latents_of(sd1, PROMPTS, noise), plain)


def test_pefts_adapters_are_refused(sd1: Any, tmp_path: Path, deltas_for: Make, seed: int) -> None:
    torch.manual_seed(seed)
    write_adapter(tmp_path / "a.safetensors", deltas_for(sd1))
    adapters, base = heatsink.adapters(sd1), state(sd1)
    adapters.add("a", tmp_path / "a.safetensors")
    adapters.use({"a": 1.0})
    sd1.load_lora_weights(tmp_path, weight_name="a.safetensors")
    with pytest.raises(AdapterError, match=r"PEFT has adapters here .*unload_lora_weights"):
        adapters.use({"a": 0.5})
    # What is in use comes off all the same.
    adapters.close()
    refused(sd1, "PEFT has adapters here")
    sd1.unload_lora_weights()
    assert same(state(sd1), base)
    assert isinstance(heatsink.adapters(sd1), Adapters)


def test_other_pipelines_are_refused(sd1: Any) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    refused(DDPMPipeline(unet, DDPMScheduler()), "has no UNet2DConditionModel")
    sd1.unet.conv_in.weight.data = sd1.unet.conv_in.weight.data.to(torch.float8_e4m3fn)
    refused(sd1, r"unet\.conv_in: its weight is a Parameter of torch\.float8_e4m3fn")
