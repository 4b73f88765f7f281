"""Tiny random models in diffusers layout, made once a session; tests copy what they change."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOKENS = 16
EOS_ID = 513


def pytest_configure(config: pytest.Config) -> None:
    """Run Triton kernels under the interpreter, except where tests marked gpu were asked for."""
    marks = str(config.getoption("-m", default="")).replace("not gpu", "")
    if "gpu" not in marks:
        # Before anything imports Triton, which decides when a kernel is defined.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that comes from the test's own name."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def allocations() -> Callable[[Callable[[], Any]], int]:
    """How often a call allocates a tensor's memory, as the allocator itself counts it.

    The call is made once before it is counted: what grows once and is kept does not matter.
    """
    import torch

    def count(call: Callable[[], Any]) -> int:
        activities = [torch.profiler.ProfilerActivity.CPU]
        call()
        with torch.profiler.profile(activities=activities, profile_memory=True) as found:
            call()
        return sum(event.self_cpu_memory_usage > 0 for event in found.events())

    return count


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD1 pipeline's folder, under 4 MB: 64x64 pixels, 8x8 latents. Don't change it."""
    return write_tiny_sd1(tmp_path_factory.mktemp("models") / "tiny-sd1")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL pipeline's folder, about 7 MB: two text encoders. Don't change it."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def sd1_folder(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1 model's engine, for UNet batches of 1, 2 and 4. Don't change it."""
    return build_engine(tiny_sd1, tmp_path_factory.mktemp("engines") / "sd1", "torch")


@pytest.fixture(scope="session")
def sdxl_folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL model's engine, for UNet batches of 1, 2 and 4. Don't change it."""
    return build_engine(tiny_sdxl, tmp_path_factory.mktemp("engines") / "sdxl", "torch")


@pytest.fixture(scope="session")
def sd1_onnx_folder(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd1_folder` for ONNX Runtime. Don't change it."""
    return build_engine(tiny_sd1, tmp_path_factory.mktemp("engines") / "sd1", "onnxruntime")


