from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels._lora_rows_plan import EXPAND, FUSED, SHRINK, plan_rows
from heatsink.kernels._windows import Window
from heatsink.kernels.lora_rows import lora_rows

module = import_module("heatsink.kernels.lora_rows")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Given = dict[str, Any]
SLOTS = 4


@dataclass(frozen=True)
class Use:
    """A layer with adapters.

    Attributes:
        tokens: of a row, or the image's (height, width).
        inputs: channels in.
        outputs: channels out.
        rank: of the bank.
        adapters: of a row at most.
        kernel: of a convolution, or None of a linear layer.
        rest: its stride, padding, dilation.
    """

    tokens: tuple[int, ...]
    inputs: int
    outputs: int
    rank: int
    adapters: int
    kernel: tuple[int, int] | None = None
    rest: tuple[tuple[str, Any], ...] = ()

    def make(self, rows: int, dtype: torch.dtype, seed: int, bank_seed: int = 1) -> Given:
        """Rows of a seed on a bank of another; the first of several has no adapters."""
        generator = torch.Generator().manual_seed(seed)
        bank = torch.Generator().manual_seed(bank_seed)

        def normal(generator: torch.Generator, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        taps = self.kernel or ()
        ranks = torch.randint(1, self.rank + 1, (SLOTS,), generator=bank, dtype=torch.int32)
        ranks[0] = self.rank
        a = normal(bank, SLOTS, self.rank, self.inputs, *taps) / max(1, self.inputs) ** 0.5
        b = normal(bank, SLOTS, self.rank, self.outputs)
        # What lies past the true rank is not read.
        there = torch.arange(self.rank) < ranks[:, None]
        a = torch.where(there.reshape(*there.shape, *(1,) * (a.dim() - 2)), a, torch.nan)
        b = torch.where(there[..., None], b, torch.nan)
        slots = torch.randint(-1, SLOTS, (rows, self.adapters), generator=generator)
        if rows > 1 and self.adapters:
            slots[0] = -1
            slots[1, 0] = 2
        elif self.adapters:
            slots[0, 0] = 2
        x, y = self._operands(rows, lambda *shape: normal(generator, *shape))
        return {
            "y": y.to(dtype),
            "x": x.to(dtype),
            "a": a.to(dtype),
            "b": b.to(dtype),
            "slots": slots,
            "scales": torch.rand((rows, self.adapters), generator=generator) + 0.25,
            "ranks": ranks,
            **dict(self.rest),
        }

    def _operands(self, rows: int, normal: Any) -> tuple[Tensor, Tensor]:
        if self.kernel is None:
            return normal(rows, *self.tokens, self.inputs), normal(rows, *self.tokens, self.outputs)
        x = normal(rows, self.inputs, *self.tokens)
        window = dict(self.rest)
        shape = F.conv2d(torch.zeros(1, 1, *self.tokens), torch.zeros(1, 1, *self.kernel), **window)
        return x, normal(rows, self.outputs, *shape.shape[2:])


def exact(given: Given, float64: Any) -> Any:
    """The reference."""
    pairs: dict[str, Any] = {
        name: (value, value) if isinstance(value, int) else value
        for name in ("stride", "padding", "dilation")
        if (value := given.get(name)) is not None
    }
    y, x, a, b = (float64(given[name]) for name in ("y", "x", "a", "b"))
    return reference.lora_rows(
        y,
        x,
        a,
        b,
        given["slots"].tolist(),
        float64(given["scales"]),
        ranks=None if given.get("ranks") is None else given["ranks"].tolist(),
        **pairs,
    )


def plain(given: Given) -> Tensor:
    """What a user would write for one row after the other."""
    out: Tensor = given["y"].clone()
    window = {k: given[k] for k in ("stride", "padding", "dilation") if k in given}
    for row, chosen in enumerate(given["slots"].tolist()):
        for place, slot in enumerate(chosen):
            if slot < 0:
                continue
            rank = given["a"].shape[1]
            if given.get("ranks") is not None:
                rank = int(given["ranks"][slot])
            a, b = given["a"][slot, :rank], given["b"][slot, :rank]
            scale = float(given["scales"][row, place])
            x = given["x"][row : row + 1]
            if a.dim() == 2:
                out[row : row + 1] += scale * F.linear(F.linear(x, a), b.T)
            else:
                h = F.conv2d(x, a, None, **window)
                out[row : row + 1] += scale * F.conv2d(h, b.T[:, :, None, None])
    return out


def flat(run: Callable[..., None]) -> Callable[..., None]:
    """An implementation, called as the public function is."""

    def call(
        *tensors: Tensor, ranks: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1
    ) -> None:
        pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
        run(*tensors, ranks, *(number for pair in pairs for number in pair))

    return call


RUNS: dict[str, Callable[..., None]] = {
    "op": lora_rows,
    "torch": flat(module._lora_rows_torch),
    "triton": flat(module._lora_rows_triton),
}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
NAMES = ("y", "x", "a", "b", "slots", "scales")


def apply(run: Callable[..., None], given: Given) -> Tensor:
    """What `run` makes of a copy of y that lies as y does."""
    y = given["y"]
    memory = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y)
    rest = {name: value for name, value in given.items() if name not in NAMES}
    run(memory, *(given[name] for name in NAMES[1:]), **rest)
    return memory


