"""Against the arithmetic of `runtime`, bit by bit: an image does not depend on who computes it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels.guided_step import guided_step
from heatsink.runtime import noise
from heatsink.runtime.schedule import (
    ScheduleConfig,
    apply_guidance,
    apply_step,
    coefficients,
    make_schedule,
)

module = import_module("heatsink.kernels.guided_step")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned to a program, ragged, no rows, no elements; latents of SD1.5 and of the bundled model.
SHAPES = ((6, 4, 8, 8), (6, 3, 5, 7), (0, 4, 8, 8), (6, 4, 0, 8), (2, 4, 64, 64), (9, 8, 8, 8))
CONFIG = ScheduleConfig.from_diffusers(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
)
# Sampler, steps, eta, the step a row is at: with and without history and noise.
PLACES = (
    ("euler", 20, 0.0, 3),
    ("dpm++2m", 20, 0.0, 0),
    ("dpm++2m", 20, 0.0, 7),
    ("ddim", 10, 1.0, 4),
    ("ddim", 10, 0.0, 9),
    ("lcm", 4, 0.0, 1),
    ("lcm", 4, 0.0, 3),
)
SEEDS = (0, 1, 2**63, 2**64 - 1, 2**32, 77)
ALL = pytest.mark.parametrize(
    "run",
    [guided_step, module._guided_step_torch, module._guided_step_triton],
    ids=["op", "torch", "triton"],
)
Inputs = dict[str, Any]
Run = Callable[..., tuple[Tensor, Tensor]]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int, first: int = 0) -> Inputs:
    """Rows at different steps of different schedules; every third one is not guided."""
    generator = torch.Generator().manual_seed(seed)
    rows = range(first, first + shape[0])
    schedules = [(make_schedule(n, s, CONFIG, eta=e), at) for n, s, e, at in PLACES]
    guided = torch.tensor([row % 3 != 2 for row in rows], dtype=torch.bool)
    cond = torch.cumsum(1 + guided.int(), 0) - 1
    out = torch.randn((2 * shape[0], *shape[1:]), generator=generator).to(dtype)
    seeds = [SEEDS[row % len(SEEDS)] + row * (row >= len(SEEDS)) for row in rows]
    return {
        "x": 3 * torch.randn(shape, generator=generator),
        "out": out,
        "x0_prev": torch.randn(shape, generator=generator),
        "coef": coefficients([schedules[row % len(schedules)] for row in rows]),
        "guidance": 1 + 8 * torch.rand(shape[0], generator=generator),
        "uncond": (cond - guided.int()).int(),
        "cond": cond.int(),
        "seeds": torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], dtype=torch.int64),
        "steps": torch.tensor([PLACES[row % len(PLACES)][3] for row in rows], dtype=torch.int64),
    }


def by_runtime(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What runtime/sampler.py does with these rows."""
    x, out = inputs["x"], inputs["out"]
    cond = out[inputs["cond"].long()].float()
    both = apply_guidance(out[inputs["uncond"].long()], cond, inputs["guidance"])
    guided = (inputs["uncond"] != inputs["cond"]).reshape(-1, 1, 1, 1)
    seeds = [seed % 2**64 for seed in inputs["seeds"].tolist()]
    fresh = noise.normal_rows(seeds, noise.STEP, inputs["steps"].tolist(), x.shape[1:])
    return apply_step(x, torch.where(guided, both, cond), inputs["x0_prev"], fresh, inputs["coef"])


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.int32)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert found.is_contiguous()
        assert found.shape == wanted.shape
        assert torch.equal(bits(found), bits(wanted))


