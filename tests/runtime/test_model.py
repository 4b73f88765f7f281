"""Opening a model: what is read equals the files, modules equal diffusers', bad folders say why."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heatsink.runtime.errors import CallerError, ModelError, NumericError, UnsafeFile
from heatsink.runtime.model import Model

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
Copy = Callable[[Path], Path]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    """Replace a safetensors file's tensors by `change` of them (the old one may be mapped)."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens_both_kinds(tiny_sd1: Path, tiny_sdxl: Path) -> None:
    small, large = Model.open(tiny_sd1), Model.open(str(tiny_sdxl))
    assert (small.kind, large.kind) == ("sd1", "sdxl")
    assert small.components == ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    assert large.components == (
        "text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder",
    )  # fmt: skip
    assert small.config("vae_decoder")["scaling_factor"] == 0.18215
    assert large.settings["force_zeros_for_empty_prompt"] is True
    assert large.scheduler_config["_class_name"] == "EulerDiscreteScheduler"
    assert [large.tokenizer_folder(i).name for i in range(2)] == ["tokenizer", "tokenizer_2"]
    assert small.tokenizer_count == 1
    with pytest.raises(CallerError, match="1 tokenizers"):
        small.tokenizer_folder(1)
    with pytest.raises(CallerError, match="no component 'text_encoder_2'"):
        small.weights("text_encoder_2")


def test_weights_are_the_files_bits(tiny_sd1: Path) -> None:
    stored = load_file(tiny_sd1 / UNET)
    weights = Model.open(tiny_sd1).weights("unet")
    assert set(weights) == set(stored)
    for name, value in stored.items():
        assert weights.shape(name) == tuple(value.shape)
        assert weights.dtype(name) == value.dtype
        assert torch.equal(weights[name], value), name
    assert weights.nbytes == sum(v.numel() * 4 for v in stored.values())
    assert weights.source("conv_in.bias") == f"{UNET}:conv_in.bias"


def test_weights_are_mapped_not_copied(tiny_sd1: Path) -> None:
    model = Model.open(tiny_sd1)
    weights, module = model.weights("unet"), model.load_module("unet")
    pointers = {name: weights[name].data_ptr() for name in weights}
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == pointers[name], name
        assert not parameter.requires_grad


def test_the_vaes_halves_are_disjoint_and_whole(tiny_sd1: Path) -> None:
    model = Model.open(tiny_sd1)
    decoder, encoder = (set(model.weights(f"vae_{half}")) for half in ("decoder", "encoder"))
    assert not decoder & encoder
    assert decoder | encoder == set(load_file(tiny_sd1 / VAE))
    assert {"post_quant_conv.weight", "decoder.conv_in.weight"} <= decoder


def test_modules_are_on_meta_and_buffers_are_true(tiny_sdxl: Path) -> None:
    model = Model.open(tiny_sdxl)
    for component in model.components:
        module = model.module(component)
        assert not module.training
        assert set(module.state_dict()) == set(model.weights(component))
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    buffers = model.buffers("text_encoder_2")
    assert list(buffers) == ["text_model.embeddings.position_ids"]
    assert buffers["text_model.embeddings.position_ids"].tolist() == [list(range(16))]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_loaded_modules_compute_what_diffusers_does(
    kind: str, tiny_sd1: Path, tiny_sdxl: Path, seed: int
) -> None:
    from diffusers import DiffusionPipeline

    folder = {"sd1": tiny_sd1, "sdxl": tiny_sdxl}[kind]
    pipe, model = DiffusionPipeline.from_pretrained(folder), Model.open(folder)
    torch.manual_seed(seed)
    ids = torch.randint(0, 500, (2, 16))
    latents, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for component in model.components[:-3]:
            ours = model.load_module(component)(ids).last_hidden_state
            assert torch.equal(ours, getattr(pipe, component)(ids).last_hidden_state)
        hidden = torch.randn(2, 16, pipe.unet.config.cross_attention_dim)
        added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.rand(2, 6)}
        extra = {"added_cond_kwargs": added} if kind == "sdxl" else {}
        ours = model.load_module("unet")(latents, 7, hidden, **extra).sample
        assert torch.equal(ours, pipe.unet(latents, 7, hidden, **extra).sample)
        vae: Any = model.load_module("vae_decoder")
        ours = vae.decode(latents).sample
        assert torch.equal(ours, pipe.vae.decode(latents).sample)
        vae = model.load_module("vae_encoder")
        ours = vae.encode(image).latent_dist.mean
        assert torch.equal(ours, pipe.vae.encode(image).latent_dist.mean)


def test_load_module_converts_once(tiny_sd1: Path) -> None:
    model = Model.open(tiny_sd1)
    module = model.load_module("text_encoder", torch.float16)
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    name, parameter = next(iter(module.named_parameters()))
    assert torch.equal(parameter, model.weights("text_encoder")[name].half())


