from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels.layer_norm import layer_norm

module = import_module("heatsink.kernels.layer_norm")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Run = Callable[..., Tensor]


def flat(run: Run) -> Run:
    """An implementation, called as the public function is."""

    def call(x: Tensor, weight: Any = None, bias: Any = None, **rest: Any) -> Tensor:
        return run(x, weight, bias, **({"eps": 1e-5, "scale": None, "shift": None} | rest))

    return call


# The op as a user calls it, what serves without a compiler, and the Triton kernel, here under the
# interpreter.
RUNS = {
    "op": layer_norm,
    "torch": flat(module._layer_norm_torch),
    "triton": flat(module._layer_norm_triton),
}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
# Aligned, ragged, one value, empty rows, no rows, rows of a sample apart, the widest entry of the
# configurations but one, a width of Stable Diffusion.
SHAPES = (
    (4, 256),
    (3, 5, 77),
    (2, 1),
    (2, 0),
    (0, 3, 16),
    (2, 3, 4, 33),
    (1, 2, 8192),
    (2, 5, 320),
)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, mean: float = 0.5
) -> dict[str, Any]:
    """Arguments; scale and shift are views of one projection."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale, shift = normal(shape[0], 2 * width).to(dtype).chunk(2, dim=1)
    return {
        "x": (normal(*shape) + mean).to(dtype),
        "weight": normal(width).to(dtype),
        "bias": normal(width).to(dtype),
        "scale": scale,
        "shift": shift,
    }


def plain(x: Tensor, **given: Any) -> Tensor:
    """What a user would write."""
    weight, bias = given.get("weight"), given.get("bias")
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)
    per_sample = (x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])
    if given.get("scale") is not None:
        y = y * (1 + given["scale"].reshape(per_sample))
    if given.get("shift") is not None:
        y = y + given["shift"].reshape(per_sample)
    return y


def exact(float64: Any, x: Tensor, **given: Any) -> Any:
    """The reference."""
    return reference.layer_norm(float64(x), **{name: float64(v) for name, v in given.items()})


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    run: Run,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    given = make(shape, dtype, seed)
    out = run(**given)
    within_budget(out, plain(**given), exact(float64, **given))
    assert out.is_contiguous()


@ALL
@pytest.mark.parametrize("without", ["weight", "bias", "scale", "shift", "all"])
def test_each_part_is_optional(
    run: Run, without: str, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make((2, 3, 40), torch.float32, seed)
    given = {k: v for k, v in given.items() if k == "x" or without not in (k, "all")}
    within_budget(run(**given), plain(**given), exact(float64, **given))


@ALL
def test_one_dimension(run: Run, seed: int, within_budget: Any, float64: Any) -> None:
    given = make((1, 33), torch.float32, seed)
    given = {"x": given["x"][0], "weight": given["weight"], "bias": given["bias"]}
    within_budget(run(**given), plain(**given), exact(float64, **given))


@ALL
def test_a_mean_of_a_thousand_deviations(
    run: Run, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make((2, 3, 320), torch.float32, seed, mean=1e3)
    within_budget(run(**given), plain(**given), exact(float64, **given))


@ALL
def test_strides_change_no_bit(run: Run, seed: int) -> None:
    given = make((2, 3, 4, 37), torch.float32, seed)
    x = given.pop("x")
    expected = run(x, **given)
    spread = {name: torch.stack([v, v], dim=-1)[..., 0] for name, v in given.items()}
    wide = torch.cat([x, x], dim=-1)
    turned = x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    heads = x.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (wide[..., :37], wide[..., 37:], turned, heads):
        assert not same.is_contiguous()
        assert torch.equal(run(same, **spread), expected)


@ALL
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_rows_are_exact(run: Run, modulated: bool, seed: int, row_exact: Any) -> None:
    shared = make((1, 3, 77), torch.float32, seed)

    def arguments(batch: int) -> dict[str, Any]:
        given = make((batch, 3, 77), torch.float32, seed + batch)
        rows = {name: given[name] if modulated else None for name in ("scale", "shift")}
        return {"x": given["x"], "weight": shared["weight"], "bias": shared["bias"], **rows}

    row_exact(run, arguments, rows=("x", "scale", "shift"), interpreted=run is RUNS["triton"])


@pytest.mark.parametrize("width", [48, 30])
def test_one_binary_wherever_a_sample_lies(width: int, seed: int) -> None:
    # The order of a GPU's sums follows from what a kernel is specialised for.
    config = {"BLOCK_R": 1, "warps": 4}

    def key(given: dict[str, Any]) -> str:
        (launch,) = module.plan(config, **given)[1]
        return str(launch.key())

    given = make((3, 7, 5, width), torch.float16, seed)
    rows = {name: given[name] for name in ("x", "scale", "shift")}
    expected = key(given)
    for i in range(3):
        assert key(given | {name: value[i : i + 1] for name, value in rows.items()}) == expected
    wide = torch.cat([rows["x"], rows["x"]], dim=-1)
    for x in (wide[..., :width], wide[..., width:], rows["x"].mT.contiguous().mT):
        assert key(given | {"x": x}) == expected


@pytest.mark.skipif(not _native.available(), reason="there is no extension to compare with")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extension_gives_the_bits_of_pytorch(dtype: torch.dtype, seed: int) -> None:
    # Whole rounds of 64 lanes, a vector more, a part of one, less than one.
    for width in (320, 336, 77, 7):
        given = make((2, 5, width), dtype, seed, mean=3.0)
        assert torch.equal(layer_norm(**given), RUNS["torch"](**given))


def test_fake_strides_are_the_real_ones_in_every_implementation(seed: int) -> None:
    x = torch.randn(2, 3, 5, 30, generator=torch.Generator().manual_seed(seed))
    for order in ((0, 1, 2, 3), (2, 1, 0, 3), (0, 3, 2, 1), (1, 0, 3, 2)):
        view = x.permute(order)
        torch.library.opcheck(torch.ops.heatsink.layer_norm, (view, None, None, 1e-5, None, None))
        fake = module._layer_norm_fake(view, None, None, 1e-5, None, None)
        for run in RUNS.values():
            out = run(view)
            assert (out.shape, out.stride()) == (fake.shape, fake.stride())


def test_opcheck_and_compile(seed: int) -> None:
    given = make((3, 7, 64), torch.float32, seed)
    x, weight, bias, scale, shift = given.values()
    torch.library.opcheck(torch.ops.heatsink.layer_norm, (x, weight, bias, 1e-5, scale, shift))
    torch.library.opcheck(torch.ops.heatsink.layer_norm, (x.mT, None, None, 1e-5, None, None))
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), layer_norm(**given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int, within_budget: Any, float64: Any) -> None:
    for shape in (*SHAPES, (2, 256, 1280), (2, 9, 16384)):
        given = {name: x.cuda() for name, x in make(shape, dtype, seed).items()}
        within_budget(layer_norm(**given), plain(**given), exact(float64, **given))


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    given = {name: x.cuda() for name, x in make((3, 7, 640), torch.float16, seed).items()}
    expected = layer_norm(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer_norm(**given)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


X = torch.ones(2, 3, 6)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.double()}, TypeError, "x: expected one of float16, bfloat16, float32"),
        ({"x": torch.ones(())}, ValueError, "x: expected .* got a tensor without dimensions"),
        ({"x": torch.ones(1, 16385)}, ValueError, "x: expected a last .* 16384, got 16385"),
        ({"x": X.clone().requires_grad_()}, ValueError, "x: expected no gradient"),
        ({"eps": -1.0}, ValueError, "eps: expected a positive number below .* got -1.0"),
        ({"eps": float("inf")}, ValueError, "eps: expected a positive number below .* got inf"),
        ({"eps": 10**400}, ValueError, "eps: expected a positive number below .* got 1000"),
        ({"eps": "a"}, TypeError, "eps: expected a number, got str"),
        ({"eps": True}, TypeError, "eps: expected a number, got bool"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: expected torch.float32 like x"),
        ({"scale": torch.ones(6)}, ValueError, r"scale: expected shape \(2, 6\), got \(6,\)"),
        ({"shift": torch.ones(3, 6)}, ValueError, r"shift: expected shape \(2, 6\)"),
        ({"x": X[0, 0], "shift": X[0]}, ValueError, r"x: expected \(N, ..., C\) with shift"),
        ({"scale": torch.ones(2, 6, device="meta")}, ValueError, "scale: expected device cpu"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        layer_norm(**{"x": X, **given})
