"""The probe computes as many exponentials as it says, and nothing overflows on the way."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from heatsink.kernels import exp_rate
from heatsink.kernels._launch import run


@pytest.mark.parametrize("repeats", [1, 5])
def test_each_element_goes_through_every_repetition(repeats: int) -> None:
    launches, count = exp_rate.plan(torch.device("cpu"), programs=2, repeats=repeats)
    assert count == 2 * exp_rate.BLOCK * repeats
    run(launches)
    out = launches[0].args["out_ptr"]
    assert isinstance(out, torch.Tensor)
    expected = 1.0 / (1.0 + np.arange(out.numel()) % 997)
    for _ in range(repeats):
        expected = np.exp2(-expected)
    # The iteration contracts (its derivative is at most ln 2 in magnitude): errors do not add up.
    np.testing.assert_allclose(out.numpy(), expected, rtol=4 * 2.0**-23)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from heatsink.kernels import exp_rate
source = ASTSource(
    exp_rate.KERNEL.function(),
    {"out_ptr": "*fp32"},
    {"REPEATS": exp_rate.REPEATS, "BLOCK": exp_rate.BLOCK},
)
options = {"num_warps": exp_rate.WARPS, "num_stages": 1}
print(compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def test_values_stay_in_registers() -> None:
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip().split()[0] for line in done.stdout.splitlines() if line.strip()]
    loop = lines[next(i for i, line in enumerate(lines) if line.startswith("$L__BB")) :]
    body = loop[
        : next(i for i, line in enumerate(loop) if line in ("bra", "@%p1") or "bra" in line)
    ]
    elements = exp_rate.BLOCK // (32 * exp_rate.WARPS)
    assert sum(line.startswith("ex2.approx") for line in body) >= elements
    assert not [line for line in body if line.startswith(("ld.", "st."))]


@pytest.mark.gpu
def test_a_gpu_reaches_a_rate_that_a_gpu_can_have() -> None:
    from heatsink.benchmarks import ceilings

    found = ceilings.measure(torch.device("cuda"))
    # 16 a clock and multiprocessor on every architecture this package is for.
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    limit = 16 * properties.multi_processor_count * 3e9
    assert limit / 10 < found.exponentials < limit
    assert found.copy > 1e11
