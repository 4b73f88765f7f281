from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels._products import ACTIVATIONS, pack, scratch_bytes, unpack
from heatsink.kernels.linear import linear, pack_linear

module = import_module("heatsink.kernels.linear")

DTYPES = (torch.float32, torch.bfloat16)
# x's shape and columns. Aligned, ragged, one of each, one dimension, SD1.5's time embedding, the
# bundled model, and a depth of many parts.
SHAPES = (
    ((2, 32, 64), 64),
    ((3, 7, 43), 37),
    ((1, 1), 1),
    ((5,), 3),
    ((2, 320), 1280),
    ((2, 64, 128), 512),
    ((3, 11, 1337), 50),
)
Run = Callable[..., Tensor]


def through_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    activation = rest.get("activation", "")
    geglu = activation == "geglu"
    columns = weight.shape[0] // 2 if geglu else weight.shape[0]
    out = x.new_empty(*x.shape[:-1], columns)
    scratch = torch.empty(scratch_bytes(), dtype=torch.uint8)
    torch.ops.heatsink.linear_packed(
        x,
        pack_linear(weight, geglu=geglu),
        bias,
        rest.get("residual"),
        rest.get("sample_add"),
        activation,
        scratch,
        out,
    )
    return out


def through_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
    out: Tensor = module._linear_torch(
        x,
        weight,
        bias,
        rest.get("residual"),
        rest.get("sample_add"),
        rest.get("activation", ""),
    )
    return out


ALL = pytest.mark.parametrize(
    "run", [linear, through_packed, through_torch], ids=["op", "packed", "torch"]
)


