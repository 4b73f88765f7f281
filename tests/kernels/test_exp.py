from __future__ import annotations

import numpy as np
import pytest
import torch

from heatsink.kernels._exp import exp


def all_patterns(seed: int) -> torch.Tensor:
    """Floats of every kind: bit patterns at random, and the range where the result is neither."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32)
    return torch.cat([raw.view(torch.float32), torch.linspace(-105, 90, 200_001)])


def test_error_is_below_one_unit_in_the_last_place(seed: int) -> None:
    x = all_patterns(seed)
    x = x[x.isfinite()]
    with np.errstate(over="ignore"):
        exact = np.exp(x.numpy().astype(np.float64))
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    actual = exp(x).numpy()
    assert finite.any()
    assert not finite.all()
    assert np.array_equal(actual[~finite], rounded[~finite])
    unit = np.spacing(rounded[finite]).astype(np.float64)
    assert (np.abs(actual[finite] - exact[finite]) / unit).max() < 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 1.0),
        (-0.0, 1.0),
        (float("inf"), float("inf")),
        (float("-inf"), 0.0),
        (88.72283, float.fromhex("0x1.ffff08p+127")),
        (88.7229, float("inf")),
        (-103.97, 2.0**-149),
        (-103.98, 0.0),
    ],
)
def test_ends(x: float, expected: float) -> None:
    assert exp(torch.tensor([x])).item() == expected


def test_nan_stays() -> None:
    assert exp(torch.tensor([torch.nan, -torch.nan])).isnan().all()


def test_bits_do_not_depend_on_the_place(seed: int) -> None:
    x = torch.randn(67, generator=torch.Generator().manual_seed(seed))
    whole = exp(x)
    assert torch.equal(whole, torch.cat([exp(element[None]) for element in x]))
    assert torch.equal(whole[1::2], exp(x[1::2]))
