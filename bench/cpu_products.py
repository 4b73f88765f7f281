"""`linear` and `conv2d` of this package on the CPU against oneDNN through PyTorch.

    python bench/cpu_products.py --threads 1 --dtype bf16

Every call is interleaved with the others; medians with the fastest. With one thread the time is the
thread's own on the processor, so that other programs count less; with more it is the clock's. The
ceilings are loops in registers alone, measured in the same run (needs a C++ compiler). Weights are
packed beforehand where a variant can: "ours" and "oneDNN packed".
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.benchmarks.environment import processor
from heatsink.kernels import _native, load
from heatsink.kernels._products import scratch_bytes
from heatsink.kernels.linear import pack_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], Tensor | None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """A linear layer (`size` 0: `batch` rows), or a convolution of `size` x `size` pixels."""

    name: str
    batch: int
    channels: int
    columns: int
    size: int = 0
    kernel: int = 3
    stride: int = 1

    @property
    def rows(self) -> int:
        """Of the product."""
        pixels = (self.size // self.stride) ** 2 if self.size else 1
        return self.batch * pixels

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        taps = self.kernel**2 if self.size else 1
        return 2 * self.rows * self.channels * taps * self.columns


SHAPES = (
    Shape("bundled 8x8", 24, 64, 64, 8),
    Shape("bundled 8x8", 24, 128, 128, 8),
    Shape("bundled 8x8", 24, 192, 128, 8),
    Shape("bundled 4x4", 24, 192, 192, 4),
    Shape("bundled tokens", 24 * 64, 128, 128),
    Shape("bundled tokens", 24 * 64, 128, 1024),
    Shape("bundled tokens", 24 * 64, 512, 128),
    Shape("bundled tokens, one pair", 2 * 64, 128, 128),
    Shape("SD1.5 64x64", 2, 320, 320, 64),
    Shape("SD1.5 32x32", 2, 640, 640, 32),
    Shape("SD1.5 16x16", 2, 1280, 1280, 16),
    Shape("SD1.5 8x8", 2, 1280, 1280, 8),
    Shape("SD1.5 64x64 in", 2, 4, 320, 64),
    Shape("SD1.5 64x64 out", 2, 320, 4, 64),
    Shape("SD1.5 64x64 down", 2, 320, 320, 64, stride=2),
    Shape("SD1.5 64x64 1x1", 2, 960, 320, 64, kernel=1),
    Shape("SD1.5 4096 tokens", 8192, 320, 320),
    Shape("SD1.5 4096 tokens", 8192, 320, 2560),
    Shape("SD1.5 1024 tokens", 2048, 640, 640),
    Shape("SD1.5 1024 tokens", 2048, 2560, 640),
    Shape("SD1.5 256 tokens", 512, 1280, 1280),
    Shape("SD1.5 time", 2, 320, 1280),
    Shape("VAE 64x64", 1, 512, 512, 64),
    Shape("VAE 128x128", 1, 256, 256, 128),
    Shape("VAE 256x256", 1, 128, 128, 256),
)


def _linear(shape: Shape, dtype: torch.dtype) -> dict[str, Call]:
    x = torch.randn(shape.rows, shape.channels).to(dtype)
    weight = (torch.randn(shape.columns, shape.channels) / shape.channels**0.5).to(dtype)
    bias = torch.randn(shape.columns).to(dtype)
    out = torch.empty(shape.rows, shape.columns, dtype=dtype)
    packed, scratch = pack_linear(weight), torch.empty(scratch_bytes(), dtype=torch.uint8)
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, shape.rows)
    op, pointwise = torch.ops.heatsink.linear_packed, torch.ops.mkldnn._linear_pointwise

    def ours() -> Tensor:
        op(x, packed, bias, None, None, "", scratch, out)
        return out

    return {
        "ours": ours,
        "PyTorch": lambda: F.linear(x, weight, bias),
        "oneDNN packed": lambda: pointwise(x, prepacked, bias, "none", [], ""),
    }


def _conv2d(shape: Shape, dtype: torch.dtype) -> dict[str, Call]:
    last = torch.channels_last
    kernel, stride, padding = shape.kernel, shape.stride, shape.kernel // 2
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size).to(dtype)
    x = x.contiguous(memory_format=last)
    depth = shape.channels * kernel**2
    weight = (torch.randn(shape.columns, shape.channels, kernel, kernel) / depth**0.5).to(dtype)
    weight = weight.contiguous(memory_format=last)
    bias = torch.randn(shape.columns).to(dtype)
    small = shape.size // stride
    out = torch.empty(shape.batch, shape.columns, small, small, dtype=dtype, memory_format=last)
    packed, scratch = pack_linear(weight), torch.empty(scratch_bytes(), dtype=torch.uint8)
    window = ([padding] * 2, [stride] * 2, [1, 1], 1)
    reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
    prepacked = reorder(weight.to_mkldnn(), *window, x.shape)
    op, pointwise = torch.ops.heatsink.conv2d_packed, torch.ops.mkldnn._convolution_pointwise

    window_ours = (kernel, kernel, stride, padding, 1, "")

    def ours() -> Tensor:
        op(x, None, packed, bias, None, None, *window_ours, scratch, out)
        return out

    return {
        "ours": ours,
        "PyTorch": lambda: F.conv2d(x, weight, bias, stride, padding),
        "oneDNN packed": lambda: pointwise(x, prepacked, bias, *window, "none", [], ""),
    }


def _check(calls: dict[str, Call], dtype: torch.dtype) -> None:
    outs = {name: call() for name, call in calls.items()}
    expected = outs["PyTorch"]
    for name, out in outs.items():
        assert out is not None
        assert expected is not None
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        if not error < (1e-2 if dtype == torch.bfloat16 else 1e-5):
            raise SystemExit(f"{name}: relative error {error:.1e}")


def measure(calls: dict[str, Call], seconds: float, clock: Clock) -> dict[str, list[float]]:
    """Seconds a call, sorted, of every call; their repetitions are interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: sorted(found) for name, found in times.items()}


