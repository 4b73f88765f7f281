"""What `optimize` takes, refuses and gives back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import heatsink
from heatsink.integrations.replacement import Replacement
from heatsink.runtime.errors import InvalidRequest, NotBuilt

Pair = tuple[Any, Any]
Make = Callable[[], Any]
NAMES = ("text_encoder", "unet", "vae")


def test_the_report_names_what_was_replaced(make_sd1: Make) -> None:
    done = heatsink.optimize(make_sd1())
    assert done.replaced == {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    assert done.left == {}
    assert "unet: UNet2DConditionModel runs as a program" in str(done)


def test_restore_puts_the_very_same_objects_back(make_sd1: Make) -> None:
    pipe = make_sd1()
    modules = {name: getattr(pipe, name) for name in NAMES}
    weights = {
        name: {k: v.clone() for k, v in modules[name].state_dict().items()} for name in NAMES
    }
    config = dict(pipe.config)
    latents = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = pipe.vae.decode(latents).sample
        heatsink.optimize(pipe)
        assert dict(pipe.config) == config
        assert torch.allclose(pipe.vae.decode(latents).sample, wanted, atol=1e-5)
        assert heatsink.restore(pipe) == list(NAMES)
        assert torch.equal(pipe.vae.decode(latents).sample, wanted)
    for name, module in modules.items():
        assert getattr(pipe, name) is module
        for key, value in module.state_dict().items():
            assert torch.equal(value, weights[name][key])
    assert dict(pipe.config) == config
    assert heatsink.restore(pipe) == []


def test_only_the_named_components_are_replaced(make_sd1: Make) -> None:
    pipe = make_sd1()
    assert set(heatsink.optimize(pipe, components=["vae"]).replaced) == {"vae"}
    assert not isinstance(pipe.unet, Replacement)
    assert isinstance(pipe.vae, Replacement)


def test_an_optimised_pipeline_is_saved_as_the_plain_one(
    sd1: Pair, tiny_sd1: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    sd1[1].save_pretrained(tmp_path)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        found, wanted = (
            load_file(folder / f"{name}.safetensors") for folder in (tmp_path, tiny_sd1)
        )
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (tmp_path / "model_index.json").read_text().count("UNet2DConditionModel") == 1


def test_twice_is_refused(sd1: Pair) -> None:
    with pytest.raises(InvalidRequest, match="already optimised"):
        heatsink.optimize(sd1[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ["controlnet"]}, r"components: the pipeline has .*, not \['controlnet'\]"),
        ({"components": "unet"}, "components: expected a list of names, got 'unet'"),
        ({"components": []}, "components: expected a list of names"),
        ({"precision": "fp8"}, r"precision: expected one of \['bf16', 'fp16', 'fp32'\], got 'fp8'"),
        ({"precision": torch.float64}, "precision: expected one of"),
    ],
)
def test_wrong_options_change_nothing(make_sd1: Make, options: Any, message: str) -> None:
    pipe = make_sd1()
    with pytest.raises(InvalidRequest, match=message):
        heatsink.optimize(pipe, **options)
    assert not any(isinstance(getattr(pipe, name), Replacement) for name in NAMES)


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"pipe: expected one of StableDiffusionPipeline, .*int"
    ):
        heatsink.optimize(3)


def test_states_in_which_the_network_would_be_another(make_sd1: Make) -> None:
    from peft import LoraConfig

    pipe = make_sd1()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(InvalidRequest, match="unet: PEFT adapters are loaded"):
        heatsink.optimize(pipe)
    pipe = make_sd1()
    # What accelerate leaves on a module that it offloads, whole or in parts.
    pipe.vae.decoder._hf_hook = object()
    with pytest.raises(InvalidRequest, match="vae: offloaded or hooked"):
        heatsink.optimize(pipe)
    pipe = make_sd1()
    pipe.unet.to("meta")
    with pytest.raises(InvalidRequest, match="unet: on meta"):
        heatsink.optimize(pipe)
    pipe = make_sd1()
    pipe.unet.train()
    pipe.unet.conv_out = torch.nn.Sequential(pipe.unet.conv_out, torch.nn.Dropout(0.1))
    with pytest.raises(InvalidRequest, match="unet: in training mode with dropout"):
        heatsink.optimize(pipe)
    assert not any(isinstance(getattr(pipe, name), Replacement) for name in NAMES)


def test_what_can_not_be_captured_is_left_and_named(make_sd1: Make) -> None:
    from diffusers import AutoencoderTiny

    pipe = make_sd1()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    pipe.text_encoder.final_layer_norm.to(torch.float64)
    with pytest.raises(NotBuilt, match="vae: AutoencoderTiny can't be captured yet"):
        heatsink.optimize(pipe, components=["vae", "unet"])
    assert not isinstance(pipe.unet, Replacement)
    done = heatsink.optimize(pipe)
    assert done.left["vae"] == "AutoencoderTiny can't be captured yet"
    assert done.left["text_encoder"] == "weights of torch.float32, torch.float64"
    assert list(done.replaced) == ["unet"]
    assert "vae: left, AutoencoderTiny" in str(done)
