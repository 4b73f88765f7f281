"""The latents that requests with a picture start from, and those that a mask keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heatsink.runtime import noise, pictures
from heatsink.runtime.backends.session import Array
from heatsink.runtime.buckets import alike
from heatsink.runtime.errors import NumericError
from heatsink.runtime.request import Request
from heatsink.runtime.request_pictures import Pictures
from heatsink.runtime.spec import EngineSpec

RunComponent = Callable[[str, dict[str, Array]], dict[str, Array]]


def encode_images(
    requests: Sequence[Request],
    images: Sequence[Array | None],
    run: RunComponent,
    *,
    purpose: int = noise.ENCODE,
) -> list[Tensor | None]:
    """A sample of the VAE's posterior for each picture; those of one size are encoded in one batch.

    Args:
        requests: whose seeds decide the samples.
        images: float32 `(3, H, W)` in [-1, 1] for each, or None.
        run: runs a component on rows.
        purpose: of the noise: `noise.ENCODE` or `noise.ENCODE_KEPT`.

    Returns:
        Latents float32 `(C, h, w)` in the scaled domain, None for requests without a picture.

    Raises:
        NumericError: the encoder gave NaN or infinity; names the request's seed.
    """
    starts: list[Tensor | None] = [None] * len(requests)
    places = [place for place, image in enumerate(images) if image is not None]
    arrays = [image for image in images if image is not None]
    for group in alike([array.shape for array in arrays]):
        own = [places[index] for index in group]
        pixels = np.stack([arrays[index] for index in group])
        out = run("vae_encoder", {"image": pixels})
        mean, std = (torch.from_numpy(out[name]) for name in ("mean", "std"))
        seeds = [requests[place].seed for place in own]
        latents = mean + std * noise.normal_rows(seeds, purpose, 0, mean.shape[1:])
        for place, start in zip(own, latents, strict=True):
            if not bool(torch.isfinite(start).all()):
                raise NumericError(
                    f"request with seed {requests[place].seed}: vae_encoder gave a non-finite value"
                )
            starts[place] = start
    return starts


@dataclass(frozen=True)
class Start:
    """What a request's pictures are in the latent domain.

    Attributes:
        latents: float32 `(C, h, w)`, the encoded picture; None without one.
        mask: bool `(1, h, w)`, true where it is painted anew; None without one.
        kept: float32 `(1 + C, h, w)`, what an inpainting model is told: the mask, and the encoded
            picture with grey where it is painted anew.
    """

    latents: Tensor | None = None
    mask: Tensor | None = None
    kept: Array | None = None


def encode_starts(
    requests: Sequence[Request], given: Sequence[Pictures], run: RunComponent, spec: EngineSpec
) -> list[Start]:
    """Encode the pictures of all requests, those of one size in one batch.

    Args:
        requests: with their sizes resolved.
        given: their pictures, resized where their size differs.
        run: runs a component on rows.
        spec: of the engine.

    Raises:
        NumericError: the encoder gave NaN or infinity; names the request's seed.
    """
    sizes = [(request.height or 0, request.width or 0) for request in requests]
    images = [
        None if own.image is None else pictures.to_array(own.image, *size)
        for own, size in zip(given, sizes, strict=True)
    ]
    masks = [
        None if own.mask is None else pictures.to_mask(own.mask, *size)
        for own, size in zip(given, sizes, strict=True)
    ]
    latents = encode_images(requests, images, run)
    # The first pixel of a latent's decides for it.
    factor = spec.vae_factor
    small = [
        None if mask is None else np.ascontiguousarray(mask[None, ::factor, ::factor])
        for mask in masks
    ]
    kept: list[Array | None] = [None] * len(requests)
    if spec.inpainting:
        grey = [
            None if image is None or mask is None else np.where(mask, np.float32(0), image)
            for image, mask in zip(images, masks, strict=True)
        ]
        encoded = encode_images(requests, grey, run, purpose=noise.ENCODE_KEPT)
        kept = [
            None if mask is None or own is None else np.concatenate([mask, own.numpy()])
            for mask, own in zip(small, encoded, strict=True)
        ]
    return [
        Start(start, None if mask is None else torch.from_numpy(mask), own)
        for start, mask, own in zip(latents, small, kept, strict=True)
    ]