def ceilings(threads: int, clock: Clock) -> dict[str, float]:
    """GFLOP/s of loops in registers alone, by dtype, on so many threads at once."""
    source = Path(__file__).with_name("cpu_ceilings.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = ["c++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    flags = Path("/proc/cpuinfo").read_text().split()
    loops = {
        "fp32": ("fma_avx512", "avx512f", 1 << 21),
        "bf16": ("amx_bfloat16", "amx_bf16", 1 << 20),
    }
    return {
        dtype: max(_rate(getattr(loaded, name), rounds, threads, clock) for _ in range(7))
        for dtype, (name, flag, rounds) in loops.items()
        if flag in flags
    }


def _rate(
    loop: Callable[[ctypes.c_int64], float], rounds: int, threads: int, clock: Clock
) -> float:
    loop.restype = ctypes.c_double  # type: ignore[attr-defined]
    done: list[float] = []
    others = [
        threading.Thread(target=lambda: done.append(loop(ctypes.c_int64(rounds))))
        for _ in range(threads - 1)
    ]
    start = clock()
    for other in others:
        other.start()
    done.append(loop(ctypes.c_int64(rounds)))
    for other in others:
        other.join()
    return sum(done) / (clock() - start) / 1e9


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each shape")
    parser.add_argument("--only", default="", help="part of the shapes' names")
    options = parser.parse_args()
    load()
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    ceiling = ceilings(options.threads, clock)
    print(f"{processor()}, PyTorch {torch.__version__}, {_native.instruction_set()}")
    print(f"{options.threads} threads, {options.dtype}; load before: {os.getloadavg()[0]:.1f}")
    print(f"ceilings, GFLOP/s: {', '.join(f'{n} {rate:.0f}' for n, rate in ceiling.items())}")
    heads = "".join(f"{name:>15s}" for name in ("ours", "PyTorch", "oneDNN packed"))
    print(f"{'GFLOP/s, median (best)':50s}{heads}{'us, ours':>10s}{'ratio':>7s}")
    ratios = []
    with torch.inference_mode():
        for shape in (found for found in SHAPES if options.only in found.name):
            ratios.append(_row(shape, dtype, options.seconds, clock))
    mean = statistics.geometric_mean(ratios)
    print(f"the better of the others takes {mean:.2f} times as long (geometric mean)")


def _row(shape: Shape, dtype: torch.dtype, seconds: float, clock: Clock) -> float:
    """Print a line; the ratio of the better of the others to ours."""
    calls = (_conv2d if shape.size else _linear)(shape, dtype)
    _check(calls, dtype)
    times = measure(calls, seconds, clock)
    middle = {name: statistics.median(found) for name, found in times.items()}
    rates = [
        f"{shape.flops / middle[name] / 1e9:.0f} ({shape.flops / found[0] / 1e9:.0f})"
        for name, found in times.items()
    ]
    ratio = min(middle["PyTorch"], middle["oneDNN packed"]) / middle["ours"]
    kind = f"{shape.kernel}x{shape.kernel}/{shape.stride}" if shape.size else "linear"
    title = f"{shape.name}, {kind} {shape.batch}x{shape.channels} to {shape.columns}"
    columns = "".join(f"{rate:>15s}" for rate in rates)
    print(f"{title:50s}{columns}{1e6 * middle['ours']:10.0f}{ratio:7.2f}", flush=True)
    return ratio


if __name__ == "__main__":
    main()