def test_sharded_files_read_as_one(tiny_sd1: Path, copy_model: Copy) -> None:
    from diffusers import UNet2DConditionModel

    folder = copy_model(tiny_sd1)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    (folder / UNET).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    whole, cut = Model.open(tiny_sd1), Model.open(folder)
    assert all(torch.equal(whole.weights("unet")[n], v) for n, v in cut.weights("unet").items())
    assert cut.digest("unet") == whole.digest("unet")
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**table, "conv_in.bias": "../../secret.safetensors"})
    with pytest.raises(ModelError, match="file beside it"):
        Model.open(folder)
    edit_json(index, weight_map={**table, "nowhere.bias": table["conv_in.bias"]})
    with pytest.raises(ModelError, match=r"its shards lack: nowhere\.bias"):
        Model.open(folder)
    edit_json(index, weight_map={})
    with pytest.raises(ModelError, match="no weight_map"):
        Model.open(folder)


def test_variant_files(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)
    assert Model.open(folder).notes == ()
    halves = {name: value.half() for name, value in load_file(tiny_sd1 / UNET).items()}
    save_file(halves, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert Model.open(folder).weights("unet").dtype("conv_in.bias") == torch.float32
    with pytest.raises(ModelError, match=r"text_encoder holds no model\.fp16\.safetensors"):
        Model.open(folder, variant="fp16")
    (folder / UNET).unlink()
    model = Model.open(folder)
    assert model.notes == ("unet has no plain weights: its fp16 variant is used",)
    assert torch.equal(model.weights("unet")["conv_in.bias"], halves["conv_in.bias"])
    save_file(halves, folder / "unet/diffusion_pytorch_model.ema.safetensors")
    assert "fp16" in Model.open(folder).notes[0]
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.int8.safetensors"
    )
    with pytest.raises(ModelError, match=r"several variants: give variant= one of .*ema.*int8"):
        Model.open(folder)


def test_text_encoders_load_with_and_without_prefix(tiny_sdxl: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sdxl)
    plain = Model.open(tiny_sdxl)
    for component in ("text_encoder", "text_encoder_2"):
        before = dict(plain.weights(component))
        for prefix in ("", "text_model."):

            def rename(tensors: dict[str, torch.Tensor], prefix: str = prefix) -> dict[str, Any]:
                bare = {n.removeprefix("text_model."): v for n, v in tensors.items()}
                kept = {n: v for n, v in bare.items() if n.startswith("text_projection")}
                ids = {f"{prefix}embeddings.position_ids": torch.arange(16)[None]}
                return {f"{prefix}{n}": v for n, v in bare.items() if n not in kept} | kept | ids

            rewrite(folder / component / "model.safetensors", rename)
            model = Model.open(folder)
            after = model.weights(component)
            assert set(after) == set(before)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert model.digest(component) == plain.digest(component)
            model.module(component)


