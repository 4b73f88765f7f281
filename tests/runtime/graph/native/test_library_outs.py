"""Products of libraries in given memory: the bits of the ops, and what is left to them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink.kernels
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.native import library_outs, outs
from heatsink.runtime.native.library_outs import conv2d_step, linear_step
from heatsink.runtime.native.program import Program

heatsink.kernels.load()
ROWS = (2, 5)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _terms(chosen: tuple[bool, bool, bool, str], *result: int) -> dict[str, Any]:
    bias, residual, sample, activation = chosen
    columns = result[1] if len(result) == 4 else result[-1]
    return {
        "bias": _draw(3, columns) if bias else None,
        "residual": _draw(4, *result) if residual else None,
        "sample_add": _draw(5, result[0], columns) if sample else None,
        "activation": activation,
    }


CHOICES = list(itertools.product([0, 1], [0, 1], [0, 1], ["", "silu", "gelu", "gelu_tanh"]))


@pytest.mark.parametrize("chosen", CHOICES)
def test_a_linear_layer_is_written_in_place(chosen: tuple[bool, bool, bool, str]) -> None:
    from heatsink.kernels.linear import _linear_torch

    x, weight, terms = _draw(1, *ROWS, 8), _draw(2, 6, 8), _terms(chosen, *ROWS, 6)
    out = torch.full((*ROWS, 6), float("nan"))
    step = linear_step(x, weight, **terms, out=out)
    assert step is not None
    for _ in range(2):
        step()
        assert torch.equal(out, _linear_torch(x, weight, **terms))


def test_what_would_round_twice_is_left_to_the_op() -> None:
    x, weight = _draw(1, *ROWS, 8).bfloat16(), _draw(2, 6, 8).bfloat16()
    out, term = torch.empty(*ROWS, 6, dtype=torch.bfloat16), _draw(4, *ROWS, 6).bfloat16()
    assert linear_step(x, weight, None, term, None, "", out) is not None
    assert linear_step(x, weight, None, None, None, "silu", out) is not None
    assert linear_step(x, weight, None, term, None, "silu", out) is None


def test_what_no_operator_writes_is_left_to_the_op() -> None:
    x, weight, out = _draw(1, *ROWS, 8), _draw(2, 6, 8), torch.empty(*ROWS, 6)
    assert linear_step(x, weight, None, None, None, "geglu", torch.empty(*ROWS, 3)) is None
    assert linear_step(x, weight, None, None, None, "quick_gelu", out) is None
    assert linear_step(x.transpose(0, 1), weight, None, None, None, "", out) is None
    assert linear_step(x, weight, None, None, None, "", torch.empty(*ROWS, 7)[..., :6]) is None
    assert linear_step(x[:0], weight, None, None, None, "", out[:0]) is None
    # Without cuDNN there is none of a convolution.
    image = _draw(1, 2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    kernel, result = _draw(2, 4, 4, 3, 3), torch.empty_like(image)
    assert conv2d_step(image, None, kernel, None, None, None, 1, 1, 1, "", result) is None


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Another convolution in the place of cuDNN's, by the names of its schema; shapes it gave."""
    names = [each.name for each in torch.ops.aten.cudnn_convolution.out._schema.arguments]
    found: list[tuple[int, ...]] = []

    def convolution(*values: Any, out: Tensor) -> None:
        given = dict(zip(names, values, strict=False))
        assert len(given) == len(names) - 1
        assert given["weight"].is_contiguous(memory_format=torch.channels_last)
        window = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
        out.copy_(torch.nn.functional.conv2d(given["self"], given["weight"], None, **window))
        found.append(tuple(out.shape))

    fakes = SimpleNamespace(cudnn_convolution=SimpleNamespace(out=convolution))
    monkeypatch.setattr(library_outs, "aten", fakes)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return found


def _of_library(op: Any) -> outs.MakeStep:
    """What a program makes of a product on a CUDA device."""
    make = outs._LIBRARY[op._schema.name.removeprefix("heatsink::")]
    return lambda args, kwargs, out: make(*outs._positional(op, args, kwargs), out)


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_a_program_of_libraries_products_gives_the_graphs_results(
    name: str,
    cases: dict[str, Any],
    graphs: Callable[[str], Graph],
    cudnn: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for op in (torch.ops.heatsink.linear.default, torch.ops.heatsink.conv2d.default):
        monkeypatch.setitem(outs.OUTS, op, _of_library(op))
    graph = run_passes(graphs(name), PASSES_NATIVE)
    program = Program(graph, 2, {n: w.load() for n, w in graph.weights.items()})
    left = Counter(target for target, _ in program.unplanned)
    convolutions = Counter(str(node.target) for node in graph.nodes)["heatsink.conv2d.default"]
    given = cases[name].inputs(2, seed=3)
    plain, exact = graph.run(given), graph.run(given, dtype=torch.float64)
    for output, value in program.run(given).items():
        error, own = ((v - exact[output]).abs().max() for v in (value, plain[output]))
        assert error <= 2 * (own + torch.finfo(torch.float32).eps * exact[output].abs().max())
    assert len(cudnn) == convolutions - left["heatsink.conv2d.default"] > convolutions // 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chosen", CHOICES)
def test_products_on_cuda_have_the_bits_of_the_ops(
    chosen: tuple[bool, bool, bool, str], dtype: torch.dtype
) -> None:
    x, weight = (
        _draw(seed, *shape).to("cuda", dtype) for seed, shape in ((1, (3, 77, 64)), (2, (96, 64)))
    )
    terms = _on_cuda(_terms(chosen, 3, 77, 96), dtype)
    _same(linear_step, torch.ops.heatsink.linear, (x, weight), terms, (), dtype)
    image = _draw(1, 3, 32, 9, 8).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    for size, stride in ((3, 1), (3, 2), (1, 1)):
        kernel = _draw(2, 48, 32, size, size).to("cuda", dtype)
        result = (3, 48, *((n + 2 * (size // 2) - size) // stride + 1 for n in (9, 8)))
        terms = _on_cuda(_terms(chosen, *result), dtype)
        window = (stride, size // 2, 1)
        _same(conv2d_step, torch.ops.heatsink.conv2d, (image, None, kernel), terms, window, dtype)


def _on_cuda(terms: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    found = {n: v.to("cuda", dtype) if isinstance(v, Tensor) else v for n, v in terms.items()}
    residual = found["residual"]
    if residual is not None and residual.dim() == 4:
        found["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return found


def _same(
    make: Any, op: Any, given: Any, terms: dict[str, Any], window: tuple[int, ...], dtype: Any
) -> None:
    *values, activation = terms.values()
    wanted = op(*given, *values, *window, activation)
    out = torch.full_like(wanted, float("nan"))
    step = make(*given, *values, *window, activation, out)
    after = (terms["residual"], terms["sample_add"], activation or None)
    several = sum(term is not None for term in after) > 1
    assert (step is None) == (several and dtype != torch.float32)
    if step is not None:
        step()
        assert torch.equal(out, wanted)
