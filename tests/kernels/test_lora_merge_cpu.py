"""What holds of the C++ implementation alone: its bits, whatever runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from heatsink.kernels import _native
from heatsink.kernels.lora_merge import Term, lora_merge

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)


def test_large_calls_go_past_the_caches_with_the_same_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # More than 32 MiB in rows of whole cache lines, and the same weights without them.
    large = torch.zeros(9000, 1024)
    base = [torch.randn(24, 64, generator=generator) for _ in range(2)] + [large]
    terms = [
        Term(
            j,
            torch.randn(5, 64, generator=generator),
            torch.randn(24, 5, generator=generator),
            0.3,
            torch.rand(24, generator=generator) + 0.5 if j else None,
        )
        for j in range(2)
    ]
    out = [torch.full_like(x, float("nan")) for x in base]
    lora_merge(base, out, terms)
    assert torch.equal(out[2], large)
    alone = [torch.full_like(x, float("nan")) for x in base[:2]]
    lora_merge(base[:2], alone, terms)
    assert all(map(torch.equal, alone, out))


BITS = """
import json, sys, torch
from heatsink.kernels.fingerprint import fingerprint
from heatsink.kernels.lora_merge import Term, lora_merge
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(1)
shapes = ((64, 64), (37, 45), (1, 1), (70, 3), (5, 6, 3, 3), (9, 20, 1, 1), (1030, 640))
found = []
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)
    base = [normal(*shape) for shape in shapes]
    base[4] = base[4].contiguous(memory_format=torch.channels_last)
    terms = []
    for rank, lengths in ((7, False), (3, True)):
        for j, shape in enumerate(shapes):
            a, b = normal(rank, *shape[1:]), normal(shape[0], rank)
            terms.append(Term(j, a, b, 0.3, normal(shape[0]).abs() + 0.5 if lengths else None))
    out = [torch.full_like(x, float("nan")) for x in base]
    lora_merge(base, out, terms)
    found += [fingerprint(x[None]).hex()[0] for x in out]
print(json.dumps(found))
"""


def test_bits_are_those_of_every_processor_and_number_of_threads() -> None:
    def found_with(instructions: str, threads: int) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", BITS, str(threads)],
            env={**os.environ, "HEATSINK_CPU": instructions},
            capture_output=True,
            text=True,
            check=False,
        )
        if "HEATSINK_CPU: expected one of" in done.stderr:
            pytest.skip(f"this processor has no {instructions}")
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)
        return found

    expected = found_with("portable", 1)
    assert len(set(expected)) == len(expected)
    for instructions in ("avx2", "avx512"):
        assert found_with(instructions, 2) == expected
