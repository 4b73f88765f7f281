"""LoRA files as others write them: PEFT, diffusers in all its generations, kohya and LyCORIS."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heatsink.runtime.adapter_file import (
    AdapterDelta,
    digest_deltas,
    inspect_adapter,
    read_adapter,
    write_adapter,
)
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.ldm_names import translate, unet_names
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_K, CONV = f"{BLOCK}.attn2.to_k", "down_blocks.0.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
Q_PROJ = "encoder.layers.0.self_attn.q_proj"


def lora(model: Model, component: str, path: str, rank: int, **fields: Any) -> AdapterDelta:
    names = model.weights(component)
    path = next(name for name in names if name.endswith(f"{path}.weight")).removesuffix(".weight")
    shape = names.shape(f"{path}.weight")
    a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
    return AdapterDelta(component, path, a, b, **fields)


def dora(delta: AdapterDelta) -> AdapterDelta:
    return replace(delta, magnitude=torch.rand(delta.b.shape[0]) + 0.5)


def assert_same(first: list[AdapterDelta], second: list[AdapterDelta]) -> None:
    """Equal bit by bit, dtypes and scales too."""
    keys = [[(d.component, d.module_path) for d in each] for each in (first, second)]
    assert keys[0] == keys[1]
    for one, other in zip(first, second, strict=True):
        for mine, theirs in (
            (one.a, other.a),
            (one.b, other.b),
            (one.magnitude, other.magnitude),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)
        assert one.scale == other.scale


def randomise(module: torch.nn.Module) -> None:
    """Give every tensor of an adapter a value of its own; PEFT starts B at zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.normal_(std=0.1)


