from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from heatsink.kernels import noise as kernel
from heatsink.kernels import reference
from heatsink.kernels._launch import run
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.noise import (
    ENCODE,
    INITIAL,
    STEP,
    normal,
    normal_rows,
    philox,
    words_to_normal,
)

DOCS = Path(__file__).parents[2] / "docs" / "noise.md"
SEEDS = (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
ULP = 2.0**-24  # half a unit in the last place of float32, relative

Op = Callable[[Tensor, Tensor, int, int], Tensor]


def triton(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    """The Triton kernel, here under the interpreter, whose time goes with the launch's programs."""
    config = {"BLOCK": 64 if count < 10_000 else 1 << 16, "warps": 4}
    out, launches = kernel.plan(config, keys, steps, purpose, count)
    run(launches)
    return out


# C++ where it was built, PyTorch, Triton.
ALL = pytest.mark.parametrize(
    "op",
    [kernel.normal, kernel._normal_torch, triton],
    ids=["op", "torch", "triton"],
)


def bits(x: Tensor) -> list[int]:
    flat: list[int] = x.contiguous().view(torch.int32).flatten().tolist()
    return flat


def int64(*numbers: int) -> Tensor:
    return torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers], dtype=torch.int64)


def sample_words(count: int, seed: int) -> Tensor:
    """Words over the whole range, the ends and both sides of the transform's branch."""
    generator = torch.Generator().manual_seed(seed)
    split = round((0.5 - 0.425) * 2**32)
    low = [*range(64), *range(split - 2000, split + 2000), *range(2**31 - 64, 2**31)]
    ends = torch.tensor([*low, *(2**32 - 1 - w for w in low)])
    return torch.cat([ends, torch.randint(0, 2**32, (count,), generator=generator)])


def _table(heading: str) -> list[list[str]]:
    """The cells of the table below `heading` in the document."""
    lines = DOCS.read_text().split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.split("|")[1:-1]])
    return rows


def _words(cell: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in cell.split())


def test_known_answers_of_philox() -> None:
    # As Random123 publishes them, not as this package prints them.
    answers = {
        ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
        ): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    published = {(_words(c), _words(k)): _words(out) for c, k, out in _table("Philox4x32-10, the")}
    assert published == answers
    for (counter, key), expected in answers.items():
        assert reference.philox_4x32_10(counter, key) == expected
        c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
        k0, k1 = (torch.tensor(word) for word in key)
        assert tuple(int(word) for word in philox((c0, c1, c2, c3), (k0, k1))) == expected


@ALL
def test_published_elements(op: Op) -> None:
    rows = _table("Elements (")
    assert len(rows) >= 10
    for cells in rows:
        seed, purpose, step, index = (int(cell) for cell in cells[:4])
        word = reference.noise_word(seed, purpose, step, index)
        assert f"{word:08x}" == cells[4]
        assert float(reference.word_to_normal(word)) == float.fromhex(cells[5])
        values = op(int64(seed), torch.tensor([step]), purpose, index + 1)
        assert values[0, index].item() == float.fromhex(cells[5])


def test_published_transform() -> None:
    rows = _table("The transform alone")
    assert len(rows) >= 16
    for word, value in rows:
        assert float(reference.word_to_normal(int(word, 16))) == float.fromhex(value)
        assert words_to_normal(torch.tensor(int(word, 16))).item() == float.fromhex(value)


@ALL
def test_equals_the_reference(op: Op) -> None:
    steps = (0, 1, 49, 2**31, 2**32 - 1, 7)
    values = op(int64(*SEEDS), torch.tensor(steps), STEP, 301)
    expected = [
        [reference.word_to_normal(reference.noise_word(seed, STEP, step, i)) for i in range(301)]
        for seed, step in zip(SEEDS, steps, strict=True)
    ]
    assert bits(values) == np.array(expected, dtype=np.float32).view(np.int32).flatten().tolist()


