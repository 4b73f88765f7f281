"""Real uses of `lora_rows`: layers of SD1.5, SDXL and the bundled model with adapters."""

from __future__ import annotations

import torch

from heatsink.kernels._op import Case, Inputs, normal

F16, F32 = torch.float16, torch.float32
SLOTS = 8


def tables(rows: int, adapters: int, device: torch.device) -> Inputs:
    """Every row with adapters of its own, as far as the slots go."""
    count = torch.arange(rows * adapters, device=device).view(rows, adapters)
    scales = torch.full((rows, adapters), 0.75, device=device)
    return {"slots": count % SLOTS, "scales": scales}


def linear(
    name: str,
    rows: int,
    tokens: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype = F16,
    rank: int = 16,
    adapters: int = 1,
    timed: bool = True,
) -> Case:
    """Rows of tokens through a linear layer."""

    def make(device: torch.device) -> Inputs:
        return {
            "y": normal((rows, tokens, outputs), dtype, device, seed=1),
            "x": normal((rows, tokens, inputs), dtype, device, seed=2),
            "a": normal((SLOTS, rank, inputs), dtype, device, seed=3) / inputs**0.5,
            "b": normal((SLOTS, rank, outputs), dtype, device, seed=4) / rank**0.5,
            **tables(rows, adapters, device),
        }

    return Case(name, make, timed)


def image(
    name: str,
    rows: int,
    side: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype = F16,
    *,
    kernel: int = 3,
    stride: int = 1,
    rank: int = 16,
    channels_last: bool = True,
    timed: bool = True,
) -> Case:
    """Images through a convolution; A lies with its channels innermost where the images do."""

    def make(device: torch.device) -> Inputs:
        memory = torch.channels_last if channels_last else torch.contiguous_format
        small = (side + stride - 1) // stride
        a = normal((SLOTS * rank, inputs, kernel, kernel), dtype, device, seed=3)
        a = (a / (inputs * kernel * kernel) ** 0.5).contiguous(memory_format=memory)
        x = normal((rows, inputs, side, side), dtype, device, seed=2)
        y = normal((rows, outputs, small, small), dtype, device, seed=1)
        return {
            "y": y.contiguous(memory_format=memory),
            "x": x.contiguous(memory_format=memory),
            "a": a.unflatten(0, (SLOTS, rank)),
            "b": normal((SLOTS, rank, outputs), dtype, device, seed=4) / rank**0.5,
            **tables(rows, 1, device),
            "stride": stride,
            "padding": kernel // 2,
        }

    return Case(name, make, timed)


CASES = (
    linear("sdxl-1280@1024-fp16", 8, 1024, 1280, 1280),
    linear("sdxl-1280@1024-r64-fp16", 8, 1024, 1280, 1280, rank=64),
    linear("sdxl-1280@1024-two-fp16", 8, 1024, 1280, 1280, adapters=2),
    linear("sdxl-640@4096-fp16", 8, 4096, 640, 640),
    linear("sdxl-640@4096-r64-fp16", 8, 4096, 640, 640, rank=64),
    linear("sdxl-geglu-1280-10240-fp16", 8, 1024, 1280, 10240),
    linear("sdxl-geglu-640-5120-fp16", 8, 4096, 640, 5120),
    linear("sdxl-ff-5120-1280-fp16", 8, 1024, 5120, 1280),
    linear("sdxl-ff-2560-640-fp16", 8, 4096, 2560, 640),
    linear("sdxl-text-2048-1280-fp16", 8, 77, 2048, 1280),
    linear("sdxl-text-2048-640-fp16", 8, 77, 2048, 640),
    linear("sdxl-time-1280-1280-fp16", 8, 1, 1280, 1280),
    linear("sd15-320@4096-fp16", 8, 4096, 320, 320),
    linear("sd15-640@1024-fp16", 8, 1024, 640, 640),
    linear("sd15-1280@256-fp16", 8, 256, 1280, 1280),
    linear("sd15-1280@256-two-bf16", 8, 256, 1280, 1280, torch.bfloat16, adapters=2),
    linear("sd15-text-768-320-fp16", 8, 77, 768, 320),
    linear("sd15-text-768-1280-fp16", 8, 77, 768, 1280),
    image("sdxl-conv-320@128-fp16", 4, 128, 320, 320),
    image("sdxl-conv-1280@32-fp16", 8, 32, 1280, 1280),
    image("sd15-conv-320@64-fp16", 8, 64, 320, 320),
    image("sd15-conv-320@64-nchw-fp16", 8, 64, 320, 320, channels_last=False),
    image("sd15-conv-320@64-s2-fp16", 8, 64, 320, 320, stride=2, timed=False),
    image("sd15-proj-640@32-fp16", 8, 32, 640, 640, kernel=1),
    image("sd15-proj-640@32-nchw-fp16", 8, 32, 640, 640, kernel=1, channels_last=False),
    linear("bundled-64@64-fp32", 8, 64, 64, 64, F32),
    linear("bundled-128@16-fp32", 8, 16, 128, 128, F32),
    linear("bundled-192@4-fp32", 8, 4, 192, 192, F32),
    image("bundled-conv-64@8-fp32", 8, 8, 64, 64, F32, channels_last=False),
)
# Both ways, both layouts of images and of A, every dtype.
SMOKE = (
    "sdxl-640@4096-fp16",
    "sdxl-text-2048-1280-fp16",
    "sd15-1280@256-two-bf16",
    "sd15-conv-320@64-fp16",
    "sd15-conv-320@64-nchw-fp16",
    "sd15-proj-640@32-nchw-fp16",
    "bundled-64@64-fp32",
)
