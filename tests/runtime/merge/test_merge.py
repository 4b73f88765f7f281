"""Swaps of adapters in live weights: exact, in place, all or nothing."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels.merge_plan import MergePlan
from heatsink.runtime.merge import Merger
from heatsink.runtime.model import Model
from heatsink.runtime.pristine import ComponentSource, Keep, costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_within_one_rounding(
    tools: Any, dtype: torch.dtype, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1, dtype))
    base = {key: value.detach().clone() for key, value in live.items()}
    first, second = (
        tools.adapter(live, tools.paths),
        tools.adapter(live, tools.paths[1:4], 5, dora=True),
    )
    Merger(live).apply([(first, 0.8), (second, -0.3)])
    for key, value in live.items():
        mine = [(d, w) for ds, w in ((first, 0.8), (second, -0.3)) for d in ds]
        mine = [(d, w) for d, w in mine if f"unet.{d.weight_name}" == key]
        if not mine:
            assert torch.equal(value, base[key]), key
            continue
        reference = tools.exact(base[key], mine)
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(reference.abs())))
        # One rounding to the dtype, and fp32's own error in sums of some hundred terms.
        tiny = 2.0**-24 * 64 * reference.abs().max() + torch.finfo(dtype).smallest_normal
        assert bool(((value.double() - reference).abs() <= 0.5 * ulp + tiny).all()), key
        assert not torch.equal(value, base[key]), key


@pytest.mark.parametrize("keep", ["device", "host", "mapped"])
def test_a_thousand_random_swaps_are_exact(
    tools: Any, keep: Keep, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    unet = tools.unet_of(tiny_sd1)
    live = tools.weights_of(unet)
    source = ComponentSource({"unet": Model.open(tiny_sd1).weights("unet")})
    mapped = source if keep == "mapped" else None
    a = tools.adapter(live, tools.paths[:4])
    b, c = (
        tools.adapter(live, tools.paths[2:], 5),
        tools.adapter(live, tools.paths[1:3], 2, dora=True),
    )
    merger = Merger(live, keep=keep, source=mapped)
    base = merger.digest()
    wanted = {}
    states = [(a,), (b,), (c,), (a, b), (b, a), (a, c), (c, b, a), ()]
    for state in range(len(states)):
        # Each combination once, on weights that no other adapter ever touched.
        fresh = Merger(tools.weights_of(tools.unet_of(tiny_sd1)))
        fresh.apply([(deltas, 0.7) for deltas in states[state]])
        wanted[state] = fresh.digest()
    assert wanted[len(states) - 1] == base
    assert len(set(wanted.values())) >= len(states) - 1
    prepared = {id(deltas): merger.prepare(deltas) for deltas in (a, b, c)}
    places = {key: value.data_ptr() for key, value in live.items()}
    swaps = 1000 if keep == "device" else 60
    seen = set()
    last = len(states) - 1
    for _ in range(swaps):
        state = choose.randrange(len(states) + 1)
        if state == len(states):
            merger.remove()
            state = len(states) - 1
        else:
            merger.apply([(prepared[id(deltas)], 0.7) for deltas in states[state]])
        seen.add((last, state))
        last = state
        assert merger.digest() == wanted[state]
    assert len(seen) > 30
    assert {key: value.data_ptr() for key, value in live.items()} == places
    merger.release()
    assert merger.digest() == base
    assert merger.cost == Merger(live).cost


def test_one_launch_over_what_is_touched_now_or_was_before(
    tools: Any, tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    calls: list[tuple[int, int]] = []
    plain = MergePlan._call

    def counted(plan: MergePlan, chosen: Any, written: Any) -> None:
        calls.append((len(written), sum(len(one.terms) for one, _ in chosen)))
        plain(plan, chosen, written)

    monkeypatch.setattr(MergePlan, "_call", counted)
    merger = Merger(live)
    a, b = tools.adapter(live, tools.paths[:4]), tools.adapter(live, tools.paths[3:])
    merger.apply([(a, 1.0)])
    merger.apply([(b, 1.0)])
    merger.apply([(a, 0.5), (b, 0.5), (a, 0.0)])
    merger.remove()
    merger.remove()
    assert calls[:4] == [(4, 4), (6, 3), (6, 7), (6, 0)]
    assert all(count == 0 for count, _ in calls[4:])


@pytest.mark.parametrize("keep", ["device", "host"])
def test_channels_last_weights(tools: Any, keep: Keep, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    unet = tools.unet_of(tiny_sd1)
    live = tools.weights_of(unet)
    first = tools.adapter(live, tools.paths) + tools.adapter(live, tools.paths[4:], dora=True)
    Merger(live).apply([(first, 1.0)])
    other = tools.weights_of(tools.unet_of(tiny_sd1).to(memory_format=torch.channels_last))
    key = f"unet.{tools.paths[4]}.weight"
    assert not other[key].is_contiguous()
    merger = Merger(other, keep=keep)
    base = merger.digest()
    merger.apply([(first, 1.0)])
    assert torch.allclose(other[key], live[key], rtol=0, atol=1e-5)
    for name, value in live.items():
        assert torch.allclose(value, other[name], rtol=0, atol=1e-5), name
    merger.remove()
    assert merger.digest() == base


def test_what_keeping_costs_is_told_before_and_after(tools: Any, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    deltas = tools.adapter(live, tools.paths[:3])
    size = sum(live[f"unet.{path}.weight"].nbytes for path in tools.paths[:3])
    merger = Merger(live)
    told = merger.costs(deltas)
    # On the CPU the device's memory is the host's, and nothing crosses a bus.
    assert (told["device"].host, told["host"].host, told["mapped"].disk) == (size, size, size)
    assert told["mapped"].host == told["mapped"].device == told["device"].device == 0
    assert merger.cost.host == 0
    merger.apply([(deltas, 1.0)])
    assert merger.cost == told["device"]
    merger.remove()
    assert merger.cost == told["device"]
    everything = costs(live)["device"]
    assert everything.host == sum(value.nbytes for value in live.values())
    meta = {"unet.w": torch.empty(1 << 20, device="meta"), "unet.v": torch.empty(9, device="meta")}
    on_device = costs(meta, staging=1 << 10)
    total = 4 * ((1 << 20) + 9)
    assert on_device["device"].device == total
    assert on_device["host"].host == on_device["host"].transfer == total
    assert on_device["mapped"].disk == on_device["mapped"].transfer == total
    # The largest weight must fit, whatever the bound.
    assert on_device["host"].staging == 4 << 20
    assert costs(meta)["mapped"].staging == total


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["device", "host"])
def test_a_captured_graph_replays_with_the_new_weights(
    tools: Any, keep: Keep, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    unet = tools.unet_of(tiny_sd1).cuda().eval()
    live = tools.weights_of(unet)
    inputs = (
        torch.randn(2, 4, 8, 8, device="cuda"),
        torch.tensor([7.0, 7.0], device="cuda"),
        torch.randn(2, 16, 32, device="cuda"),
    )
    merger = Merger(live, keep=keep, staging=1 << 14)
    with torch.no_grad():
        for _ in range(2):
            unet(*inputs, return_dict=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = unet(*inputs, return_dict=False)

        def replay() -> Tensor:
            graph.replay()
            result: Tensor = captured.clone()
            return result

        states = {"base": replay()}
        a, b = tools.adapter(live, tools.paths[:4]), tools.adapter(live, tools.paths[2:])
        for name, adapters in (("a", [(a, 1.0)]), ("b", [(b, 1.0)]), ("both", [(a, 1), (b, 1)])):
            merger.apply(adapters)
            states[name] = replay()
            assert torch.equal(states[name], unet(*inputs, return_dict=False)[0])
        for first, second in pairwise(states.values()):
            assert not torch.equal(first, second)
        merger.apply([(a, 1.0)])
        assert torch.equal(replay(), states["a"])
        merger.remove()
        assert torch.equal(replay(), states["base"])
    assert merger.cost == (
        merger.costs([*a, *b])["device"] if keep == "device" else merger.costs([*a, *b])["host"]
    )