# One block of everything and more, ranks beyond two blocks, and layers of the bundled model.
LINEAR = {
    "aligned": Use((32,), 64, 64, 16, 1),
    "ragged": Use((37,), 75, 130, 20, 2),
    "token": Use((1,), 48, 33, 5, 3),
    "text": Use((77,), 96, 40, 16, 1),
    "flat": Use((), 30, 18, 8, 2),
    "deep": Use((2, 3, 5), 17, 24, 4, 1),
    "rank": Use((9,), 40, 40, 70, 2),
    "bundled": Use((64,), 64, 64, 16, 1),
    "bundled-4": Use((4,), 192, 192, 16, 2),
}
IMAGES = {
    "3x3": Use((9, 8), 20, 24, 8, 1, (3, 3), (("padding", 1),)),
    "stride": Use((9, 7), 16, 16, 16, 2, (3, 3), (("stride", 2), ("padding", 1))),
    "1x1": Use((4, 8), 32, 16, 4, 1, (1, 1)),
    "uneven": Use((6, 11), 3, 5, 3, 1, (2, 3), (("padding", (1, 0)), ("dilation", (1, 2)))),
    "bundled": Use((8, 8), 64, 64, 16, 1, (3, 3), (("padding", 1),)),
}
# Small enough to be run many times under the interpreter: two blocks of ranks, two of tokens.
SMALL = {
    "linear": Use((6,), 20, 34, 18, 2),
    "token": Use((1,), 20, 33, 5, 2),
    "image": Use((3, 4), 7, 9, 5, 1, (2, 3), (("stride", (1, 2)), ("padding", 1))),
    "image-1x1": Use((4, 8), 16, 16, 4, 1, (1, 1)),
}
USES = {**LINEAR, **{f"image-{name}": use for name, use in IMAGES.items()}}


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", USES)
def test_against_float64(
    run: Any, name: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    given = USES[name].make(3, dtype, seed)
    out = apply(run, given)
    within_budget(out, plain(given), exact(given, float64))
    assert torch.equal(out[0], given["y"][0])
    assert not torch.equal(out[1], given["y"][1])


@ALL
def test_nothing_to_do(run: Any, seed: int) -> None:
    for use in (Use((0,), 8, 8, 4, 1), Use((5,), 8, 0, 4, 1), Use((5,), 8, 8, 4, 0)):
        given = use.make(2, torch.float32, seed)
        assert torch.equal(apply(lora_rows, given), given["y"])
    given = Use((5,), 8, 8, 4, 2).make(3, torch.float32, seed)
    given["slots"].fill_(-1)
    given["y"][0, 0, :2] = torch.tensor([-0.0, torch.nan])
    assert torch.equal(apply(run, given).view(torch.int32), given["y"].view(torch.int32))


@ALL
@pytest.mark.parametrize("name", ["linear", "token", "image"])
def test_rows_are_exact(run: Any, name: str, seed: int, row_exact: Any) -> None:
    use = SMALL[name]

    def op(**given: Any) -> Tensor:
        return apply(run, given)

    def make(batch: int) -> Given:
        return use.make(batch, torch.float32, seed + batch)

    row_exact(op, make, ("y", "x", "slots", "scales"), interpreted=run is RUNS["triton"])


@ALL
@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rank", "image-stride"])
def test_the_bank_and_trailing_slots_change_no_bit(
    run: Any, name: str, dtype: torch.dtype, seed: int
) -> None:
    given = USES[name].make(3, dtype, seed)
    expected = apply(run, given)
    # More entries without an adapter, whatever their scales.
    more = torch.full((3, 2), -1)
    wider = torch.cat([given["scales"], torch.full((3, 2), torch.nan)], 1)
    longer = {**given, "slots": torch.cat([given["slots"], more], 1), "scales": wider}
    assert torch.equal(apply(run, longer), expected)
    # Other slots of a larger bank, with more padding of ranks.
    order = torch.tensor([6, 1, 5, 3])
    moved = dict(given)
    for key in ("a", "b"):
        old = given[key]
        moved[key] = torch.full((9, old.shape[1] + 19, *old.shape[2:]), torch.nan, dtype=dtype)
        moved[key][order, : old.shape[1]] = old
    moved["ranks"] = torch.full((9,), 3, dtype=torch.int32)
    moved["ranks"][order] = given["ranks"]
    moved["slots"] = torch.where(given["slots"] < 0, -7, order[given["slots"].clamp(min=0)]).int()
    assert torch.equal(apply(run, moved), expected)
    # Zeros where ranks are not given.
    zeros = {**given, **{key: given[key].nan_to_num(0.0) for key in ("a", "b")}, "ranks": None}
    assert torch.equal(apply(run, zeros), expected)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., x.shape[-1] :]


