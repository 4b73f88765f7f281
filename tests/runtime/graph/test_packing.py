from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heatsink.runtime.errors import ModelError
from heatsink.runtime.graph.packing import cut, spans, stack
from heatsink.runtime.graph.weight import Origin, Weight


def _weight(name: str, values: Tensor, dtype: torch.dtype = torch.float32) -> Weight:
    return Weight(tuple(values.shape), dtype, lambda: values, name)


def test_stacked_rows_are_in_order_and_say_whose_they_are(seed: int) -> None:
    torch.manual_seed(seed)
    parts = [torch.randn(rows, 3) for rows in (4, 2, 5)]
    weights = [_weight(name, values) for name, values in zip("qkv", parts, strict=True)]
    packed, origins = stack(weights, [[Origin(name)] for name in "qkv"])
    assert packed.shape == (11, 3)
    assert torch.equal(packed.load(), torch.cat(parts))
    assert origins == [
        Origin("q", ((0, 4),)),
        Origin("k", ((0, 2),)),
        Origin("v", ((0, 5),)),
    ]
    for (start, stop, origin), values in zip(spans(origins, 11), parts, strict=True):
        assert origin.slice is not None
        assert torch.equal(packed.load()[start:stop], values[slice(*origin.slice[0])])


def test_what_was_stacked_is_cut_again(seed: int) -> None:
    torch.manual_seed(seed)
    values = [torch.randn(4, 3), torch.randn(6, 3)]
    weights = [_weight("a", values[0]), _weight("b", values[1])]
    given = [[Origin("a")], [Origin("b", ((0, 2),)), Origin("c", ((1, 5),), "scale by 2.0")]]
    packed, origins = stack(weights, given)
    part, kept = cut(packed, origins, 3, 9)
    assert torch.equal(part.load(), torch.cat(values)[3:9])
    assert kept == [
        Origin("a", ((3, 4),)),
        Origin("b", ((0, 2),)),
        Origin("c", ((1, 4),), "scale by 2.0"),
    ]
    assert [(start, stop) for start, stop, _ in spans(kept, 6)] == [(0, 1), (1, 3), (3, 6)]


def test_a_scaled_part_is_rounded_once_with_the_rest() -> None:
    values = torch.tensor([[1.0], [3.0]])
    scaled = _weight("a", values, torch.float16).scale_rows(lambda v: v / 3, 0, 2)
    packed, _ = stack([scaled, _weight("b", values, torch.float16)], [[Origin("a")], [Origin("b")]])
    assert packed.source().dtype == torch.float64
    expected = torch.cat([values.double() / 3, values.double()])
    assert torch.equal(packed.load(), expected.to(torch.float16))


def test_a_part_of_another_shape_is_named_when_it_is_loaded() -> None:
    wrong = Weight((2, 3), torch.float32, lambda: torch.zeros(3, 2), "k.weight")
    packed, _ = stack([_weight("q", torch.zeros(1, 3)), wrong], [[Origin("q")], [Origin("k")]])
    with pytest.raises(ModelError, match=r"'k\.weight'.*\[2, 3\].*\[3, 2\]"):
        packed.load()
