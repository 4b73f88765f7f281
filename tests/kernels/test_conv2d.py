from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels._products import ACTIVATIONS, scratch_bytes
from heatsink.kernels.conv2d import conv2d
from heatsink.kernels.linear import pack_linear

module = import_module("heatsink.kernels.conv2d")

DTYPES = (torch.float32, torch.bfloat16)
Run = Callable[..., Tensor]
# PyTorch's own convolution gives other bits in another memory format.
NATIVE = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)
# x, channels of x2, columns, kernel, stride, padding, upsample.
CASES = {
    "aligned": ((2, 32, 8, 8), 0, 32, (3, 3), 1, 1, 1),
    "ragged": ((3, 5, 9, 7), 0, 19, (3, 3), 1, 1, 1),
    "one": ((1, 1, 1, 1), 0, 1, (1, 1), 1, 0, 1),
    "pointwise": ((2, 40, 5, 6), 0, 33, (1, 1), 1, 0, 1),
    "strided": ((2, 12, 9, 8), 0, 20, (3, 3), 2, 1, 1),
    "upsampled": ((2, 12, 5, 4), 0, 20, (3, 3), 1, 1, 2),
    "two images": ((2, 33, 6, 7), 18, 20, (3, 3), 1, 1, 1),
    "all at once": ((2, 7, 6, 5), 9, 20, (3, 2), 2, 1, 2),
    "uneven kernel": ((1, 6, 8, 9), 0, 5, (2, 5), 1, 2, 1),
    "no padding": ((1, 6, 8, 9), 0, 5, (3, 3), 2, 0, 1),
    "latents": ((2, 4, 16, 16), 0, 48, (3, 3), 1, 1, 1),
    "bundled": ((2, 128, 8, 8), 64, 128, (3, 3), 1, 1, 1),
    "as wide as a block": ((1, 64, 6, 64), 0, 4, (3, 3), 1, 1, 1),
    "wide and concatenated": ((1, 320, 3, 40), 320, 33, (3, 3), 1, 1, 1),
}


def window(inputs: dict[str, Any]) -> tuple[int, int, int]:
    return inputs.get("stride", 1), inputs.get("padding", 0), inputs.get("upsample", 1)


