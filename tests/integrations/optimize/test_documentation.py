"""The examples of docs/integrations.md run as they stand there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heatsink.integrations import dynamo
from heatsink.integrations.replacement import Replacement

PAGE = Path(__file__).resolve().parents[3] / "docs" / "integrations.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)


def run(example: str, **given: Any) -> dict[str, Any]:
    """What the example's names hold afterwards."""
    exec(compile(example, str(PAGE), "exec"), given)
    return given


def test_there_is_a_test_for_each() -> None:
    assert len(EXAMPLES) == 3


def test_a_pipeline(make_sd1: Callable[[], Any]) -> None:
    pipe = make_sd1()
    plain = pipe(
        "a red apple", num_inference_steps=4, generator=torch.Generator().manual_seed(1)
    ).images
    found = run(EXAMPLES[0], pipe=pipe, generator=torch.Generator().manual_seed(1))
    assert set(found["done"].replaced) == {"text_encoder", "unet", "vae"}
    assert not isinstance(pipe.unet, Replacement)
    left, right = (np.asarray(images[0], dtype=np.int16) for images in (plain, found["images"]))
    # A level of 8 bits may round the other way.
    assert np.abs(left - right).max() <= 1


def test_torch_compile() -> None:
    if "heatsink" not in torch._dynamo.list_backends(exclude_tags=()):
        # As the entry point does where the package is installed.
        torch._dynamo.register_backend(dynamo.backend, name="heatsink")
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU())
    latents = torch.randn(2, 3)
    found = run(EXAMPLES[1], network=network, latents=latents)
    assert torch.allclose(found["found"], network(latents), atol=1e-6)


def test_an_attention_processor(make_sd1: Callable[[], Any]) -> None:
    unet = make_sd1().unet
    run(EXAMPLES[2], unet=unet)
    names = {type(processor).__name__ for processor in unet.attn_processors.values()}
    assert names == {"HeatsinkAttnProcessor"}
