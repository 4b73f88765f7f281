"""Fixtures of the tests that build engines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from heatsink.export import components
from heatsink.export.build import Options, build
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.model import Model


@pytest.fixture(scope="session")
def ported(tiny_sd1: Path, sd1_onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1 engine with ports for 3 adapters of rank 4. Don't change it."""
    out = tmp_path_factory.mktemp("ported") / "engine"
    options = Options(backend="onnxruntime", batch=(1, 2, 4), adapters=(3, 4))
    report = build(tiny_sd1, out, options, reuse=[sd1_onnx_folder])
    assert report.reused == ["vae_decoder", "vae_encoder"]
    assert report.notes == []
    return out


@pytest.fixture(scope="session")
def targets(tiny_sd1: Path) -> Targets:
    """The modules of the tiny SD1 model."""
    return Targets.of(Model.open(tiny_sd1))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder: what is left in it after a failure is what was left behind."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def old(sd1_onnx_folder: Path, place: Path) -> Path:
    """An engine that stands where another one is to be built."""
    return Path(shutil.copytree(sd1_onnx_folder, place / "engine"))


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a component, which should have been taken over, fails with its name."""

    def refuse(model: Any, plan: Any, *rest: Any) -> Any:
        raise AssertionError(plan.name)

    monkeypatch.setattr(components, "build", refuse)
