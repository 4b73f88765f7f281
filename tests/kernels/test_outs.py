"""`heatsink::<op>_out`: the op's bits in given memory, of any op and implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, load

load()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPP_IN_USE = _native.available()


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


@dataclass(frozen=True)
class Case:
    """An op, its arguments, and a larger tensor with the part of it that a result may lie in."""

    op: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    larger: Callable[[Tensor], tuple[Tensor, Tensor]]
    triton: str = ""
    in_place: int = 0

    def args(self, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        made = self.make(torch.Generator().manual_seed(seed))
        return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in made)

    def module(self) -> Any:
        return import_module(f"heatsink.kernels.{self.op}")

    def by_triton(self) -> Callable[..., Tensor]:
        run: Callable[..., Tensor] = getattr(self.module(), self.triton)
        return run

    def by_torch(self) -> Callable[..., Tensor]:
        name = "group_norm_torch" if self.op == "group_norm_silu" else f"_{self.op}_torch"
        run: Callable[..., Tensor] = getattr(self.module(), name)
        return run

    def run(self, args: tuple[Any, ...]) -> Tensor:
        new: Tensor = getattr(torch.ops.heatsink, self.op)(*args)
        return new

    def run_out(self, args: tuple[Any, ...], out: Tensor) -> None:
        getattr(torch.ops.heatsink, f"{self.op}_out")(*args, out)


def _wider_rows(like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are parts of longer ones."""
    whole = torch.full((*like.shape[:-1], like.shape[-1] + 3), 7.0, dtype=like.dtype)
    return whole, whole[..., 2:-1]


def _wider_pixels(like: Tensor) -> tuple[Tensor, Tensor]:
    """Channels that are some of a concatenation's."""
    n, c, *pixels = like.shape
    whole = torch.full((n, *pixels, c + 5), 7.0, dtype=like.dtype).movedim(-1, 1)
    return whole, whole[:, 4 : 4 + c]


def _packed_heads(like: Tensor) -> tuple[Tensor, Tensor]:
    """One of two results side by side, heads before tokens."""
    b, s, h, d = like.shape
    whole = torch.full((b, h, 2, s, d), 7.0, dtype=like.dtype)
    return whole, whole[:, :, 1].transpose(1, 2)


def _layer_norm(draw: torch.Generator) -> tuple[Any, ...]:
    scale, shift = _normal(draw, 3, 154).chunk(2, dim=1)
    return (
        _normal(draw, 3, 5, 77), _normal(draw, 77), _normal(draw, 77), 1e-5, scale, shift,
    )  # fmt: skip


def _group_norm(draw: torch.Generator) -> tuple[Any, ...]:
    x = _normal(draw, 2, 6, 5, 24).movedim(-1, 1)
    return x, 4, _normal(draw, 24), None, 1e-5, _normal(draw, 2, 24), None, True


def _attention(draw: torch.Generator, keys: int = 19, width: int = 20) -> tuple[Any, ...]:
    q = _normal(draw, 2, 37, 3, width)
    k, v = _normal(draw, 2, keys, 2, 3, width).unbind(2)
    return q, k, v, 0.25, False, _normal(draw, 1, 1, 37, keys)


