"""What values are known by, and how long they are kept."""

from __future__ import annotations

import torch

from heatsink.runtime.native.values import Digests, Store, digest, joined


def _put(store: Store, *keys: bytes) -> None:
    for key in keys:
        store.put(key, {"x": torch.zeros(2), "y": torch.zeros(1)})


def _held(store: Store) -> bytes:
    return b"".join(key for key in (b"a", b"b", b"c", b"d") if key in store)


def test_the_store_lets_go_what_was_needed_longest_ago() -> None:
    store = Store(limit=24)
    _put(store, b"a", b"b", b"c")
    assert store.bytes == 36
    store.trim({b"a"})
    # Two more are within the limit.
    assert _held(store) == b"abc"
    store.trim()
    assert _held(store) == b"ac"
    assert store.bytes == 24
    _put(store, b"d")
    store.trim()
    assert _held(store) == b"ad"


def test_the_store_keeps_what_is_needed_beyond_its_limit() -> None:
    store = Store(limit=0)
    _put(store, b"a", b"b", b"c")
    store.trim({b"a", b"b", b"never put"})
    assert _held(store) == b"ab"
    assert len(store) == 2
    store.clear()
    assert (len(store), store.bytes) == (0, 0)


def test_digests_tell_bits_apart() -> None:
    digests = Digests()
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [float("nan"), 1.0], [float("nan"), 1.0]])
    first = digests.of(rows)
    assert len(set(first)) == 3
    assert digests.of(rows) == first
    assert digests.of(rows.clone()) == first
    assert digests.of(rows[[1, 0]]) == [first[1], first[0]]
    assert digests.of(rows.double())[0] not in first
    assert digest(rows[0]) == first[0]
    assert digest(rows[0].view(1, 2)) != first[0]
    assert digest(rows.t().contiguous().t()[0]) == first[0]


def test_rows_written_in_place_are_seen() -> None:
    digests, rows = Digests(), torch.zeros(3, 4, dtype=torch.bfloat16)
    first = digests.of(rows)
    rows[1, 2] = 1
    second = digests.of(rows)
    assert second[0] == second[2] == first[0]
    assert second[1] == digest(rows[1]) != first[1]
    digests.forget()
    assert digests.of(rows) == second


def test_joined_keys_know_where_one_ends() -> None:
    assert joined([b"a", b"bc"]) != joined([b"ab", b"c"])
    assert joined([b"", b"a"]) != joined([b"a", b""])
    assert joined([b"a", b"b"]) == joined((b"a", b"b"))
