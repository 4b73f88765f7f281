"""`lora_rows` in C++: its bits, whatever the processor's instructions and the threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._lora_rows_torch import lora_rows_torch
from heatsink.kernels._windows import Window
from heatsink.kernels.lora_rows import lora_rows
from heatsink.kernels.recorder import Recorder

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def every_form(dtype: torch.dtype) -> list[Tensor]:
    """Linear layers and images, dense along channels and along pixels, of all parts of vectors."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    found = []
    slots = torch.tensor([[0, 2], [-1, -1], [1, -1], [2, 1]])
    scales = torch.rand((4, 2), generator=generator)
    ranks = torch.tensor([70, 3, 33], dtype=torch.int32)
    for tokens, inputs, outputs in ((50, 130, 90), (1, 64, 33), (13, 17, 16)):
        y, x = normal(4, tokens, outputs), normal(4, tokens, inputs)
        bank = (normal(3, 70, inputs), normal(3, 70, outputs))
        lora_rows(y, x, *bank, slots, scales, ranks=ranks)
        found.append(y)
    for memory in (torch.contiguous_format, torch.channels_last):
        x = normal(4, 20, 7, 9).contiguous(memory_format=memory)
        y = normal(4, 18, 4, 5).contiguous(memory_format=memory)
        bank = (normal(3, 70, 20, 3, 3), normal(3, 70, 18))
        lora_rows(y, x, *bank, slots, scales, ranks=ranks, stride=2, padding=1)
        found.append(y)
    return found


# Printed as bytes, so that a difference shows.
CHILD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
torch.set_num_threads(1)
for dtype in here.DTYPES:
    for y in here.every_form(dtype):
        print(y.contiguous().view(torch.uint8).numpy().tobytes().hex())
"""


def of_instructions(name: str) -> str:
    command = [sys.executable, "-P", "-c", CHILD, str(Path(__file__))]
    done = subprocess.run(
        command,
        env={**os.environ, "HEATSINK_CPU": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if "on this processor" in done.stderr:
        pytest.skip(reason=f"this processor has no {name}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one set of instructions")
@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_every_set_of_instructions_gives_the_same_bits(name: str) -> None:
    found = of_instructions(name)
    assert len(found.splitlines()) == 3 * 5
    assert found == of_instructions("portable")


def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    found: dict[int, Any] = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = every_form(torch.float32)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for one, other in zip(found[1], found[threads], strict=True):
            assert torch.equal(one, other)


def test_the_op_runs_the_extension(seed: int) -> None:
    # C++ contracts, PyTorch's operations do not: so which of them ran can be seen.
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.randn((2, 2, 64, 128), generator=generator)
    a, b = torch.randn((2, 1, 16, 128), generator=generator)
    slots, scales = torch.zeros((2, 1), dtype=torch.int32), torch.ones(2, 1)
    other = y.clone()
    lora_rows(y, x, a, b, slots, scales)
    lora_rows_torch(other, x, a, b, slots, scales, None, Window())
    assert not torch.equal(y, other)
    torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "3x3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bank_may_be_of_another_dtype(dtype: torch.dtype, kernel: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    slots, scales = torch.tensor([[0], [1]]), torch.tensor([[0.5], [2.0]])
    sizes = (2, 20, 6, 5) if kernel else (2, 11, 20)
    x = torch.randn(sizes, generator=generator).to(dtype)
    y = torch.zeros(2, 18, 4, 3, dtype=dtype) if kernel else torch.zeros(2, 11, 18, dtype=dtype)
    geometry = (1, 1, 0, 0, 1, 1)
    for other in DTYPES:
        a = torch.randn((2, 7, 20, *kernel), generator=generator).to(other)
        b = torch.randn((2, 7, 18), generator=generator).to(other)
        found, wanted = y.clone(), y.float()
        torch.ops.heatsink.lora_rows(found, x, a, b, slots, scales, None, *geometry)
        # All of it is float32 inside, and what is read is exact.
        wide = (x.float(), a.float(), b.float())
        torch.ops.heatsink.lora_rows(wanted, *wide, slots, scales, None, *geometry)
        assert found.any()
        assert torch.equal(found, wanted.to(dtype))


def test_a_recorded_call_is_made_again() -> None:
    x, y = torch.randn(2, 5, 8), torch.zeros(2, 5, 6)
    bank, slots = (torch.randn(2, 3, 8), torch.randn(2, 3, 6)), torch.tensor([[1], [-1]])
    given = (y, x, *bank, slots, torch.ones(2, 1), None, 1, 1, 0, 0, 1, 1)
    recorder = Recorder()
    assert recorder.record(partial(torch.ops.heatsink.lora_rows.default, *given), "here")
    assert not y.any()
    recorder.replay()
    assert y[0].any()
    assert not y[1].any()
    # What lies in the slots when it is replayed counts, and an error names the call.
    slots.copy_(torch.tensor([[-1], [0]]))
    recorder.replay()
    assert y[1].any()
    slots[0] = 2
    with pytest.raises(RuntimeError, match=r"here: .*slots: expected slots of the bank, up to 1"):
        recorder.replay()
