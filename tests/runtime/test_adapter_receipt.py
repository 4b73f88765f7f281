"""The receipt: every key applied, refused with its reason, or ignored as the caller said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heatsink.runtime.adapter_family import family_of
from heatsink.runtime.adapter_file import (
    AdapterDelta,
    Targets,
    digest_deltas,
    inspect_adapter,
    read_adapter,
    write_adapter,
)
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import AdapterError, InvalidRequest
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
K = f"unet.{BLOCK}.attn2.to_k"
A, B = f"{K}.lora_A.weight", f"{K}.lora_B.weight"


def lora(model: Model, component: str, path: str, rank: int) -> AdapterDelta:
    shape = model.weights(component).shape(f"{path}.weight")
    return AdapterDelta(component, path, torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank))


def two_modules(model: Model) -> list[AdapterDelta]:
    return [
        lora(model, "unet", f"{BLOCK}.attn2.to_k", 4),
        lora(model, "unet", f"{BLOCK}.attn2.to_v", 2),
    ]


def test_the_receipt_of_a_good_file(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    write_adapter(tmp_path / "a", two_modules(model))
    receipt, deltas = inspect_adapter(tmp_path / "a", model)
    assert receipt.accepted
    assert receipt.keys == 4
    values = json.loads(json.dumps(receipt.as_dict()))
    v = f"unet.{BLOCK}.attn2.to_v"
    assert values == {
        "path": str(tmp_path / "a"),
        "sha256": sha256_file(tmp_path / "a"),
        "format": "diffusers",
        "accepted": True,
        "digest": digest_deltas(deltas),
        "dtypes": ["float32"],
        "ranks": [2, 4],
        "applied": {
            A: ["unet", f"{BLOCK}.attn2.to_k", "down"],
            B: ["unet", f"{BLOCK}.attn2.to_k", "up"],
            f"{v}.lora_A.weight": ["unet", f"{BLOCK}.attn2.to_v", "down"],
            f"{v}.lora_B.weight": ["unet", f"{BLOCK}.attn2.to_v", "up"],
        },
        "refused": {},
        "ignored": [],
        "notes": [],
    }


def damaged(model: Model, path: Path, **more: Tensor) -> None:
    """A file of two modules with a NaN in one of them, and other keys."""
    write_adapter(path, two_modules(model))
    file = load_file(path)
    file[A][0, 0] = float("nan")
    save_file({**file, **{key.replace("__", "."): value for key, value in more.items()}}, path)


def test_the_receipt_of_a_refused_file(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    damaged(model, tmp_path / "a", emb_params=torch.ones(1), unet__x__alpha=torch.ones(1))
    receipt, deltas = inspect_adapter(tmp_path / "a", model)
    assert deltas == []
    assert not receipt.accepted
    assert receipt.digest is None
    assert {key: why.split(":")[0] for key, why in receipt.refused.items()} == {
        A: "non-finite",
        B: "non-finite",
        "emb_params": "unsupported",
        "unet.x.alpha": "unknown target",
    }
    # What would fit is listed, too; every key is in exactly one place.
    assert {place[1] for place in receipt.applied.values()} == {f"{BLOCK}.attn2.to_v"}
    assert receipt.keys == 6
    with pytest.raises(AdapterError, match="4 of 6 keys can't be applied, so none is") as caught:
        read_adapter(tmp_path / "a", model)
    assert caught.value.refused == receipt.refused


def test_what_the_caller_ignores(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    path = tmp_path / "a"
    damaged(model, path, emb_params=torch.ones(1), unet__x__alpha=torch.ones(1))
    ignore = [f"{K}.*", "emb_params", "unet.x.*"]
    receipt, deltas = inspect_adapter(path, model, ignore=ignore)
    assert [d.module_path for d in deltas] == [f"{BLOCK}.attn2.to_v"]
    assert receipt.ignored == tuple(sorted([A, B, "emb_params", "unet.x.alpha"]))
    assert receipt.refused == {}
    assert [d.module_path for d in read_adapter(path, model, ignore=ignore)] == [
        f"{BLOCK}.attn2.to_v"
    ]
    # Fewer than the faults: refused all the same, and whole.
    with pytest.raises(AdapterError, match="1 of 6 keys"):
        read_adapter(path, model, ignore=ignore[:2])
    with pytest.raises(InvalidRequest, match="ignore: 'lora_te_\\*' matches no key of"):
        read_adapter(path, model, ignore=[*ignore, "lora_te_*"])
    with pytest.raises(InvalidRequest, match="expected a list of keys or patterns"):
        read_adapter(path, model, ignore="unet.*")


def test_a_module_is_not_ignored_in_part(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    path = tmp_path / "a"
    write_adapter(path, two_modules(model), "kohya", alpha=1.0)
    with pytest.raises(AdapterError, match=r"incomplete: lora_unet_\w+_to_k.alpha of the same"):
        read_adapter(path, model, ignore=["*_to_k.alpha"])
    with pytest.raises(AdapterError, match=r"incomplete: \w+_to_k.lora_down.weight of the same"):
        read_adapter(path, model, ignore=["*_to_k.lora_down.weight"])
    # One of two spellings of the same tensor may go.
    write_adapter(path, two_modules(model))
    file = load_file(path)
    save_file({**file, f"{K}.lora_down.weight": file[A] + 1}, path)
    with pytest.raises(AdapterError, match="contradiction: the same target as"):
        read_adapter(path, model)
    deltas = read_adapter(path, model, ignore=[f"{K}.lora_down.weight"])
    assert torch.equal(deltas[0].a, file[A])


def test_without_a_model_nothing_is_judged_but_the_file(
    tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    path = tmp_path / "a"
    deltas = [*two_modules(model)]
    write_adapter(path, deltas, "kohya", alpha=1.0)
    receipt, found = inspect_adapter(path)
    assert "not judged" in receipt.notes[0]
    assert receipt.digest is None
    assert receipt.accepted
    assert [d.module_path for d in found] == [d.module_path.replace(".", "_") for d in deltas]
    assert [d.scale for d in found] == [1 / 4, 1 / 2]
    write_adapter(path, deltas)
    assert [d.module_path for d in inspect_adapter(path)[1]] == [d.module_path for d in deltas]
    damaged(model, path)
    receipt, found = inspect_adapter(path)
    assert found == []
    assert set(receipt.refused) == {A, B}


def test_targets_are_written_and_read(tiny_sdxl: Path, tmp_path: Path, seed: int) -> None:
    """An adapter is read by an engine's table as by the model it was built of."""
    torch.manual_seed(seed)
    model = Model.open(tiny_sdxl)
    table = json.loads(json.dumps(Targets.of(model).as_dict()))
    targets = Targets.from_dict(table)
    assert targets == Targets.of(model)
    block = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k"
    encoder = next(p for p in targets.shapes["text_encoder_2"] if p.endswith("q_proj"))
    deltas = [lora(model, "text_encoder_2", encoder, 2), lora(model, "unet", block, 2)]
    for format in ("diffusers", "kohya"):
        write_adapter(tmp_path / format, deltas, format)
        read = read_adapter(tmp_path / format, targets)
        assert digest_deltas(read) == digest_deltas(deltas)
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "b")
    with pytest.raises(AdapterError, match="unknown target: unet has no linear or convolution x"):
        read_adapter(tmp_path / "b", targets)


