"""Between PIL images and the VAE's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image


def to_array(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """An image as RGB float32 `(3, H, W)` in [-1, 1]; resized (Lanczos) where its size differs."""
    pixels = _resized(image.convert("RGB"), height, width)
    return np.ascontiguousarray((pixels / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1))


def to_unit_array(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """As `to_array`, in [0, 1]: what ControlNets take."""
    pixels = _resized(image.convert("RGB"), height, width)
    return np.ascontiguousarray((pixels / np.float32(255)).transpose(2, 0, 1))


def to_mask(image: Image, height: int, width: int) -> npt.NDArray[np.bool_]:
    """A mask's pixels `(H, W)`: true where its grey is at least half; resized as `to_array`."""
    grey: npt.NDArray[np.bool_] = _resized(image.convert("L"), height, width) >= np.float32(127.5)
    return grey


def _resized(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    from PIL import Image as images

    if image.size != (width, height):
        image = image.resize((width, height), images.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32)


def to_image(pixels: npt.NDArray[np.float32]) -> Image:
    """Float32 `(3, H, W)` in [-1, 1] as 8-bit RGB: `round((x / 2 + 1/2) * 255)`, ties to even."""
    from PIL import Image as images

    unit = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1)
    return images.fromarray(np.rint(unit * np.float32(255)).astype(np.uint8).transpose(1, 2, 0))
