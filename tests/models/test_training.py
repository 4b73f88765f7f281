"""The whole training of the bundled model on a handful of made-up icons, a few steps a stage."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file

from heatsink.models import data, loop, train

pytest.importorskip("resvg_py", reason="rendering icons needs the extra `train`")

SUBGROUPS = ["food-fruit", "animal-mammal", "warning"]
COLOURS = {"flat": "red", "fluent": "green", "noto": "blue", "twemoji": "orange"}


def _archive(path: Path, members: dict[str, object]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            text = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose npm packages hold 36 emoji: a third in each subgroup, each of its own
    width.
    """
    folder = tmp_path_factory.mktemp("training")
    (folder / "npm").mkdir()
    codes = [f"1f{600 + i}" for i in range(36)]
    emoji = [
        {
            "label": f"thing {chr(97 + i % 26)}{i}",
            "hexcode": code.upper(),
            "tags": ["some", "thing"],
            "group": 4,
            "subgroup": i % 3,
            "order": i,
            "version": 1,
        }
        for i, code in enumerate(codes)
    ]
    messages = {"subgroups": [{"order": i, "key": key} for i, key in enumerate(SUBGROUPS)]}
    for key, spec in data.PACKAGES.items():
        name, version = spec.lstrip("@").replace("/", "-").rsplit("@", 1)
        path = folder / "npm" / f"{name}-{version}.tgz"
        if key == "names":
            _archive(path, {"en/data.json": emoji, "en/messages.json": messages})
            continue
        colour = COLOURS.get(key, "currentColor")
        icons = {
            f"icon-{i}": {"body": f'<rect width="{4 + i // 3}" height="16" fill="{colour}"/>'}
            for i in range(36)
        }
        chars = {} if key == "fluent" else {code: f"icon-{i}" for i, code in enumerate(codes)}
        _archive(path, {"icons.json": {"icons": icons}, "chars.json": chars})
    return folder


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heatsink.models.train.SUBJECTS", 20)
        patch.setattr("heatsink.models.diffusion.BATCH", 4)
        patch.setattr("heatsink.models.control.BATCH", 4)
        patch.setattr("heatsink.models.control.VARIANTS", 3)
        yield


