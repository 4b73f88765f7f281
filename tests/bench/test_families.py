"""What ops are compared with: the expressions are right, and the work is counted right."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from heatsink.benchmarks import attention, bundled, check, families, gates, norms, steps
from heatsink.benchmarks.ceilings import Ceilings
from heatsink.benchmarks.family import Cost, Variant, compulsory_bytes, eager_variant
from heatsink.kernels import noise
from heatsink.kernels._op import Inputs
from heatsink.kernels.catalog import ops
from heatsink.kernels.fingerprint import fingerprint

CPU = torch.device("cpu")


def test_compulsory_bytes_count_every_value_once() -> None:
    x = torch.empty(4, 6, dtype=torch.float16)
    broadcast = torch.empty(6).expand(4, 6)
    inputs: Inputs = {"x": x, "view": x[:, ::2], "b": broadcast, "eps": 1e-5, "none": None}
    out = (torch.empty(4, dtype=torch.int64), torch.empty(0))
    assert compulsory_bytes(inputs, out) == 48 + 24 + 24 + 32


def test_attention_costs_two_products_and_an_exponential_a_pair() -> None:
    q, k = torch.empty(2, 5, 3, 16), torch.empty(2, 7, 3, 16)
    cost = attention.cost({"q": q, "k": k, "v": k}, q)
    assert cost.exponentials == 2 * 3 * 5 * 7
    assert cost.flops == {"fp32": 4 * 2 * 3 * 5 * 7 * 16}
    assert cost.bytes == 4 * (2 * q.numel() + 2 * k.numel())
    causal = attention.cost({"q": q, "k": k, "v": k, "causal": True}, q)
    assert causal.exponentials == 2 * 3 * (1 + 2 + 3 + 4 + 5)


def test_8_bit_attention_is_counted_at_the_rates_of_its_products() -> None:
    q = torch.empty(2, 5, 3, 16, dtype=torch.float16)
    inputs = {"q": q, "k": q, "v": q, "pure": False}
    one = 2 * 2 * 3 * 5 * 5 * 16
    assert attention.cost_8bit(inputs, q).flops == {"int8": one, "fp16": one}
    assert attention.cost_8bit({**inputs, "pure": True}, q).flops == {"fp8": 2 * one}


def test_8_bit_attention_is_compared_with_attention_and_held_to_its_promise() -> None:
    family = families.FAMILIES["attention_fp8"]
    q = torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(1))
    inputs = {"q": q, "k": q, "v": q, "pure": True}
    assert torch.equal(family.eager(**inputs), attention.sdpa(q, q, q))
    assert family.reference(inputs)[0].dtype == torch.float64
    assert (family.tolerance(inputs), family.tolerance({**inputs, "pure": False})) == (0.07, 0.02)


def test_the_ceiling_is_the_slowest_part() -> None:
    ceilings = Ceilings(copy=10.0, products={"fp16": 100.0, "int8": 200.0}, exponentials=5.0)
    assert ceilings.least_seconds(Cost(bytes=20)) == 2
    assert ceilings.least_seconds(Cost(20, {"fp16": 300})) == 3
    assert ceilings.least_seconds(Cost(20, {"fp16": 300}, exponentials=20)) == 4
    # One after the other on the same units.
    assert ceilings.least_seconds(Cost(20, {"fp16": 300, "int8": 400})) == 5
    # What was not measured bounds nothing.
    assert ceilings.least_seconds(Cost(20, {"fp8": 300})) == 2
    unknown = Ceilings(10.0, {}, 0.0)
    assert unknown.least_seconds(Cost(20, exponentials=10**9)) == 2


# The expressions that ops are compared with


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (5, 5), (2, 1, 5, 5), (2, 3, 5, 5)])
def test_the_reference_of_attention_is_its_formula(
    causal: bool, bias_shape: tuple[int, ...] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64, generator=generator)
    bias = None
    if bias_shape:
        bias = torch.randn(bias_shape, dtype=torch.float64, generator=generator)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 0.3
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    for compute in (attention.exact, attention.sdpa):
        close(compute(q, k, v, scale=0.3, causal=causal, bias=bias), expected)


def test_the_reference_of_group_norm_is_its_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, weight, bias = draw(2, 3, 5, 8), draw(8), draw(8)
    scale, shift = draw(2, 8), draw(2, 8)
    parts = x.reshape(2, 15, 4, 2)
    mean = parts.mean((1, 3), keepdim=True)
    variance = parts.var((1, 3), keepdim=True, unbiased=False)
    y = ((parts - mean) / (variance + 1e-5).sqrt()).reshape(x.shape) * weight + bias
    images = x.permute(0, 3, 1, 2)
    plain = norms.group_norm_silu(images, 4, weight, bias, eps=1e-5, silu=False)
    close(plain.permute(0, 2, 3, 1), y)
    y = y * (1 + scale[:, None, None]) + shift[:, None, None]
    full = norms.group_norm_silu(images, 4, weight, bias, eps=1e-5, scale=scale, shift=shift)
    close(full.permute(0, 2, 3, 1), y * torch.sigmoid(y))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_of_rotary_turns_pairs(interleaved: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator)
    angle = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    pairs = x.unflatten(-1, (4, 2) if interleaved else (2, 4))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angle)[None, :, None]
    stacked = torch.stack([turned.real, turned.imag], dim=-1 if interleaved else -2)
    close(
        gates.rotary(x, angle.cos(), angle.sin(), interleaved=interleaved),
        stacked.flatten(-2),
    )


@pytest.mark.parametrize("name", sorted(bundled.CASES))
def test_the_bundled_shapes_are_what_the_expressions_take(name: str) -> None:
    family = families.FAMILIES[name]
    for case in family.bundled:
        inputs = case.make(CPU)
        reference = check.Reference.of(family, inputs)
        plain = check.make_ready(eager_variant("plain", family.eager), inputs, reference)
        assert plain.max_error is not None
        for variant in family.others(inputs):
            if isinstance(variant, Variant) and variant.name.endswith("eager, NCHW"):
                assert check.make_ready(variant, inputs, reference).max_error is not None


def step_inputs(seed: int) -> dict[str, Tensor]:
    """Three rows: guided with history and noise, guided with neither, not guided."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    coef = draw(3, 8)
    coef[1, 6:] = 0
    return {
        "x": draw(3, 2, 4, 4),
        "out": draw(5, 2, 4, 4),
        "x0_prev": draw(3, 2, 4, 4),
        "coef": coef,
        "guidance": draw(3),
        "uncond": torch.tensor([4, 0, 2], dtype=torch.int32),
        "cond": torch.tensor([1, 3, 2], dtype=torch.int32),
        "seeds": torch.tensor([7, 8, 9]),
        "steps": torch.tensor([0, 1, 2]),
    }


