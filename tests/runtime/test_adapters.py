"""The adapter bank: what a slot holds, who gets one, and who has to go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.errors import AdapterError, InvalidRequest, UnknownAdapter
from heatsink.runtime.port_layout import PortLayout

SLOTS, RANK = 3, 4
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {
        "mid.to_k": (5, 7),
        "mid.to_q": (5, 7),
        "mid.proj": (5, 7, 1, 1),
        "mid.conv": (6, 3, 3, 3),
    },
    "text_encoder": {"layers.0.fc1": (8, 2)},
}


def layouts(slots: int = SLOTS, rank: int = RANK) -> list[PortLayout]:
    return [PortLayout.of(name, slots, rank, table) for name, table in WEIGHTS.items()]


def delta(path: str, rank: int = 2, scale: float = 1.0, component: str = "unet") -> AdapterDelta:
    shape = WEIGHTS[component][path]
    a, b = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank)
    return AdapterDelta(component, path, a, b, scale)


def style(number: int) -> list[AdapterDelta]:
    """An adapter of one module, the same for the same number."""
    torch.manual_seed(number)
    return [delta("mid.to_q"), delta("mid.conv", rank=RANK)]


def filled(count: int, slots: int = SLOTS) -> AdapterBank:
    """A bank that knows adapters s0, s1, ..."""
    bank = AdapterBank(layouts(slots))
    for number in range(count):
        bank.add(f"s{number}", style(number))
    return bank


def use(bank: AdapterBank, *names: str) -> list[int]:
    """Run a request with these adapters; returns their slots in the order of the names."""
    with bank.acquire(dict.fromkeys(names, 1.0)) as lease:
        lease.wait()
        slot = {use.name: lease.mixes[0].uses.index(use) for use in lease.mixes[0].uses}
        entries = lease.entries(0, "unet")
        return [entries[slot[name]][0] for name in names]


def port(bank: AdapterBank, component: str, path: str, slot: int) -> tuple[Tensor, Tensor]:
    """`a` and `b` of one port and slot."""
    layout = bank.layouts[component]
    group, place = layout.places()[path]
    tensors, row = bank.tensors(component), place * layout.slots + slot
    return tensors[f"bank.{group}.a"][row], tensors[f"bank.{group}.b"][row]


def product(bank: AdapterBank, component: str, path: str, slot: int) -> Tensor:
    """B A in float64, shaped as a weight without the sides of a 1x1 convolution."""
    a, b = port(bank, component, path, slot)
    # A convolution's inputs are last in the bank.
    return torch.einsum("ro,r...->o...", b.double(), a.movedim(-1, 1).double())


# What a slot holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_slot_holds_each_modules_scale_times_its_product(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    deltas = [
        delta("mid.to_q", 3, 0.3),
        delta("mid.proj", 1, 2.5),
        delta("mid.conv", 4, -0.7),
        delta("layers.0.fc1", 2, 1.1, "text_encoder"),
    ]
    deltas = [replace(d, a=d.a.to(dtype), b=d.b.to(dtype)) for d in deltas]
    bank = AdapterBank(layouts())
    bank.add("s", deltas)
    (slot,) = use(bank, "s")
    for d in deltas:
        expected = d.scale * torch.einsum("or,r...->o...", d.b.double(), d.a.double())
        found = product(bank, d.component, d.module_path, slot)
        # One rounding of scale x B to fp32; A is exact.
        size = torch.einsum("or,r...->o...", d.b.double().abs(), d.a.double().abs()) * abs(d.scale)
        error = (found - expected.reshape(found.shape)).abs()
        limit = torch.finfo(torch.float32).eps / 2 * size.reshape(found.shape)
        assert bool((error <= limit).all()), d.module_path
        a, b = port(bank, d.component, d.module_path, slot)
        assert not a[d.rank :].any()
        assert not b[d.rank :].any()
    assert not any(part.any() for part in port(bank, "unet", "mid.to_k", slot))


def test_loads_touch_their_slot_alone_and_nothing_is_allocated_anew() -> None:
    bank = filled(6)
    tensors = {(c, n): t for c in WEIGHTS for n, t in bank.tensors(c).items()}
    views = {key: tensor.numpy() for key, tensor in tensors.items()}
    held = bank.acquire({"s0": 1.0})
    held.wait()
    ((own, _),) = held.entries(0, "unet")
    before = {k: v.reshape(-1, SLOTS, *v.shape[1:])[:, own].copy() for k, v in views.items()}
    assert sum(bool(values.any()) for values in before.values()) == 4
    for number in (1, 2, 3, 4, 5, 1, 3):
        assert use(bank, f"s{number}") != [own]
        for key, view in views.items():
            np.testing.assert_array_equal(
                view.reshape(-1, SLOTS, *view.shape[1:])[:, own], before[key]
            )
    for component in WEIGHTS:
        for name, tensor in bank.tensors(component).items():
            assert tensor.data_ptr() == tensors[component, name].data_ptr()
    # The views that a session was given see what was loaded.
    assert all(
        view.any() for (c, _), view in views.items() if c == "unet" and view.shape[1:] != (RANK, 7)
    )
    held.release()


def test_the_bank_says_each_rows_true_rank() -> None:
    bank = filled(0, slots=2)
    bank.add("low", [delta("mid.to_q", 1), delta("mid.conv", RANK)])
    bank.add("text", [delta("layers.0.fc1", 2, 1.0, "text_encoder")])
    lasting = {c: {n: t.data_ptr() for n, t in bank.ranks(c).items()} for c in WEIGHTS}

    def ranks(component: str, path: str) -> list[int]:
        group, place = bank.layouts[component].places()[path]
        of_group = bank.ranks(component)[f"bank.{group}.ranks"]
        found: list[int] = of_group.view(-1, 2)[place].tolist()
        return found

    with bank.acquire({"low": 1.0, "text": 1.0}) as lease:
        lease.wait()
    low, text = bank.info("low").slot, bank.info("text").slot
    assert low is not None
    assert text is not None
    assert low != text
    wanted = [0, 0]
    wanted[low] = 1
    assert ranks("unet", "mid.to_q") == wanted
    assert ranks("unet", "mid.to_k") == [0, 0]
    assert ranks("text_encoder", "layers.0.fc1")[text] == 2
    # What an evicted adapter had does not stay.
    bank.remove("low")
    bank.add("other", [delta("mid.to_k", 2)])
    assert use(bank, "other") == [low]
    assert ranks("unet", "mid.to_q") == ranks("unet", "mid.conv") == [0, 0]
    assert ranks("unet", "mid.to_k")[low] == 2
    assert bank.verify(low)
    bank.ranks("unet")["bank.0.ranks"][low] += 1
    assert not bank.verify(low)
    assert lasting == {c: {n: t.data_ptr() for n, t in bank.ranks(c).items()} for c in WEIGHTS}


def test_a_slots_digest_is_of_its_bytes(seed: int) -> None:
    torch.manual_seed(seed)
    bank = filled(3)
    bank.add("other ranks", [delta("mid.conv", 1), delta("layers.0.fc1", 4, 1.0, "text_encoder")])
    for name in ("s0", "s1", "s2", "other ranks"):
        (slot,) = use(bank, name) if name != "other ranks" else use(bank, "s0", name)[1:]
        assert bank.verify(slot)
    assert len({bank.slot_digest(name) for name in bank.infos()}) == 4
    value = bank.tensors("unet")["bank.0.b"]
    value[0, 0, 0] += 1
    assert sum(bank.verify(slot) for slot in range(SLOTS)) == SLOTS - 1
    with pytest.raises(ValueError, match="slot: expected one that holds an adapter, got 3"):
        bank.verify(SLOTS)
    with pytest.raises(ValueError, match="got 0"):
        filled(1).verify(0)
    assert bank.stats().leased == 0


def test_an_adapter_outlives_the_tensors_it_came_from() -> None:
    bank, deltas = AdapterBank(layouts()), style(1)
    bank.add("s", deltas)
    for each in deltas:
        each.a.fill_(9)
        each.b.fill_(9)
    (slot,) = use(bank, "s")
    assert bank.verify(slot)
    assert not (port(bank, "unet", "mid.to_q", slot)[0] == 9).any()


# What is refused


def changed(**fields: Tensor | float | str) -> AdapterDelta:
    torch.manual_seed(0)
    return replace(delta("mid.to_q"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (changed(component="vae"), "no adapter ports in its vae"),
        (changed(module_path="mid.to_z"), "no port there"),
        (changed(a=torch.ones(2, 8)), r"a \(2, 8\) and b \(5, 2\) for a port \(7,\) -> 5"),
        (changed(a=torch.ones(2, 7, 3, 3)), "wrong shape"),
        (changed(b=torch.ones(5, 3)), "wrong shape"),
        (changed(a=torch.ones(5, 7), b=torch.ones(5, 5)), "rank 5, .* take 4 at most"),
        (changed(magnitude=torch.ones(5)), r"DoRA .*`heatsink lora merge`"),
        (changed(scale=float("inf")), "the scale is inf"),
        (changed(a=torch.full((2, 7), float("nan"))), "non-finite: a holds NaN"),
        (changed(b=torch.full((5, 2), 1e30), scale=1e30), "non-finite: scale x b"),
        (delta("mid.conv"), "it is there twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_whole(bad: AdapterDelta, reason: str) -> None:
    bank = filled(1)
    (slot,) = use(bank, "s0")
    before = (bank.stats(), bank.infos())
    # Beside what fits: nothing of the file is taken.
    with pytest.raises(AdapterError, match=reason) as caught:
        bank.add("bad", [delta("mid.conv"), bad])
    assert list(caught.value.refused) == [f"{bad.component}.{bad.module_path}"]
    assert "1 of 2 modules can't be taken, so none is" in str(caught.value)
    assert (bank.stats(), bank.infos()) == before
    assert bank.verify(slot)


def test_a_narrow_bank_refuses_what_overflows_in_it() -> None:
    bank = AdapterBank(layouts(), dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"scale x b holds NaN or infinity in torch\.float16"):
        bank.add("s", [changed(b=torch.full((5, 2), 1e4), scale=10.0)])
    bank.add("s", [changed(b=torch.full((5, 2), 1e4), scale=0.1)])
    assert bank.verify(*use(bank, "s"))


def test_every_refusal_is_listed_and_an_empty_adapter_is_one() -> None:
    bank = AdapterBank(layouts())
    bad = [changed(module_path=f"mid.{number}") for number in range(7)]
    with pytest.raises(AdapterError, match=r"7 of 7 modules .*; and 2 more") as caught:
        bank.add("s", bad)
    assert len(caught.value.refused) == 7
    with pytest.raises(AdapterError, match="changes no module"):
        bank.add("s", [])
    for name in ("", "0" * 64, 5):
        with pytest.raises(InvalidRequest, match="name: expected a text that is no SHA-256"):
            bank.add(name, style(0))  # type: ignore[arg-type]
    assert bank.infos() == {}


def test_layouts_must_agree() -> None:
    one, two = layouts()
    for wrong in ([], [one, one], [one, replace(two, slots=5)]):
        with pytest.raises(ValueError, match="layouts: expected one for each component"):
            AdapterBank(wrong)


# Names and contents


def test_one_content_under_two_names_is_one_adapter() -> None:
    bank = filled(1)
    first = bank.info("s0")
    again = bank.add("twin", style(0))
    assert again.digest == first.digest
    assert use(bank, "s0") == use(bank, "twin")
    assert bank.stats().loads == 1
    bank.remove("s0")
    assert use(bank, "twin") == [bank.info("twin").slot]
    assert bank.stats().loads == 1
    # The same content has the same digest from whatever dtype it came.
    half = [replace(d, a=d.a.half(), b=d.b.half()) for d in style(1)]
    wide = [replace(d, a=d.a.float(), b=d.b.float()) for d in half]
    assert bank.add("half", half).digest == bank.add("wide", wide).digest


def test_a_name_with_other_content_is_another_adapter() -> None:
    bank = filled(1)
    bank.pin("s0")
    with bank.acquire({"s0": 1.0}) as lease:
        lease.wait()
        ((slot, _),) = lease.entries(0, "unet")
        old = bank.info("s0")
        new = bank.add("s0", style(9))
        assert new.digest != old.digest
        assert (new.slot, new.pinned) == (None, False)
        # What runs goes on with the old.
        assert use(bank, "s0") != [slot]
        assert bank.verify(slot)
        assert lease.mixes[0].uses[0].digest == old.digest
    assert bank.stats().used == 1
    # The same content again changes nothing.
    bank.pin("s0")
    assert bank.add("s0", style(9)).pinned


def test_a_removed_adapter_serves_who_holds_it_and_then_goes() -> None:
    bank = filled(2)
    lease = bank.acquire({"s0": 1.0})
    bank.remove("s0")
    lease.wait()
    ((slot, _),) = lease.entries(0, "unet")
    assert bank.verify(slot)
    with pytest.raises(UnknownAdapter, match="no 's0' here: s1") as caught:
        bank.acquire({"s1": 1.0, "s0": 1.0})
    assert caught.value.known == ("s1",)
    # Content that comes back while it is held is found where it is, and not written again.
    bank.add("again", style(0))
    assert use(bank, "again") == [slot]
    assert bank.stats().loads == 1
    bank.remove("again")
    assert bank.stats().used == 1
    lease.release()
    lease.release()
    assert (bank.stats().used, bank.stats().leased) == (0, 0)
    with pytest.raises(UnknownAdapter, match="no 's0' here"):
        bank.remove("s0")
    bank.remove("s1")
    with pytest.raises(UnknownAdapter, match="there is none; add one first"):
        bank.pin("s1")


def test_names_are_one_text_in_any_spelling() -> None:
    bank = AdapterBank(layouts())
    assert bank.add("cafe\u0301", style(0)).name == "caf\u00e9"
    assert bank.info("caf\u00e9").modules == ("unet.mid.conv", "unet.mid.to_q")
    for one, other in (("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")):
        assert bank.info(one) == bank.info(other)
        assert use(bank, one) == use(bank, other)
        assert bank.slot_digest(one) == bank.slot_digest(other)
        bank.pin(one)
        assert bank.infos()["caf\u00e9"].pinned
        bank.unpin(other)
        assert not bank.info(one).pinned
        bank.remove(one)
        assert bank.infos() == {}
        bank.add(other, style(0))


def test_a_digest_stands_for_its_name() -> None:
    bank = filled(2)
    bank.add("twin", style(0))
    digest = bank.info("s0").digest
    assert use(bank, digest) == use(bank, "s0")
    assert bank.info(digest).modules == bank.info("s0").modules
    bank.pin(digest)
    assert bank.info("twin").pinned
    bank.unpin(digest)
    assert not bank.info("s0").pinned
    bank.pin("s0")
    bank.pin(digest)
    # All names of the content go, and what else is there stays.
    bank.remove(digest)
    assert list(bank.infos()) == ["s1"]
    assert (bank.stats().used, bank.stats().pinned) == (0, 0)
    with pytest.raises(UnknownAdapter, match=f"no '{digest}' here: s1"):
        bank.remove(digest)
    bank.add("s0", style(0))
    assert not bank.info("s0").pinned


def test_the_banks_figures() -> None:
    bank = filled(2)
    elements = sum(t.numel() for c in WEIGHTS for t in bank.tensors(c).values())
    ranks = sum(t.numel() for c in WEIGHTS for t in bank.ranks(c).values())
    stats = bank.stats()
    assert stats.device_bytes == 4 * (elements + ranks)
    # Per port and rank, in the ranks that are used: to_k, to_q and proj in one group, conv.
    assert stats.host_bytes == 2 * 4 * (3 * 2 * (7 + 5) + 4 * (27 + 6))
    assert (stats.slots, stats.used) == (SLOTS, 0)
    bank.prefetch("s0")
    assert (bank.stats().used, bank.stats().leased, bank.stats().loads) == (1, 0, 1)
    assert repr(bank) == "<AdapterBank 3 slots ['text_encoder', 'unet'] ['s0', 's1']>"
