"""Between PIL images and the VAE's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image


def to_array(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """An image as RGB float32 `(3, H, W)` in [-1, 1]; resized (Lanczos) where its size differs."""
    from PIL import Image as images

    rgb = image.convert("RGB")
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), images.Resampling.LANCZOS)
    pixels = np.asarray(rgb, dtype=np.float32)
    return np.ascontiguousarray((pixels / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1))


def to_image(pixels: npt.NDArray[np.float32]) -> Image:
    """Float32 `(3, H, W)` in [-1, 1] as 8-bit RGB: `round((x / 2 + 1/2) * 255)`, ties to even."""
    from PIL import Image as images

    unit = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1)
    return images.fromarray(np.rint(unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 0))
