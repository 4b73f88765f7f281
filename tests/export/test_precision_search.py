from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heatsink.export import precision_search
from heatsink.export.painter import EQUAL_DB, Painter, Setting, Subjects, psnr, summary
from heatsink.export.precision_rating import candidates, probes, rates
from heatsink.export.precision_search import search
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.graph.passes.quantise import round_operands
from heatsink.runtime.model import Model

SUBJECTS = Subjects(("a cat", "a dog"), (3,), steps=3, guidance=2.0)


class Two(nn.Module):
    """A module whose rounding shows, and one whose does not: its weights and inputs are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.rough, self.exact = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.rough.weight.copy_(torch.randn(8, 8) / 3)
            self.exact.weight.copy_(torch.eye(8))
            self.exact.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.exact(x) + self.rough(x),)


@pytest.fixture
def two(seed: int) -> Graph:
    torch.manual_seed(seed)
    net = Two()
    specs = {"x": TensorSpec(("batch", 8), torch.float32)}
    return capture_module("net", net.to("meta"), _values(seed), None, specs, ("y",))


def _values(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in Two().state_dict().items()}


def _silent(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_a_rate_is_the_error_that_a_module_alone_makes(precision: str, two: Graph) -> None:
    # Powers of two up to the largest are exact in every format.
    x = 2.0 ** torch.arange(8.0)[None] * torch.tensor([[1.0], [-1.0]])
    weight, bias = (two.weights[f"rough.{n}"].load() for n in ("weight", "bias"))
    if precision == "fp8":
        read, held = round_operands("aten.linear", x, weight)
        low = read @ held.T + bias
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        low = nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).float()
    wanted = float((low - (x @ weight.T + bias)).square().sum())
    found = rates(two, precision, {"x": x}, _silent)
    assert found["exact"] == 0.0
    assert wanted > 0
    assert found["rough"] == pytest.approx(wanted, rel=1e-2)


def test_candidates_are_modules_with_weights(tiny_sd1: Path) -> None:
    graph = Painter(Model.open(tiny_sd1), SUBJECTS).graph("unet")
    half, eight = (candidates(graph, precision) for precision in ("bf16", "fp8"))
    norms = [name for name in half if "norm" in name]
    assert norms
    assert [name for name in half if name not in norms] == eight
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < set(eight)
    assert len(set(half)) == len(half)


def test_probes_are_rows_of_runs_apart() -> None:
    calls = [{"x": np.full((4, 2), step, np.float32)} for step in range(9)]
    (found,) = probes(calls).values()
    assert found[:, 0].tolist() == [0, 0, 4, 4, 8, 8]
    assert probes(calls[:1])["x"].shape == (2, 2)


def test_psnr_is_of_each_picture() -> None:
    zeros = np.zeros((3, 2, 2, 3), np.uint8)
    other = zeros.copy()
    other[1] = 255
    other[2, 0, 0] = 51
    # A quarter of the pixels is a fifth of the range away.
    assert psnr(other, zeros) == [EQUAL_DB, 0.0, pytest.approx(10 * np.log10(100))]
    assert summary([30.004, 40.0]) == {"worst": 30.0, "mean": 35.0}


class Answers:
    """A painter whose pictures get better by 1 dB with every module that stays high."""

    def __init__(self, painter: Painter) -> None:
        self.subjects, self.graph = painter.subjects, painter.graph
        self._painter = painter
        self.asked: list[int] = []

    def draw(self, settings: Any = None, watch: Any = None) -> Any:
        if not settings:
            return self._painter.draw(watch=watch)
        self.asked.append(len(settings["unet"].high))
        return self.asked[-1]


@pytest.mark.parametrize(
    ("target", "asked", "high"),
    [
        (20.0, [0], 0),
        (20.5, [0, 1], 1),
        (26.0, [0, 1, 2, 4, 8, 6, 5], 6),
        (27.5, [0, 1, 2, 4, 8, 6, 7], 8),
    ],
)
def test_as_few_as_suffice_stay_high(
    target: float,
    asked: list[int],
    high: int,
    tiny_sd1: Path,
    painter: Painter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = Answers(painter)
    monkeypatch.setattr(precision_search, "Painter", lambda *_: answers)
    monkeypatch.setattr(precision_search, "psnr", lambda count, _: [20.0 + count, 40.0])
    order = [f"m{place}" for place in range(20)]
    rated = {name: float(-place) for place, name in enumerate(order)}
    monkeypatch.setattr(precision_search, "rates", lambda *_: rated)
    found = search(tiny_sd1, "fp8", SUBJECTS, target=target)
    assert answers.asked == asked
    assert found.high == tuple(order[:high])
    assert found.before == {"worst": 20.0, "mean": 30.0}
    assert found.after["worst"] == 20.0 + high
    with pytest.raises(InvalidRequest, match=r"41 dB are not reached .* which give 40.0"):
        search(tiny_sd1, "fp8", SUBJECTS, target=41.0)


@pytest.fixture(scope="module")
def painter(tiny_sd1: Path) -> Painter:
    """Draws the tiny model."""
    return Painter(Model.open(tiny_sd1), SUBJECTS)


def test_a_search_is_repeatable_and_json(tiny_sd1: Path, painter: Painter) -> None:
    whole = painter.draw()
    low = psnr(painter.draw({"unet": Setting("fp8")}), whole)
    told: list[str] = []

    def report(what: str, done: int, total: int) -> None:
        told.append(what)

    found = search(tiny_sd1, "fp8", SUBJECTS, target=min(low) + 1.0, progress=report)
    assert found.before == summary(low)
    assert 0 < len(found.high) < found.modules
    assert found.after["worst"] >= min(low) + 1.0 - 0.005
    assert psnr(painter.draw({"unet": Setting("fp8", found.high)}), whole) != low
    assert {"rating modules of unet", "drawing with 1 modules high"} <= set(told)
    values = json.loads(json.dumps(found.as_dict()))
    assert values["high"] == list(found.high)
    assert values["subjects"] == {
        "prompts": ["a cat", "a dog"], "seeds": [3], "steps": 3, "guidance": 2.0,
        "scheduler": "dpm++2m",
    }  # fmt: skip


def test_pictures_don_t_depend_on_the_others(tiny_sd1: Path, painter: Painter) -> None:
    alone = Painter(Model.open(tiny_sd1), Subjects(("a dog",), (3,), steps=3, guidance=2.0))
    settings = {"unet": Setting("fp8", ("conv_in",)), "vae_decoder": Setting("bf16")}
    assert np.array_equal(alone.draw(settings)[0], painter.draw(settings)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "fp8"}, "target: expected decibels for the precision 'fp8', got none"),
        ({"precision": "int8", "target": 30.0}, r"precision: expected one of .*, got 'int8'"),
        ({"precision": "bf16", "component": "vae_encoder"}, "got 'vae_encoder'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str, tiny_sd1: Path) -> None:
    with pytest.raises(InvalidRequest, match=message):
        search(tiny_sd1, subjects=SUBJECTS, **arguments)
    with pytest.raises(InvalidRequest, match="prompts: expected at least one, got none"):
        Subjects(())
