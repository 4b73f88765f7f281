from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels._merge_terms import flat
from heatsink.kernels.lora_merge import Term, lora_merge

module = import_module("heatsink.kernels.lora_merge")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Run = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Term]], None]


def flattened(run: Callable[..., None]) -> Run:
    """An implementation, called as the public function is."""
    return lambda base, out, terms: run(list(base), list(out), *flat(terms))


# The op as a user calls it, what serves without a compiler, and the Triton kernel, here under the
# interpreter.
RUNS: dict[str, Run] = {
    "op": lora_merge,
    "torch": flattened(module._lora_merge_torch),
    "triton": flattened(module._lora_merge_triton),
}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
# Aligned, ragged, one value, few columns, a 3x3 and a 1x1 convolution, one of a width of Stable
# Diffusion.
SHAPES = ((64, 64), (37, 45), (1, 1), (70, 3), (5, 6, 3, 3), (9, 20, 1, 1), (8, 320))


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """A tensor's bit patterns."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def term(
    weight: Tensor,
    rank: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    number: int = 0,
    magnitude: bool = False,
    count: int | None = None,
    **rest: Any,
) -> Term:
    """A term of random values for a weight, of which the product is about as large."""
    count = weight.shape[0] if count is None else count
    a = normal((rank, *weight.shape[1:]), dtype, seed)
    b = normal((count, rank), dtype, seed + 1)
    lengths = None
    if magnitude:
        lengths = (torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)
    return Term(number, a, b, 0.7 * rank**-0.5, lengths, **rest)


def merged(run: Run, base: Sequence[Tensor], terms: Sequence[Term]) -> list[Tensor]:
    """What an implementation gives, into memory full of NaN."""
    out = [torch.full_like(x, float("nan")) for x in base]
    before = [x.clone() for x in base]
    run(base, out, terms)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(base, before, strict=True))
    return out


def plain(base: Tensor, terms: Sequence[Term]) -> Tensor:
    """What a user would write, in the weight's dtype."""
    total, factor = torch.zeros_like(base), torch.ones_like(base.flatten(1)[:, :1])
    for t in terms:
        rows = slice(t.row, t.row + (len(t.b) - 1) * t.step + 1, t.step)
        part = (t.scale * (t.b.float() @ t.a.float().flatten(1))).to(base.dtype)
        if t.magnitude is not None:
            length = (base.flatten(1)[rows] + part).norm(dim=1, keepdim=True)
            gain = t.magnitude.to(base.dtype)[:, None] / length
            factor[rows] += gain - 1
            part = part * gain
        total[rows] += part.reshape(total[rows].shape)
    return (base.flatten(1) * factor).reshape(base.shape) + total


def exact(float64: Any, base: Tensor, terms: Sequence[Term]) -> Any:
    """The reference."""
    rows = [
        (
            float64(t.a),
            float64(t.b),
            t.scale,
            None if t.magnitude is None else float64(t.magnitude),
            t.row,
            t.step,
        )
        for t in terms
    ]
    return reference.lora_merge(float64(base), rows)


@pytest.fixture
def check(within_budget: Any, float64: Any) -> Callable[..., None]:
    """Compares the results with float64, weight by weight."""

    def compare(run: Run, base: Sequence[Tensor], terms: Sequence[Term]) -> None:
        for j, out in enumerate(merged(run, base, terms)):
            mine = [t for t in terms if t.weight == j]
            within_budget(out, plain(base[j], mine), exact(float64, base[j], mine))

    return compare


@ALL
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(
    run: Run, dtype: torch.dtype, adapter: torch.dtype, seed: int, check: Any
) -> None:
    base = [normal(shape, dtype, seed + j) for j, shape in enumerate(SHAPES)]
    check(run, base, [term(x, 4, seed + j, adapter, number=j) for j, x in enumerate(base)])


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_against_float64(run: Run, dtype: torch.dtype, seed: int, check: Any) -> None:
    base = [normal(shape, dtype, seed + j) for j, shape in enumerate(SHAPES)]
    terms = [term(x, 3, seed + j, number=j, magnitude=True) for j, x in enumerate(base)]
    # Another with magnitudes, and one without.
    terms += [term(base[1], 2, seed + 20, number=1, magnitude=True)]
    terms += [term(base[1], 2, seed + 30, number=1)]
    check(run, base, terms)


@ALL
@pytest.mark.parametrize("ranks", [(1,), (15, 17), (128,), (5, 1, 33, 2, 64)], ids=str)
def test_ranks(run: Run, ranks: tuple[int, ...], seed: int, check: Any) -> None:
    base = [normal((12, 48), torch.float32, seed)]
    check(run, base, [term(base[0], rank, seed + rank) for rank in ranks])


