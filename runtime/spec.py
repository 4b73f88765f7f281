"""What the runtime must know of an engine besides its components, and which requests it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.request import Request
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.text import Tokenizer

NO_PORTS = (
    "this engine has no adapter ports; build one that has with `heatsink build MODEL -o ENGINE "
    "--adapters SLOTSxRANK`, or fuse an adapter at build time with `--fuse FILE:SCALE`"
)


@dataclass(frozen=True)
class EngineSpec:
    """What the runtime must know of an engine besides its components.

    Attributes:
        name: of the model.
        digest: of the manifest; receipts name it.
        text_encoders: component names, in the order in which their hidden states are concatenated.
        tokenizers: one for each.
        schedule: the model's noise schedule.
        latent_channels: channels of the latents.
        vae_factor: pixels a latent, in each direction.
        default_size: (height, width) where a request names none.
        heights: smallest and largest height that was built.
        widths: smallest and largest width that was built.
        zero_empty_negative: see `conditions.encode`.
        adapters: names and scales of what was fused into the weights.
        controlnets: names of its ControlNets.
        residuals: of an engine that has any: the shapes of what they give for a row, by name.
        inpainting: the UNet takes a mask and the latents of what it keeps beside the noisy ones.
        backend: who runs it.
    """

    name: str
    digest: str
    text_encoders: Sequence[str]
    tokenizers: Sequence[Tokenizer]
    schedule: ScheduleConfig
    latent_channels: int
    vae_factor: int
    default_size: tuple[int, int]
    heights: tuple[int, int]
    widths: tuple[int, int]
    zero_empty_negative: bool = False
    adapters: Mapping[str, float] = field(default_factory=dict)
    controlnets: Sequence[str] = ()
    residuals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inpainting: bool = False
    backend: str = ""

    def resolve(self, request: Request, *, ports: bool = False) -> Request:
        """The request with its size filled in, if this engine can answer it.

        Args:
            request: what to make.
            ports: whether the engine has adapter ports.

        Raises:
            InvalidRequest: a size that no engine of this model has, or no picture with a mask for
                an inpainting model.
            NotBuilt: a size, an adapter or a ControlNet that this engine was not built for.
        """
        request = request.resolved(*self.default_size)
        for name, limits in (("height", self.heights), ("width", self.widths)):
            value = getattr(request, name)
            if value % self.vae_factor:
                raise InvalidRequest(
                    f"{name}: expected a multiple of {self.vae_factor}, got {value}"
                )
            if not limits[0] <= value <= limits[1]:
                built = f"{limits[0]} to {limits[1]}" if limits[0] < limits[1] else f"{limits[0]}"
                raise NotBuilt(
                    f"{name}: this engine was built for {built} pixels, got {value}; "
                    "build another with `heatsink build MODEL -o ENGINE --size HEIGHTxWIDTH`"
                )
        if request.adapters and not ports:
            raise NotBuilt(f"adapters {sorted(request.adapters)}: {NO_PORTS}")
        if unknown := sorted(set(request.controls) - set(self.controlnets)):
            has = ", ".join(self.controlnets) or "none"
            raise NotBuilt(
                f"control: this engine has no ControlNet {', '.join(unknown)} (it has: {has}); "
                "build one that has with `heatsink build MODEL -o ENGINE --controlnet NAME=FOLDER`"
            )
        if self.inpainting and request.mask_digest is None:
            raise InvalidRequest(
                "mask: expected an image and a mask, since this is an inpainting model"
            )
        return request

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """(C, h, w) of a resolved request's latents."""
        assert request.height is not None
        assert request.width is not None
        factor = self.vae_factor
        return self.latent_channels, request.height // factor, request.width // factor
