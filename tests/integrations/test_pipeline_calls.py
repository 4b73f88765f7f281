"""Weights and hooks change between a pipeline's calls, never in the middle of one."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import heatsink
from heatsink.integrations.pipeline_calls import PipelineCalls
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import AdapterError, CallerError, MergeTimeout, WaitsForItself

Make = Callable[..., list[AdapterDelta]]
PROMPTS = ["a red apple", "two cats"]
CHOICES: list[Any] = [{"a": 1.0}, [{"a": 1.0}, None], None]
LONG = 20.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@pytest.fixture
def adapters(sd1: Any, deltas_for: Make, seed: int) -> Iterator[Any]:
    torch.manual_seed(seed)
    with heatsink.adapters(sd1) as found:
        found.add("a", deltas_for(sd1))
        yield found


@pytest.mark.parametrize("before", CHOICES)
@pytest.mark.parametrize("after", CHOICES)
def test_a_choice_of_another_thread_waits_for_the_call(
    before: Any, after: Any, sd1: Any, adapters: Any, latents_of: Any
) -> None:
    noise = torch.randn(2, 4, 8, 8)
    wanted = []
    for choice in (before, after):
        adapters.use(choice)
        wanted.append(latents_of(sd1, PROMPTS, noise))
    adapters.use(before)
    with ThreadPoolExecutor(1) as pool:
        tasks = []

        def step(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if number == 0:
                with pytest.raises(MergeTimeout, match="1 requests are under way"):
                    pool.submit(adapters.use, after, timeout=0.01).result(LONG)
                tasks.append(pool.submit(adapters.use, after))
                until(lambda: adapters.gate.waiting == 1)
            assert not tasks[0].done()
            return given

        during = latents_of(sd1, PROMPTS, noise, callback_on_step_end=step)
        tasks[0].result(LONG)
    assert torch.equal(during, wanted[0])
    assert torch.equal(latents_of(sd1, PROMPTS, noise), wanted[1])
    assert (adapters.gate.requests, adapters.gate.waiting) == (0, 0)


def test_a_call_waits_for_a_change(sd1: Any, adapters: Any, latents_of: Any) -> None:
    noise = torch.randn(2, 4, 8, 8)
    adapters.use({"a": 1.0})
    wanted = latents_of(sd1, PROMPTS, noise)
    adapters.remove()
    with ThreadPoolExecutor(1) as pool:
        with adapters.gate.merge():
            task = pool.submit(latents_of, sd1, PROMPTS, noise)
            until(lambda: adapters.gate.waiting == 1)
            adapters._merger.apply([(adapters._deltas["a"], 1.0)])
        assert torch.equal(task.result(LONG), wanted)


def test_a_callback_can_not_change_what_runs(sd1: Any, adapters: Any, latents_of: Any) -> None:
    noise, seen = torch.randn(2, 4, 8, 8), []
    adapters.use({"a": 1.0})
    wanted = latents_of(sd1, PROMPTS, noise)

    def step(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        for change in (
            lambda: adapters.use({"a": 0.5}),
            lambda: adapters.use(None),
            lambda: adapters.use([{"a": 1.0}, None]),
            lambda: adapters.keep("host"),
            adapters.remove,
            adapters.close,
        ):
            with pytest.raises(WaitsForItself, match="inside a request"):
                change()
        seen.append(number)
        return given

    assert torch.equal(latents_of(sd1, PROMPTS, noise, callback_on_step_end=step), wanted)
    assert len(seen) == 4
    assert adapters.in_use == {"a": 1.0}

    def nested(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if number == 0:
            # The same thread holds the gate already. (The scheduler's state is lost by this.)
            assert torch.equal(latents_of(pipe, PROMPTS, noise), wanted)
        return given

    latents_of(sd1, PROMPTS, noise, callback_on_step_end=nested)
    adapters.use(None, timeout=0.0)
    assert issubclass(WaitsForItself, CallerError)


def test_a_call_that_fails_lets_changes_in(sd1: Any, adapters: Any, latents_of: Any) -> None:
    noise = torch.randn(2, 4, 8, 8)
    adapters.use({"a": 1.0})
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def step(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            latents_of(sd1, PROMPTS, noise, callback_on_step_end=step)
        with pytest.raises(ValueError, match="prompt"):
            sd1(prompt=None)
        assert adapters.gate.requests == 0
        adapters.use({"a": 0.5}, timeout=0.0)


def test_closing_waits_for_the_call(sd1: Any, adapters: Any, latents_of: Any) -> None:
    noise, inside, leave = torch.randn(2, 4, 8, 8), threading.Event(), threading.Event()
    adapters.use({"a": 1.0})
    wanted = latents_of(sd1, PROMPTS, noise)

    def step(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        inside.set()
        assert leave.wait(LONG)
        return given

    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(latents_of, sd1, PROMPTS, noise, callback_on_step_end=step)
        assert inside.wait(LONG)
        closing = [pool.submit(adapters.close), pool.submit(adapters.use, None)]
        until(lambda: adapters.gate.waiting == 2)
        leave.set()
        assert torch.equal(running.result(LONG), wanted)
        # Whoever comes first: a change of what is closed meanwhile is none.
        closing[0].result(LONG)
        assert closing[1].exception(LONG) is None or isinstance(closing[1].exception(), CallerError)
    assert "_heatsink_adapters" not in vars(sd1)


def test_the_pipeline_is_what_it_was(sd1: Any, tmp_path: Any) -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline

    signature = inspect.signature(sd1.__call__)
    adapters = heatsink.adapters(sd1)
    assert type(sd1) is not StableDiffusionPipeline
    assert isinstance(sd1, StableDiffusionPipeline)
    assert (type(sd1).__name__, type(sd1).__module__) == (
        StableDiffusionPipeline.__name__,
        StableDiffusionPipeline.__module__,
    )
    assert inspect.signature(sd1.__call__) == signature
    sd1.save_pretrained(tmp_path)
    assert '"StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()
    other = AutoPipelineForImage2Image.from_pipe(sd1)
    assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"
    adapters.close()
    assert type(sd1) is StableDiffusionPipeline


def test_an_object_that_keeps_its_class_is_refused() -> None:
    class Final:
        def __init_subclass__(cls) -> None:
            raise TypeError("this class has no subclasses")

        def __call__(self) -> None: ...

    pipe = Final()
    calls = PipelineCalls(pipe, lambda: pytest.fail("never"))
    with pytest.raises(AdapterError, match=r"a Final can't be watched .* has no subclasses"):
        calls.start()
    calls.stop()
    assert type(pipe) is Final