def test_transform_equals_the_reference(seed: int) -> None:
    words = sample_words(2000, seed)
    expected = np.array([reference.word_to_normal(w) for w in words.tolist()], dtype=np.float32)
    assert bits(words_to_normal(words)) == expected.view(np.int32).tolist()


def test_both_implementations_agree_on_many_values(seed: int) -> None:
    keys, steps = int64(seed, *SEEDS), torch.arange(len(SEEDS) + 1)
    expected = kernel._normal_torch(keys, steps, INITIAL, 65_537)
    assert bits(kernel.normal(keys, steps, INITIAL, 65_537)) == bits(expected)


@ALL
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 255, 256, 257, 1000])
def test_a_value_depends_on_its_index_alone(op: Op, count: int) -> None:
    keys, steps = int64(3, 2**64 - 3), torch.tensor([5, 6])
    longest = op(keys, steps, STEP, 1001)
    values = op(keys, steps, STEP, count)
    assert values.shape == (2, count)
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    assert bits(values) == bits(longest[:, :count])


def test_rows_equal_the_same_rows_alone() -> None:
    shape = (4, 9, 7)
    together = normal_rows(SEEDS, STEP, range(len(SEEDS)), shape)
    for row, seed in enumerate(SEEDS):
        assert bits(together[row]) == bits(normal(seed, STEP, row, shape))
    backwards = normal_rows(SEEDS[::-1], STEP, range(len(SEEDS))[::-1], shape)
    assert bits(backwards.flip(0)) == bits(together)
    assert bits(normal_rows(SEEDS, STEP, 4, shape)[4]) == bits(together[4])


def test_the_shape_only_arranges() -> None:
    flat = normal(11, INITIAL, 0, (4 * 16 * 16,))
    assert bits(normal(11, INITIAL, 0, (4, 16, 16))) == bits(flat)
    assert normal(11, INITIAL, 0, ()).item() == flat[0].item()
    assert normal(11, INITIAL, 0, (4, 0)).shape == (4, 0)
    assert normal_rows([], INITIAL, 0, (4, 4)).shape == (0, 4, 4)


