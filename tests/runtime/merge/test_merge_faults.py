"""Merges that fail, wait, or meet weights that were changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from heatsink.kernels.merge_plan import MergePlan
from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas
from heatsink.runtime.errors import AdapterError, CallerError, MergeTimeout, NonFiniteWeights
from heatsink.runtime.merge import Merger
from heatsink.runtime.model import Model
from heatsink.runtime.pristine import ComponentSource


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
    tools: Any, change: str, message: str, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    merger = Merger(live)
    good = tools.adapter(live, tools.paths[:2])
    merger.apply([(good, 1.0)])
    before, applied = merger.digest(), merger.applied
    broken = [
        *tools.adapter(live, tools.paths[3:5]),
        bad(change)(tools.adapter(live, tools.paths[2:3])[0]),
    ]
    with pytest.raises(AdapterError, match=message) as caught:
        merger.apply([(good, 0.5), (broken, 1.0)])
    assert list(caught.value.refused) == [f"unet.{broken[-1].module_path}"]
    assert (merger.digest(), merger.applied) == (before, applied)
    with pytest.raises(AdapterError, match="weight is nan"):
        merger.apply([(good, float("nan"))])
    assert merger.digest() == before


def test_a_result_that_overflows_changes_nothing(tools: Any, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1, torch.float16))
    merger = Merger(live)
    good, huge = tools.adapter(live, tools.paths[:2]), tools.adapter(live, tools.paths[1:3])
    merger.apply([(good, 1.0)])
    before = merger.digest()
    with pytest.raises(NonFiniteWeights, match="2 merged weights hold NaN or infinity"):
        merger.apply([(huge, 1e9)], check=True)
    assert merger.digest() == before
    merger.apply([(huge, 1.0)], check=True)
    assert merger.digest() != before


def test_a_launch_that_fails_half_way_is_undone(
    tools: Any, tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    merger = Merger(live)
    first, second = tools.adapter(live, tools.paths[:3]), tools.adapter(live, tools.paths[2:])
    merger.apply([(first, 1.0)])
    before = merger.digest()
    plain = MergePlan._call
    failing = iter([True, False])

    def half(plan: MergePlan, chosen: Any, written: Any) -> None:
        if next(failing):
            plan.out[written[0]].fill_(7.0)
            raise RuntimeError("the launch failed")
        plain(plan, chosen, written)

    monkeypatch.setattr(MergePlan, "_call", half)
    with pytest.raises(RuntimeError, match="the launch failed"):
        merger.apply([(second, 1.0)])
    assert merger.digest() == before
    assert next(failing, None) is None
    assert [weight for _, weight in merger.applied] == [1.0]


def interrupted(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Break off right after the weights were written, and then before they are written again.

    `times` times; returns what is left.
    """
    plain, left = MergePlan._call, [times]

    def then(plan: MergePlan, chosen: Any, written: Any) -> None:
        again = left[0] < times
        if not (left[0] and again):
            plain(plan, chosen, written)
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt

    monkeypatch.setattr(MergePlan, "_call", then)
    return left


