"""What the tests of kernels share: memory filled with NaN, the error budget, row exactness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}
EVERY = tuple(range(1, 18))
# Under the interpreter, which takes milliseconds a program: samples alone, even and odd many, and
# one beyond 16. Kernels know the batch only as a count of rows that masks the last program, so
# these reach a program of up to 16 rows full, with one row, and in between; test_gpu_rows.py has
# every batch.
FEW = (1, 2, 3, 5, 8, 17)

Rows = dict[str, Any]


@pytest.fixture(autouse=True)
def nan_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # mypy does not see what the module is replaced by at import.
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


def array(x: Tensor) -> Any:
    """A tensor's values as float64 NumPy."""
    return x.detach().to("cpu", torch.float64).numpy()


def check_budget(actual: Tensor, plain: Tensor, exact: Any) -> None:
    """Assert error <= 2 x (error of the plain computation + eps(dtype) x max|exact|), everywhere.

    Args:
        actual: what the op gave.
        plain: the same in plain PyTorch operations of the same dtype.
        exact: float64, from `heatsink.kernels.reference`.
    """
    assert actual.shape == plain.shape == exact.shape
    assert actual.dtype == plain.dtype
    if exact.size == 0:
        return
    assert np.isfinite(array(actual)).all()
    scale = EPS[actual.dtype] * np.abs(exact).max()
    allowed = 2 * (np.abs(array(plain) - exact).max() + scale)
    error = np.abs(array(actual) - exact).max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_row_exact(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    make: Callable[[int], Rows],
    rows: Sequence[str],
    batches: Sequence[int] | None = None,
    *,
    interpreted: bool = True,
) -> None:
    """Assert that a sample's bits are the same alone, first, last and amid batches of others.

    Args:
        run: the op, called with keyword arguments.
        make: `batch -> arguments`, different values for every sample and every batch.
        rows: the arguments whose dimension 0 is the sample.
        batches: sizes of the batches; by default `FEW` or `EVERY`.
        interpreted: whether `run` may be a kernel under the interpreter.
    """
    if batches is None:
        batches = FEW if interpreted else EVERY
    sample = make(1)
    alone = as_tuple(run(**sample))
    for batch in batches:
        for place in sorted({0, batch // 2, batch - 1}):
            whole = make(batch)
            for name in rows:
                if whole[name] is not None:
                    whole[name] = whole[name].clone()
                    whole[name][place] = sample[name][0]
            for found, expected in zip(as_tuple(run(**whole)), alone, strict=True):
                same = torch.equal(bits(found[place]), bits(expected[0]))
                assert same, f"batch {batch}, place {place}: other bits than alone"


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One tensor as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def bits(x: Tensor) -> Tensor:
    """A tensor's bit patterns."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(width[x.element_size()])


@pytest.fixture
def within_budget() -> Callable[[Tensor, Tensor, Any], None]:
    """`check_budget`."""
    return check_budget


@pytest.fixture
def row_exact() -> Callable[..., None]:
    """`check_row_exact`."""
    return check_row_exact


@pytest.fixture
def float64() -> Callable[[Tensor], Any]:
    """A tensor's values as float64 NumPy."""
    return array