def save_with_peft(module: torch.nn.Module, folder: Path, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(module, LoraConfig(**config))
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


def unet_of(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet")


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_unet_of_peft(use_dora: bool, tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = {"target_modules": ["to_k", "proj_in", "conv1"], "use_dora": use_dora}
    config |= {"r": 4, "lora_alpha": 6, "rank_pattern": {"conv1": 2}}
    wrapped = save_with_peft(unet_of(tiny_sd1), tmp_path, **config)
    model = Model.open(tiny_sd1)
    receipt, deltas = inspect_adapter(tmp_path / "adapter_model.safetensors", model)
    assert receipt.format == "peft"
    assert receipt.ranks == (2, 4)
    assert len(receipt.applied) == (3 if use_dora else 2) * len(deltas)
    by_path = {d.module_path: d for d in deltas}
    assert {len(by_path[path].a.shape) for path in (TO_K, POINT, CONV)} == {2, 4}
    for path, delta in by_path.items():
        layer = wrapped.get_submodule(f"base_model.model.{path}")
        assert torch.equal(delta.a, layer.lora_A["default"].weight)
        assert torch.equal(delta.b, layer.lora_B["default"].weight.flatten(1))
        assert delta.scale == layer.scaling["default"]
        assert (delta.magnitude is not None) == use_dora
        if delta.magnitude is not None:
            theirs = layer.lora_magnitude_vector["default"].weight
            assert torch.equal(delta.magnitude, theirs.flatten())
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is no JSON object"):
        read_adapter(tmp_path / "adapter_model.safetensors", model)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: that is missing"):
        read_adapter(tmp_path / "adapter_model.safetensors", model)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("named", [True, False])
def test_a_text_encoder_of_peft(
    component: str, named: bool, tiny_sdxl: Path, tmp_path: Path, seed: int
) -> None:
    import transformers

    torch.manual_seed(seed)
    second = component == "text_encoder_2"
    class_ = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    module = class_.from_pretrained(tiny_sdxl / component)
    save_with_peft(module, tmp_path, r=2, target_modules=["q_proj"])
    if not named:
        # Then the shapes tell which encoder it is.
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    file, model = tmp_path / "adapter_model.safetensors", Model.open(tiny_sdxl)
    deltas = read_adapter(file, model)
    assert {d.component for d in deltas} == {component}
    assert len(deltas) == 3
    assert all(f"{d.module_path}.weight" in model.weights(component) for d in deltas)


def test_a_peft_file_that_fits_two_components_says_so(
    tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    save_with_peft(unet_of(tiny_sd1), tmp_path, r=2, target_modules=["to_k"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    targets = Targets.of(Model.open(tiny_sd1))
    twin = Targets(
        {**targets.shapes, "controlnet": targets.shapes["unet"]}, targets.flat, targets.kind
    )
    receipt, deltas = inspect_adapter(tmp_path / "adapter_model.safetensors", twin)
    assert {d.component for d in deltas} == {"unet"}
    assert "fits unet and controlnet alike" in receipt.notes[0]
    assert inspect_adapter(tmp_path / "adapter_model.safetensors", targets)[0].notes == ()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_files_of_diffusers(
    text: bool, use_dora: bool, tiny_sdxl: Path, tmp_path: Path, seed: int
) -> None:
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    wanted = {"unet": ["to_k", "conv1"]}
    wanted |= {"text_encoder": ["q_proj"], "text_encoder_2": ["fc1"]} if text else {}
    layers: dict[str, Any] = {}
    for name, modules in wanted.items():
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(r=4, target_modules=modules, use_dora=use_dora))
        randomise(module)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
        layers[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    receipt, deltas = inspect_adapter(file, Model.open(tiny_sdxl))
    assert receipt.format == "diffusers"
    assert receipt.refused == {}
    assert {d.component for d in deltas} == set(wanted)
    assert {d.scale for d in deltas} == {2.0}
    state = layers["unet_lora_layers"]
    for delta in (d for d in deltas if d.component == "unet"):
        assert torch.equal(delta.b, state[f"{delta.module_path}.lora_B.weight"].flatten(1))
        if use_dora:
            theirs = state[f"{delta.module_path}.lora_magnitude_vector"]
            assert delta.magnitude is not None
            assert torch.equal(delta.magnitude, theirs.flatten())


def test_a_unet_saved_alone_has_no_prefix(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    unet = unet_of(tiny_sd1)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_k", "conv_in"]))
    randomise(unet)
    unet.save_lora_adapter(tmp_path)
    deltas = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", Model.open(tiny_sd1))
    assert {d.scale for d in deltas} == {0.5}
    assert {d.component for d in deltas} == {"unet"}
    assert "conv_in" in {d.module_path for d in deltas}


Rename = Callable[[str], str]


def swap(down: str, up: str) -> Rename:
    return lambda key: key.replace("lora_A.weight", down).replace("lora_B.weight", up)


SPELLINGS: dict[str, Rename] = {
    "lora.down": swap("lora.down.weight", "lora.up.weight"),
    "lora_down": swap("lora_down.weight", "lora_up.weight"),
    "linear_layer": swap("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "default": lambda key: swap("lora_A.default.weight", "lora_B.default.weight")(key).replace(
        "magnitude_vector", "magnitude_vector.default.weight"
    ),
    "default_0": swap("lora_A.default_0.weight", "lora_B.default_0.weight"),
    "magnitude.weight": lambda key: key.replace("magnitude_vector", "magnitude_vector.weight"),
    "no text_model": lambda key: key.replace("text_model.", ""),
    "processor": lambda key: (
        swap("lora.down.weight", "lora.up.weight")(key)
        .replace("attn2.", "attn2.processor.")
        .replace("to_k.lora.", "to_k_lora.")
        .replace("to_out.0.lora.", "to_out_lora.")
        .replace("to_out.0.lora_magnitude", "to_out.lora_magnitude")
        .replace("q_proj.lora.", "to_q_lora.")
    ),
    "bare processor": lambda key: SPELLINGS["processor"](key).removeprefix("unet."),
}


@pytest.mark.parametrize("style", SPELLINGS)
def test_every_generation_of_keys(style: str, tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = [
        dora(lora(model, "unet", TO_K, 4)),
        dora(lora(model, "unet", f"{BLOCK}.attn2.to_out.0", 3)),
        lora(model, "text_encoder", Q_PROJ, 2),
    ]
    deltas.sort(key=lambda d: (d.component, d.module_path))
    write_adapter(tmp_path / "a", deltas)
    file = load_file(tmp_path / "a")
    renamed = {SPELLINGS[style](key): value for key, value in file.items()}
    assert renamed.keys() != file.keys()
    assert len(renamed) == len(file)
    save_file(renamed, tmp_path / "b")
    assert_same(read_adapter(tmp_path / "b", model), deltas)


def kohya(delta: AdapterDelta, prefix: str, **more: Tensor) -> dict[str, Tensor]:
    module = f"{prefix}{delta.module_path.replace('.', '_')}"
    ones = (1,) * (delta.a.dim() - 2)
    tensors = {
        "lora_down.weight": delta.a,
        "lora_up.weight": delta.b.reshape(*delta.b.shape, *ones),
    }
    return {f"{module}.{name}": value for name, value in (tensors | more).items()}


def test_a_file_of_kohya_by_hand(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    linear, point, conv = (lora(model, "unet", path, 4) for path in (TO_K, POINT, CONV))
    text = lora(model, "text_encoder", Q_PROJ, 2)
    bare = replace(text, module_path="text_model." + text.module_path.removeprefix("text_model."))
    scale, other = torch.rand(32) + 0.5, torch.rand(32) + 0.5
    file = {
        **kohya(linear, "lora_unet_", alpha=torch.tensor(2.0, dtype=torch.float16)),
        # LyCORIS: over the outputs, as (out, 1, 1, 1); a linear of rank r in a 1x1's place.
        **kohya(replace(point, a=point.a.flatten(1)), "lora_unet_", dora_scale=scale[:, None]),
        **kohya(conv, "lora_unet_", dora_scale=other[:, None, None, None]),
        **kohya(bare, "lora_te_", alpha=torch.tensor(1.0)),
    }
    save_file(file, tmp_path / "a")
    receipt, deltas = inspect_adapter(tmp_path / "a", model)
    assert receipt.format == "kohya"
    wanted = [
        replace(linear, scale=0.5),
        replace(point, magnitude=scale),
        replace(conv, magnitude=other),
        replace(text, scale=0.5),
    ]
    assert_same(deltas, sorted(wanted, key=lambda d: (d.component, d.module_path)))
    place = ("unet", CONV, "dora_scale")
    assert receipt.applied[f"lora_unet_{CONV.replace('.', '_')}.dora_scale"] == place


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_middle_of_a_locon_is_contracted(
    kernel: int, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    path = CONV if kernel == 3 else POINT
    whole = lora(model, "unet", path, 4)
    down, mid = torch.randn(4, 32, 1, 1), torch.randn(4, 4, kernel, kernel)
    file = kohya(replace(whole, a=down.half()), "lora_unet_", alpha=torch.tensor(2.0))
    file[f"lora_unet_{path.replace('.', '_')}.lora_mid.weight"] = mid.half()
    save_file(file, tmp_path / "a")
    receipt, (delta,) = inspect_adapter(tmp_path / "a", model)
    assert "lora_mid of 1 modules is contracted" in receipt.notes[0]
    assert delta.a.dtype == torch.float32
    assert delta.scale == 0.5
    # What the three layers do one after the other, in float64.
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    step = torch.nn.functional.conv2d(x, down.half().double())
    step = torch.nn.functional.conv2d(step, mid.half().double(), padding=kernel // 2)
    step = torch.nn.functional.conv2d(step, delta.b.double()[:, :, None, None])
    weight = (delta.b.double() @ delta.a.double().flatten(1)).reshape(delta.weight_shape)
    ours = torch.nn.functional.conv2d(x, weight, padding=kernel // 2)
    # Every element of A is rounded once to float32.
    size = torch.nn.functional.conv2d(x.abs(), weight.abs(), padding=kernel // 2).max()
    assert (ours - step).abs().max() <= 4 * torch.finfo(torch.float32).eps * size * 4
    # The same delta, written whole: the same adapter.
    write_adapter(tmp_path / "b", [delta], "kohya")
    assert digest_deltas(read_adapter(tmp_path / "b", model)) == receipt.digest


def test_all_of_kohyas_names_of_sdxls_original_layout(
    tiny_sdxl: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sdxl)
    table, targets = unet_names(model.config("unet")), Targets.of(model)
    inverse = {new: old for old, new in table.items()}
    deltas: list[AdapterDelta] = []
    file: dict[str, Tensor] = {}
    for path in sorted(targets.shapes["unet"]):
        original = translate(inverse, path)
        assert original is not None, path
        delta = lora(model, "unet", path, 1)
        deltas.append(delta)
        file |= kohya(replace(delta, module_path=original), "lora_unet_")
    for known in (
        "input_blocks_2_0_op", "input_blocks_3_1_transformer_blocks_1_attn2_to_k",
        "middle_block_1_proj_in", "output_blocks_0_0_skip_connection", "label_emb_0_0",
        "time_embed_2", "input_blocks_1_0_in_layers_2", "out_2",
    ):  # fmt: skip
        assert f"lora_unet_{known}.lora_down.weight" in file
    save_file(file, tmp_path / "a")
    assert_same(read_adapter(tmp_path / "a", model), deltas)
