"""Single-file checkpoints: every tensor comes back bit by bit under diffusers' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heatsink.runtime import ldm_names
from heatsink.runtime.components import meta_module
from heatsink.runtime.errors import ModelError, UnsafeFile
from heatsink.runtime.model import Model

# The tiny models' blocks by hand, diffusers -> original. Longer prefixes come first.
UNET_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
VAE = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.": ".mid.attn_1.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".conv_norm_out.": ".norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".resnets.": ".block.",
    "encoder.down_blocks.": "encoder.down.",
    **{f"decoder.up_blocks.{i}.": f"decoder.up.{3 - i}." for i in range(4)},
}
OPEN_CLIP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}


def replace_all(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def unet_key(name: str, kind: str) -> str:
    for new, old in UNET_BLOCKS.items():
        if name.startswith(new + "."):
            rest = name[len(new) :]
            return old + (replace_all(rest, UNET_RESNET) if "resnets" in new else rest)
    # The upsampler stands behind a residual block, and behind attention where there is some.
    assert name.startswith("up_blocks.0.upsamplers.0.conv.")
    return f"output_blocks.1.{2 if kind == 'sdxl' else 1}.conv.{name.rpartition('.')[2]}"


def original_layout(folder: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a diffusers folder under the names and shapes of the original code."""
    for name, value in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        yield f"model.diffusion_model.{unet_key(name, kind)}", value
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        linear = ".to_" in name and value.dim() == 2
        convolution = value[:, :, None, None] if linear else value
        yield f"first_stage_model.{replace_all(name, VAE)}", convolution
    prefix = "cond_stage_model." if kind == "sd1" else "conditioner.embedders.0."
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        yield f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}", value
    yield f"{prefix}transformer.text_model.embeddings.position_ids", torch.arange(16)[None]
    if kind == "sdxl":
        second = load_file(folder / "text_encoder_2/model.safetensors")
        for name, value in open_clip_layout(second):
            yield f"conditioner.embedders.1.model.{name}", value
    yield "alphas_cumprod", torch.linspace(1, 0, 10)
    yield "model_ema.decay", torch.tensor(0.99)


