"""An engine built in another process, byte by byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from heatsink.export.manifest import read_manifest


@pytest.mark.slow
def test_another_process_builds_the_same_bytes(
    tiny_sd1: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-P", "-m", "heatsink.cli", "build", str(tiny_sd1), "-o", "engine",
        "--batch", "1:2:4", "-q",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    digest = read_manifest(sd1_folder).digest
    assert done.stdout == f"engine  engine {digest}\n"
    # Nothing of the libraries' own.
    assert done.stderr.split(";")[0] == "built text_encoder, unet, vae_decoder, vae_encoder"
    for path in sorted(sd1_folder.rglob("*")):
        if path.is_file():
            other = tmp_path / "engine" / path.relative_to(sd1_folder)
            assert other.read_bytes() == path.read_bytes(), path.name
