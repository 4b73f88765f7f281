"""Engines with ControlNets: what is built, taken over, vouched for and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heatsink.export import components, exactness
from heatsink.export.build import Options, build
from heatsink.export.manifest import TensorSpec, read_manifest
from heatsink.export.opening import describe
from heatsink.runtime.errors import InvalidRequest, ModelError
from heatsink.runtime.graph.denoisers import residual_names

NAMES = ["text_encoder", "unet", "vae_decoder", "vae_encoder", "controlnet_lines"]


@pytest.fixture(scope="module")
def folder(
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    sd1_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny SD1 engine with a ControlNet."""
    out = tmp_path_factory.mktemp("controlled") / "engine"
    nets = {"lines": sd1_controlnets["lines"]}
    options = Options(backend="torch", batch=(1, 2, 2), controlnets=nets)
    report = build(tiny_sd1, out, options, reuse=[sd1_folder])
    # The UNet has other inputs than without.
    assert "unet" in report.built
    assert "controlnet_lines" in report.built
    return out


def test_the_manifest_says_what_it_takes(folder: Path, sd1_folder: Path) -> None:
    manifest = read_manifest(folder)
    assert set(manifest.components) == set(NAMES)
    assert manifest.ports.controlnet
    assert not read_manifest(sd1_folder).ports.controlnet
    residuals = residual_names(4)
    unet, net = manifest.components["unet"], manifest.components["controlnet_lines"]
    assert [spec.name for spec in net.outputs] == list(residuals)
    shapes = {spec.name: spec.shape for spec in unet.inputs}
    assert {spec.name: spec.shape for spec in net.outputs} == {n: shapes[n] for n in residuals}
    assert {spec.name: (spec.dtype, spec.shape[1:]) for spec in net.inputs} == {
        "sample": ("float32", [4, 8, 8]),
        "timestep": ("float32", []),
        "encoder_hidden_states": ("float32", [16, 32]),
        "controlnet_cond": ("float32", [3, 64, 64]),
        "conditioning_scale": ("float32", []),
    }
    # Both have a known answer in every batch size, and error that rounding explains.
    for name in ("unet", "controlnet_lines"):
        known = manifest.exactness.components[name]
        assert (known.buckets, known.refused, len(known.answers)) == ([1, 2], [], 2)
        assert len(set(known.answers)) == 2
        assert manifest.components[name].parity.max_abs > 0
    spec = describe(folder, manifest)
    assert spec.controlnets == ["lines"]
    assert list(spec.residuals) == list(residuals)
    assert spec.residuals["mid_residual"] == (64, 4, 4)
    assert not spec.inpainting


def test_another_controlnet_leaves_the_rest(
    tiny_sd1: Path,
    sd1_controlnets: dict[str, Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []

    def note(model: Any, plan: Any, *rest: Any) -> Any:
        built.append(plan.name)
        raise LookupError

    monkeypatch.setattr(components, "build", note)
    options = Options(
        backend="torch", batch=(1, 2, 2), controlnets={"lines": sd1_controlnets["depth"]}
    )
    with pytest.raises(LookupError):
        build(tiny_sd1, tmp_path / "engine", options, reuse=[folder])
    assert built == ["controlnet_lines"]


def test_the_probe_has_rows_with_and_without() -> None:
    shapes: dict[str, list[int | str]] = {
        "controlnet_cond": ["batch", 3, 4, 4],
        "conditioning_scale": ["batch"],
        "down_residual_0": ["batch", 2, 3],
        "mid_residual": ["batch", 2],
    }
    specs = [TensorSpec(name=n, dtype="float32", shape=s) for n, s in shapes.items()]
    few, many = exactness.probe(specs, 2, 1), exactness.probe(specs, 4, 1)
    for name, values in many.items():
        assert values.dtype == np.float32
        assert np.array_equal(values[:2], few[name])
    for name in ("controlnet_cond", "conditioning_scale"):
        assert many[name].min() >= 0
        assert many[name].max() < 1
        assert len(np.unique(many[name])) > 3
    for name in ("down_residual_0", "mid_residual"):
        assert not many[name][1::2].any()
        assert np.signbit(many[name][1::2]).all()
        assert many[name][::2].all()


@pytest.mark.parametrize(
    ("nets", "kind", "message"),
    [
        ({"Lines": Path("x")}, InvalidRequest, "controlnet: expected a name of up to 40 of"),
        ({"lines": Path("nowhere")}, ModelError, "controlnet 'lines': there is no folder nowhere"),
    ],
)
def test_what_can_t_be_built_is_refused(
    tiny_sd1: Path, tmp_path: Path, nets: dict[str, Path], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        build(tiny_sd1, tmp_path / "engine", Options(backend="torch", controlnets=nets))
    assert list(tmp_path.iterdir()) == []