def open_clip_layout(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    for name, value in bare.items():
        if name == "text_projection.weight":
            yield "text_projection", value.t()
        elif ".q_proj." in name:
            three = [bare[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"]
            layer, leaf = name.split(".")[2], name.rpartition(".")[2]
            yield f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield replace_all(name, OPEN_CLIP), value
    yield "logit_scale", torch.tensor(4.6)


def write_single(folder: Path, kind: str, path: Path, **extra: Tensor) -> Path:
    tensors = {**dict(original_layout(folder, kind)), **extra}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_every_tensor_comes_back(
    kind: str, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}[kind]
    path = write_single(folder, kind, tmp_path / "model.safetensors")
    whole, model = Model.open(folder), Model.open(path, config=folder)
    assert model.kind == kind
    assert any("2 tensors that no network needs" in note for note in model.notes)
    for component in whole.components:
        expected, found = whole.weights(component), model.weights(component)
        assert set(found) == set(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
            assert found.shape(name) == tuple(found[name].shape)
        assert model.digest(component) == whole.digest(component)
    model.check()
    model.check_finite()
    assert model.tokenizer_folder(0) == folder / "tokenizer"


def test_half_precision_files_keep_their_dtype(tiny_sdxl: Path, tmp_path: Path) -> None:
    layout = original_layout(tiny_sdxl, "sdxl")
    halves = {name: value.half().contiguous() for name, value in layout}
    save_file(halves, tmp_path / "half.safetensors", metadata={"ss_network_dim": "8"})
    model = Model.open(tmp_path / "half.safetensors", config=tiny_sdxl)
    whole = Model.open(tiny_sdxl)
    for component in model.components:
        for name, value in model.weights(component).items():
            assert torch.equal(value, whole.weights(component)[name].half()), name
    assert (
        model.load_module("text_encoder_2").state_dict()["text_projection.weight"].dtype
        == torch.float16
    )


def test_plain_names_are_mapped_without_copying(tiny_sd1: Path, tmp_path: Path) -> None:
    path = write_single(tiny_sd1, "sd1", tmp_path / "model.safetensors")
    model = Model.open(path, config=tiny_sd1)
    for component in model.components:
        weights = model.weights(component)
        assert all(weights[name].data_ptr() == weights[name].data_ptr() for name in weights)
    name = "decoder.mid_block.attentions.0.to_q.weight"
    assert model.weights("vae_decoder").source(name).endswith("[1x1 convolution as linear]")


def parameters(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_standard_configurations_and_their_names(kind: str) -> None:
    """The configurations have the published sizes; diffusers' converter agrees on names."""
    from diffusers.loaders import single_file_utils

    configs = json.loads((Path(ldm_names.__file__).parent / f"configs/{kind}.json").read_text())
    unet = meta_module("unet", configs["unet"])
    assert parameters(unet) == {"sd1": 859_520_964, "sdxl": 2_567_463_684}[kind]
    vae = sum(
        parameters(meta_module(f"vae_{half}", configs["vae"])) for half in ("encoder", "decoder")
    )
    assert vae == 83_653_863
    assert parameters(meta_module("text_encoder", configs["text_encoder"])) == 123_060_480
    if kind == "sdxl":
        second = meta_module("text_encoder_2", configs["text_encoder_2"])
        assert parameters(second) == 694_659_840
    convert = single_file_utils.convert_ldm_unet_checkpoint
    assert_names(
        unet,
        ldm_names.unet_names(configs["unet"]),
        "model.diffusion_model.",
        convert,
        configs["unet"],
    )


def assert_names(
    module: torch.nn.Module,
    table: dict[str, str],
    prefix: str,
    convert: Any,
    config: dict[str, Any],
) -> None:
    inverse = {new: old for old, new in table.items()}
    originals: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        original = ldm_names.translate(inverse, name)
        assert original is not None, name
        assert ldm_names.translate(table, original) == name
        originals[prefix + original] = value
    converted = convert(dict(originals), config)
    assert {name: tuple(value.shape) for name, value in converted.items()} == {
        name: tuple(value.shape) for name, value in module.state_dict().items()
    }
    for name, value in converted.items():
        # The very same meta tensor: the converter put the same original under the same name.
        assert value is originals[prefix + str(ldm_names.translate(inverse, name))]


def test_tokenizer_from_a_folder_or_the_cache(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    path = write_single(tiny_sd1, "sd1", tmp_path / "model.safetensors")
    config = Path(shutil.copytree(tiny_sd1, tmp_path / "config"))
    shutil.rmtree(config / "tokenizer")
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(ModelError, match=r"clip-vit-large-patch14; give tokenizer=DIR"):
        Model.open(path, config=config)
    for given in (tiny_sd1, tiny_sd1 / "tokenizer"):
        model = Model.open(path, config=config, tokenizer=given)
        assert model.tokenizer_folder(0) == tiny_sd1 / "tokenizer"
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Model.open(path, config=config, tokenizer=tmp_path)
    repository = cache / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots/0123abcd"
    shutil.copytree(tiny_sd1 / "tokenizer", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    model = Model.open(path, config=config)
    assert model.tokenizer_folder(0) == snapshot
    assert model.notes[-1] == f"the tokenizer is taken from {snapshot}"


def test_bad_checkpoints_each_say_why(tiny_sd1: Path, tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", dict(original_layout(tiny_sd1, "sd1"))
    tensors = {name: value.contiguous() for name, value in tensors.items()}

    def refused(changed: dict[str, Tensor], message: str, config: Path = tiny_sd1) -> None:
        path.unlink(missing_ok=True)
        save_file(changed, path)
        with pytest.raises(ModelError, match=message):
            Model.open(path, config=config)

    refused({"lora_unet_conv_in.alpha": torch.ones(1)}, "no checkpoint of a whole")
    text = {name for name in tensors if name.startswith("cond_stage_model")}
    rest = {name: value for name, value in tensors.items() if name not in text}
    refused(rest, "no text encoder in the layout")
    second = {"cond_stage_model.model.ln_final.weight": torch.ones(2)}
    refused({**rest, **second}, r"Stable Diffusion 2\.x")
    no_vae = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model")}
    refused(no_vae, "lacks the weights of vae")
    refused({**tensors, "v_pred": torch.ones(1)}, "1 keys of no known meaning: v_pred")
    refused(tensors, "is no folder", config=tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="truncated, damaged"):
        Model.open(path, config=tiny_sd1)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(UnsafeFile, match="pickle or zip"):
        Model.open(path, config=tiny_sd1)


def test_a_checkpoint_of_another_shape_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    path = write_single(tiny_sd1, "sd1", tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"40 keys of no known meaning: .* needs config=FOLDER"):
        Model.open(path, tokenizer=tiny_sd1)


def test_a_missing_tensor_is_named(tiny_sd1: Path, tmp_path: Path) -> None:
    tensors = dict(original_layout(tiny_sd1, "sd1"))
    del tensors["model.diffusion_model.out.2.bias"]
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    with pytest.raises(ModelError, match=r"1 missing: conv_out\.bias"):
        Model.open(path, config=tiny_sd1).check()