def test_the_reference_of_a_step_is_the_runtimes(seed: int) -> None:
    inputs = step_inputs(seed)
    x_next, x0 = steps.guided_step(**inputs)
    drawn = noise.normal(inputs["seeds"], inputs["steps"], 1, 32).double().view(3, 2, 4, 4)
    for row in range(3):
        low, high = (inputs["out"][int(inputs[name][row])] for name in ("uncond", "cond"))
        guided = low + inputs["guidance"][row] * (high - low) if row < 2 else high
        _, _, p, q, a, b, c, d = inputs["coef"][row]
        own = p * inputs["x"][row] + q * guided
        later = a * inputs["x"][row] + b * own + c * inputs["x0_prev"][row] + d * drawn[row]
        close(x0[row], own)
        close(x_next[row], later)


def test_the_noise_and_digest_are_the_packages_own() -> None:
    keys, at = torch.tensor([3, 4]), torch.tensor([0, 5])
    assert torch.equal(steps.normal(keys, at, 1, 10), noise.normal(keys, at, 1, 10))
    x = torch.arange(24.0).reshape(2, 12)
    assert torch.equal(steps.fingerprint(x)[0], fingerprint(x).digest)
    variants = {v.name: v for v in families.FAMILIES["fingerprint"].others({"x": x})}
    host = variants["SHA-256 on the host"]
    assert isinstance(host, Variant)
    expected = [hashlib.sha256(row.tobytes()).hexdigest() for row in x.numpy()]
    assert host.prepare({"x": x})() == expected
    assert not host.comparable


def test_every_op_has_something_to_be_compared_with() -> None:
    assert set(ops()) <= set(families.FAMILIES)