@ALL
def test_mixed_dtypes(run: Run, seed: int, check: Any) -> None:
    base = [normal((20, 48), torch.float32, seed)]
    terms = []
    for j, dtype in enumerate(DTYPES):
        other = DTYPES[(j + 1) % 3]
        made = term(base[0], 4, seed + j, dtype)
        lengths = normal((20,), DTYPES[(j + 2) % 3], seed + j).abs() + 1
        terms += [Term(0, made.a, made.b.to(other), 0.3, lengths), made]
    check(run, base, terms)


@ALL
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "dora"])
def test_packed_and_interleaved_rows(run: Run, magnitude: bool, seed: int, check: Any) -> None:
    base = [normal((3 * 21, 40), torch.float32, seed), normal((24, 18), torch.float32, seed + 1)]
    terms = [
        term(base[0], 3, seed + j, count=21, row=row, magnitude=magnitude)
        for j, row in enumerate((42, 0))
    ]
    terms += [
        term(base[1], 3, seed + 9, number=1, count=12, row=1, step=2, magnitude=magnitude),
        term(base[1], 2, seed + 8, number=1, count=5, row=3, step=4),
    ]
    check(run, base, terms)
    out = merged(run, base, terms)
    # The rows between, and the even ones, are the base's.
    assert torch.equal(out[0][21:42], base[0][21:42])
    assert torch.equal(out[1][::2], base[1][::2])


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_terms_are_copied_bit_by_bit(run: Run, dtype: torch.dtype, seed: int) -> None:
    base = [normal((70, 33), dtype, seed), normal((4, 16), dtype, seed + 1)]
    base[0][0, :4] = torch.tensor([-0.0, float("inf"), float("nan"), -float("inf")])
    out = merged(run, base, [term(base[0], 4, seed, count=3, row=60, step=2)])
    touched = [60, 62, 64]
    rest = [i for i in range(70) if i not in touched]
    assert torch.equal(bits(out[0])[rest], bits(base[0])[rest])
    assert not torch.equal(out[0][touched], base[0][touched])
    assert torch.equal(bits(out[1]), bits(base[1]))


@ALL
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_channels_last_changes_no_bit(run: Run, order: str, seed: int) -> None:
    # Sums are over the rank alone; with magnitudes a row's norm would be in another order.
    weight = normal((24, 16, 3, 3), torch.float16, seed)
    made = term(weight, 5, seed, torch.float16)
    (expected,) = merged(run, [weight], [made])
    last = weight.contiguous(memory_format=torch.channels_last)
    a = made.a if order == "contiguous" else made.a.contiguous(memory_format=torch.channels_last)
    (out,) = merged(run, [last], [Term(0, a, made.b, made.scale)])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    # A transposed B, and an A with its columns flat.
    turned = Term(0, made.a.flatten(1), made.b.t().contiguous().t(), made.scale)
    assert not turned.b.is_contiguous()
    assert torch.equal(merged(run, [last], [turned])[0], expected)


@ALL
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "dora"])
def test_a_weight_does_not_depend_on_the_others(run: Run, magnitude: bool, seed: int) -> None:
    base = [normal(shape, torch.float32, seed + j) for j, shape in enumerate(SHAPES)]
    terms = [term(x, 4, seed + j, number=j, magnitude=magnitude) for j, x in enumerate(base)]
    terms += [term(base[1], 4, seed + 20, torch.float16, number=1)]
    together = merged(run, base, terms)
    for j in range(len(base)):
        mine = [Term(0, t.a, t.b, t.scale, t.magnitude) for t in terms if t.weight == j]
        assert torch.equal(merged(run, [base[j]], mine)[0], together[j])
    # Nor on where the terms of others stand among its own.
    assert all(map(torch.equal, merged(run, base, terms[::-1][1:] + terms[-1:]), together))


@ALL
def test_terms_without_effect_are_left_out(run: Run, seed: int) -> None:
    base = [normal((6, 8), torch.float16, seed)]
    base[0][0, 0] = -0.0
    none = [
        Term(0, torch.ones(2, 8), torch.ones(6, 2), 0.0),
        Term(0, torch.ones(2, 8), torch.ones(0, 2), 1.0),
        Term(0, torch.ones(0, 8), torch.ones(6, 0), 1.0),
    ]
    (out,) = merged(run, base, none)
    assert torch.equal(bits(out), bits(base[0]))


@ALL
def test_a_magnitude_counts_at_scale_0(run: Run, check: Callable[..., None], seed: int) -> None:
    base = [normal((6, 8), torch.float32, seed)]
    whole = term(base[0], 2, seed, magnitude=True)
    terms = [replace(whole, scale=0.0)]
    check(run, base, terms)
    out = merged(run, base, terms)
    assert whole.magnitude is not None
    assert torch.allclose(out[0].norm(dim=1), whole.magnitude)


@ALL
def test_empty(run: Run) -> None:
    lora_merge([], [], [])
    base = [torch.ones(0, 4), torch.ones(3, 0), torch.ones(2, 2)]
    out = merged(run, base, [Term(1, torch.ones(2, 0), torch.ones(3, 2), 1.0)])
    assert torch.equal(out[2], base[2])


