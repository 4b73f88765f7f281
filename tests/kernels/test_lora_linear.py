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
from heatsink.kernels.linear import linear, pack_linear
from heatsink.kernels.lora_linear import lora_linear

module = import_module("heatsink.kernels.lora_linear")

DTYPES = (torch.float32, torch.bfloat16)
SLOTS, RANK = 4, 6
# x's shape and the weight's rows: aligned, ragged, one token, SD1.5's time embedding, images'
# positions, a token alone, and (bundled model) a feed-forward of more tokens than a block has.
SHAPES = (
    ((3, 32, 64), 64),
    ((4, 7, 43), 38),
    ((3, 1, 5), 2),
    ((3, 320), 1280),
    ((2, 2, 5, 16), 10),
    ((1, 1), 2),
    ((3, 64, 128), 1024),
)
Given = dict[str, Any]
Run = Callable[..., Tensor]


def make(
    shape: tuple[int, ...], columns: int, dtype: torch.dtype, seed: int, activation: str = "gelu"
) -> Given:
    """The second row has no adapters, the others one or two of different ranks."""
    rows = shape[0]
    own, shared = (torch.Generator().manual_seed(each) for each in (seed, 1))

    def normal(generator: torch.Generator, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    out = columns // 2 if activation == "geglu" else columns
    ranks = torch.tensor([RANK, 1, 3, 0], dtype=torch.int32)
    past = torch.arange(RANK) >= ranks[:, None]
    a = normal(shared, SLOTS, RANK, shape[-1]) / shape[-1] ** 0.5
    b = normal(shared, SLOTS, RANK, columns)
    slots = torch.randint(-1, SLOTS, (rows, 2), generator=own)
    slots[0, 1] = 2
    slots[1:2] = -1
    return {
        "x": normal(own, *shape),
        "weight": normal(shared, columns, shape[-1]) / shape[-1] ** 0.5,
        "bias": normal(shared, columns),
        "a": a.masked_fill(past[..., None], torch.nan),
        "b": b.masked_fill(past[..., None], torch.nan),
        "slots": slots,
        "scales": torch.where(slots < 0, torch.nan, torch.rand(slots.shape, generator=own) + 0.5),
        "ranks": ranks,
        "residual": normal(own, *shape[:-1], out),
        "sample_add": normal(own, rows, columns),
        "activation": activation,
    }


def arguments(given: Given) -> tuple[Any, ...]:
    names = ("x", "weight", "bias", "residual", "sample_add", "activation")
    adapters = ("a", "b", "slots", "scales", "ranks")
    return tuple(given.get(name) for name in (*names, *adapters))


def through(op: Any) -> Run:
    def run(**given: Any) -> Tensor:
        x, weight, *rest = arguments(given)
        geglu = given["activation"] == "geglu"
        columns = weight.shape[0] // 2 if geglu else weight.shape[0]
        out: Tensor = x.new_empty(*x.shape[:-1], columns)
        scratch = torch.empty(scratch_bytes(), dtype=torch.uint8)
        op(x, pack_linear(weight, geglu=geglu), *rest, scratch, out)
        return out

    return run


packed = through(torch.ops.heatsink.lora_linear_packed)
ALL = pytest.mark.parametrize(
    "run",
    [lora_linear, packed, through(module._lora_linear_packed_torch)],
    ids=["op", "packed", "torch"],
)


def plain(given: Given) -> Tensor:
    """What a user would write for one row after the other."""
    rows = []
    for row, chosen in enumerate(given["slots"].tolist()):
        x = given["x"][row]
        y = F.linear(x, given["weight"], given["bias"])
        if given["sample_add"] is not None:
            y = y + given["sample_add"][row]
        for place, slot in enumerate(chosen):
            if slot >= 0:
                rank = int(given["ranks"][slot])
                a, b = given["a"][slot, :rank], given["b"][slot, :rank]
                y = y + float(given["scales"][row, place]) * F.linear(F.linear(x, a), b.T)
        if given["activation"] == "geglu":
            value, gate = y.chunk(2, -1)
            y = value * F.gelu(gate)
        elif given["activation"] == "quick_gelu":
            y = y * torch.sigmoid(1.702 * y)
        elif given["activation"]:
            kind = {"gelu_tanh": "tanh"}.get(given["activation"], "none")
            y = F.silu(y) if given["activation"] == "silu" else F.gelu(y, approximate=kind)
        rows.append(y if given["residual"] is None else y + given["residual"][row])
    return torch.stack(rows)


def exact(float64: Any, given: Given) -> Any:
    wide = {
        name: float64(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }
    wide["slots"], wide["ranks"] = given["slots"].tolist(), given["ranks"].tolist()
    return reference.lora_linear(**wide)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
def test_against_float64(
    run: Run, shape: Any, columns: int, dtype: Any, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make(shape, columns, dtype, seed)
    out = run(**given)
    within_budget(out, plain(given), exact(float64, given))
    assert out.is_contiguous()


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(
    run: Run, activation: str, dtype: Any, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make((3, 19, 70), 36, dtype, seed, activation)
    within_budget(run(**given), plain(given), exact(float64, given))
    given |= {"residual": None, "sample_add": None, "bias": None}
    within_budget(run(**given), plain(given), exact(float64, given))


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_without_adapters_has_the_bits_of_linear(
    run: Run, activation: str, dtype: torch.dtype, seed: int
) -> None:
    for empty in ([1], [0, 1, 3], [0, 1, 2, 3]):
        given = make((4, 9, 70), 36, dtype, seed, activation)
        given["slots"][empty] = -1
        # A product of zeros and a negative zero: what is added must not change its sign.
        given["x"][:, 0], given["bias"][:8] = 0.0, -0.0
        given["sample_add"] = None
        product = {n: given[n] for n in ("x", "weight", "bias", "residual", "activation")}
        wanted, out = linear(**product), run(**given)
        width = torch.int32 if dtype == torch.float32 else torch.int16
        for row in range(4):
            same = out[row].view(width).equal(wanted[row].view(width))
            assert same == (row in empty or _unused(given, row)), row


def _unused(given: Given, row: int) -> bool:
    """Whether all of a row's adapters are of rank 0."""
    return all(s < 0 or given["ranks"][s] == 0 for s in given["slots"][row].tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_and_not_give_the_same_bits(dtype: torch.dtype, seed: int) -> None:
    if not _native.available():
        pytest.skip("without the extension both are PyTorch's product")
    # The last has blocks that end within a sample.
    for shape, columns in (*SHAPES, ((3, 300, 8), 20000)):
        given = make(shape, columns, dtype, seed, "geglu")
        assert torch.equal(packed(**given), lora_linear(**given))


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 43), (320,)], ids=str)
def test_row_exact(run: Run, shape: Any, dtype: Any, seed: int, row_exact: Any) -> None:
    def batch(size: int) -> Given:
        given = make((size, *shape), 40, dtype, seed + size, "geglu")
        if size == 1:
            given["slots"][0] = torch.tensor([1, 2])
            given["scales"][0] = torch.tensor([0.5, 1.5])
        return given

    rows = ("x", "slots", "scales", "residual", "sample_add")
    row_exact(run, batch, rows, interpreted=False)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_are_not_dense(run: Run, dtype: torch.dtype, seed: int) -> None:
    given = make((3, 7, 40), 24, dtype, seed)
    wanted = run(**given)
    spread = given | {
        "a": given["a"].mT.contiguous().mT,
        "b": given["b"].mT.contiguous().mT,
        "slots": given["slots"].t().contiguous().t().int(),
        "scales": given["scales"].t().contiguous().t(),
        # Tokens further apart, as a part of a packed product has them.
        "x": torch.cat([given["x"], given["x"]], -1)[..., :40],
    }
    assert torch.equal(run(**spread), wanted)


@ALL
def test_no_rows(run: Run) -> None:
    given = make((1, 3, 8), 6, torch.float32, 1)
    for shape in ((0, 3, 8), (2, 0, 8)):
        rows = shape[0]
        empty = given | {"x": torch.ones(shape), "residual": torch.ones(*shape[:2], 6)}
        empty |= {"slots": torch.zeros(rows, 2).long(), "scales": torch.ones(rows, 2)}
        empty["sample_add"] = torch.ones(rows, 6)
        assert run(**empty).shape == (*shape[:2], 6)


def test_a_slot_that_is_not_there() -> None:
    given = make((2, 3, 8), 6, torch.float32, 1)
    given["slots"][0] = SLOTS
    with pytest.raises(RuntimeError, match="slots: expected slots of the bank, up to 3, got 4"):
        lora_linear(**given)
    if _native.available():
        with pytest.raises(RuntimeError, match="slots: expected slots of the bank"):
            packed(**given)


WRONG: dict[str, tuple[Given, type[Exception], str]] = {
    "x": ({"x": torch.ones(2, 3, 9)}, ValueError, r"x: expected \(R, \.\.\., K\)"),
    "a": ({"a": torch.ones(4, 6, 9)}, ValueError, r"a: expected \(S, rank, 8\), got \(4, 6, 9\)"),
    "b": ({"b": torch.ones(4, 6, 5)}, ValueError, r"b: .*\(4, 6, 6\).*\(4, 6, 5\)"),
    "dtype": ({"b": torch.ones(4, 6, 6).bfloat16()}, TypeError, "b: .*bfloat16"),
    "slots": ({"slots": torch.zeros(3, 2).long()}, ValueError, r"slots: expected shape \(2, n\)"),
    "float slots": ({"slots": torch.zeros(2, 2)}, TypeError, "slots: .*float32"),
    "scales": ({"scales": torch.ones(2, 3)}, ValueError, r"scales: .*\(2, 2\).*\(2, 3\)"),
    "ranks": ({"ranks": torch.ones(3, dtype=torch.int32)}, ValueError, r"ranks: .*\(4,\)"),
    "residual": ({"residual": torch.ones(2, 3, 5)}, ValueError, "residual: "),
    "activation": ({"activation": "relu"}, ValueError, "activation: .*'relu'"),
    "device": ({"slots": torch.zeros(2, 2, device="meta").long()}, ValueError, "slots: .*meta"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    changes, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        lora_linear(**make((2, 3, 8), 6, torch.float32, 1) | changes)


def test_the_op_is_one_of_pytorchs(seed: int) -> None:
    given = make((2, 3, 8), 6, torch.float32, seed, "geglu")
    given["scales"].nan_to_num_()
    given["a"].nan_to_num_()
    given["b"].nan_to_num_()
    torch.library.opcheck(torch.ops.heatsink.lora_linear.default, arguments(given))

    def twice(**all_of_it: Any) -> Tensor:
        return lora_linear(**all_of_it) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), 2 * lora_linear(**given))