def turned(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "image", "image-1x1"])
def test_strides_change_no_bit(run: Any, name: str, dtype: torch.dtype, seed: int) -> None:
    given = SMALL[name].make(3, dtype, seed)
    expected = apply(run, given)
    for layout in (sliced, turned, innermost):
        for key in NAMES:
            assert torch.equal(apply(run, {**given, key: layout(given[key])}), expected), key
        changed = {key: layout(given[key]) for key in NAMES}
        assert torch.equal(apply(run, {**given, **changed}), expected)


def config_of(given: Given, **changes: int) -> dict[str, int]:
    key = module.key(*(given[name] for name in NAMES))
    return {**module.lookup("lora_rows", key, module.target_of(torch.device("cpu"))), **changes}


@pytest.mark.parametrize("use", [LINEAR["ragged"], IMAGES["3x3"]], ids=["linear", "image"])
def test_launches_do_not_depend_on_rows_or_adapters(use: Use, seed: int) -> None:
    for fused, kernels in ((1, [FUSED]), (0, [SHRINK, EXPAND])):
        keys = set()
        for rows in (1, 2, 5, 8, 17):
            for adapters in (1, 2, 3, 8, 64):
                shape = Use(use.tokens, use.inputs, use.outputs, 20, adapters, use.kernel, use.rest)
                given = shape.make(rows, torch.float16, seed)
                for slots in (4, 1, 3):
                    bank = {key: given[key][:slots] for key in ("a", "b", "ranks")}
                    changed = {**given, **bank}
                    launches = module.plan(config_of(given, FUSED=fused), **changed)[1]
                    assert [launch.kernel for launch in launches] == kernels
                    keys.add(tuple(launch.key() for launch in launches))
        # Nor do the binaries.
        assert len(keys) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ragged", "image-stride", "image-1x1"])
def test_both_ways_and_parts_of_sums(
    name: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    given = USES[name].make(3, dtype, seed)
    window = Window(
        USES[name].kernel or (1, 1),
        *((given.get(k, d),) * 2 for k, d in (("stride", 1), ("padding", 0))),
    )
    for changes in (
        {"FUSED": 1, "SPLITS": 1},
        {"FUSED": 0, "SPLITS": 1},
        {"FUSED": 0, "SPLITS": 3},
    ):
        config = config_of(given, **changes, BLOCK_K=16)
        y, x, a, b, slots, scales, ranks = (given[k] for k in (*NAMES, "ranks"))
        out, launches = plan_rows(config, y.clone(), x, a, b, slots, scales, ranks, window)
        module.run(launches)
        within_budget(out, plain(given), exact(given, float64))


@pytest.mark.parametrize("name", ["ragged", "image-3x3"])
def test_opcheck_and_compile(name: str, seed: int) -> None:
    given = USES[name].make(3, torch.float32, seed)
    pairs = [given.get("stride", 1)] * 2 + [given.get("padding", 0)] * 2 + [1, 1]
    args = (*(given[key] for key in NAMES), given["ranks"], *pairs)
    torch.library.opcheck(torch.ops.heatsink.lora_rows, args)

    def layer(y: Tensor, **rest: Any) -> Tensor:
        y = y * 2
        lora_rows(y, **rest)
        return y

    y = given.pop("y")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y, **given), layer(y, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", USES)
def test_on_a_gpu(
    name: str, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    given = USES[name].make(3, dtype, seed)
    expected, bound = plain(given), exact(given, float64)
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
    out = apply(lora_rows, there)
    within_budget(out.cpu(), expected, bound)
    assert torch.equal(out[0], there["y"][0])
    for layout in (sliced, turned, innermost):
        changed = {key: layout(there[key]) for key in NAMES}
        assert torch.equal(apply(lora_rows, {**there, **changed}), out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", USES)
def test_rows_are_exact_on_a_gpu(name: str, dtype: torch.dtype, seed: int, row_exact: Any) -> None:
    def op(**given: Any) -> Tensor:
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
        return apply(lora_rows, there)

    def make(batch: int) -> Given:
        return USES[name].make(batch, dtype, seed + batch)

    row_exact(op, make, ("y", "x", "slots", "scales"), interpreted=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "image-3x3"])
def test_in_a_cuda_graph_whose_bank_and_slots_change(name: str, seed: int) -> None:
    first, other = (USES[name].make(3, torch.float16, seed + i, bank_seed=i) for i in (0, 1))
    op = RUNS["op"]
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in first.items()}
    out = given["y"].clone()
    op(**{**given, "y": out.clone()})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(given["y"])
        op(**{**given, "y": out})
    for changed in (first, other, first):
        for key, value in changed.items():
            if isinstance(value, Tensor):
                given[key].copy_(value)
        graph.replay()
        expected = given["y"].clone()
        op(**{**given, "y": expected})
        assert torch.equal(out, expected)
