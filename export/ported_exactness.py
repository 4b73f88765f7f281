"""Measures with how many adapters, and in which batch sizes, a graph with ports is exact.

A row's bits may depend neither on the rows beside it, nor on their adapters, nor on how many
adapters the inputs have room for, nor on which slots hold the row's own. A seeded probe is run in
every bucket with each room for adapters (the largest twice at least), each time with rows at other
places and adapters in other slots. Rows of it without adapters, beside others and among themselves,
must answer as in the graph without ports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from heatsink.export.exactness import PROBE_SEED, probe, row_answers
from heatsink.export.manifest import KnownAnswer, TensorSpec
from heatsink.runtime.backends.session import Array, Session
from heatsink.runtime.errors import EngineMismatch
from heatsink.runtime.port_layout import ROWS_INPUT, SCALES_INPUT, SLOTS_INPUT, PortLayout

COUNTS = (1, 2, 4)
# How many adapters the probe's rows have, in turn, where there is room for them.
_OWN = (1, 0, 4, 2, 1, 1, 0, 1)
# Deviation of a bank's values: each layer's term is seen, and none drowns the layer.
_SPREAD = 0.03
_SEEDED = 1 << 20

Answers = dict[tuple[int, int], str]
"""(row, adapters of it that there was room for) -> fingerprint."""


def adapter_probe(layout: PortLayout, name: str, content: int, seed: int) -> Array:
    """One adapter's part of a bank tensor, `(ports, rank, ...)`, drawn anew for each content."""
    shape = layout.shapes()[name]
    place = list(layout.shapes()).index(name)
    rng = np.random.Generator(np.random.Philox(key=[seed, _SEEDED + place * 4096 + content]))
    values = rng.standard_normal((shape[0] // layout.slots, *shape[1:]))
    return np.asarray(values * _SPREAD, np.float32)


def bank_probe(layout: PortLayout, slots: Sequence[int], seed: int) -> dict[str, Array]:
    """A bank whose slot `slots[c]` holds adapter c."""
    bank = {}
    for name, shape in layout.shapes().items():
        values = np.zeros((shape[0] // layout.slots, layout.slots, *shape[1:]), np.float32)
        for content, slot in enumerate(slots):
            values[:, slot] = adapter_probe(layout, name, content, seed)
        bank[name] = values.reshape(shape)
    return bank


def uses(row: int, room: int, contents: int) -> list[tuple[int, float]]:
    """The adapters of a row of the probe, and their weights."""
    count = min(_OWN[row % len(_OWN)], room)
    return [((row + i) % contents, 0.5 + 0.125 * ((row + 3 * i) % 5)) for i in range(count)]


def port_inputs(mixes: Sequence[Sequence[tuple[int, float]]], room: int) -> dict[str, Array]:
    """The inputs of a ported graph for rows with these slots and scales."""
    adapted = [row for row, own in enumerate(mixes) if own]
    slots = np.full((len(adapted), room), -1, np.int64)
    scales = np.zeros((len(adapted), room), np.float32)
    for place, row in enumerate(adapted):
        for column, (slot, scale) in enumerate(mixes[row]):
            slots[place, column], scales[place, column] = slot, scale
    return {ROWS_INPUT: np.array(adapted, np.int64), SLOTS_INPUT: slots, SCALES_INPUT: scales}


def _runs(bucket: int, rooms: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """Room, a shift of the adapters' slots, and the rows of the probe by place, for each run."""
    half, shift = bucket // 2, bucket.bit_length()
    plain = list(range(bucket))
    places = [[*plain[half:], *plain[:half]], list(range(half, half + bucket))[::-1]]
    wanted = [*rooms, *[rooms[-1]] * (3 - len(rooms)), rooms[-1]]
    orders = [plain, *places, *([plain] * (len(wanted) - 3))]
    return [
        (room, shift + turn, order)
        for turn, (room, order) in enumerate(zip(wanted, orders, strict=True))
    ]


def _slots(layout: PortLayout, shift: int) -> list[int]:
    """The slots of the probe's adapters."""
    contents = min(layout.slots, max(COUNTS))
    return [(content + shift) % layout.slots for content in range(contents)]


def _fingerprints(
    session: Session,
    layout: PortLayout,
    values: Mapping[str, Array],
    rows: Sequence[int],
    room: int,
    *,
    shift: int = 0,
    seed: int = PROBE_SEED,
    plain: bool = False,
) -> list[str]:
    """Run rows of the probe; `plain`: none has an adapter."""
    slots = _slots(layout, shift)
    own = [[] if plain else uses(row, room, len(slots)) for row in rows]
    mixes = [[(slots[content], weight) for content, weight in mix] for mix in own]
    given = {name: value[list(rows)] for name, value in values.items()}
    bank = bank_probe(layout, slots, seed)
    return row_answers(session.run({**given, **bank, **port_inputs(mixes, room)}))


def _answers(texts: Sequence[str], rows: Sequence[int], room: int) -> Answers:
    """Fingerprints by row and its number of adapters."""
    return {(row, len(uses(row, room, 1))): text for row, text in zip(rows, texts, strict=True)}


def measure(
    session: Session,
    inputs: list[TensorSpec],
    layout: PortLayout,
    sizes: Sequence[int],
    twin: KnownAnswer,
    progress: Callable[[int, int], None] | None = None,
    *,
    rooms: Sequence[int] = COUNTS,
) -> tuple[list[int], KnownAnswer, bool]:
    """The counts and buckets that agree, their known answers, and whether the twin agrees.

    Args:
        session: of the graph with ports.
        inputs: those of the graph without.
        layout: of its ports.
        sizes: the batch sizes to try, ascending.
        twin: known answers of the graph without ports.
        progress: called with the runs done and in all.
        rooms: the numbers of adapters that a row of the graph may have room for.

    Raises:
        EngineMismatch: no batch size gives a row the same bits at another place.
    """
    report = progress or (lambda done, total: None)
    largest = max(sizes)
    values = probe(inputs, largest + largest // 2, PROBE_SEED)
    plan = [(bucket, *run) for bucket in sizes for run in _runs(bucket, rooms)]
    total = len(plan) + len(sizes)
    found: dict[tuple[int, int], list[Answers]] = {}
    for done, (bucket, room, shift, rows) in enumerate(plan):
        texts = _fingerprints(session, layout, values, rows, room, shift=shift)
        found.setdefault((bucket, room), []).append(_answers(texts, rows, room))
        report(done + 1, total)
    counts, buckets = _agreeing(found, sizes, rooms)
    rows, room = list(range(max(buckets))), max(counts)
    answers = _fingerprints(session, layout, values, rows, room)
    without = []
    for done, bucket in enumerate(buckets):
        # Such a batch is given the least room.
        texts = _fingerprints(session, layout, values, rows[:bucket], min(counts), plain=True)
        without.append({(row, 0): text for row, text in enumerate(texts)})
        report(total - len(buckets) + done + 1, total)
    runs = [*without, *(run for b in buckets for n in counts for run in found[b, n])]
    if not all(
        _agree(one, run) for one in [_answers(answers, rows, room), *without] for run in runs
    ):
        raise EngineMismatch(
            f"{session.name}: no batch size up to {largest} gives a row the same bits at another "
            "place and beside other adapters; build with --fast to do without exactness"
        )
    twins = {(row, 0): text for row, text in enumerate(twin.answers)}
    known = KnownAnswer(
        buckets=buckets,
        refused=[size for size in sizes if size not in buckets],
        probe_seed=PROBE_SEED,
        answers=answers,
    )
    return counts, known, all(_agree(twins, run) for run in runs)


def _agree(first: Answers, second: Answers) -> bool:
    return all(second[key] == answer for key, answer in first.items() if key in second)


def _agreeing(
    found: Mapping[tuple[int, int], Sequence[Answers]],
    sizes: Sequence[int],
    rooms: Sequence[int],
) -> tuple[list[int], list[int]]:
    """The most pairs of count and bucket that agree, every count with every bucket."""
    choices: list[tuple[tuple[int, int, int], list[int], list[int]]] = []
    for length in range(1, len(rooms) + 1):
        for counts in itertools.combinations(rooms, length):
            for top in sizes:
                buckets: list[int] = []
                for bucket in [top, *(size for size in sizes[::-1] if size < top)]:
                    runs = [run for b in [*buckets, bucket] for n in counts for run in found[b, n]]
                    if all(_agree(a, b) for a, b in itertools.combinations(runs, 2)):
                        buckets.append(bucket)
                if buckets:
                    score = (len(counts) * len(buckets), max(buckets), max(counts))
                    choices.append((score, list(counts), sorted(buckets)))
    _, counts_found, buckets_found = max(choices)
    return counts_found, buckets_found


def check(
    session: Session,
    inputs: list[TensorSpec],
    layout: PortLayout,
    counts: Sequence[int],
    known: KnownAnswer,
    bucket: int,
    room: int,
    hint: str = "",
) -> None:
    """Run rows of the known answer in one batch size and with room for `room`, and compare.

    A row's bits don't depend on the room, so the same answers serve each: of the rows whose
    adapters fit, as often as the batch has places. `hint` ends the message.

    Raises:
        EngineMismatch: this machine or library gives other bits than the one that built the engine.
    """
    most = max(counts)
    fits = [row for row in range(len(known.answers)) if uses(row, room, 1) == uses(row, most, 1)]
    rows = (fits * bucket)[:bucket]
    values = probe(inputs, max(rows) + 1, known.probe_seed)
    found = _fingerprints(session, layout, values, rows, room, seed=known.probe_seed)
    wrong = [row for row, text in zip(rows, found, strict=True) if text != known.answers[row]]
    if wrong:
        raise EngineMismatch(
            f"{session.name} with adapters: batch {bucket} with room for {room} a row does not "
            f"give the known answer here (rows {wrong[:8]}); results would not be the ones this "
            "engine was built for. Build it again on this machine with `heatsink build MODEL -o "
            f"ENGINE`{hint}"
        )