def test_old_vae_attention_names(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, name in old.items():
            tensors = {
                k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                for k, v in tensors.items()
            }
        return tensors

    rewrite(folder / VAE, rename)
    plain, model = Model.open(tiny_sd1), Model.open(folder)
    assert sum("query" in name for name in load_file(folder / VAE)) == 4
    for component in ("vae_decoder", "vae_encoder"):
        model.module(component)
        before = plain.weights(component)
        assert all(torch.equal(v, before[n]) for n, v in model.weights(component).items())


def test_digest_depends_on_values_names_and_configuration(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)
    first = Model.open(tiny_sd1).digest("unet")
    assert len(first) == 64
    edit_json(folder / "unet/config.json", _diffusers_version="0.1.0", _name_or_path="elsewhere")
    rewrite(folder / UNET, lambda t: dict(reversed(t.items())))
    assert Model.open(folder).digest("unet") == first
    rewrite(folder / UNET, lambda t: {**t, "conv_in.bias": t["conv_in.bias"] + 1})
    second = Model.open(folder).digest("unet")
    rewrite(folder / UNET, lambda t: {**t, "conv_in.bias": t["conv_in.bias"].half()})
    third = Model.open(folder).digest("unet")
    edit_json(folder / "unet/config.json", norm_num_groups=4)
    assert len({first, second, third, Model.open(folder).digest("unet")}) == 4


def test_progress_ends_at_the_total(tiny_sd1: Path) -> None:
    model = Model.open(tiny_sd1)
    total = sum(model.weights(component).nbytes for component in model.components)
    calls: list[tuple[int, int]] = []
    model.check_finite(lambda done, all_: calls.append((done, all_)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)
    calls.clear()
    model.digest("unet", lambda done, all_: calls.append((done, all_)))
    assert calls[-1] == (model.weights("unet").nbytes,) * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_names_the_tensor(tiny_sd1: Path, copy_model: Copy, value: float) -> None:
    folder = copy_model(tiny_sd1)

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["decoder.conv_in.weight"][0, 1, 2, 0:2] = value
        return tensors

    rewrite(folder / VAE, damage)
    with pytest.raises(NumericError, match=r"vae_decoder.*decoder\.conv_in\.weight holds 2 values"):
        Model.open(folder).check_finite()


def test_missing_unexpected_and_misshapen_keys_are_listed(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["conv_in.bias"]
        return {**tensors, "extra.weight": torch.zeros(3), "conv_out.bias": torch.zeros(5)}

    rewrite(folder / UNET, damage)
    with pytest.raises(ModelError) as caught:
        Model.open(folder).check()
    message = str(caught.value)
    assert "1 missing: conv_in.bias" in message
    assert f"1 unexpected: extra.weight ({UNET}:extra.weight)" in message
    assert "1 of another shape: conv_out.bias (5,) instead of (4,)" in message


def test_ignored_parts_are_told(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    extractor = ["transformers", "CLIPImageProcessor"]
    edit_json(folder / "model_index.json", safety_checker=checker, feature_extractor=extractor)
    (note,) = Model.open(folder).notes
    assert "safety_checker and feature_extractor" in note


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), ModelError, "no model_index.json"),
    "broken index": (
        lambda f: (f / "model_index.json").write_text("{"), ModelError, "not readable as JSON",
    ),
    "list index": (
        lambda f: (f / "model_index.json").write_text("[]"), ModelError, "expected an object",
    ),
    "other pipeline": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        ModelError, "holds a FluxPipeline.*supported: StableDiffusionPipeline",
    ),
    "null component": (
        lambda f: edit_json(f / "model_index.json", vae=[None, None]), ModelError, "names no vae",
    ),
    "other class": (
        lambda f: edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        ModelError, "vae is a AutoencoderTiny, expected AutoencoderKL",
    ),
    "no folder": (lambda f: (f / "vae").rename(f / "va"), ModelError, "component vae is missing"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), ModelError, "lacks config.json"),
    "no weights": (lambda f: (f / UNET).unlink(), ModelError, "holds no weights"),
    "no tokenizer": (
        lambda f: (f / "tokenizer").rename(f / "words"), ModelError, "holds no tokenizer",
    ),
    "no scheduler": (
        lambda f: (f / "scheduler").rename(f / "plan"), ModelError, "lacks scheduler_config.json",
    ),
    "truncated": (lambda f: truncate(f / TEXT), ModelError, "truncated, damaged or no safetensors"),
    "empty": (lambda f: (f / TEXT).write_bytes(b""), ModelError, r"\(0 bytes\) is truncated"),
    "renamed zip": (
        lambda f: torch.save({"a": torch.ones(2)}, f / UNET), UnsafeFile, "holds a pickle or zip",
    ),
    "renamed pickle": (
        lambda f: (f / UNET).write_bytes(pickle.dumps({"a": [1] * 50})),
        UnsafeFile, "holds a pickle or zip",
    ),
    "pickle only": (
        lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"),
        UnsafeFile, "only pickled weights .*diffusion_pytorch_model.bin",
    ),
    "editing": (
        lambda f: edit_json(f / "unet/config.json", in_channels=8), ModelError, "editing models",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_each_say_why(case: str, tiny_sd1: Path, copy_model: Copy) -> None:
    damage, kind, message = BAD[case]
    folder = copy_model(tiny_sd1)
    damage(folder)
    with pytest.raises(kind, match=message):
        Model.open(folder)


def test_configurations_of_another_class_are_refused(tiny_sd1: Path, copy_model: Copy) -> None:
    folder = copy_model(tiny_sd1)
    edit_json(folder / "unet/config.json", _class_name="UNet3DConditionModel")
    edit_json(folder / "vae/config.json", up_block_types=["NoBlock"] * 4)
    model = Model.open(folder)
    with pytest.raises(ModelError, match="unet's configuration is of a UNet3DConditionModel"):
        model.module("unet")
    with pytest.raises(ModelError, match=r"vae_decoder's configuration can't be built.*NoBlock"):
        model.module("vae_decoder")


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model folder or file .*nowhere"):
        Model.open(tmp_path / "nowhere")
    for name in ("model.ckpt", "model.bin"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(UnsafeFile, match="is a pickle"):
            Model.open(tmp_path / name)
    (tmp_path / "model.onnx").write_bytes(b"anything")
    with pytest.raises(ModelError, match="neither a model folder nor"):
        Model.open(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="for single files"):
        Model.open(tmp_path, tokenizer=tmp_path)


def test_a_safetensors_header_that_looks_like_a_pickle_loads(tmp_path: Path) -> None:
    from heatsink.runtime.weights import open_safetensors

    # A header of 0x280 bytes makes the file begin with pickle's own 0x80 0x02.
    path, value = tmp_path / "a.safetensors", torch.arange(4.0)
    for padding in range(700):
        save_file({"a": value}, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no padding gave the header length")
    assert torch.equal(open_safetensors(path)[0]["a"].read(), value)
