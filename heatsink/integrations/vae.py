"""AutoencoderKL as captured programs: an encoder's and a decoder's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.replacement import Replacement


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # A copy: slices are taken outside, and would fix the batch here.
        model.use_slicing = model.use_tiling = False

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.model.decode(latents, return_dict=False)[0],)


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        moments = self.model.encoder(image)
        if self.model.quant_conv is not None:
            moments = self.model.quant_conv(moments)
        return (moments,)


class Autoencoder(Replacement):
    """Stands for an AutoencoderKL. Slicing is done a row at a time; tiling is the original's."""

    kept = frozenset(
        {
            "use_slicing", "use_tiling", "enable_slicing", "disable_slicing", "enable_tiling",
            "disable_tiling", "tile_sample_min_size", "tile_latent_min_size",
            "tile_overlap_factor", "post_quant_conv", "quant_conv",
        }
    )  # fmt: skip

    def _move_in(self) -> None:
        """Let an offloading hook move the weights in: it knows only of `forward`."""
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The posterior of images `(B, 3, H, W)`, as the original's `encode`.

        Raises:
            InvalidRequest: an image of another dtype or device.
            NotBuilt: the network can't be captured for this size.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        self._move_in()
        vae = self.original
        if vae.use_tiling and max(x.shape[-2:]) > vae.tile_sample_min_size:
            return vae.encode(x, return_dict=return_dict)
        moments = self._sliced("vae_encoder", _Encoder, "image", x, "moments")
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """The images of latents `(B, C, h, w)`, as the original's `decode`.

        `generator` has no effect there either.

        Raises:
            InvalidRequest: latents of another dtype or device.
            NotBuilt: the network can't be captured for this size.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        self._move_in()
        vae = self.original
        if vae.use_tiling and max(z.shape[-2:]) > vae.tile_latent_min_size:
            return vae.decode(z, return_dict=return_dict)
        image = self._sliced("vae_decoder", _Decoder, "latents", z, "image")
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode and decode, as the original's `forward`."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def _sliced(self, kind: str, network: Any, name: str, value: Tensor, output: str) -> Tensor:
        pieces = value.split(1) if self.original.use_slicing and len(value) > 1 else [value]
        done = [self._compute(kind, network, {name: piece}, (output,))[output] for piece in pieces]
        return done[0] if len(done) == 1 else torch.cat(done)