@ALL
def test_a_weight_without_terms_may_be_its_own_base(run: Run, seed: int) -> None:
    base = [normal((5, 7), torch.float32, seed), normal((4, 8), torch.float32, seed)]
    out = [base[0], torch.full_like(base[1], float("nan"))]
    before = base[0].clone()
    run(base, out, [term(base[1], 2, seed, number=1)])
    assert torch.equal(base[0], before)
    assert not out[1].isnan().any()


def test_rounded_once(seed: int, float64: Any) -> None:
    # Of float64 results rounded to fp16, nearly all are met; by what is computed in fp16, fewer.
    base = [normal((64, 320), torch.float16, seed)]
    made = term(base[0], 16, seed, torch.float16)
    wanted = exact(float64, base[0], [made]).astype(np.float16)
    for run in (RUNS["op"], RUNS["triton"]):
        met = (merged(run, base, [made])[0].numpy() == wanted).mean()
        assert met > 0.998
    assert (plain(base[0], [made]).numpy() == wanted).mean() < 0.9


def test_opcheck(seed: int) -> None:
    base = [normal((5, 6), torch.float32, seed), normal((4, 2, 3, 3), torch.float32, seed)]
    out = [torch.empty_like(x) for x in base]
    terms = [term(base[0], 2, seed, magnitude=True), term(base[1], 3, seed, number=1)]
    torch.library.opcheck(torch.ops.heatsink.lora_merge.default, (base, out, *flat(terms)))


def test_compiled(seed: int) -> None:
    base = [normal((5, 6), torch.float32, seed), normal((4, 8), torch.float32, seed)]
    made = [term(base[0], 2, seed, magnitude=True), term(base[1], 3, seed, number=1)]

    def swap(base: list[Tensor], out: list[Tensor], a: list[Tensor], b: list[Tensor]) -> Tensor:
        terms = [Term(j, a[j], b[j], 0.5, made[j].magnitude) for j in range(2)]
        lora_merge(base, out, terms)
        return out[0].sum()

    given = [t.a for t in made], [t.b for t in made]
    expected = [torch.empty_like(x) for x in base]
    total = swap(base, expected, *given)
    out = [torch.full_like(x, float("nan")) for x in base]
    compiled = torch.compile(swap, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(base, out, *given), total)
    assert all(map(torch.equal, out, expected))


def test_one_launch_for_a_models_adapter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [normal((32, 48), torch.float16, seed + j) for j in range(40)]
    terms = [term(x, 1 + j, seed, torch.float16, number=j) for j, x in enumerate(base)]
    terms += [term(base[j], 3, seed + j, torch.float16, number=j) for j in range(7)]
    launched: list[Any] = []
    monkeypatch.setattr(module, "run", launched.extend)
    RUNS["triton"](base, [torch.empty_like(x) for x in base], terms)
    assert len(launched) == 1
    # What is rare has a launch of its own: uneven columns, an fp32 adapter, magnitudes.
    base += [normal((8, 9), torch.float16, seed)]
    terms += [
        term(base[0], 2, seed),
        term(base[1], 2, seed, torch.float16, number=1, magnitude=True),
    ]
    launched.clear()
    RUNS["triton"](base, [torch.empty_like(x) for x in base], terms)
    classes = [(c["EVEN_ROWS"], c["FORM"], c["GAINS"]) for c in (x.constants for x in launched)]
    assert sorted(classes) == [
        (False, "any", False),
        (True, "any", False),
        (True, "fp16", False),
        (True, "fp16", True),
    ]


def test_plan_needs_no_values() -> None:
    config = {"BLOCK_M": 64, "ANY_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "COLUMNS": 128} | {
        "warps": 4,
        "stages": 1,
    }
    x = torch.empty(130, 320, dtype=torch.float16, device="meta")
    made = Term(0, torch.empty(4, 320, device="meta"), torch.empty(130, 4, device="meta"), 1.0)
    _, (launch,) = module.plan(config, [x], [torch.empty_like(x)], [made])
    assert launch.grid == (5 * 3, 1, 1)
    assert launch.args["strips_ptr"].device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(
    dtype: torch.dtype,
    adapter: torch.dtype,
    magnitude: bool,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    base = [normal(shape, dtype, seed + j) for j, shape in enumerate((*SHAPES, (1280, 2048)))]
    terms = [
        term(x, 24, seed + j, adapter, number=j, magnitude=magnitude) for j, x in enumerate(base)
    ]
    on_gpu = [
        replace(
            t,
            a=t.a.cuda(),
            b=t.b.cuda(),
            magnitude=None if t.magnitude is None else t.magnitude.cuda(),
        )
        for t in terms
    ]
    out = merged(lora_merge, [x.cuda() for x in base], on_gpu)
    for x, made, found in zip(base, terms, out, strict=True):
        within_budget(found.cpu(), plain(x, [made]), exact(float64, x, [made]))