CASES = {
    "layer_norm": Case("layer_norm", _layer_norm, _wider_rows, "_layer_norm_triton", 1),
    "layer_norm of turned rows": Case(
        "layer_norm",
        lambda draw: (_normal(draw, 3, 70, 40).mT, _normal(draw, 140)[::2], None, 1e-5, None, None),
        _wider_rows,
    ),
    "rms_norm": Case(
        "rms_norm",
        lambda draw: (_normal(draw, 3, 5, 77), _normal(draw, 77), 1e-6),
        _wider_rows,
        "_rms_norm_triton",
        1,
    ),
    "silu_mul": Case(
        "silu_mul",
        lambda draw: (_normal(draw, 3, 5, 77), _normal(draw, 3, 5, 77)),
        _wider_rows,
        "_silu_mul_triton",
        2,
    ),
    "silu_mul of turned rows": Case(
        "silu_mul", lambda draw: (_normal(draw, 5, 33).mT, _normal(draw, 5, 33).mT), _wider_rows
    ),
    "geglu": Case("geglu", lambda draw: (_normal(draw, 3, 5, 64),), _wider_rows, "_geglu_triton"),
    "geglu of turned rows": Case("geglu", lambda draw: (_normal(draw, 66, 5).mT,), _wider_rows),
    "group_norm_silu": Case(
        "group_norm_silu", _group_norm, _wider_pixels, "_group_norm_silu_triton", 1
    ),
    "group_norm_silu of planes": Case(
        "group_norm_silu",
        lambda draw: (_normal(draw, 2, 70, 5, 40), 10, None, None, 1e-5, None, None, False),
        _wider_pixels,
    ),
    "attention": Case("attention", _attention, _packed_heads, "_attention_triton"),
    "attention of whole vectors": Case(
        "attention", lambda draw: _attention(draw, 64, 32), _packed_heads
    ),
    "attention without keys": Case("attention", lambda draw: _attention(draw, 0), _packed_heads),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MAIN = pytest.mark.parametrize("case", [c for c in CASES.values() if c.triton], ids=lambda c: c.op)


def _new(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(torch.nan)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ops_bits(case: Case, dtype: torch.dtype, seed: int) -> None:
    args = case.args(seed, dtype)
    wanted = case.run(args)
    out = _new(wanted)
    case.run_out(args, out)
    assert not out.isnan().any()
    assert torch.equal(out, wanted)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_something_larger(case: Case, dtype: torch.dtype, seed: int) -> None:
    args = case.args(seed, dtype)
    wanted = case.run(args)
    whole, part = case.larger(wanted)
    case.run_out(args, part)
    assert torch.equal(part, wanted)
    # Nothing else was touched.
    part.fill_(7.0)
    assert (whole == 7.0).all()


@MAIN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(case: Case, dtype: torch.dtype, seed: int) -> None:
    for place in range(case.in_place):
        args = case.args(seed, dtype)
        wanted = case.run(args)
        case.run_out(args, args[place])
        assert torch.equal(args[place], wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_half_in_place(dtype: torch.dtype, seed: int) -> None:
    (x,) = CASES["geglu"].args(seed, dtype)
    wanted, gate = torch.ops.heatsink.geglu(x), x[..., 32:].clone()
    torch.ops.heatsink.geglu_out(x, x[..., :32])
    assert torch.equal(x[..., :32], wanted)
    assert torch.equal(x[..., 32:], gate)


# The op as it is called, in PyTorch operations, and under the interpreter the launches of a GPU.
WAYS: dict[str, Callable[..., None]] = {
    "op": lambda case, *given: case.run_out(given[:-1], given[-1]),
    "torch": lambda case, *given: case.module().OUT.copied(case.by_torch(), *given),
    "triton": lambda case, *given: case.module().OUT.launched(case.by_triton(), *given),
}


@MAIN
@pytest.mark.parametrize("way", ["torch", "triton"])
def test_the_implementations_for_other_devices(case: Case, way: str, seed: int) -> None:
    args = case.args(seed, torch.float32)
    by = case.by_torch() if way == "torch" else case.by_triton()
    wanted = by(*args)
    whole, part = case.larger(wanted)
    for out in (_new(wanted), part):
        WAYS[way](case, *args, out)
        assert torch.equal(out, wanted)
    part.fill_(7.0)
    assert (whole == 7.0).all()
    for place in range(case.in_place):
        args = case.args(seed, torch.float32)
        WAYS[way](case, *args, args[place])
        assert torch.equal(args[place], wanted)


@MAIN
def test_launches_write_where_they_are_told(case: Case, seed: int) -> None:
    args = case.args(seed, torch.float32)
    out = _new(case.run(args))
    assert case.by_triton()(*args, out) is out


@MAIN
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_the_arguments_is_refused(case: Case, way: str, seed: int) -> None:
    args = case.args(seed, torch.float32)
    like = case.run(args)
    # Room for the result twice over behind the first argument.
    memory = torch.zeros(3 * args[0].numel())
    first = memory.as_strided(args[0].shape, args[0].stride(), 0)
    shifted = memory.as_strided(like.shape, like.stride(), 1)
    refused = pytest.raises((ValueError, RuntimeError), match="out: expected memory apart")
    with refused:
        WAYS[way](case, first, *args[1:], shifted)
    last = next(a for a in reversed(args) if isinstance(a, Tensor))
    if last is args[0]:
        return
    memory = torch.zeros(like.numel() + last.numel())
    used = memory.as_strided(last.shape, last.contiguous().stride(), 0)
    given = tuple(used if a is last else a for a in args)
    with refused:
        WAYS[way](case, *given, memory.as_strided(like.shape, like.stride(), 1))


@MAIN
def test_memory_that_does_not_fit_is_refused(case: Case, seed: int) -> None:
    args = case.args(seed, torch.float32)
    like = case.run(args)
    public = case.module().OUT
    folded = torch.empty(1).expand(like.shape)
    scattered = torch.empty(*like.shape, 2)[..., 0]
    for out, error, match in (
        ([1.0], TypeError, "out: expected a tensor, got list"),
        (like[..., 1:], ValueError, r"out: expected shape \(.*\), got \("),
        (like.half(), TypeError, "out: expected torch.float32, got torch.float16"),
        (like.to("meta"), ValueError, "out: expected device cpu, got meta"),
        (scattered, ValueError, "out: expected dense rows at one distance, got strides"),
    ):
        with pytest.raises(error, match=match):
            public(*args, out)
    for out, match in (
        (like[..., 1:], "out: expected size"),
        (like.half(), "out: expected the result's dtype"),
        (folded, "out: expected no two elements at one place"),
        (scattered, "out: expected"),
    ):
        with pytest.raises(
            (ValueError, RuntimeError, TypeError), match=match if CPP_IN_USE else ""
        ):
            case.run_out(args, out)


@MAIN
def test_nothing_is_allocated(case: Case, seed: int, allocations: Callable[..., int]) -> None:
    if not CPP_IN_USE:
        pytest.skip("the extension is not in use")
    for dtype in DTYPES:
        args = case.args(seed, dtype)
        out = _new(case.run(args))
        assert allocations(lambda args=args, out=out: case.run_out(args, out)) == 0
        assert allocations(lambda args=args: case.run(args)) >= 1


@MAIN
def test_opcheck(case: Case, seed: int) -> None:
    args = case.args(seed, torch.float32)
    op = getattr(torch.ops.heatsink, f"{case.op}_out")
    torch.library.opcheck(op, (*args, case.run(args)))


def test_public_functions_take_out(seed: int) -> None:
    kernels = import_module("heatsink.kernels")
    x = _normal(torch.Generator().manual_seed(seed), 2, 3, 4, 8)
    calls: dict[str, Callable[..., Tensor]] = {
        "layer_norm": kernels.layer_norm,
        "rms_norm": kernels.rms_norm,
        "geglu": kernels.geglu,
        "silu_mul": lambda x, **out: kernels.silu_mul(x, x + 1, **out),
        "attention": lambda x, **out: kernels.attention(x, x, x, **out),
        "group_norm_silu": lambda x, **out: kernels.group_norm_silu(x, 1, **out),
    }
    for name, call in calls.items():
        wanted = call(x)
        out = _new(wanted)
        assert call(x, out=out) is out, name
        assert torch.equal(out, wanted), name
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out = _new(wanted)
        compiled(x, out=out)
        assert torch.equal(out, wanted), name


@pytest.mark.gpu
@MAIN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(case: Case, dtype: torch.dtype, seed: int) -> None:
    args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in case.args(seed, dtype))
    wanted = case.run(args)
    out = _new(wanted.cpu()).cuda()
    case.run_out(args, out)
    assert torch.equal(out, wanted)
