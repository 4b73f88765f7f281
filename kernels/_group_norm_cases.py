"""GroupNorm's real uses: every layer of the UNets and autoencoders of SD1.5 and SDXL, and others.

Whether a layer is followed by SiLU and whether its pixels are a part of a concatenation is not in
the configuration's key; the first is in the launch's, the second is not (`_rows.settled`).
"""

from __future__ import annotations

import torch

from heatsink.kernels._op import Case, Inputs, normal

_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32

# (model, samples, dtype, side of the image, channels with SiLU, channels without). Without: in
# front of a UNet's transformers and of an autoencoder's middle attention.
_LAYERS: tuple[tuple[str, int, torch.dtype, int, tuple[int, ...], tuple[int, ...]], ...] = (
    ("sd15", 2, _F16, 64, (320, 640, 960), (320,)),
    ("sd15", 2, _F16, 32, (320, 640, 960, 1280, 1920), (640,)),
    ("sd15", 2, _F16, 16, (640, 1280, 1920, 2560), (1280,)),
    ("sd15", 2, _F16, 8, (1280, 2560), (1280,)),
    ("sdxl", 2, _F16, 128, (320, 640, 960), ()),
    ("sdxl", 2, _F16, 64, (320, 640, 960, 1280, 1920), (640,)),
    ("sdxl", 2, _F16, 32, (640, 1280, 1920, 2560), (1280,)),
    ("vae", 1, _F16, 64, (512,), (512,)),
    ("vae", 1, _F16, 128, (256, 512), (512,)),
    ("vae", 1, _F16, 256, (128, 256, 512), ()),
    ("vae", 1, _F16, 512, (128, 256, 512), ()),
    ("vae", 1, _F16, 1024, (128, 256), ()),
    # SDXL's autoencoder overflows fp16, so it is also run in fp32.
    ("vae", 1, _F32, 128, (512,), (512,)),
    ("vae", 1, _F32, 256, (256, 512), ()),
    ("vae", 1, _F32, 512, (128, 256, 512), ()),
    ("vae", 1, _F32, 1024, (128, 256), ()),
)


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype,
    *,
    modulated: bool = False,
    silu: bool = True,
    timed: bool = True,
) -> Case:
    def make(device: torch.device) -> Inputs:
        samples, channels, height, width = shape
        inputs: Inputs = {
            "x": normal((samples, height, width, channels), dtype, device, 1).permute(0, 3, 1, 2),
            "groups": groups,
            "weight": normal((channels,), dtype, device, 2),
            "bias": normal((channels,), dtype, device, 3),
        }
        if not silu:
            inputs["silu"] = False
        if modulated:
            both = normal((samples, 2 * channels), dtype, device, 4)
            inputs["scale"], inputs["shift"] = both.chunk(2, dim=1)
        return inputs

    return Case(name, make, timed)


_TIMED = (
    _case("sd15-320x64x64-fp16", (2, 320, 64, 64), 32, _F16),
    _case("sd15-1280x16x16-fp16", (2, 1280, 16, 16), 32, _F16),
    _case("sd15-640x32x32-fp16", (2, 640, 32, 32), 32, _F16),
    _case("sd15-2560x8x8-fp16", (2, 2560, 8, 8), 32, _F16),
    _case("sd15-2560x16x16-bf16", (2, 2560, 16, 16), 32, _BF16),
    _case("sdxl-320x128x128-fp16", (2, 320, 128, 128), 32, _F16),
    _case("sdxl-640x64x64-fp16", (2, 640, 64, 64), 32, _F16),
    _case("sdxl-1280x32x32-bf16", (2, 1280, 32, 32), 32, _BF16),
    _case("sdxl-1920x64x64-fp16", (2, 1920, 64, 64), 32, _F16),
    _case("vae-512x64x64-fp16", (1, 512, 64, 64), 32, _F16),
    _case("vae-256x512x512-fp16", (1, 256, 512, 512), 32, _F16),
    _case("modulated-640x32x32-fp16", (4, 640, 32, 32), 32, _F16, modulated=True),
    _case("bundled-unet-128x8x8-fp32", (8, 128, 8, 8), 16, _F32),
    _case("bundled-vae-32x64x64-fp32", (8, 32, 64, 64), 8, _F32),
)


def _layers() -> tuple[Case, ...]:
    """The layers that are not among the timed cases."""
    short = {_F16: "fp16", _F32: "fp32"}
    cases = {case.name: case for case in _TIMED}
    for model, samples, dtype, side, with_silu, without in _LAYERS:
        for silu, widths in ((True, with_silu), (False, without)):
            for channels in widths:
                tail = "" if silu else "-linear"
                name = f"{model}-{channels}x{side}x{side}-{short[dtype]}{tail}"
                shape = (samples, channels, side, side)
                if name not in cases:
                    cases[name] = _case(name, shape, 32, dtype, silu=silu, timed=False)
    return tuple(cases.values())


CASES = _layers()
