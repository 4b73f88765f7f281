"""Fixtures of the tests that build engines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from heatsink.export import components


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder: what is left in it after a failure is what was left behind."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def old(sd1_folder: Path, place: Path) -> Path:
    """An engine that stands where another one is to be built."""
    return Path(shutil.copytree(sd1_folder, place / "engine"))


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a component, which should have been taken over, fails with its name."""

    def refuse(model: Any, plan: Any, *rest: Any) -> Any:
        raise AssertionError(plan.name)

    monkeypatch.setattr(components, "build", refuse)
