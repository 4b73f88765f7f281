"""ControlNets beside a model: read, named, compared with its UNet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.errors import InvalidRequest, ModelError, UnsafeFile
from heatsink.runtime.model import Model

SD1 = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_controlnets_are_components(tiny_sd1: Path, sd1_controlnets: dict[str, Path]) -> None:
    plain = Model.open(tiny_sd1)
    model = plain.with_controlnets(sd1_controlnets)
    assert plain.controlnets == ()
    assert model.controlnets == ("lines", "depth")
    assert model.components == (*SD1, "controlnet_lines", "controlnet_depth")
    model.check()
    model.check_finite()
    assert {model.digest(name) for name in SD1} == {plain.digest(name) for name in SD1}
    digests = [model.digest(f"controlnet_{name}") for name in model.controlnets]
    assert len(set(digests)) == 2
    # A digest is of what it is, not of what it is called.
    other = plain.with_controlnets({"edges": sd1_controlnets["lines"]})
    assert other.digest("controlnet_edges") == digests[0]


def test_they_stay_when_weights_are_replaced(
    tiny_sd1: Path, sd1_controlnets: dict[str, Path]
) -> None:
    model = Model.open(tiny_sd1).with_controlnets(sd1_controlnets)
    fused = model.with_weights({"unet": model.weights("unet")})
    assert fused.components == model.components
    net = fused.load_module("controlnet_lines", torch.float32)
    assert type(net).__name__ == "ControlNetModel"
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_adapter_files_name_no_controlnet_of_these(
    tiny_sd1: Path, sd1_controlnets: dict[str, Path]
) -> None:
    model = Model.open(tiny_sd1).with_controlnets(sd1_controlnets)
    assert Targets.of(model) == Targets.of(Model.open(tiny_sd1))


def test_the_models_own_controlnet_is_a_folder_as_any(
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    copy_model: Callable[[Path], Path],
) -> None:
    folder = copy_model(tiny_sd1)
    shutil.copytree(sd1_controlnets["lines"], folder / "controlnet")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionControlNetPipeline"}
    index |= {"controlnet": ["diffusers", "ControlNetModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = Model.open(folder)
    assert (model.components, model.extras) == (SD1, ("controlnet",))
    own = model.with_controlnets({"lines": folder / "controlnet"})
    assert own.controlnets == ("lines",)


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "missing": (shutil.rmtree, ModelError, "controlnet 'lines': there is no folder"),
    "a UNet": (
        lambda f: edit(f, _class_name="UNet2DConditionModel"),
        ModelError,
        "holds a UNet2DConditionModel .*expected ControlNetModel",
    ),
    "another width": (
        lambda f: edit(f, block_out_channels=[32, 96]),
        ModelError,
        r"another UNet: it has block_out_channels \[32, 96\] \(wants \[32, 64\]\)",
    ),
    "another depth": (
        lambda f: edit(f, layers_per_block=2),
        ModelError,
        r"another UNet: .*layers_per_block 2 \(wants 1\)",
    ),
    "another text encoder": (
        lambda f: edit(f, cross_attention_dim=48),
        ModelError,
        r"another UNet: it has cross_attention_dim 48 \(wants 32\)",
    ),
    "pickled": (
        lambda f: (f / "diffusion_pytorch_model.safetensors").rename(
            f / "diffusion_pytorch_model.bin"
        ),
        UnsafeFile,
        "only pickled weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_each_say_why(
    case: str, tiny_sd1: Path, sd1_controlnets: dict[str, Path], tmp_path: Path
) -> None:
    damage, kind, message = BAD[case]
    folder = Path(shutil.copytree(sd1_controlnets["lines"], tmp_path / "lines"))
    damage(folder)
    with pytest.raises(kind, match=message):
        Model.open(tiny_sd1).with_controlnets({"lines": folder})


def test_weights_that_do_not_fit_the_configuration_are_listed(
    tiny_sd1: Path, sd1_controlnets: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd1_controlnets["lines"], tmp_path / "lines"))
    edit(folder, conditioning_embedding_out_channels=[4, 8, 8, 8])
    model = Model.open(tiny_sd1).with_controlnets({"lines": folder})
    with pytest.raises(ModelError, match=r"controlnet_lines don't fit .*of another shape"):
        model.check()


@pytest.mark.parametrize("name", ["", "Lines", "a/b", "..", "-a", "a" * 41, "a b"])
def test_a_name_must_do_for_a_file(
    name: str, tiny_sd1: Path, sd1_controlnets: dict[str, Path]
) -> None:
    with pytest.raises(InvalidRequest, match="controlnet: expected a name of up to 40 of"):
        Model.open(tiny_sd1).with_controlnets({name: sd1_controlnets["lines"]})


def test_channels_of_an_inpainting_model_are_taken(
    tiny_sd1: Path, copy_model: Callable[[Path], Path]
) -> None:
    folder = copy_model(tiny_sd1)
    edit(folder / "unet", in_channels=9)
    assert Model.open(folder).config("unet")["in_channels"] == 9
    edit(folder / "unet", in_channels=8)
    with pytest.raises(ModelError, match=r"takes 8 channels .*expected 4 \(or 9, of an inpainti"):
        Model.open(folder)