def call(run: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return run(*inputs.values())


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_runtime(
    run: Run, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    inputs = make(shape, dtype, seed)
    assert_same(call(run, inputs), by_runtime(inputs))


def test_against_float64(seed: int, within_budget: Any) -> None:
    inputs = make((7, 2, 3, 5), torch.float32, seed)
    exact = reference.guided_step(*(value.numpy() for value in inputs.values()))
    for found, wanted in zip(guided_step(**inputs), exact, strict=True):
        # x and x0 nearly cancel in x_next: its scale is that of its terms.
        scale = max(abs(value).max() for value in (*exact, inputs["x"].numpy()))
        assert abs(found.double().numpy() - wanted).max() <= 12 * 2.0**-23 * scale


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "row_strided": lambda x: torch.stack([x, 2 * x], dim=1)[:, 0],
}


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strides_do_not_matter(run: Run, layout: str, dtype: torch.dtype, seed: int) -> None:
    inputs = make((6, 4, 9, 7), dtype, seed)
    expected = by_runtime(inputs)
    views = {name: LAYOUTS[layout](inputs[name]) for name in ("x", "out", "x0_prev")}
    assert_same(call(run, {**inputs, **views}), expected)
    vectors = {name: torch.stack([inputs[name]] * 2, dim=-1)[..., 0] for name in module.VECTORS}
    assert_same(call(run, {**inputs, **vectors}), expected)


@ALL
def test_what_a_row_does_not_use_may_hold_anything(run: Run, seed: int) -> None:
    inputs = make((7, 4, 6, 6), torch.float32, seed)
    expected = by_runtime(inputs)
    rows = inputs["coef"][:, 6] == 0
    assert rows.any()
    assert not rows.all()
    inputs["x0_prev"][rows] = torch.nan
    inputs["guidance"][inputs["uncond"] == inputs["cond"]] = torch.nan
    assert_same(call(run, inputs), expected)


@ALL
def test_rows_are_exact(run: Run, seed: int, row_exact: Any) -> None:
    def own_rows(batch: int) -> Inputs:
        inputs = make((batch, 4, 5, 5), torch.float16, seed + batch, first=batch)
        index = torch.arange(batch, dtype=torch.int32)
        return {**inputs, "out": inputs["out"].view(batch, 2, 4, 5, 5), "uncond": index}

    def pairs(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        # Two rows of `out` a sample, and the odd one is the prompt's.
        index = torch.arange(len(inputs["x"]), dtype=torch.int32)
        pair = {"uncond": 2 * index, "cond": 2 * index + 1}
        return call(run, {**inputs, "out": inputs["out"].flatten(0, 1), **pair})

    rows = ("x", "out", "x0_prev", "coef", "guidance", "seeds", "steps")
    row_exact(pairs, own_rows, rows=rows)


def test_a_row_that_out_has_not(seed: int) -> None:
    inputs = make((2, 4, 3, 3), torch.float32, seed)
    inputs["cond"] = torch.tensor([1, 4], dtype=torch.int32)
    for run in (guided_step, module._guided_step_torch):
        with pytest.raises(RuntimeError, match="cond: expected rows of out, 0 to 3, got 4"):
            call(run, inputs)
    x_next, x0 = call(module._guided_step_triton, inputs)
    assert x_next[0].isfinite().all()
    assert x_next[1].isnan().all()
    assert x0[1].isnan().all()


def test_opcheck_and_compile(seed: int) -> None:
    inputs = make((5, 4, 4, 4), torch.float32, seed)
    torch.library.opcheck(torch.ops.heatsink.guided_step, tuple(inputs.values()))
    compiled = torch.compile(guided_step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**inputs), guided_step(**inputs))


def test_the_implementation_is_said() -> None:
    assert _native.describe().startswith("C++" if _native.available() else "PyTorch (")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_and_in_a_graph(dtype: torch.dtype, seed: int) -> None:
    inputs = make((9, 4, 64, 64), dtype, seed)
    expected = by_runtime(inputs)
    for layout in (torch.contiguous_format, torch.channels_last):
        there = {name: value.cuda() for name, value in inputs.items()}
        there["out"] = there["out"].contiguous(memory_format=layout)
        assert_same(guided_step(**there), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = guided_step(**there)
        for result in results:
            result.zero_()
        graph.replay()
        assert_same(results, expected)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": 1.0}, TypeError, "x: expected a tensor, got float"),
        ({"x": torch.ones(2, 4, 3, 3).half()}, TypeError, "x: expected one of float32"),
        ({"out": torch.ones(4, 4, 3, 3).double()}, TypeError, "out: expected one of float16"),
        ({"cond": torch.zeros(2)}, TypeError, "cond: expected torch.int32 like uncond"),
        ({"seeds": torch.zeros(2).int()}, TypeError, "seeds: expected one of int64"),
        ({"out": torch.ones(4, 4, 3, 2)}, ValueError, r"out: expected shape \(4, 4, 3, 3\)"),
        ({"x0_prev": torch.ones(1, 4, 3, 3)}, ValueError, r"x0_prev: expected shape \(2, 4, 3"),
        ({"coef": torch.ones(2, 7)}, ValueError, r"coef: expected shape \(2, 8\), got \(2, 7\)"),
        ({"steps": torch.zeros(3).long()}, ValueError, r"steps: expected shape \(2,\)"),
        ({"out": torch.ones(4, 4, 3, 3, device="meta")}, ValueError, "out: expected device cpu"),
        ({"x": torch.ones(())}, ValueError, "x, out: expected .* without dimensions"),
        ({"coef": torch.ones(2, 8, requires_grad=True)}, ValueError, "coef: expected no grad"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    inputs: dict[str, Any] = {**make((2, 4, 3, 3), torch.float32, 0), **changes}
    with pytest.raises(error, match=match):
        guided_step(**inputs)


def by_default(*given: Tensor, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    module._guided_step_out_torch(*given, *results)
    return results


def by_launch(*given: Tensor, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    module._guided_step_out_triton(*given, *results)
    return results


RESULTS = pytest.mark.parametrize(
    "run", [guided_step, by_default, by_launch], ids=["op", "torch", "triton"]
)


@RESULTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_given_memory(run: Run, dtype: torch.dtype, seed: int) -> None:
    inputs = make((7, 3, 5, 7), dtype, seed)
    wanted = guided_step(**inputs)
    given = (torch.full_like(inputs["x"], torch.nan), torch.full_like(inputs["x"], torch.nan))
    assert run(*inputs.values(), results=given) is given
    assert_same(given, wanted)
    # The next sample where this one was.
    given = (inputs["x"], given[1])
    assert_same(run(*inputs.values(), results=given), wanted)


@RESULTS
def test_memory_of_other_arguments_is_refused(run: Run, seed: int) -> None:
    inputs = make((3, 4, 8, 8), torch.float32, seed)
    x, other = inputs["x"], torch.empty_like(inputs["x"])
    memory = torch.zeros(2 * x.numel())
    inputs["out"] = inputs["out"].contiguous()
    for results, name in (
        ((other, x), "x0"),
        ((other, inputs["x0_prev"]), "x0"),
        ((inputs["x0_prev"], other), "x_next"),
        ((inputs["out"][1:4], other), "x_next"),
        ((other, other), "x0"),
        ((memory[: x.numel()].view_as(x), memory[8 : 8 + x.numel()].view_as(x)), "x0"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected memory apart"):
            run(*inputs.values(), results=results)


def test_results_that_do_not_fit_are_refused(seed: int) -> None:
    inputs = make((3, 4, 8, 8), torch.float32, seed)
    good = torch.empty(3, 4, 8, 8)
    for bad, error, match in (
        (good[1:], ValueError, "x0: expected shape"),
        (good.half(), TypeError, "x0: expected torch.float32 like x"),
        (torch.empty(3, 4, 8, 16)[..., ::2], ValueError, "x0: expected contiguous memory"),
    ):
        with pytest.raises(error, match=match):
            guided_step(**inputs, results=(good, bad))


def test_a_step_in_given_memory_allocates_nothing(
    seed: int, allocations: Callable[..., int]
) -> None:
    if not _native.available():
        pytest.skip("the extension is not in use")
    inputs = make((7, 4, 8, 8), torch.float32, seed)
    given = torch.empty_like(inputs["x"]), torch.empty_like(inputs["x"])
    assert allocations(lambda: guided_step(**inputs, results=given)) == 0
    assert allocations(lambda: guided_step(**inputs)) > 0
    torch.library.opcheck(torch.ops.heatsink.guided_step_out, (*inputs.values(), *given))
