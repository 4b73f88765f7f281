from __future__ import annotations

import random
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.kernels._config import lookup, target_of
from heatsink.kernels._launch import run
from heatsink.kernels._merge_tables import MergeTables, TermTable
from heatsink.kernels.lora_merge import KERNEL, Term, key, lora_merge
from heatsink.kernels.merge_plan import MergePlan

module = import_module("heatsink.kernels.merge_plan")

SHAPES = ((16, 24), (5, 7), (24, 16), (6, 3, 3, 3), (8, 8))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(base: list[Tensor], weights: tuple[int, ...], rank: int, seed: int) -> list[Term]:
    """Terms on some of the weights; the first has magnitudes, the last a row of two."""
    terms = []
    for j in weights:
        rows, step = (base[j].shape[0] // 2, 2) if j == weights[-1] else (base[j].shape[0], 1)
        a, b = normal((rank, *base[j].shape[1:]), seed + j), normal((rows, rank), seed - j)
        lengths = normal((rows,), seed).abs() + 0.5 if j == weights[0] else None
        terms.append(Term(j, a, b, 0.3, lengths, 0, step))
    return terms


def weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [normal(shape, seed + j).to(dtype) for j, shape in enumerate(SHAPES)]


def fresh(base: list[Tensor], chosen: list[tuple[list[Term], float]]) -> list[Tensor]:
    """A merge of its own into new memory."""
    out = [torch.full_like(x, float("nan")) for x in base]
    terms = [
        Term(t.weight, t.a, t.b, t.scale * weight, t.magnitude, t.row, t.step)
        for terms, weight in chosen
        if weight
        for t in terms
    ]
    lora_merge(base, out, terms)
    return out


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_a_thousand_swaps_leave_no_trace(seed: int) -> None:
    base = weights(seed, torch.float32)
    terms = {
        "a": adapter(base, (0, 1, 3), 4, seed),
        "b": adapter(base, (1, 2, 3), 3, seed + 50),
        "c": adapter(base, (4, 0), 9, seed + 90),
    }
    sets: list[list[tuple[str, float]]] = [
        [],
        [("a", 1.0)],
        [("b", 0.8)],
        [("c", -1.5)],
        [("a", 0.8), ("b", 0.3)],
        [("b", 0.3), ("a", 0.8)],
        [("c", 1.0), ("a", 0.0)],
        [("a", 0.5), ("b", 0.25), ("c", 1.0)],
    ]
    expected = [fresh(base, [(terms[n], w) for n, w in chosen]) for chosen in sets]
    assert same(expected[0], base)
    # No two sets give the same, but for the order: a merge that did nothing would show.
    alike = [(i, j) for i in range(8) for j in range(i) if same(expected[i], expected[j])]
    assert set(alike) <= {(5, 4)}
    before = [x.clone() for x in base]
    out = [torch.full_like(x, float("nan")) for x in base]
    plan = MergePlan(base, out)
    prepared = {name: plan.prepare(these) for name, these in terms.items()}
    draw = random.Random(seed)
    for _ in range(1000):
        number = draw.randrange(len(sets))
        plan.merge([(prepared[name], weight) for name, weight in sets[number]])
        assert same(out, expected[number])
    plan.merge()
    assert same(out, base)
    assert same(base, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_a_term_begins_chooses_nothing(dtype: torch.dtype, seed: int) -> None:
    base = [normal((16, 32), seed).to(dtype)]
    a, b = normal((4, 32), seed + 1).to(dtype), normal((16, 4), seed + 2).to(dtype)
    results, rows = [], []
    for start in (0, 1, 4, 7, 8):
        moved = torch.empty(a.numel() + 8, dtype=dtype)[start:][: a.numel()].view(a.shape)
        moved.copy_(a)
        terms = [Term(0, moved, b, 0.5)]
        table, out = TermTable(base, terms), [torch.full_like(base[0], float("nan"))]
        tables = MergeTables(base, out)
        # By the form goes which binary is launched; what it is given begins where it reads.
        rows.append(table.rows[0, 3:].tolist())
        assert table.rows[0, 0] % 16 == 0
        run(
            tables.launches(
                lookup("lora_merge", key(base), target_of(torch.device("cpu"))), KERNEL, table
            )
        )
        results.append(out[0])
    assert all(row == rows[0] for row in rows)
    assert rows[0][5] < 2
    assert same(results, [results[0]] * len(results))
    reference = base[0].double() + 0.5 * (b.double() @ a.double())
    eps = torch.finfo(dtype).eps
    assert (results[0].double() - reference).abs().max() <= 2 * eps * reference.abs().max()


def test_only_what_changes_is_written(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = weights(seed)
    out = [torch.full_like(x, float("nan")) for x in base]
    plan = MergePlan(base, out)
    a, b = (
        plan.prepare(adapter(base, (0, 1), 2, seed)),
        plan.prepare(adapter(base, (1, 3), 2, seed)),
    )
    written: list[list[int]] = []
    # The op of this name is what `merge` calls.
    merge = torch.ops.heatsink.lora_merge

    def spy(base: list[Tensor], out: list[Tensor], *rest: Any) -> None:
        written.append([next(j for j, x in enumerate(plan.out) if x is y) for y in out])
        merge(base, out, *rest)

    monkeypatch.setattr(torch.ops.heatsink, "lora_merge", spy)
    plan.merge([(a, 1.0)])
    plan.merge([(b, 1.0)])
    plan.merge()
    plan.merge()
    plan.forget()
    plan.merge()
    everything = [0, 1, 2, 3, 4]
    assert written == [everything, [0, 1, 3], [1, 3], everything]
    assert same(out, base)


def test_a_failed_merge_is_repaired_by_the_next(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = weights(seed)
    out = [torch.empty_like(x) for x in base]
    plan = MergePlan(base, out)
    a, b = plan.prepare(adapter(base, (0, 1), 2, seed)), plan.prepare(adapter(base, (3,), 2, seed))
    plan.merge([(a, 1.0)])

    def fails(base: list[Tensor], out: list[Tensor], *_: Any) -> None:
        out[-1].fill_(float("nan"))
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.heatsink, "lora_merge", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            plan.merge([(b, 1.0)])
    plan.merge([(a, 1.0)])
    assert same(out, fresh(base, [(adapter(base, (0, 1), 2, seed), 1.0)]))


def test_tables_of_joined_adapters_give_the_same_bits(seed: int) -> None:
    # What `merge` does on a GPU, under the interpreter.
    base = weights(seed, torch.float16)
    parts = [(adapter(base, (0, 1, 3), 4, seed), 0.8), (adapter(base, (3, 1), 3, seed + 9), 0.3)]
    config = lookup("lora_merge", key(base), target_of(base[0].device))
    out = [torch.full_like(x, float("nan")) for x in base]
    expected = [torch.full_like(x, float("nan")) for x in base]
    tables = MergeTables(base, out)
    only = np.array([True, True, False, True, False])
    joined = TermTable.joined([(TermTable(base, terms), weight) for terms, weight in parts])
    run(tables.launches(config, KERNEL, joined, only))
    terms = [
        Term(t.weight, t.a, t.b, t.scale * w, t.magnitude, t.row, t.step)
        for ts, w in parts
        for t in ts
    ]
    run(MergeTables(base, expected).launches(config, KERNEL, TermTable(base, terms)))
    for j in range(len(base)):
        assert torch.equal(out[j], expected[j]) if only[j] else bool(out[j].isnan().all())
    # Again, with the strips of last time, after other weights in between.
    run(tables.launches(config, KERNEL, TermTable.joined([]), ~only))
    run(tables.launches(config, KERNEL, joined, only))
    assert same(out[2:5:2], base[2:5:2])
    assert same([out[j] for j in (0, 1, 3)], [expected[j] for j in (0, 1, 3)])


def test_bad_arguments(seed: int) -> None:
    base = weights(seed)
    plan = MergePlan(base, [torch.empty_like(x) for x in base])
    other = MergePlan(base, [torch.empty_like(x) for x in base])
    a = plan.prepare(adapter(base, (0,), 2, seed))
    with pytest.raises(ValueError, match=r"out\[0\]: expected memory of its own"):
        MergePlan(base, base)
    with pytest.raises(ValueError, match=r"terms\[0\].weight: expected 0 to 4, got 5"):
        plan.prepare([Term(5, torch.ones(2, 2), torch.ones(2, 2), 1.0)])
    with pytest.raises(ValueError, match="adapters: expected some that this plan prepared"):
        other.merge([(a, 1.0)])
    with pytest.raises(ValueError, match="adapters: expected finite weights, got inf"):
        plan.merge([(a, float("inf"))])


def test_no_weights() -> None:
    plan = MergePlan([], [])
    plan.merge([(plan.prepare([]), 1.0)])


@pytest.mark.gpu
def test_a_live_cuda_graph_sees_the_new_weights(seed: int) -> None:
    base = [normal((320, 640), seed).half().cuda(), normal((640, 320), seed + 1).half().cuda()]
    out = [x.clone() for x in base]
    plan = MergePlan(base, out)
    terms = [
        Term(
            j,
            normal((16, x.shape[1]), seed).half().cuda(),
            normal((x.shape[0], 16), seed).cuda(),
            0.1,
        )
        for j, x in enumerate(base)
    ]
    one = plan.prepare(terms)
    plan.merge([(one, 1.0)])
    x = normal((3, 640), seed).half().cuda()
    result = torch.empty(3, 640, dtype=torch.half, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.mm(torch.mm(x, out[0].t()), out[1].t(), out=result)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(torch.mm(x, out[0].t()), out[1].t(), out=result)
    results = []
    for weights in ([(one, 1.0)], [], [(one, 2.0)], [(one, 1.0)], []):
        plan.merge(weights)
        graph.replay()
        results.append(result.clone())
        assert torch.equal(result, torch.mm(torch.mm(x, out[0].t()), out[1].t()))
    assert torch.equal(results[0], results[3])
    assert torch.equal(results[1], results[4])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert same(out, base)


@pytest.mark.gpu
def test_no_merge_while_a_graph_is_captured(seed: int) -> None:
    base = [normal((32, 32), seed).cuda()]
    plan = MergePlan(base, [x.clone() for x in base])
    refused = pytest.raises(ValueError, match="expected no CUDA graph to be captured")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan.merge()
