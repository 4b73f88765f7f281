"""What a system costs a process that begins with it: time to its first image, and memory.

The process imports, opens (or compiles) and answers one request, then a second one. Files that are
written once ahead of time (an exported graph, an engine) are there before; caches of compilers are
not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heatsink.benchmarks.latency_work import Level, Workload
from heatsink.runtime.errors import HeatsinkError

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """Of one system, in a process of its own.

    Attributes:
        system: its name.
        level: what it answered.
        precision: what it computed in.
        count: images, or rows of the UNet.
        cold: seconds from the start of the process to the first result.
        imports: seconds of these until the system's own library and PyTorch were imported.
        opening: seconds of these in which the model was opened.
        first: seconds of these for the first request, compiling included where it comes then.
        warm: seconds of the second request.
        memory: bytes at the peak: PyTorch's CUDA allocator's, or what the process grew by after
            PyTorch was imported; None where neither can be read.
    """

    system: str
    level: Level
    precision: str
    count: int
    cold: float
    imports: float
    opening: float
    first: float
    warm: float
    memory: int | None


def measure(
    workload: Workload, system: str, precision: str, level: Level, count: int, seconds: float
) -> Cost:
    """Start a process and wait for it.

    Args:
        workload: whose artefacts are there.
        system: a name of `latency.SYSTEMS`.
        precision: as the system is made with.
        level: what it answers.
        count: how many.
        seconds: it may take.

    Raises:
        HeatsinkError: it failed, or took longer.
    """
    given = {
        "workload": {**workload.as_dict(), "ready": True},
        "system": system,
        "precision": precision,
        "level": level,
        "count": count,
        # The same clock in every process of the machine.
        "begun": time.monotonic(),
    }
    with tempfile.TemporaryDirectory(prefix="heatsink-cold-") as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-m", __name__, json.dumps(given)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False,
                timeout=max(1.0, seconds),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise HeatsinkError(f"took longer than {seconds:.0f} s in a fresh process") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HeatsinkError(f"failed in a fresh process: {lines[-1][:200]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def answer(given: dict[str, Any]) -> Cost:
    """What the process does."""
    import torch

    from heatsink.benchmarks.latency import SYSTEMS
    from heatsink.benchmarks.latency_systems import synchronised
    from heatsink.benchmarks.latency_work import Artefacts

    workload = Workload(**given["workload"])
    system, level, count = given["system"], given["level"], given["count"]
    torch.set_num_threads(workload.threads)
    memory = _Memory(workload.device)
    begun, imported = given["begun"], time.monotonic()
    artefacts = Artefacts(workload)
    (runner, *_) = SYSTEMS[system](artefacts, given["precision"]).runners(level, count)
    runner.load(artefacts.request(level, count, 1))
    opened = time.monotonic()
    with synchronised(workload.device):
        runner.run()
    answered = time.monotonic()
    runner.load(artefacts.request(level, count, 2))
    with synchronised(workload.device) as warm:
        runner.run()
    return Cost(
        system,
        level,
        given["precision"],
        count,
        answered - begun,
        imported - begun,
        opened - imported,
        answered - opened,
        warm(),
        memory.peak(),
    )


class _Memory:
    """The process's memory from now on."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        # Lets the peak begin again: what importing took for a moment is not the system's.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes."""
        import torch

        if self._cuda:
            return torch.cuda.max_memory_allocated()
        peak = _status("VmHWM")
        return None if peak is None or self._before is None else peak - self._before


def _status(key: str) -> int | None:
    """A line of the kernel's report about this process, in bytes."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def main(arguments: list[str]) -> None:
    """Measure what the one argument, JSON, asks for; print the cost as JSON."""
    from heatsink import console

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("given", type=json.loads)
    given = parser.parse_args(arguments).given
    with console.quiet_libraries(diffusers=False):
        cost = answer(given)
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main(sys.argv[1:])