def test_threads_do_not_matter() -> None:
    expected = normal_rows([1, 2, 3], STEP, 1, (100_001,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert bits(normal_rows([1, 2, 3], STEP, 1, (100_001,))) == bits(expected)
    finally:
        torch.set_num_threads(threads)


def test_strided_keys_and_steps() -> None:
    keys, steps = int64(1, 9, 2, 9, 3, 9), torch.tensor([4, 0, 5, 0, 6, 0])
    expected = kernel.normal(int64(1, 2, 3), torch.tensor([4, 5, 6]), STEP, 10)
    assert bits(kernel.normal(keys[::2], steps[::2], STEP, 10)) == bits(expected)


def test_streams_differ_and_are_uncorrelated() -> None:
    count = 40_000
    streams = [
        normal(seed, purpose, step, (count,))
        for seed, purpose, step in (
            (5, INITIAL, 0),
            (6, INITIAL, 0),
            (5 + 2**32, INITIAL, 0),
            (5, STEP, 0),
            (5, STEP, 1),
            (5, ENCODE, 0),
        )
    ]
    rows = torch.stack([*streams, streams[0].roll(1), streams[0].roll(4)]).double()
    correlation = rows @ rows.T / count
    # A product of independent normals has variance 1: five standard errors.
    off = correlation - torch.diag(correlation.diagonal())
    assert off.abs().max().item() < 5 / math.sqrt(count)


def test_moments_and_distribution(seed: int) -> None:
    count = 200_000
    x = normal(seed, INITIAL, 0, (count,)).double().numpy()
    # E[z^k], and the variance of z^k, which is E[z^2k] - E[z^k]^2: five standard errors.
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((x**power).mean() - mean) < 5 * math.sqrt(variance / count)
    # Kolmogorov's bound at a significance of 1e-6.
    statistic = stats.kstest(x, special.ndtr).statistic
    assert statistic < math.sqrt(math.log(2 / 1e-6) / 2 / count)


def test_error_of_the_transform(seed: int) -> None:
    words = sample_words(300_000, seed)
    values = words_to_normal(words).double().numpy()
    exact = special.ndtri((words.double().numpy() + 0.5) / 2**32)
    # AS 241's PPND7 states about 1e-7. On top, each rounding costs at most one relative ULP: six
    # in each polynomial of positive terms, five in conversions, product and quotient, three
    # that reach z through the polynomials' argument.
    budget = 1e-7 + 20 * ULP
    # scipy's probability is itself rounded near 1: 2^-54 in p, divided by the density at z.
    rounding = 2.0**-54 / np.exp(-(exact**2) / 2) * math.sqrt(2 * math.pi)
    assert np.all(np.abs(values - exact) <= budget * np.abs(exact) + rounding)
    # What docs/noise.md promises.
    assert np.max(np.abs(values - exact) - rounding - 5e-7 * np.abs(exact)) < 0


def test_the_transform_is_odd_finite_and_never_zero(seed: int) -> None:
    words = sample_words(50_000, seed)
    values = words_to_normal(words)
    assert bits(words_to_normal(2**32 - 1 - words)) == bits(-values)
    assert values.isfinite().all()
    assert (values != 0).all()
    assert values.abs().max().item() == -words_to_normal(torch.tensor(0)).item() < 6.34


def test_square_root_is_rounded_correctly(seed: int) -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(seed)) * 25
    assert bits(kernel._sqrt(x)) == bits(torch.from_numpy(np.sqrt(x.numpy())))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, STEP, 0, (4,)), r"seed: expected an integer in \[0, 2\^64\), got -1"),
        ((2**64, STEP, 0, (4,)), r"seed: expected an integer in \[0, 2\^64\)"),
        ((1.5, STEP, 0, (4,)), r"seed: expected an integer, got 1.5 \(float\)"),
        ((1, -1, 0, (4,)), r"purpose: expected an integer in \[0, 2\^32\), got -1"),
        ((1, STEP, 2**32, (4,)), r"step: expected an integer in \[0, 2\^32\)"),
        ((1, STEP, 0, (4, -2)), r"shape: expected an integer in \[0, 2\^31\), got -2"),
    ],
)
def test_bad_numbers(arguments: tuple[int, int, int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        normal(*arguments)


def test_bad_rows() -> None:
    with pytest.raises(InvalidRequest, match="steps: expected one for each of 2 seeds, got 3"):
        normal_rows([1, 2], STEP, [1, 2, 3], (4,))
    with pytest.raises(ValueError, match=r"keys: expected \(rows,\) int64, got \(2, 1\)"):
        kernel.normal(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2), 0, 4)
    with pytest.raises(ValueError, match=r"steps: expected \(2,\) on cpu like keys, got \(3,\)"):
        kernel.normal(int64(1, 2), int64(1, 2, 3), 0, 4)
    with pytest.raises(ValueError, match="count: expected 0 or more, got -1"):
        kernel.normal(int64(1), int64(1), 0, -1)
    with pytest.raises(ValueError, match=r"purpose: expected an integer in \[0, 2\^32\), got -1"):
        kernel.normal(int64(1), int64(1), -1, 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keys", "a", "keys: expected a tensor, got str"),
        ("steps", [1], "steps: expected a tensor, got list"),
        ("purpose", 1.5, "purpose: expected an integer, got float"),
        ("count", "4", "count: expected an integer, got str"),
        ("count", True, "count: expected an integer, got bool"),
    ],
)
def test_what_is_no_tensor_or_integer(name: str, value: Any, message: str) -> None:
    given: dict[str, Any] = {"keys": int64(1), "steps": int64(1), "purpose": 0, "count": 4}
    with pytest.raises(TypeError, match=message):
        kernel.normal(**{**given, name: value})


def test_opcheck() -> None:
    arguments = (int64(*SEEDS), torch.arange(len(SEEDS)), STEP, 21)
    torch.library.opcheck(torch.ops.heatsink.normal.default, arguments)
