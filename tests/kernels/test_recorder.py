"""Recorded calls: made again in order, on what lies in their tensors then."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, load
from heatsink.kernels.recorder import Recorder, static_memory

load()
ours: Any = torch.ops.heatsink


def test_without_the_extension_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available", lambda: False)
    with pytest.raises(RuntimeError, match="calls can't be recorded: "):
        Recorder()


if not _native.available():
    pytest.skip("calls are recorded by the extension, which is not in use", allow_module_level=True)


def _norm(x: Tensor, out: Tensor, eps: float = 1e-5) -> partial[Any]:
    return partial(ours.rms_norm_out, x, None, eps, out)


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_static_memory_is_there_to_be_written(size: int) -> None:
    memory = static_memory(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    assert (memory.fill_(7) == 7).all()


def test_large_pages_are_asked_for_dense_memory_alone() -> None:
    with pytest.raises(RuntimeError, match="memory: expected a dense tensor"):
        ours.program_memory(torch.empty(4, 4).mT[:2])


def test_calls_are_kept_and_made_in_order(seed: int) -> None:
    x, y = (torch.randn(3, 8, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1))
    h, out = torch.zeros(3, 8), torch.zeros(3, 8)
    recorder = Recorder()
    # The second reads what the first writes.
    assert recorder.record(_norm(x, h), "first")
    assert recorder.record(partial(ours.silu_mul_out, h, x, out), "second")
    assert recorder.calls == 2
    assert not h.any()
    assert not out.any()
    for _ in range(2):
        recorder.replay()
        assert torch.equal(out, ours.silu_mul(ours.rms_norm(x, None, 1e-5), x))
        x.copy_(y)
    wanted = out.clone()
    recorder.replay(0, 1)
    assert torch.equal(h, ours.rms_norm(y, None, 1e-5))
    assert torch.equal(out, wanted)


def test_outside_of_a_record_calls_are_made(seed: int) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    recorder, out = Recorder(), torch.zeros(2, 8)
    recorder.record(_norm(x, out), "kept")
    other = torch.zeros(2, 8)
    _norm(x, other)()
    assert other.all()
    assert recorder.calls == 1


def test_what_cannot_be_kept_is_made() -> None:
    recorder, out = Recorder(), torch.ones(2)
    assert not recorder.record(partial(torch.add, out, out, out=out), "no op of this package")
    assert out.tolist() == [2.0, 2.0]
    assert recorder.calls == 0


def test_a_failing_record_leaves_the_thread_as_it_was() -> None:
    recorder, out = Recorder(), torch.zeros(2, 8)
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0, "fails")
    with pytest.raises(RuntimeError, match="this thread records one already"):
        recorder.record(lambda: Recorder().record(_norm(out, out), "inner"), "outer")
    _norm(torch.ones(2, 8), out)()
    assert out.all()


def test_another_threads_calls_are_made() -> None:
    recorder, out = Recorder(), torch.zeros(2, 8)

    def call() -> None:
        thread = threading.Thread(target=_norm(torch.ones(2, 8), out))
        thread.start()
        thread.join()

    assert not recorder.record(call, "another thread's")
    assert out.all()


def test_tensors_live_as_long_as_the_recorder() -> None:
    out = torch.zeros(64, 64)
    recorder = Recorder()
    x = torch.ones(64, 64)
    recorder.record(_norm(x, out), "kept")
    del x
    gc.collect()
    for _ in range(4):
        torch.full((64, 64), torch.nan)
    recorder.replay()
    assert torch.equal(out, ours.rms_norm(torch.ones(64, 64), None, 1e-5))
    program, alive = recorder._program, weakref.ref(recorder)
    run = recorder.replayer(0, 1)
    del recorder
    assert alive() is not None
    run()
    del run
    assert alive() is None
    with pytest.raises(RuntimeError, match="program: there is none of number"):
        ours.program_replay(program, 0, 1)


def test_an_error_says_which_call() -> None:
    recorder, out = Recorder(), torch.zeros(2, 8)
    recorder.record(_norm(torch.ones(2, 8), out), "first of a.b")
    # Seen only when it runs.
    recorder.record(_norm(torch.ones(2, 4), out), "second of a.c")
    with pytest.raises(
        RuntimeError, match=r"second of a\.c: .*out: expected size 4 in dimension 1"
    ):
        recorder.replay()
    assert out.all()
    with pytest.raises(RuntimeError, match="program: expected calls among 2, got 1 to 3"):
        recorder.replay(1, 3)


def test_other_threads_run_meanwhile() -> None:
    x = torch.ones(1024, 1024)
    recorder = Recorder()
    for _ in range(40):
        recorder.record(_norm(x, x), "long")
    turns, stop = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = turns
    recorder.replayer(0, 40)()
    after = turns
    stop.set()
    thread.join()
    # With the lock held, none; the interpreter hands it over every 5 ms at most.
    assert after - before > 1000


def test_a_replay_allocates_nothing(allocations: Any) -> None:
    x = torch.ones(4, 8)
    recorder = Recorder()
    for _ in range(5):
        recorder.record(_norm(x, torch.empty(4, 8)), "call")
    assert allocations(recorder.replay) == 0
