"""Many styles in one batch, end to end: a real engine with ports, LoRA files, pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import heatsink
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.adapter_write import write_adapter
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import (
    AdapterError,
    DamagedFile,
    HeatsinkError,
    NotBuilt,
    UnsafeFile,
)

STEPS = 3
STYLES: list[Any] = [None, "A", {"B": 0.75}, {"A": 0.5, "B": 1.0}]


def write_style(path: Path, targets: Targets, seed: int) -> Path:
    """A LoRA file of rank 3 on every second layer of the UNet and of the text encoder."""
    draw = torch.Generator().manual_seed(seed)
    deltas = []
    for component in ("text_encoder", "unet"):
        for module, shape in sorted(targets.shapes[component].items())[seed % 2 :: 2]:
            a = torch.randn(3, *shape[1:], generator=draw) / 10
            b = torch.randn(shape[0], 3, generator=draw) / 10
            deltas.append(AdapterDelta(component, module, a, b, 0.5))
    write_adapter(path, deltas)
    return path


class Counting:
    """A session of the UNet that notes the rows and timesteps of its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.name = session, session.name
        self.runs: list[list[float]] = []

    def run(self, inputs: Any) -> Any:
        self.runs.append(inputs["timestep"].tolist())
        return self.session.run(inputs)

    def take(self) -> list[list[float]]:
        runs, self.runs = self.runs, []
        return runs


def draw(engine: Engine, styles: list[Any]) -> list[bytes]:
    result = engine.generate(
        ["a fox"] * len(styles), negative_prompt="blur", seed=[7] * len(styles), steps=STEPS,
        guidance=3.0, adapters=styles,
    )  # fmt: skip
    return [np.asarray(image).tobytes() for image in result.images]


@pytest.fixture(scope="module")
def engine(ported: Path, targets: Targets, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The tiny engine with the styles A and B from their files."""
    opened = heatsink.load(ported, threads=1)
    folder = tmp_path_factory.mktemp("styles")
    for seed, name in enumerate("AB"):
        opened.add_adapter(name, write_style(folder / f"{name}.safetensors", targets, seed))
    return opened


def test_four_styles_in_one_call_are_four_calls_of_one(engine: Engine) -> None:
    # What is run for the first time is checked first: that is not counted.
    first = draw(engine, STYLES)
    for style in STYLES:
        draw(engine, [style])
    unet: Any = engine._components["unet"]
    before = unet._session, unet._twin._session
    unet._session = with_ports = Counting(unet._session)
    unet._twin._session = without = Counting(unet._twin._session)
    try:
        together = draw(engine, STYLES)
        # Two rows a request and step. Six have adapters; four fill a batch, two share one with two.
        runs = with_ports.take()
        times = sorted({run[0] for run in runs}, reverse=True)
        assert len(times) == STEPS
        assert runs == [[time] * 4 for time in times for _ in range(2)]
        assert without.take() == []
        alone = []
        for style in STYLES:
            alone += draw(engine, [style])
            one = [[time] * 2 for time in times]
            assert (with_ports.take(), without.take()) == (([], one) if not style else (one, []))
    finally:
        unet._session, unet._twin._session = before
    assert together == alone == first
    assert len(set(together)) == len(STYLES)


def test_more_adapters_than_a_row_has_room_for_are_told_before_any_work(
    ported: Path, targets: Targets, tmp_path: Path
) -> None:
    opened: Any = heatsink.load(ported, threads=1)
    for seed in range(5):
        path = write_style(tmp_path / f"{seed}.safetensors", targets, seed)
        opened.add_adapter(f"s{seed}", path)
    unet = opened._components["unet"]
    unet._twin._session = without = Counting(unet._twin._session)
    five = {f"s{seed}": 0.5 for seed in range(5)}
    with pytest.raises(NotBuilt, match=r"this engine takes 4 at once in its .*, the request has 5"):
        draw(opened, ["s0", five])
    assert (unet._session, without.runs, opened.bank.stats().loads) == (None, [], 0)


Damage = Callable[[Path], object]


def change(value: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda path: save_file(value(load_file(path)), path)


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[max(tensors)].view(-1)[-1] = float("nan")
    return tensors


BAD: dict[str, tuple[Damage, type[HeatsinkError], str]] = {
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        DamagedFile,
        "is truncated",
    ),
    "wrong shape": (
        change(lambda tensors: {**tensors, max(tensors): torch.ones(3, 5)}),
        AdapterError,
        "wrong shape",
    ),
    "NaN": (change(with_nan), AdapterError, "non-finite"),
    "another architecture": (
        change(lambda tensors: {f"transformer.single_blocks.{k}": v for k, v in tensors.items()}),
        AdapterError,
        "keys can't be applied, so none is",
    ),
    "renamed pickle": (
        # Copies: the file that is written over is mapped.
        lambda path: torch.save({k: v.clone() for k, v in load_file(path).items()}, path),
        UnsafeFile,
        "is named as safetensors but holds a pickle",
    ),
}


def test_bad_files_leave_the_pixels_as_they_were(
    engine: Engine, targets: Targets, tmp_path: Path
) -> None:
    before, infos = draw(engine, STYLES), engine.adapters
    for kind, (damage, error, message) in BAD.items():
        path = write_style(tmp_path / f"{kind}.safetensors", targets, 2)
        # It is one that is taken until it is damaged.
        engine.add_adapter("good", path)
        engine.remove_adapter("good")
        damage(path)
        for name in ("new", "A"):
            with pytest.raises(error, match=message) as caught:
                engine.add_adapter(name, path)
            assert type(caught.value) is error
        assert draw(engine, STYLES) == before, kind
        assert engine.adapters == infos
