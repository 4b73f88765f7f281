"""The latents that image-to-image requests start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from heatsink.runtime import noise, pictures
from heatsink.runtime.backends.session import Array
from heatsink.runtime.buckets import alike
from heatsink.runtime.digest import image_digest
from heatsink.runtime.errors import InvalidRequest, NumericError
from heatsink.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

RunComponent = Callable[[str, dict[str, Array]], dict[str, Array]]


def check_images(requests: Sequence[Request], images: Sequence[Image | None]) -> None:
    """Compare every picture with the digest in its request.

    Raises:
        InvalidRequest: a picture is missing, is another one, or comes with a request that names
            none.
    """
    if len(images) != len(requests):
        raise InvalidRequest(
            f"images: expected one (or None) for each of {len(requests)} requests, "
            f"got {len(images)}"
        )
    for request, image in zip(requests, images, strict=True):
        if image is None and request.image_digest is not None:
            raise InvalidRequest("image: expected the picture that image_digest names, got none")
        if image is not None and image_digest(image) != request.image_digest:
            raise InvalidRequest("image: its pixels are not those of the request's image_digest")


def encode_images(
    requests: Sequence[Request], images: Sequence[Image | None], run: RunComponent
) -> list[Tensor | None]:
    """A sample of the VAE's posterior for each picture; those of one size are encoded in one batch.

    Args:
        requests: with their sizes resolved.
        images: the picture of every image-to-image request, None for the others.
        run: runs a component on rows.

    Returns:
        Latents float32 `(C, h, w)` in the scaled domain, None for requests without a picture.

    Raises:
        NumericError: the encoder gave NaN or infinity; names the request's seed.
    """
    starts: list[Tensor | None] = [None] * len(requests)
    places = [place for place, image in enumerate(images) if image is not None]
    for group in alike([(requests[place].height, requests[place].width) for place in places]):
        own = [places[index] for index in group]
        pixels = np.stack([_pixels(requests[place], images[place]) for place in own])
        out = run("vae_encoder", {"image": pixels})
        mean, std = (torch.from_numpy(out[name]) for name in ("mean", "std"))
        seeds = [requests[place].seed for place in own]
        latents = mean + std * noise.normal_rows(seeds, noise.ENCODE, 0, mean.shape[1:])
        for place, start in zip(own, latents, strict=True):
            if not bool(torch.isfinite(start).all()):
                raise NumericError(
                    f"request with seed {requests[place].seed}: vae_encoder gave a non-finite value"
                )
            starts[place] = start
    return starts


def _pixels(request: Request, image: Image | None) -> Array:
    assert image is not None
    assert request.height is not None
    assert request.width is not None
    return pictures.to_array(image, request.height, request.width)
