"""Measures in which batch sizes a component gives a row the same bits, and records a known answer.

Library kernels choose their blocking by the whole problem, so a row's bits may change with the
batch. A seeded probe is run in every bucket twice, with rows at two places and among different
neighbours; the buckets that agree in every bit of every row form a class, and an engine runs one
class only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from heatsink.export.manifest import KnownAnswer, TensorSpec
from heatsink.kernels.fingerprint import fingerprint
from heatsink.runtime.backends.session import Array, Phased, Session
from heatsink.runtime.errors import EngineMismatch, NumericError
from heatsink.runtime.graph.denoisers import SCALE, residuals_among

PROBE_SEED = 20_260_101


def bucket_sizes(largest: int) -> list[int]:
    """Powers of two up to `largest`, and `largest` itself."""
    sizes = [1 << k for k in range(largest.bit_length()) if 1 << k <= largest]
    return sizes if sizes[-1] == largest else [*sizes, largest]


def close_sizes(largest: int) -> list[int]:
    """Sizes up to `largest` of which one holds any number of rows with at most a fifth padding.

    >>> close_sizes(24)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]
    """
    sizes, size = [1], 1
    while size < largest:
        size = min(largest, size + max(1, 1 << (max(size.bit_length() - 3, 0))))
        sizes.append(size)
    return sizes


def probe(inputs: list[TensorSpec], rows: int, seed: int) -> dict[str, Array]:
    """`rows` different rows of seeded values; row r does not depend on how many there are.

    All dimensions but the first are those of the engine: symbolic later ones are not built yet.
    Floats are standard normal (timesteps: whole numbers below 1000; pictures of ControlNets and
    their scales: up to 1), integers are below 256. Every other row has a ControlNet's residuals.
    """
    out: dict[str, Array] = {}
    residuals = residuals_among(spec.name for spec in inputs)
    for position, spec in enumerate(inputs):
        shape = [int(size) for size in spec.shape[1:]]
        values: list[Array] = []
        for row in range(rows):
            rng = np.random.Generator(np.random.Philox(key=[seed, position * 65_536 + row]))
            if spec.dtype == "int64":
                values.append(rng.integers(0, 256, shape))
            elif spec.name == "timestep":
                values.append(np.array(rng.integers(0, 1000), np.float32))
            elif spec.name in ("controlnet_cond", SCALE):
                values.append(np.asarray(rng.random(shape), spec.dtype))
            elif spec.name in residuals and row % 2:
                # What a row without a ControlNet has.
                values.append(np.full(shape, -0.0, spec.dtype))
            else:
                values.append(rng.standard_normal(shape).astype(spec.dtype))
        out[spec.name] = np.stack(values)
    return out


def row_answers(outputs: Mapping[str, Array]) -> list[str]:
    """One 64-bit hexadecimal fingerprint a row: the sum of the outputs' fingerprints."""
    total: Array | None = None
    for name in sorted(outputs):
        result = fingerprint(torch.from_numpy(np.ascontiguousarray(outputs[name])))
        if int(result.nonfinite.sum()):
            raise NumericError(
                f"output {name!r} holds {int(result.nonfinite.sum())} non-finite values"
            )
        digest = result.digest.numpy().view(np.uint64)
        total = digest if total is None else total + digest
    assert total is not None
    return [f"{int(value):016x}" for value in total]


def run_afresh(session: Session, values: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session; nothing that it keeps of one run is used in another."""
    out = session.run(values)
    if isinstance(session, Phased):
        session.forget()
    return out


def _answers_in(session: Session, values: Mapping[str, Array], bucket: int) -> list[str] | None:
    """Answers of rows 0 to `bucket` - 1, run at once; None if they depend on place or neighbours.

    A second run holds the later half of them at the earlier places, with strangers at the later
    ones: so every place is compared with another, and half of the neighbours are new.
    """
    half = bucket // 2
    first, second = (
        row_answers(run_afresh(session, {name: value[rows] for name, value in values.items()}))
        for rows in (slice(0, bucket), slice(half, half + bucket))
    )
    return first if first[half:] == second[: bucket - half] else None


def measure(
    session: Session,
    inputs: list[TensorSpec],
    sizes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> KnownAnswer:
    """The largest class of buckets (ties: the one with the larger bucket) and its known answers.

    Args:
        session: the component.
        inputs: what it takes.
        sizes: the buckets to try, ascending.
        progress: called with how many of them were measured, and of how many.

    Raises:
        EngineMismatch: no batch size gives a row the same bits at two places.
    """
    largest = max(sizes)
    values = probe(inputs, largest + largest // 2, PROBE_SEED)
    found: dict[int, list[str]] = {}
    for done, bucket in enumerate(sizes):
        answers = _answers_in(session, values, bucket)
        if answers is not None:
            found[bucket] = answers
        if progress:
            progress(done + 1, len(sizes))
    if not found:
        raise EngineMismatch(
            f"{session.name}: no batch size up to {largest} gives a row the same bits at another "
            "place; build with --fast to do without exactness"
        )
    # Two buckets agree where their common rows do; agreement with the larger one makes a class.
    classes = [
        [b for b in found if b <= top and found[b] == found[top][:b]] for top in sorted(found)
    ]
    buckets = max(classes, key=lambda members: (len(members), max(members)))
    return KnownAnswer(
        buckets=buckets,
        refused=[b for b in sizes if b not in buckets],
        probe_seed=PROBE_SEED,
        answers=found[max(buckets)],
    )


def check(
    session: Session, inputs: list[TensorSpec], known: KnownAnswer, bucket: int, hint: str = ""
) -> None:
    """Run the known answer's first `bucket` rows and compare; `hint` ends the message.

    Raises:
        EngineMismatch: this machine or library gives other bits than the one that built the engine.
    """
    values = probe(inputs, bucket, known.probe_seed)
    found = row_answers(run_afresh(session, values))
    wrong = [row for row in range(bucket) if found[row] != known.answers[row]]
    if wrong:
        raise EngineMismatch(
            f"{session.name}: batch {bucket} does not give the known answer here (rows "
            f"{wrong[:8]}); results would not be the ones this engine was built for. Build it "
            f"again on this machine with `heatsink build MODEL -o ENGINE`{hint}"
        )