@pytest.fixture(scope="module")
def trained(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder after two steps of every stage."""
    out = tmp_path_factory.mktemp("trained") / "emoji"
    train.main("all", work, out, "", 0, 2, 1)
    return out


def test_icons_line_up_over_styles_and_lie_on_white(work: Path) -> None:
    icons = data.load_or_build(work, 20)
    assert icons.pictures.shape == (36, 5, 64, 64, 3)
    assert int(icons.selected.sum()) == 20
    assert {icons.subgroups[i] for i in np.flatnonzero(icons.selected)} == {
        "food-fruit",
        "animal-mammal",
    }
    # Icon 33 is 15 of 16 units wide: its right edge is white in every style, its left in the
    # style's colour.
    expected = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 165, 0), (0, 0, 0)]
    for style, colour in enumerate(expected):
        assert tuple(icons.pictures[33, style, 32, 10]) == colour
        assert tuple(icons.pictures[33, style, 32, 63]) == (255, 255, 255)


def test_held_out_subjects_depend_on_names_alone(work: Path) -> None:
    icons = data.load_or_build(work, 20)
    first = icons.held_out("noto", 0.5)
    turned = data.Icons(
        icons.pictures[::-1],
        icons.names[::-1],
        icons.tags[::-1],
        icons.subgroups[::-1],
        icons.selected[::-1],
    )
    assert 0 < first.sum() < len(first)
    assert (turned.held_out("noto", 0.5)[::-1] == first).all()


def test_all_stages_make_a_pipeline(work: Path, trained: Path) -> None:
    out = trained
    from diffusers import ControlNetModel, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True).to(torch.float32)
    weights = [
        t
        for path in out.rglob("*.safetensors")
        for k, t in load_file(path).items()
        if not k.endswith("alpha")
    ]
    assert {t.dtype for t in weights} == {torch.float16}
    assert pipe.tokenizer.model_max_length == 24
    assert (
        pipe.tokenizer.decode(pipe.tokenizer("Xyz!").input_ids, skip_special_tokens=True) == "xyz !"
    )
    ControlNetModel.from_pretrained(out / "controlnet", local_files_only=True)
    names = {path.name for path in (out / "adapters").iterdir()}
    assert names == {f"{b}.safetensors" for b in data.BRANDS} | {"noto-kohya.safetensors"}
    picture = _draw(pipe)
    pipe.load_lora_weights(str(out / "adapters"), weight_name="noto.safetensors")
    with_lora = _draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(out / "adapters"), weight_name="noto-kohya.safetensors")
    assert (with_lora != picture).any()
    np.testing.assert_allclose(_draw(pipe), with_lora, atol=1e-4)
    # A second run finds every checkpoint complete and trains no further.
    before = (work / "unet.pt").read_bytes()
    train.main("base", work, out, "", 0, 2, 1)
    assert (work / "unet.pt").read_bytes() == before


def test_adapters_and_controlnet_are_trained_anew_on_a_finished_model(
    work: Path, trained: Path, tmp_path: Path
) -> None:
    first, second, other = trained, tmp_path / "second", tmp_path / "work"
    other.mkdir()
    shutil.copyfile(work / "icons-20.npz", other / "icons-20.npz")

    def stage(name: str, brand: str = "") -> None:
        train.main(name, other, second, brand, 0, 2, 1, first)

    stage("export")
    assert _weights(second) == _weights(first)
    stage("lora", "noto")
    stage("controlnet")
    stage("export")
    changed = {k for k, digest in _weights(first).items() if _weights(second)[k] != digest}
    assert changed == {
        "adapters/noto.safetensors",
        "adapters/noto-kohya.safetensors",
        "controlnet/diffusion_pytorch_model.safetensors",
    }
    # The same command goes on from there, also when it starts from what it wrote.
    before = (other / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes()
    train.main("controlnet", other, second, "", 0, 2, 1, second)
    assert (other / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"already holds .*unet\.pt"):
        train.main("lora", work, second, "", 0, 3, 1, first)
    for name in ("all", "base", "vae"):
        with pytest.raises(typer.BadParameter, match="--from replaces what stage"):
            train.main(name, tmp_path / "new", second, "", 0, 3, 1, first)
    assert not (tmp_path / "new").exists()


def _weights(model: Path) -> dict[str, str]:
    """A digest of the tensors in every weight file."""
    out = {}
    for path in sorted(model.rglob("*.safetensors")):
        total = hashlib.sha256()
        for key, value in sorted(load_file(path).items()):
            total.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.numpy().tobytes())
        out[str(path.relative_to(model))] = total.hexdigest()
    return out


def _draw(pipe: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("thing", num_inference_steps=2, generator=generator, output_type="np").images  # type: ignore


def test_loop_resumes_where_it_stopped(tmp_path: Path) -> None:
    seen: list[float] = []

    def run(folder: Path, steps: int, parameter: torch.nn.Parameter) -> None:
        def loss(generator: torch.Generator) -> torch.Tensor:
            draw = torch.rand((), generator=generator)
            seen.append(float(draw))
            return (parameter - draw).square().sum()

        loop.train("p", folder, {"p": parameter}, loss, steps=steps, lr=0.1)

    whole = torch.nn.Parameter(torch.zeros(3))
    run(tmp_path / "whole", 6, whole)
    draws = seen.copy()
    seen.clear()
    for steps in (3, 6):
        parts = torch.nn.Parameter(torch.zeros(3))
        run(tmp_path / "parts", steps, parts)
    # The same batches in the same order; only the learning rate's fall depends on the steps asked
    # for.
    assert seen == draws
    state = torch.load(tmp_path / "parts" / "p.pt", weights_only=True)
    assert state["step"] == 6
    assert not torch.equal(state["live"]["p"], torch.zeros(3))


def test_an_unknown_stage_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="stage must be one of"):
        train.main("everything", work, tmp_path, "", 0, 1, 1)