def make(
    shape: tuple[int, ...], columns: int, dtype: torch.dtype, seed: int, activation: str = ""
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    geglu = 2 if activation == "geglu" else 1
    return {
        "x": normal(*shape).to(dtype),
        "weight": (normal(geglu * columns, shape[-1]) / shape[-1] ** 0.5).to(dtype),
        "bias": normal(geglu * columns).to(dtype),
        "residual": normal(*shape[:-1], columns).to(dtype),
        "sample_add": normal(shape[0], geglu * columns).to(dtype) if len(shape) > 1 else None,
        "activation": activation,
    }


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    sample_add: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    y = F.linear(x, weight, bias)
    if sample_add is not None:
        y = y + sample_add.reshape(len(x), *[1] * (x.dim() - 2), -1)
    if activation == "geglu":
        value, gate = y.chunk(2, -1)
        y = value * F.gelu(gate)
    else:
        activate: dict[str, Callable[[Tensor], Tensor]] = {
            "": lambda y: y,
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
            "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
        }
        y = activate[activation](y)
    return y if residual is None else y + residual


def exact(float64: Any, inputs: dict[str, Any]) -> Any:
    return reference.linear(
        **{name: float64(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    )


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
def test_against_float64(
    run: Run,
    shape: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    inputs = make(shape, columns, dtype, seed)
    out = run(**inputs)
    within_budget(out, plain(**inputs), exact(float64, inputs))
    assert out.is_contiguous()
    alone = {"x": inputs["x"], "weight": inputs["weight"]}
    within_budget(run(**alone), plain(**alone), exact(float64, alone))


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(
    run: Run, activation: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    for columns in (64, 37, 8):
        inputs = make((3, 19, 70), columns, dtype, seed, activation)
        within_budget(run(**inputs), plain(**inputs), exact(float64, inputs))
        del inputs["residual"]
        within_budget(run(**inputs), plain(**inputs), exact(float64, inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_every_size(activation: str, float64: Any, within_budget: Any) -> None:
    # A product of ones with what goes into the activation.
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-1e4, 1e4, 0.0])]).unsqueeze(1)
    weight = torch.ones(2, 1)
    inputs: dict[str, Any] = {"x": x, "weight": weight, "activation": activation}
    within_budget(linear(x, weight, activation=activation), plain(**inputs), exact(float64, inputs))


@pytest.mark.parametrize("run", [linear, through_packed], ids=["op", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(run: Run, dtype: torch.dtype) -> None:
    weight = torch.ones(5, 3, dtype=dtype)
    assert run(torch.ones(0, 3, dtype=dtype), weight).shape == (0, 5)
    assert run(torch.ones(2, 0, 3, dtype=dtype), weight).shape == (2, 0, 5)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(dtype: torch.dtype, geglu: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for columns, depth in ((64, 96), (34, 7), (16, 33), (2, 1), (50, 70)):
        weight = torch.randn(columns, depth, generator=generator).to(dtype)
        packed = pack_linear(weight, geglu=geglu)
        assert torch.equal(packed, pack(weight, geglu, dtype == torch.bfloat16))
        assert torch.equal(unpack(packed, columns, depth, geglu), weight)
        assert torch.equal(pack_linear(weight.t().contiguous().t(), geglu=geglu), packed)
    image = torch.randn(6, 5, 3, 2, generator=generator).to(dtype)
    rows = image.permute(0, 2, 3, 1).reshape(6, -1)
    assert torch.equal(pack_linear(image, geglu=geglu), pack_linear(rows, geglu=geglu))
    assert torch.equal(pack_linear(image.float(), dtype), pack_linear(image))


def test_the_layout_that_is_stored() -> None:
    # Engines hold packed weights, so the order is a contract.
    weight = torch.arange(34 * 3, dtype=torch.float32).view(34, 3)
    packed = pack_linear(weight)
    assert torch.equal(packed[: 3 * 32].view(3, 32), weight[:32].t())
    assert torch.equal(packed[3 * 32 :].view(3, 16)[:, :2], weight[32:].t())
    assert packed.shape == (3 * 48,)
    assert not packed[3 * 32 :].view(3, 16)[:, 2:].any()
    pairs = pack_linear(weight, torch.bfloat16)
    tile = pairs[512:1024].view(16, 16, 2)  # rows 16 to 31 of the weight
    assert torch.equal(tile[0, :, 0].float(), weight[16:32, 0])
    assert torch.equal(tile[0, :, 1].float(), weight[16:32, 1])
    assert torch.equal(tile[1, :, 0].float(), weight[16:32, 2])
    assert not tile[2:].any()
    assert not tile[1, :, 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_and_compile(dtype: torch.dtype, seed: int) -> None:
    inputs = make((2, 5, 40), 12, dtype, seed, "geglu")
    args = (*(inputs[name] for name in ("x", "weight", "bias", "residual", "sample_add")), "geglu")
    torch.library.opcheck(torch.ops.heatsink.linear.default, args)
    torch.library.opcheck(torch.ops.heatsink.pack_linear.default, (inputs["weight"], True))
    scratch = torch.zeros(scratch_bytes(), dtype=torch.uint8)
    packed = (args[0], pack_linear(args[1], geglu=True), *args[2:], scratch)
    out = torch.zeros(2, 5, 12, dtype=dtype)
    torch.library.opcheck(
        torch.ops.heatsink.linear_packed.default,
        (*packed, out),
        # Scratch is written to, and read by nobody; its values need not agree.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), linear(**inputs))


def test_what_is_refused() -> None:
    x, weight = torch.ones(2, 3, 4), torch.ones(6, 4)
    with pytest.raises(TypeError, match="x: expected one of bfloat16, float32 on the CPU"):
        linear(x.half(), weight.half())
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32 like x"):
        linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"weight: expected \(N, 4\), got \(6, 5\)"):
        linear(x, torch.ones(6, 5))
    with pytest.raises(ValueError, match=r"bias: expected shape \(6,\), got \(5,\)"):
        linear(x, weight, torch.ones(5))
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 3, 6\)"):
        linear(x, weight, residual=torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"sample_add: expected shape \(2, 6\)"):
        linear(x, weight, sample_add=torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"x: expected \(batch, ..., depth\) with sample_add"):
        linear(torch.ones(4), weight, sample_add=torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"activation: expected one of .*got 'relu'"):
        linear(x, weight, activation="relu")
    with pytest.raises(ValueError, match="weight: expected an even number of rows for geglu"):
        linear(x, torch.ones(5, 4), activation="geglu")
    with pytest.raises(ValueError, match="weight: expected no gradient"):
        linear(x, weight.requires_grad_())
    with pytest.raises(TypeError, match="dtype: expected float32 or bfloat16"):
        pack_linear(torch.ones(2, 2), torch.float16)
    with pytest.raises(ValueError, match=r"weight: expected \(N, K\).*got \(3,\)"):
        pack_linear(torch.ones(3))
