"""Processes that compile kernels."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from heatsink.kernels import _compile
from heatsink.kernels._compile import Binary, Job, binary_from

_MAIN = f"from {_compile.__name__} import main; main()"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Failure:
    """A job that gave no binary, and why."""

    reason: str


def compile_jobs(
    jobs: Sequence[Job], folder: Path, workers: int = 2, progress: Progress | None = None
) -> list[Binary | Failure]:
    """Compile jobs in processes of their own.

    Args:
        jobs: what to compile.
        folder: where the cubins go; it exists.
        workers: processes at a time.
        progress: called with a description, the number done and the number in all.

    Returns:
        For each job its binary, or why there is none.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    results: list[Binary | Failure] = [Failure("not compiled")] * len(jobs)
    done = iter(range(1, len(jobs) + 1))
    lock = threading.Lock()

    def work() -> None:
        with _Worker(folder) as worker:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                results[index] = worker.compile(jobs[index])
                with lock:
                    if progress:
                        progress("compiling", next(done), len(jobs))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _Worker:
    """A compiling process; one that dies is replaced, and its job is the failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Open as long as the worker is; __exit__ closes it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._errors.close()

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, str(self._folder)],
            env={**environment, **_compile.ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def _stop(self) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        code = process.wait()
        process.stdout.close()
        return code

    def compile(self, job: Job) -> Binary | Failure:
        """Have one job done."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._stop()
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            return Failure(f"the compiling process ended with {code}: {' '.join(told)}")
        answer = json.loads(line)
        if "error" in answer:
            return Failure(f"{answer['error']}: {answer['text'].strip()}")
        return binary_from(answer["binary"])