def pair(module: str, inputs: int = 32, outputs: int = 32) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": torch.ones(2, inputs),
        f"{module}.lora_up.weight": torch.ones(outputs, 2),
    }


SDXL_NAME = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
SD1_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FOREIGN: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "sdxl by its names": ("sd1", pair(SDXL_NAME), "for SDXL, the model is Stable Diffusion 1.x"),
    "sdxl by its width": (
        "sd1", pair(SD1_NAME, 2048), "for SDXL, the model is Stable Diffusion 1.x",
    ),
    "sdxl's second encoder": (
        "sd1", pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        "for SDXL, the model is Stable Diffusion 1.x",
    ),
    "sd1 by its names": ("sdxl", pair(SD1_NAME), "for Stable Diffusion 1.x, the model is SDXL"),
    "sd1 by its width": (
        "sdxl", pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v", 768),
        "for Stable Diffusion 1.x, the model is SDXL",
    ),
    "sd2": ("sd1", pair(SD1_NAME, 1024), "for Stable Diffusion 2.x, the model is"),
    "flux of diffusers": (
        "sd1", pair("transformer.single_transformer_blocks.0.attn.to_q"), "for Flux, the model",
    ),
    "flux of kohya": ("sdxl", pair("lora_unet_double_blocks_0_img_attn_qkv"), "for Flux, the"),
    "flux's double blocks": (
        "sd1", pair("transformer.transformer_blocks.0.attn.add_q_proj", 3072), "for Flux, the",
    ),
    "sd3 of diffusers": (
        "sd1", pair("transformer.transformer_blocks.0.attn.add_q_proj", 1536), "for SD3, the",
    ),
    "sd3 of kohya": ("sd1", pair("lora_unet_joint_blocks_0_x_block_attn_qkv"), "for SD3, the"),
    "another transformer": (
        "sdxl", pair("transformer.blocks.0.attn.to_q"), "for a diffusion transformer, the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_another_architectures_file_is_called_by_its_name(
    case: str, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    kind, file, message = FOREIGN[case]
    model = Model.open({"sd1": tiny_sd1, "sdxl": tiny_sdxl}[kind])
    save_file(file, tmp_path / "a")
    receipt, _ = inspect_adapter(tmp_path / "a", model)
    assert set(receipt.refused) == set(file)
    for reason in receipt.refused.values():
        assert reason.startswith("another architecture: the file is ")
        assert message in reason


def test_a_models_own_names_are_not_another_architectures(
    tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    for folder in (tiny_sd1, tiny_sdxl):
        model = Model.open(folder)
        names = {f"unet.{p}.lora_A.weight": s for p, s in Targets.of(model).shapes["unet"].items()}
        assert family_of(names) == model.kind
        save_file(pair("unet.conv_in"), tmp_path / "a")
        refused = inspect_adapter(tmp_path / "a", model)[0].refused
        assert {why.split(":")[0] for why in refused.values()} == {"wrong shape"}


@pytest.mark.parametrize("names", [pair("lora_unet_x"), pair("unet.conv_in")])
def test_what_tells_nothing_is_of_no_family(names: dict[str, Any]) -> None:
    assert family_of({key: tuple(value.shape) for key, value in names.items()}) is None