def through_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    activation = rest.get("activation", "")
    x2, residual = (
        None if y is None else y.contiguous(memory_format=torch.channels_last)
        for y in (rest.get("x2"), rest.get("residual"))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    shape = module._shape(x, weight, *window(rest), activation)
    out = torch.empty(shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    torch.ops.heatsink.conv2d_packed(
        x,
        x2,
        pack_linear(weight, geglu=activation == "geglu"),
        bias,
        residual,
        rest.get("sample_add"),
        *weight.shape[2:],
        *window(rest),
        activation,
        torch.empty(scratch_bytes(), dtype=torch.uint8),
        out,
    )
    return out


def through_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    out: Tensor = module._conv2d_torch(
        x,
        rest.get("x2"),
        weight,
        bias,
        rest.get("residual"),
        rest.get("sample_add"),
        *window(rest),
        rest.get("activation", ""),
    )
    return out


ALL = pytest.mark.parametrize(
    "run", [conv2d, through_packed, through_torch], ids=["op", "packed", "torch"]
)


def make(case: str, dtype: torch.dtype, seed: int, activation: str = "") -> dict[str, Any]:
    shape, more, columns, kernel, stride, padding, upsample = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    depth = (shape[1] + more) * kernel[0] * kernel[1]
    rows = 2 * columns if activation == "geglu" else columns
    inputs = {
        "x": normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last),
        "weight": (normal(rows, shape[1] + more, *kernel) / depth**0.5).to(dtype),
        "bias": normal(rows).to(dtype),
        "sample_add": normal(shape[0], rows).to(dtype),
        "stride": stride,
        "padding": padding,
        "upsample": upsample,
        "activation": activation,
    }
    if more:
        x2 = normal(shape[0], more, *shape[2:]).to(dtype)
        inputs["x2"] = x2.contiguous(memory_format=torch.channels_last)
    size = module._shape(inputs["x"], inputs["weight"], stride, padding, upsample, activation)
    residual = normal(*size).to(dtype)
    inputs["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return inputs


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    sample_add: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    activation: str = "",
) -> Tensor:
    seen = x if x2 is None else torch.cat([x, x2], 1)
    if upsample == 2:
        seen = F.interpolate(seen, scale_factor=2.0, mode="nearest")
    y = F.conv2d(seen, weight, bias, stride=stride, padding=padding)
    if sample_add is not None:
        y = y + sample_add[:, :, None, None]
    if activation == "geglu":
        value, gate = y.chunk(2, 1)
        y = value * F.gelu(gate)
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation:
        y = F.silu(y) if activation == "silu" else F.gelu(y)
    return y if residual is None else y + residual


def exact(float64: Any, inputs: dict[str, Any]) -> Any:
    return reference.conv2d(
        **{name: float64(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    )


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(
    run: Run, case: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    inputs = make(case, dtype, seed)
    out = run(**inputs)
    within_budget(out, plain(**inputs), exact(float64, inputs))
    assert out.is_contiguous(memory_format=torch.channels_last)
    for name in ("bias", "residual", "sample_add"):
        del inputs[name]
    within_budget(run(**inputs), plain(**inputs), exact(float64, inputs))


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(
    run: Run, activation: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    inputs = make("ragged", dtype, seed, activation)
    within_budget(run(**inputs), plain(**inputs), exact(float64, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_packed_variant_gives_the_same_bits(case: str, dtype: torch.dtype, seed: int) -> None:
    inputs = make(case, dtype, seed)
    assert torch.equal(through_packed(**inputs), conv2d(**inputs))


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_memory_than_channels_last(dtype: torch.dtype, seed: int) -> None:
    inputs = make("two images", dtype, seed)
    expected = conv2d(**inputs)
    images = {name: inputs[name].contiguous() for name in ("x", "x2", "residual", "weight")}
    assert images["x"].stride() != inputs["x"].stride()
    assert torch.equal(conv2d(**{**inputs, **images}), expected)
    # A part of something larger, with dense channels.
    larger = torch.cat([inputs["x"]] * 2, 3).contiguous(memory_format=torch.channels_last)
    part = larger[..., : inputs["x"].shape[3]]
    assert torch.equal(conv2d(**{**inputs, "x": part}), expected)
    sliced = {name: inputs[name].repeat_interleave(2, -1)[..., ::2] for name in images}
    sliced |= {"bias": inputs["bias"].repeat_interleave(2)[::2]}
    assert torch.equal(conv2d(**{**inputs, **sliced}), expected)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_inputs_give_the_bits_of_their_copies(dtype: torch.dtype, seed: int) -> None:
    inputs = make("all at once", dtype, seed)
    seen = torch.cat([inputs["x"], inputs["x2"]], 1).repeat_interleave(2, 2)
    seen = seen.repeat_interleave(2, 3).contiguous(memory_format=torch.channels_last)
    separate = {**inputs, "x": seen, "x2": None, "upsample": 1}
    assert torch.equal(conv2d(**inputs), conv2d(**separate))


@pytest.mark.parametrize("run", [conv2d, through_packed], ids=["op", "packed"])
def test_no_images(run: Run) -> None:
    out = run(torch.ones(0, 3, 4, 4), torch.ones(5, 3, 3, 3), padding=1)
    assert out.shape == (0, 5, 4, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_and_compile(dtype: torch.dtype, seed: int) -> None:
    inputs = make("all at once", dtype, seed, "silu")
    tensors = ("x", "x2", "weight", "bias", "residual", "sample_add")
    numbers = ("stride", "padding", "upsample", "activation")
    args = tuple(inputs[name] for name in (*tensors, *numbers))
    torch.library.opcheck(torch.ops.heatsink.conv2d.default, args)
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), conv2d(**inputs))


def test_what_is_refused() -> None:
    x, weight = torch.ones(2, 3, 5, 5), torch.ones(6, 3, 3, 3)
    with pytest.raises(TypeError, match=r"x2: expected torch\.float32 like x"):
        conv2d(x, weight, x2=x.bfloat16())
    with pytest.raises(ValueError, match="x: expected four dimensions"):
        conv2d(x[0], weight)
    with pytest.raises(ValueError, match="weight: expected four dimensions"):
        conv2d(x, weight[0])
    with pytest.raises(ValueError, match="x2: expected four dimensions"):
        conv2d(x, weight, x2=x[0])
    with pytest.raises(ValueError, match=r"x2: expected shape \(2, 3, 5, 5\), got \(1, 3, 5, 5\)"):
        conv2d(x, weight, x2=x[:1])
    with pytest.raises(ValueError, match=r"weight: expected shape \(6, 6, 3, 3\)"):
        conv2d(x, weight, x2=x)
    with pytest.raises(ValueError, match="stride: expected an integer of at least 1, got 0"):
        conv2d(x, weight, stride=0)
    with pytest.raises(ValueError, match="padding: expected an integer of at least 0, got -1"):
        conv2d(x, weight, padding=-1)
    with pytest.raises(ValueError, match="upsample: expected 1 or 2, got 3"):
        conv2d(x, weight, upsample=3)
    with pytest.raises(ValueError, match="x: expected images no smaller than the kernel"):
        conv2d(x[..., :2], weight)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 6, 3, 3\)"):
        conv2d(x, weight, residual=x)
