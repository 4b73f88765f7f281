"""SiLU in IEEE operations, as GroupNorm's implementations on the CPU take it."""

from __future__ import annotations

import torch

from heatsink.kernels._silu import silu


def test_within_its_bound() -> None:
    ends = torch.tensor([-1e28, -1e4, 1e4, 1e28])
    x = torch.cat([torch.linspace(-130, 130, 260_001), torch.linspace(-1, 1, 100_001), ends])
    exact = torch.nn.functional.silu(x.double())
    bound = 3e-7 * exact.abs().clamp(min=1.0)
    assert ((silu(x).double() - exact).abs() <= bound).all()


def test_the_ends_of_the_range() -> None:
    x = torch.tensor([-0.0, 0.0, 1e4, 3e38, float("inf"), float("nan"), -3e38])
    found = silu(x)
    assert torch.equal(found[:5], x[:5])
    assert found[5].isnan()
    assert found[6].isfinite()


def test_an_element_has_the_same_bits_wherever_it_lies() -> None:
    x = torch.linspace(-20, 20, 64)
    alone = torch.stack([silu(value) for value in x])
    assert torch.equal(silu(x), alone)
    assert torch.equal(silu(x[3:40]), alone[3:40])
    assert torch.equal(silu(x[::3]), alone[::3])
