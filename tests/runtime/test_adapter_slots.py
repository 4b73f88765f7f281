"""Who gets a slot of the bank, who has to go, and what a request's rows are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.errors import CapacityError, InvalidRequest
from heatsink.runtime.port_layout import PortLayout

PATHS = {"unet": "mid.to_q", "text_encoder": "layers.0.fc1"}


def style(number: int, component: str = "unet") -> list[AdapterDelta]:
    """An adapter of one module, the same for the same number."""
    torch.manual_seed(number)
    return [AdapterDelta(component, PATHS[component], torch.randn(2, 7), torch.randn(5, 2))]


def filled(count: int) -> AdapterBank:
    """A bank of three slots that knows adapters s0, s1, ..."""
    bank = AdapterBank([PortLayout.of(name, 3, 4, {path: (5, 7)}) for name, path in PATHS.items()])
    for number in range(count):
        bank.add(f"s{number}", style(number))
    return bank


def use(bank: AdapterBank, *names: str) -> list[int]:
    """Run a request with these adapters; returns their slots in the order of the names."""
    with bank.acquire(dict.fromkeys(names, 1.0)) as lease:
        lease.wait()
        places = [use.name for use in lease.mixes[0].uses]
        return [lease.entries(0, "unet")[places.index(name)][0] for name in names]


def test_the_least_recently_used_has_to_go() -> None:
    bank = filled(5)
    a, b, c = (use(bank, name)[0] for name in ("s0", "s1", "s2"))
    assert sorted((a, b, c)) == [0, 1, 2]
    assert use(bank, "s0") == [a]
    assert use(bank, "s3") == [b]
    assert use(bank, "s2") == [c]
    assert use(bank, "s4") == [a]
    stats = bank.stats()
    assert (stats.loads, stats.hits, stats.evictions) == (5, 2, 2)
    assert bank.info("s0").slot is None
    assert bank.info("s4").slot == a


def test_a_call_never_evicts_what_it_uses_itself() -> None:
    bank = filled(4)
    for name in ("s0", "s1", "s2"):
        use(bank, name)
    # s0 is the oldest, and stays because it is asked for too.
    slots = use(bank, "s3", "s0")
    assert slots == [1, 0]


def test_the_pinned_stay() -> None:
    bank = filled(5)
    bank.pin("s0")
    slot = bank.info("s0").slot
    for name in ("s1", "s2", "s3", "s4"):
        assert use(bank, name) != [slot]
    assert bank.info("s0") == replace(bank.info("s0"), slot=slot, pinned=True)
    bank.unpin("s0")
    use(bank, "s1", "s2", "s3")
    assert bank.info("s0").slot is None
    # A name that goes takes its pin along.
    bank.pin("s0")
    bank.remove("s0")
    assert bank.stats().pinned == 0
    assert use(bank, "s1", "s2", "s3")


def test_no_room_is_told_before_anything_changes() -> None:
    bank = filled(6)
    with pytest.raises(
        CapacityError, match=r"4 different ones .* has 3 slots: .*--adapters 4xRANK"
    ):
        bank.acquire({"s0": 1.0, "s1": 1.0}, {"s2": 1.0, "s1": 0.5}, {"s3": 1.0})
    assert bank.stats().loads == 0
    bank.pin("s0")
    held = bank.acquire({"s1": 1.0}), bank.acquire({"s1": 0.5})
    use(bank, "s2")
    before = bank.stats()
    with pytest.raises(
        CapacityError, match="2 more of the bank's 3 slots are needed and 1 are free"
    ) as caught:
        bank.acquire({"s0": 1.0}, {"s3": 1.0}, {"s4": 1.0})
    assert caught.value.holders == {0: "s0, pinned", 1: "s1, 2 running", 2: "s2, idle"}
    assert bank.stats() == before
    bank.pin("s3")
    with pytest.raises(CapacityError, match=r"1 more .* 0 are free.*slot 2: s3, pinned"):
        bank.pin("s4")
    assert not bank.info("s4").pinned
    for lease in held:
        assert bank.stats().leased == 1
        lease.release()
    assert use(bank, "s4") == [1]


def test_a_lease_is_given_back_whatever_happens() -> None:
    bank = filled(1)

    def fail() -> None:
        with bank.acquire({"s0": 1.0}):
            assert bank.stats().leased == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bank.stats().leased == 0


# What a request's rows are given


def rows(
    bank: AdapterBank, component: str, *mixes: Mapping[str, float]
) -> list[list[tuple[int, float]]]:
    with bank.acquire(*mixes) as lease:
        inputs = lease.row_inputs(component, range(len(mixes)))
        if not inputs:
            return [[] for _ in mixes]
        assert inputs["adapter_slots"].dtype == np.int64
        assert inputs["adapter_scales"].dtype == np.float32
        return [
            [(int(s), float(w)) for s, w in zip(slots, scales, strict=True)]
            for slots, scales in zip(inputs["adapter_slots"], inputs["adapter_scales"], strict=True)
        ]


def test_rows_are_in_the_order_of_contents_and_padded() -> None:
    bank = filled(3)
    order = sorted(("s0", "s1", "s2"), key=lambda name: bank.info(name).digest)
    mix = {name: 0.25 * (index + 1) for index, name in enumerate(order)}
    backwards = dict(reversed(mix.items()))
    first, second, third, fourth = rows(bank, "unet", mix, {}, backwards, {order[1]: 1.5})
    slot = [bank.info(name).slot for name in order]
    assert first == second[:0] + list(zip(slot, (0.25, 0.5, 0.75), strict=True))
    assert second == [(-1, 0.0)] * 3
    assert third == first
    assert fourth == [(slot[1], 1.5), (-1, 0.0), (-1, 0.0)]


def test_rows_of_a_component_that_an_adapter_leaves_alone_have_none() -> None:
    bank = filled(1)
    bank.add("text", style(1, "text_encoder"))
    assert rows(bank, "text_encoder", {"s0": 1.0}) == [[]]
    assert rows(bank, "vae_decoder", {"s0": 1.0}) == [[]]
    (both,) = rows(bank, "text_encoder", {"s0": 1.0, "text": 0.5})
    assert both == [(bank.info("text").slot, 0.5)]


def test_weights_that_are_nothing_take_no_slot() -> None:
    bank = filled(3)
    with bank.acquire({"s0": 0.0, "s1": -0.0, "s2": 1e-60}) as lease:
        assert lease.mixes[0].uses == ()
        assert lease.mixes[0].weights == {}
    assert bank.stats().loads == 0
    bank.add("twin", style(0))
    with bank.acquire({"s0": 0.75, "twin": -0.75, "s1": 1.0}) as lease:
        assert [use.name for use in lease.mixes[0].uses] == ["s1"]
    for weight in (float("nan"), float("inf"), 1e39):
        with pytest.raises(InvalidRequest, match=r"adapters\.s0: expected a weight that is finite"):
            bank.acquire({"s0": weight})
    with pytest.raises(InvalidRequest, match=r"adapters\.s0 \+ twin: expected"):
        bank.acquire({"s0": 3e38, "twin": 3e38})
    assert bank.stats().leased == 0


def test_names_of_one_content_add_up() -> None:
    bank = filled(1)
    for name in ("t1", "t2"):
        bank.add(name, style(0))
    digest = bank.info("s0").digest
    # As one correctly rounded sum, whatever the order of the names.
    mixes = [{"s0": 1e16, "t1": 1.0, "t2": -1e16}, {"s0": 1.0, "t1": 1e16, "t2": -1e16}]
    with bank.acquire(*mixes) as lease:
        assert [mix.weights for mix in lease.mixes] == [{digest: 1.0}] * 2
        assert [use.name for use in lease.mixes[0].uses] == ["s0", "t1", "t2"]
    # A digest stands for its content.
    with bank.acquire({digest: 0.5}) as lease:
        assert lease.mixes[0].weights == {digest: 0.5}
    assert bank.stats().loads == 1
