"""What a measurement says it was made on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heatsink.benchmarks import environment


def test_the_report_names_machine_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = environment.environment()
    assert report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert set(report["importable"]) | set(report["left_out"]) == set(environment.LIBRARIES)
    assert report["importable"]["numpy"].count(".") >= 2


def test_why_a_library_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_for_another.py").write_text("raise OSError('libcudart.so.11:\\nno such')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert environment.why_not("built_for_another") == "OSError: libcudart.so.11: no such"
    assert environment.why_not("no_such_module").startswith("ModuleNotFoundError: No module named")
    assert environment.why_not("json") == ""


def test_a_device_is_a_folders_name() -> None:
    assert environment.folder_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_driver_and_compiler_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert environment.driver() == "absent"
    assert environment.compiler() == "absent"
    for name, text in (("nvidia-smi", "echo 580.65.06; echo 580.65.06"), ("clang", "")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    assert environment.driver() == "580.65.06"
    assert environment.compiler() == "clang"
