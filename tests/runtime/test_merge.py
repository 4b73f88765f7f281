"""Swaps of adapters in live weights: exact, in place, all or nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import AdapterError, CallerError, MergeTimeout, NonFiniteWeights
from heatsink.runtime.merge import Merger
from heatsink.runtime.model import Model
from heatsink.runtime.pristine import ComponentSource, Keep, costs

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PATHS = [
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.resnets.1.conv2",
]


def unet_of(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    # A copy: what is mapped from the file must not be written.
    unet = Model.open(folder).load_module("unet")
    return unet.to(dtype) if dtype != torch.float32 else clone(unet)


def clone(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {f"unet.{name}": value for name, value in module.named_parameters()}


def adapter(
    live: dict[str, Tensor], paths: list[str], rank: int = 3, dora: bool = False
) -> list[AdapterDelta]:
    found = []
    for path in paths:
        shape = live[f"unet.{path}.weight"].shape
        a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
        magnitude = torch.rand(shape[0]) + 0.5 if dora else None
        found.append(AdapterDelta("unet", path, a, b, 0.75, magnitude))
    return found


def exact(base: Tensor, deltas: list[tuple[AdapterDelta, float]]) -> Tensor:
    """The definition in float64: W0 (1 + sum (g - 1)) + sum g w s B A."""
    start = base.double()
    total = start.clone()
    for delta, weight in deltas:
        change = weight * delta.scale * (delta.b.double() @ delta.a.double().flatten(1))
        change = change.reshape(base.shape)
        gain = torch.ones(base.shape[0], dtype=torch.float64)
        if delta.magnitude is not None:
            gain = delta.magnitude.double() / (start + change).flatten(1).norm(dim=1)
        gain = gain.reshape(-1, *[1] * (base.dim() - 1))
        total += (gain - 1) * start + gain * change
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_within_one_rounding(
    dtype: torch.dtype, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1, dtype))
    base = {key: value.detach().clone() for key, value in live.items()}
    first, second = adapter(live, PATHS), adapter(live, PATHS[1:4], 5, dora=True)
    Merger(live).apply([(first, 0.8), (second, -0.3)])
    for key, value in live.items():
        mine = [(d, w) for ds, w in ((first, 0.8), (second, -0.3)) for d in ds]
        mine = [(d, w) for d, w in mine if f"unet.{d.weight_name}" == key]
        if not mine:
            assert torch.equal(value, base[key]), key
            continue
        reference = exact(base[key], mine)
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(reference.abs())))
        # One rounding to the dtype, and fp32's own error in sums of some hundred terms.
        tiny = 2.0**-24 * 64 * reference.abs().max() + torch.finfo(dtype).smallest_normal
        assert bool(((value.double() - reference).abs() <= 0.5 * ulp + tiny).all()), key
        assert not torch.equal(value, base[key]), key


@pytest.mark.parametrize("keep", ["device", "host", "mapped"])
def test_a_thousand_random_swaps_are_exact(keep: Keep, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    unet = unet_of(tiny_sd1)
    live = weights_of(unet)
    source = ComponentSource({"unet": Model.open(tiny_sd1).weights("unet")})
    mapped = source if keep == "mapped" else None
    a = adapter(live, PATHS[:4])
    b, c = adapter(live, PATHS[2:], 5), adapter(live, PATHS[1:3], 2, dora=True)
    merger = Merger(live, keep=keep, source=mapped)
    base = merger.digest()
    wanted = {}
    states = [(a,), (b,), (c,), (a, b), (b, a), (a, c), (c, b, a), ()]
    for state in range(len(states)):
        # Each combination once, on weights that no other adapter ever touched.
        fresh = Merger(weights_of(unet_of(tiny_sd1)))
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
    tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1))
    calls: list[tuple[int, int]] = []
    plain = Merger._merge.__globals__["lora_merge"]

    def counted(base: list[Tensor], out: list[Tensor], terms: list[object]) -> None:
        calls.append((len(out), len(terms)))
        plain(base, out, terms)

    monkeypatch.setitem(Merger._merge.__globals__, "lora_merge", counted)
    merger = Merger(live)
    a, b = adapter(live, PATHS[:4]), adapter(live, PATHS[3:])
    merger.apply([(a, 1.0)])
    merger.apply([(b, 1.0)])
    merger.apply([(a, 0.5), (b, 0.5), (a, 0.0)])
    merger.remove()
    merger.remove()
    assert calls[:4] == [(4, 4), (6, 3), (6, 7), (6, 0)]
    assert all(count == 0 for count, _ in calls[4:])


@pytest.mark.parametrize("keep", ["device", "host"])
def test_channels_last_weights(keep: Keep, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    unet = unet_of(tiny_sd1)
    live = weights_of(unet)
    first = adapter(live, PATHS) + adapter(live, PATHS[4:], dora=True)
    Merger(live).apply([(first, 1.0)])
    other = weights_of(unet_of(tiny_sd1).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    key = f"unet.{PATHS[4]}.weight"
    assert not other[key].is_contiguous()
    merger = Merger(other, keep=keep)
    base = merger.digest()
    merger.apply([(first, 1.0)])
    assert torch.allclose(other[key], live[key], rtol=0, atol=1e-5)
    for name, value in live.items():
        assert torch.allclose(value, other[name], rtol=0, atol=1e-5), name
    merger.remove()
    assert merger.digest() == base


def bad(change: str) -> Callable[[AdapterDelta], AdapterDelta]:
    def broken(d: AdapterDelta) -> AdapterDelta:
        a, b, path, scale, m = d.a.clone(), d.b.clone(), d.module_path, d.scale, None
        if change == "nan":
            a[0, 0] = float("nan")
        elif change == "infinite magnitude":
            m = torch.full((b.shape[0],), float("inf"))
        elif change == "short magnitude":
            m = torch.ones(b.shape[0] - 1)
        elif change == "rows":
            b = b[1:]
        elif change == "inputs":
            a = a[:, 1:]
        elif change == "rank":
            a = a[1:]
        elif change == "path":
            path += "s"
        elif change == "scale":
            scale = float("inf")
        return AdapterDelta(d.component, path, a, b, scale, m)

    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "non-finite: a holds NaN"),
        ("infinite magnitude", "non-finite: magnitude holds"),
        ("short magnitude", "wrong shape: magnitude"),
        ("rows", "wrong shape"),
        ("inputs", "wrong shape"),
        ("rank", "wrong shape: a"),
        ("path", "unet has no weight"),
        ("scale", "the scale is inf"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(
    change: str, message: str, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1))
    merger = Merger(live)
    good = adapter(live, PATHS[:2])
    merger.apply([(good, 1.0)])
    before, applied = merger.digest(), merger.applied
    broken = [*adapter(live, PATHS[3:5]), bad(change)(adapter(live, PATHS[2:3])[0])]
    with pytest.raises(AdapterError, match=message) as caught:
        merger.apply([(good, 0.5), (broken, 1.0)])
    assert list(caught.value.refused) == [f"unet.{broken[-1].module_path}"]
    assert (merger.digest(), merger.applied) == (before, applied)
    with pytest.raises(AdapterError, match="weight is nan"):
        merger.apply([(good, float("nan"))])
    assert merger.digest() == before


def test_a_result_that_overflows_changes_nothing(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1, torch.float16))
    merger = Merger(live)
    good, huge = adapter(live, PATHS[:2]), adapter(live, PATHS[1:3])
    merger.apply([(good, 1.0)])
    before = merger.digest()
    with pytest.raises(NonFiniteWeights, match="2 merged weights hold NaN or infinity"):
        merger.apply([(huge, 1e9)], check=True)
    assert merger.digest() == before
    merger.apply([(huge, 1.0)], check=True)
    assert merger.digest() != before


def test_a_launch_that_fails_half_way_is_undone(
    tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1))
    merger = Merger(live)
    first, second = adapter(live, PATHS[:3]), adapter(live, PATHS[2:])
    merger.apply([(first, 1.0)])
    before = merger.digest()
    plain = Merger._merge.__globals__["lora_merge"]
    failing = iter([True, False])

    def half(base: list[Tensor], out: list[Tensor], terms: list[object]) -> None:
        if next(failing):
            out[0].fill_(7.0)
            raise RuntimeError("the launch failed")
        plain(base, out, terms)

    monkeypatch.setitem(Merger._merge.__globals__, "lora_merge", half)
    with pytest.raises(RuntimeError, match="the launch failed"):
        merger.apply([(second, 1.0)])
    assert merger.digest() == before
    assert next(failing, None) is None
    assert [weight for _, weight in merger.applied] == [1.0]


def test_weights_that_were_cast_or_moved_meanwhile(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    unet = unet_of(tiny_sd1)
    live = weights_of(unet)
    merger = Merger(live)
    wanted = {key: value.detach().to(torch.bfloat16) for key, value in live.items()}
    deltas = adapter(live, PATHS)
    merger.apply([(deltas, 1.0)])
    unet.to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"was moved or cast .*remove\(\) first"):
        merger.apply([(deltas, 0.5)])
    merger.remove()
    assert all(torch.equal(live[key], value) for key, value in wanted.items())
    merger.apply([(deltas, 0.5)])
    assert live[f"unet.{PATHS[0]}.weight"].dtype == torch.bfloat16
    merger.remove()
    assert all(torch.equal(live[key], value) for key, value in wanted.items())


def test_a_merge_waits_for_requests(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1))
    merger = Merger(live)
    deltas, before = adapter(live, PATHS), merger.digest()
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        with merger.gate.request():
            for call in (merger.apply, lambda _, timeout: merger.remove(timeout=timeout)):
                task = pool.submit(call, [(deltas, 1.0)], timeout=0.02)
                with pytest.raises(MergeTimeout, match="1 requests are under way"):
                    task.result()
            assert merger.digest() == before
        pool.submit(merger.apply, [(deltas, 1.0)], timeout=5.0).result()
    assert merger.digest() != before


def test_what_keeping_costs_is_told_before_and_after(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = weights_of(unet_of(tiny_sd1))
    deltas = adapter(live, PATHS[:3])
    size = sum(live[f"unet.{path}.weight"].nbytes for path in PATHS[:3])
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


def test_mapped_weights_must_be_the_live_ones(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    live = weights_of(unet_of(tiny_sd1))
    deltas, key = adapter(live, PATHS[:2]), f"unet.{PATHS[1]}.weight"
    source = ComponentSource({"unet": model.weights("unet")})
    merger = Merger(live, keep="mapped", source=source)
    with torch.no_grad():
        live[key].view(-1)[0] += 1e-3
    before = merger.digest()
    with pytest.raises(AdapterError, match="another than the live one") as caught:
        merger.apply([(deltas, 1.0)])
    assert list(caught.value.refused) == [key]
    assert merger.digest() == before
    # Half precision in memory, single in the file: the cast is what is compared.
    half = weights_of(unet_of(tiny_sd1, torch.bfloat16))
    Merger(half, keep="mapped", source=source).apply([(deltas, 1.0)])
    with pytest.raises(AdapterError, match="is the mapping itself"):
        Merger(weights_of(model.load_module("unet")), keep="mapped", source=source).apply(
            [(deltas, 1.0)]
        )
    with pytest.raises(AdapterError, match="not in the checkpoint"):
        Merger(live, keep="mapped", source={}).apply([(deltas, 1.0)])
    with pytest.raises(CallerError, match="expected one of device, host, mapped"):
        Merger(live, keep="disk")  # type: ignore[arg-type]
    with pytest.raises(CallerError, match="source= is given with 'mapped', and only with it"):
        Merger(live, keep="mapped")
    assert set(source) == set(live)
    assert len(source) == len(live)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["device", "host"])
def test_a_captured_graph_replays_with_the_new_weights(
    keep: Keep, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    unet = unet_of(tiny_sd1).cuda().eval()
    live = weights_of(unet)
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
        a, b = adapter(live, PATHS[:4]), adapter(live, PATHS[2:])
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
