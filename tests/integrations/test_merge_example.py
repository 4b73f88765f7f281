"""The example of docs/merge.md, as it stands there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import write_adapter

PAGE = Path(__file__).parents[2] / "docs" / "merge.md"


def test_the_example_runs(
    sd1: Any,
    deltas_for: Callable[..., list[AdapterDelta]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    example = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for name in ("noto", "twemoji"):
        write_adapter(f"{name}.safetensors", deltas_for(sd1))
    before = {name: value.clone() for name, value in sd1.unet.state_dict().items()}
    torch.manual_seed(seed)
    found: dict[str, Any] = {"pipe": sd1}
    exec(example, found)
    torch.manual_seed(seed)
    base = sd1("a red apple", num_inference_steps=4).images
    batch = sd1(["a red apple"] * 3, num_inference_steps=4).images
    assert not np.array_equal(base[0], found["together"][0])
    same = [np.array_equal(a, b) for a, b in zip(batch, found["three"], strict=True)]
    # The same noise, in the same order: the prompt without an adapter is the base model's image.
    assert same == [False, False, True]
    assert all(torch.equal(sd1.unet.state_dict()[name], value) for name, value in before.items())
