"""Components that are missing, or that give NaN, are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import NotBuilt, NumericError


@pytest.mark.parametrize("part", ["vae_decoder", "vae_encoder", "unet"])
def test_a_component_that_gives_nan_is_named(sd1_engine: Engine, part: str) -> None:
    def broken(inputs: Any) -> Any:
        out = sd1_engine._components[part](inputs)
        return {name: np.full_like(value, np.nan) for name, value in out.items()}

    engine = Engine(sd1_engine.spec, {**sd1_engine._components, part: broken})
    start = Image.new("RGB", (64, 64), "red")
    with pytest.raises(NumericError, match=rf"seed 77.*: {part} gave a non-finite value"):
        engine.generate("a cat", image=start, seed=77, steps=2)


def test_an_engine_without_an_encoder_says_so(sd1_engine: Engine) -> None:
    parts = {k: v for k, v in sd1_engine._components.items() if k != "vae_encoder"}
    with pytest.raises(NotBuilt, match="built without vae_encoder"):
        Engine(sd1_engine.spec, parts).generate("a cat", image=Image.new("RGB", (64, 64)), steps=2)