@pytest.fixture(scope="session")
def sdxl_onnx_folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sdxl_folder` for ONNX Runtime. Don't change it."""
    return build_engine(tiny_sdxl, tmp_path_factory.mktemp("engines") / "sdxl", "onnxruntime")


@pytest.fixture(scope="session")
def sd1_engine(sd1_folder: Path) -> Any:
    """The tiny SD1 engine, opened."""
    import heatsink

    return heatsink.load(sd1_folder, threads=1)


@pytest.fixture(scope="session")
def sdxl_engine(sdxl_folder: Path) -> Any:
    """The tiny SDXL engine, opened."""
    import heatsink

    return heatsink.load(sdxl_folder, threads=1)


@pytest.fixture(scope="session")
def sd1_onnx_engine(sd1_onnx_folder: Path) -> Any:
    """The tiny SD1 engine of ONNX Runtime, opened."""
    import heatsink

    return heatsink.load(sd1_onnx_folder, threads=1)


@pytest.fixture(scope="session")
def sdxl_onnx_engine(sdxl_onnx_folder: Path) -> Any:
    """The tiny SDXL engine of ONNX Runtime, opened."""
    import heatsink

    return heatsink.load(sdxl_onnx_folder, threads=1)


@pytest.fixture(scope="session")
def sd1_ported_folder(
    tiny_sd1: Path, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`sd1_folder` with ports for 3 adapters of rank 4. Don't change it."""
    import heatsink

    out = tmp_path_factory.mktemp("engines") / "ported"
    heatsink.build(tiny_sd1, out, batch=(1, 2, 4), adapters=(3, 4), reuse=[sd1_folder])
    return out


@pytest.fixture(scope="session")
def sd1_styles(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five LoRA files of rank 3, each on every second layer of UNet and text encoder."""
    import torch

    from heatsink.runtime.adapter_delta import AdapterDelta
    from heatsink.runtime.adapter_targets import Targets
    from heatsink.runtime.adapter_write import write_adapter
    from heatsink.runtime.model import Model

    targets, folder = Targets.of(Model.open(tiny_sd1)), tmp_path_factory.mktemp("styles")
    found = {}
    for seed, name in enumerate("ABCDE"):
        draw, deltas = torch.Generator().manual_seed(seed), []
        for component in ("text_encoder", "unet"):
            for module, shape in sorted(targets.shapes[component].items())[seed % 2 :: 2]:
                a = torch.randn(3, *shape[1:], generator=draw) / 10
                b = torch.randn(shape[0], 3, generator=draw) / 10
                deltas.append(AdapterDelta(component, module, a, b, 0.5))
        found[name] = folder / f"{name}.safetensors"
        write_adapter(found[name], deltas)
    return found


@pytest.fixture(scope="session")
def sd1_styled_engine(sd1_ported_folder: Path, sd1_styles: dict[str, Path]) -> Any:
    """The tiny engine with ports and the styles A to E."""
    import heatsink

    opened = heatsink.load(sd1_ported_folder, threads=1)
    for name, path in sd1_styles.items():
        opened.add_adapter(name, path)
    return opened


def build_engine(model: Path, out: Path, backend: str, **options: Any) -> Path:
    """Build the small engine that tests of the runtime share."""
    import heatsink

    heatsink.build(model, out, backend=backend, batch=(1, 2, 4), **options)
    return out


@pytest.fixture(scope="session")
def sd1_controlnets(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two ControlNets for the tiny SD1 model, by name. Don't change them."""
    folder = tmp_path_factory.mktemp("controlnets")
    return {
        name: write_tiny_controlnet(tiny_sd1, folder / name, seed)
        for seed, name in enumerate(("lines", "depth"))
    }


@pytest.fixture(scope="session")
def sdxl_controlnets(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ControlNet for the tiny SDXL model, by name. Don't change it."""
    folder = tmp_path_factory.mktemp("controlnets") / "lines"
    return {"lines": write_tiny_controlnet(tiny_sdxl, folder, 2)}


def write_tiny_controlnet(model: Path, folder: Path, seed: int) -> Path:
    """Write a ControlNet with random weights for a model's UNet and return its folder."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    with torch.no_grad():
        # Its last convolutions begin as zeros.
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_model(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a model folder, for tests that damage or change it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


def write_tiny_sd1(folder: Path) -> Path:
    """Write a tiny pipeline of the SD1 kind with random weights and return its folder."""
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    parts = {
        "unet": unet,
        "vae": AutoencoderKL(**_VAE, scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(_text_config(hidden_size=32, intermediate_size=64)),
        "tokenizer": _tokenizer(folder.parent / "tokenizer", "<|endoftext|>"),
        "scheduler": PNDMScheduler(**_SCHEDULE, set_alpha_to_one=False, skip_prk_steps=True),
    }
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return _save(pipeline, folder)


def write_tiny_sdxl(folder: Path) -> Path:
    """Write a tiny pipeline of the SDXL kind with random weights and return its folder."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 8),
        cross_attention_dim=32 + 48,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    second = _text_config(
        hidden_size=48, intermediate_size=96, hidden_act="gelu", projection_dim=24
    )
    parts = {
        "unet": unet,
        "vae": AutoencoderKL(**_VAE, scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(_text_config(hidden_size=32, intermediate_size=64)),
        "text_encoder_2": CLIPTextModelWithProjection(second),
        "tokenizer": _tokenizer(folder.parent / "tokenizer", "<|endoftext|>"),
        "tokenizer_2": _tokenizer(folder.parent / "tokenizer_2", "!"),
        "scheduler": EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
    }
    return _save(StableDiffusionXLPipeline(**parts, add_watermarker=False), folder)


_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _text_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **{"projection_dim": 32, **changes},
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=EOS_ID + 1,
        max_position_embeddings=TOKENS,
        bos_token_id=EOS_ID - 1,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )


def _tokenizer(folder: Path, pad_token: str) -> Any:
    """CLIP's tokenizer with no merges: a token for each byte, alone and at a word's end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token=tokens[-2],
        eos_token=tokens[-1],
        unk_token=tokens[-1],
        pad_token=pad_token,
        model_max_length=TOKENS,
    )


def _save(pipeline: Any, folder: Path) -> Path:
    import torch

    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            with torch.no_grad():
                # No two tensors may be equal (norms are all ones else): a swap of names must show.
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # CLIPTokenizer writes tokenizer.json alone in some versions; both layouts must be there.
    for tokenizer in folder.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):
            if not (tokenizer / name).exists():
                shutil.copy(folder.parent / tokenizer.name / name, tokenizer / name)
    # As in the configurations of real checkpoints: DDIM clips its predictions without it.
    config = folder / "scheduler" / "scheduler_config.json"
    fields = {**json.loads(config.read_text()), "clip_sample": False}
    config.write_text(json.dumps(fields, indent=2))
    return folder