def test_a_merge_that_is_interrupted_is_undone(
    tools: Any, tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    merger = Merger(live := tools.weights_of(tools.unet_of(tiny_sd1)))
    first, second = tools.adapter(live, tools.paths[:3]), tools.adapter(live, tools.paths[2:])
    base = merger.digest()
    left = interrupted(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        merger.apply([(first, 1.0)])
    assert (merger.digest(), merger.applied, merger.torn) == (base, [], [])
    merger.apply([(first, 1.0)])
    merged, applied = merger.digest(), merger.applied
    calls: list[Callable[[], None]] = [lambda: merger.apply([(second, 1.0)]), merger.remove]
    for call in calls:
        left[0] = 1
        with pytest.raises(KeyboardInterrupt):
            call()
        assert (merger.digest(), merger.applied, merger.torn) == (merged, applied, [])
    assert left == [0]
    merger.remove()
    assert merger.digest() == base


@pytest.mark.parametrize("heal", ["remove", "release", "apply", "apply none"])
@pytest.mark.parametrize("started", [False, True])
def test_a_merge_whose_undoing_fails_is_healed_by_the_next(
    heal: str,
    started: bool,
    tools: Any,
    tiny_sd1: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(seed)
    merger = Merger(live := tools.weights_of(tools.unet_of(tiny_sd1)))
    # Neither has a weight of the other: only its being torn makes the next write it.
    first, second = tools.adapter(live, tools.paths[:3]), tools.adapter(live, tools.paths[3:])
    base = merger.digest()
    merger.apply([(second, 1.0)])
    wanted = merger.digest()
    merger.remove()
    if started:
        merger.apply([(second, 0.5)])
    before = merger.digest()
    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merger.apply([(first, 1.0)])
    assert merger.digest() != before
    assert set(merger.torn) >= {f"unet.{path}.weight" for path in tools.paths[:3]}
    if heal.startswith("apply"):
        merger.apply([(second, 1.0)] if heal == "apply" else [])
    else:
        getattr(merger, heal)()
    assert merger.digest() == (wanted if heal == "apply" else base)
    assert merger.torn == []
    merger.remove()
    assert merger.digest() == base


def test_a_torn_weight_that_is_cast_comes_back_pristine(
    tools: Any, tiny_sd1: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    unet = tools.unet_of(tiny_sd1)
    live = tools.weights_of(unet)
    wanted = {key: value.detach().to(torch.bfloat16) for key, value in live.items()}
    merger, deltas = Merger(live), tools.adapter(live, tools.paths)
    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        merger.apply([(deltas, 1.0)])
    unet.to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"remove\(\) first"):
        merger.apply([(deltas, 1.0)])
    merger.remove()
    assert all(torch.equal(live[key], value) for key, value in wanted.items())


def test_weights_that_were_cast_or_moved_meanwhile(tools: Any, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    unet = tools.unet_of(tiny_sd1)
    live = tools.weights_of(unet)
    merger = Merger(live)
    wanted = {key: value.detach().to(torch.bfloat16) for key, value in live.items()}
    deltas = tools.adapter(live, tools.paths)
    merger.apply([(deltas, 1.0)])
    unet.to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"was moved, cast or written .*remove\(\) first"):
        merger.apply([(deltas, 0.5)])
    merger.remove()
    assert all(torch.equal(live[key], value) for key, value in wanted.items())
    merger.apply([(deltas, 0.5)])
    assert live[f"unet.{tools.paths[0]}.weight"].dtype == torch.bfloat16
    merger.remove()
    assert all(torch.equal(live[key], value) for key, value in wanted.items())


def test_weights_that_are_written_while_no_adapter_is_in_them(
    tools: Any, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    unet = tools.unet_of(tiny_sd1)
    live = tools.weights_of(unet)
    merger, deltas = Merger(live), tools.adapter(live, tools.paths)
    prepared = merger.prepare(deltas)
    merger.apply([(prepared, 1.0)])
    merger.remove()
    # Another checkpoint, in the same memory and in another order of it.
    others = {name: torch.randn_like(value) for name, value in unet.state_dict().items()}
    unet.load_state_dict(others)
    unet.to(memory_format=torch.channels_last)
    merger.apply([(prepared, 1.0)])
    key = tools.paths[4]
    reference = tools.exact(
        others[f"{key}.weight"], [(d, 1.0) for d in deltas if d.module_path == key]
    )
    assert (live[f"unet.{key}.weight"] - reference).abs().max() < 1e-5
    merged = merger.digest()
    unet.load_state_dict(unet.state_dict())
    with pytest.raises(AdapterError, match="was moved, cast or written while an adapter"):
        merger.apply([(prepared, 0.5)])
    assert merger.digest() == merged
    merger.remove()
    assert all(torch.equal(live[f"unet.{name}"], value) for name, value in others.items())


def test_what_was_prepared_does_not_change_with_its_tensors(
    tools: Any, tiny_sd1: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    merger = Merger(live := tools.weights_of(tools.unet_of(tiny_sd1)))
    deltas = tools.adapter(live, tools.paths, dora=True)
    prepared, digest = merger.prepare(deltas), digest_deltas(deltas)
    merger.apply([(prepared, 1.0)])
    wanted = merger.digest()
    other = Merger(tools.weights_of(tools.unet_of(tiny_sd1)))
    prepared = other.prepare(deltas)
    for delta in deltas:
        assert delta.magnitude is not None
        for values in (delta.a, delta.b, delta.magnitude):
            values.zero_()
    other.apply([(prepared, 1.0)])
    assert (other.digest(), other.applied) == (wanted, [(digest, 1.0)])


@pytest.mark.parametrize(
    ("way", "seen"),
    [
        ("itself", True),
        ("detached", True),
        ("view", True),
        ("data", False),
        ("numpy", False),
        ("inference", False),
        ("assign", False),
    ],
)
def test_which_writes_into_merged_weights_are_seen(way: str, seen: bool, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.inference_mode(way == "inference"):
        net = torch.nn.Linear(6, 4)
    before = net.weight.detach().clone()
    merger = Merger({"net.w.weight": net.weight})
    deltas = [AdapterDelta("net", "w", torch.randn(2, 6), torch.randn(4, 2))]
    merger.apply([(deltas, 1.0)])
    merged = net.weight.detach().clone()
    assert not torch.equal(merged, before)
    old = net.weight
    with torch.no_grad():
        if way == "itself":
            net.weight.fill_(7.0)
        elif way == "detached":
            net.weight.detach().fill_(7.0)
        elif way == "view":
            net.weight[1:].fill_(7.0)
        elif way == "data":
            net.weight.data.fill_(7.0)
        elif way == "numpy":
            net.weight.detach().numpy().fill(7.0)
        elif way == "inference":
            with torch.inference_mode():
                net.weight.fill_(7.0)
        else:
            net.load_state_dict({"weight": torch.full((4, 6), 7.0), "bias": net.bias}, assign=True)
    if seen:
        with pytest.raises(AdapterError, match="was moved, cast or written"):
            merger.apply([(deltas, 1.0)])
        merger.remove()
        assert torch.equal(old, before)
        return
    merger.apply([(deltas, 1.0)])
    assert torch.equal(old, merged)
    assert torch.equal(net.weight, torch.full((4, 6), 7.0)) == (way == "assign")


def test_weights_with_holes_in_memory_are_refused() -> None:
    live = {"net.w.weight": torch.randn(4, 6)[:, ::2], "net.v.weight": torch.randn(4, 3)}
    before = {key: value.clone() for key, value in live.items()}
    both = [AdapterDelta("net", path, torch.randn(2, 3), torch.randn(4, 2)) for path in "vw"]
    with pytest.raises(AdapterError, match=r"net\.w\.weight \(4, 3\) has the strides \(6, 2\)"):
        Merger(live).apply([(both, 1.0)])
    assert all(torch.equal(live[key], value) for key, value in before.items())


def test_a_merge_waits_for_requests(tools: Any, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    merger = Merger(live)
    deltas, before = tools.adapter(live, tools.paths), merger.digest()
    with ThreadPoolExecutor(1) as pool:
        with merger.gate.request():
            for call in (merger.apply, lambda _, timeout: merger.remove(timeout=timeout)):
                task = pool.submit(call, [(deltas, 1.0)], timeout=0.02)
                with pytest.raises(MergeTimeout, match="1 requests are under way"):
                    task.result()
            assert merger.digest() == before
        pool.submit(merger.apply, [(deltas, 1.0)], timeout=5.0).result()
    assert merger.digest() != before


def test_mapped_weights_must_be_the_live_ones(tools: Any, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    live = tools.weights_of(tools.unet_of(tiny_sd1))
    deltas, key = tools.adapter(live, tools.paths[:2]), f"unet.{tools.paths[1]}.weight"
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
    half = tools.weights_of(tools.unet_of(tiny_sd1, torch.bfloat16))
    Merger(half, keep="mapped", source=source).apply([(deltas, 1.0)])
    with pytest.raises(AdapterError, match="is the mapping itself"):
        Merger(tools.weights_of(model.load_module("unet")), keep="mapped", source=source).apply(
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
