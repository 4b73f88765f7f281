"""Adapters in live weights: swapped in place, always from the pristine weights, exact.

`W = W0 (1 + sum_i (g_i - 1)) + sum_i g_i w_i s_i (B_i A_i)` (`heatsink.kernels.lora_merge`), so
A -> B -> A, A + B -> A and removal give the same bits each time. Live weights keep their place in
memory, so a captured CUDA graph replays with the new ones.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels.lora_merge import Term, lora_merge
from heatsink.runtime.adapter_delta import AdapterDelta, owned
from heatsink.runtime.errors import AdapterError, NonFiniteWeights
from heatsink.runtime.graph.weight import Origin
from heatsink.runtime.merge_gate import MergeGate
from heatsink.runtime.merge_layout import Stamp, check_layout, stamp
from heatsink.runtime.merge_plans import MergePlans
from heatsink.runtime.merge_terms import Part, Prepared, parts_of, places_of
from heatsink.runtime.pristine import STAGING, Cost, Keep, Pristine, costs
from heatsink.runtime.weights import hash_tensor
from heatsink.runtime.writes import note_write

Applied = Sequence[tuple[Prepared, float]]
# What the kernel takes; of any other dtype, a file's values become fp32.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Merger:
    """Keeps live weights exact under swaps of adapters.

    Args:
        live: the weights that are computed with, by `component.name`. They are written in place.
        keep: where pristine values come from (`heatsink.runtime.pristine`); ask `costs` first.
        source: with keep="mapped": the checkpoint's weights, by the same keys.
        origins: of packed, interleaved or scaled weights, by key (`heatsink.runtime.graph.weight`).
        gate: what requests hold while they run; a new one by default.
        stream: the CUDA stream that requests compute on; the current one by default.
        staging: bytes of pristine weights brought to the device at a time, where they are kept
            elsewhere. Bounds memory, and costs a launch for each.
    """

    def __init__(
        self,
        live: Mapping[str, Tensor],
        *,
        keep: Keep = "device",
        source: Mapping[str, Tensor] | None = None,
        origins: Mapping[str, Sequence[Origin]] | None = None,
        gate: MergeGate | None = None,
        stream: Any = None,
        staging: int = STAGING,
    ) -> None:
        self.gate = gate or MergeGate()
        self._live = dict(live)
        self._shapes = {key: tuple(weight.shape) for key, weight in self._live.items()}
        self._places = places_of(self._shapes, origins)
        self._pristine = Pristine(keep, source)
        self._plans = MergePlans()
        self._stream = stream
        self._staging = staging
        self._stamps: dict[str, Stamp] = {}
        self._applied: Applied = ()
        # What is being written: these weights hold neither the old adapters nor the new ones.
        self._dirty: set[str] = set()

    @property
    def applied(self) -> list[tuple[str, float]]:
        """Digest and weight of every adapter in the live weights, but for those of `torn`."""
        return [(prepared.digest, weight) for prepared, weight in self._applied]

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The weights that are written."""
        return MappingProxyType(self._live)

    @property
    def pristine(self) -> bool:
        """Whether the live weights have no adapter in them."""
        return not self._applied and not self._dirty

    @property
    def changed(self) -> list[str]:
        """Weights with adapters that someone else moved, cast or wrote meanwhile."""
        return sorted(self._changed().intersection(self._touched(self._applied)))

    @property
    def torn(self) -> list[str]:
        """Weights in no known state: a merge was broken off, and so was its undoing.

        The next `apply` or `remove` writes them whole.
        """
        return sorted(self._dirty)

    @property
    def cost(self) -> Cost:
        """What is kept now."""
        return self._pristine.cost(self._staging)

    def costs(self, deltas: Iterable[AdapterDelta]) -> dict[Keep, Cost]:
        """What keeping the weights that these adapters touch costs, by where they are kept."""
        touched = {part.key for part in self._parts(deltas)}
        return costs(self._live, touched | set(self._pristine.kept), self._staging)

    def prepare(self, deltas: Iterable[AdapterDelta]) -> Prepared:
        """Check an adapter and bring it to the weights' devices, so that `apply` need not.

        Its values are copied: what happens to these tensors or their file later changes nothing.

        Raises:
            AdapterError: `refused` maps each module that doesn't fit, or holds NaN, to its reason.
        """
        deltas = tuple(owned(deltas))
        _check_finite(deltas)

        def on(tensor: Tensor, device: torch.device) -> Tensor:
            dtype = tensor.dtype if tensor.dtype in _FLOATS else torch.float32
            return tensor.detach().to(device, dtype, non_blocking=True)

        with self._on_stream():
            parts = []
            for part in self._parts(deltas):
                live = self._live[part.key]
                magnitude = None if part.magnitude is None else on(part.magnitude, live.device)
                a, b = on(part.a, live.device), on(part.b, live.device)
                parts.append(Part(part.key, a, b, part.scale, magnitude, part.row, part.step))
        return Prepared(deltas, tuple(parts))

    def apply(
        self,
        adapters: Sequence[tuple[Prepared | Iterable[AdapterDelta], float]],
        *,
        timeout: float | None = None,
        check: bool = False,
    ) -> None:
        """Make the live weights the pristine ones with these adapters, in this order.

        What was applied before is gone. One launch for all layers, where pristine weights are on
        the device; queued on the compute stream once no request is under way.

        Args:
            adapters: each with its weight; one whose weight is 0 is left out.
            timeout: seconds to wait for requests under way; None waits for ever.
            check: look at every merged weight afterwards (waits for the device).

        Raises:
            AdapterError: an adapter doesn't fit, or a live weight was moved, cast or written while
                one was in it. Nothing is changed.
            NonFiniteWeights: with `check`, a merged weight is not finite. Nothing is changed.
            MergeTimeout: requests took longer. Nothing is changed.
        """
        wanted: list[tuple[Prepared, float]] = []
        for adapter, weight in adapters:
            if not -float("inf") < weight < float("inf"):
                raise AdapterError(f"an adapter's weight is {weight}, expected a finite number")
            if weight:
                wanted.append((self._ready(adapter), float(weight)))
        with self.gate.merge(timeout), self._on_stream(), torch.no_grad():
            self._check_places(part.key for ready, _ in wanted for part in ready.parts)
            self._keep(wanted)
            touched = self._touched((*self._applied, *wanted))
            with self._undone(touched):
                self._write(touched, wanted)
                if check:
                    self._check_result(touched)
            self._applied = wanted
            self._dirty.clear()

    def remove(self, *, timeout: float | None = None) -> None:
        """Put the pristine weights back, bit by bit.

        Weights that were moved or cast meanwhile get what moving or casting the pristine ones
        gives, and are kept anew when they are touched again.
        """
        with self.gate.merge(timeout), self._on_stream(), torch.no_grad():
            moved = self._changed()
            touched = self._touched(self._applied)
            rest = [key for key in touched if key not in moved]
            self._dirty.update(touched)
            with self._undone(rest):
                for key in moved.intersection(touched):
                    self._live[key].detach().copy_(self._pristine.read(key))
                    note_write([self._live[key]])
                self._write(rest, ())
            self._applied = ()
            # Before what is kept of them goes: what is dirty must be known.
            self._dirty.clear()
            self._forget(moved)

    def release(self, *, timeout: float | None = None) -> None:
        """Put the pristine weights back and give up what was kept of them."""
        self.remove(timeout=timeout)
        self._forget(list(self._stamps))

    def digest(self) -> str:
        """SHA-256 (hex) of the live weights: keys, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for key, weight in sorted(self._live.items()):
            digest.update(f"{key}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
            hash_tensor(digest, weight.detach().cpu())
        return digest.hexdigest()

    def _ready(self, adapter: Prepared | Iterable[AdapterDelta]) -> Prepared:
        if not isinstance(adapter, Prepared):
            return self.prepare(adapter)
        fits = all(part.a.device == self._live[part.key].device for part in adapter.parts)
        return adapter if fits else self.prepare(adapter.deltas)

    def _parts(self, deltas: Iterable[AdapterDelta]) -> Iterator[Part]:
        refused, parts = {}, []
        for delta in deltas:
            try:
                parts += parts_of(delta, self._places, self._shapes)
            except AdapterError as reason:
                refused[f"{delta.component}.{delta.module_path}"] = str(reason)
        if refused:
            told = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:5])
            raise AdapterError(f"{len(refused)} deltas don't fit the weights: {told}", refused)
        return iter(parts)

    def _on_stream(self) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        return stream

    @contextmanager
    def _undone(self, touched: Sequence[str]) -> Iterator[None]:
        """Whatever breaks a write off: undo it the way it came, from the pristine weights.

        If that breaks off too, the weights stay known as dirty.
        """
        self._dirty.update(touched)
        try:
            yield
        except BaseException:
            self._write(touched, self._applied)
            self._dirty.difference_update(touched)
            raise

    def _touched(self, applied: Applied) -> list[str]:
        """What must be written for these to go or come."""
        return sorted(_keys(applied) | self._dirty)

    def _changed(self) -> set[str]:
        """Weights that someone else moved, cast or wrote; a merge that broke off is no such."""
        found = set()
        for key, was in self._stamps.items():
            now = stamp(self._live[key])
            if now != was and (key not in self._dirty or now[:-1] != was[:-1]):
                found.add(key)
        return found

    def _keep(self, wanted: Applied) -> None:
        touched = {key: self._live[key] for key in sorted(_keys(wanted))}
        # First, so that nothing is kept whose changes would not be seen.
        self._stamps.update({key: stamp(weight) for key, weight in touched.items()})
        self._pristine.copy(touched)

    def _forget(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self._pristine.drop(keys)
        for key in keys:
            self._stamps.pop(key, None)

    def _check_places(self, keys: Iterable[str]) -> None:
        """Forget weights that were changed while no adapter was in them; refuse if one was."""
        if merged := self.changed:
            raise AdapterError(
                f"the live weight {merged[0]} was moved, cast or written while an adapter was in"
                " it: remove() first"
            )
        self._forget(self._changed())
        for key in keys:
            check_layout(key, self._live[key])

    def _write(self, touched: Iterable[str], wanted: Applied) -> None:
        """Write these weights, by device and dtype: pristine, with what `wanted` does to them."""
        groups: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
        for key in touched:
            groups[self._live[key].device, self._live[key].dtype].append(key)
            # The kernels go by the address. Before they begin: one that breaks off has written.
            note_write([self._live[key]])
        for group, keys in groups.items():
            if self._pristine.keep == "device":
                self._plan(group, keys, wanted)
                self._stamps.update({key: stamp(self._live[key]) for key in keys})
                continue
            for some in self._in_pieces(group[0], keys):
                self._merge(group[0], some, wanted)
                self._stamps.update({key: stamp(self._live[key]) for key in some})

    def _plan(
        self, group: tuple[torch.device, torch.dtype], keys: Sequence[str], wanted: Applied
    ) -> None:
        """One launch over weights whose pristine values lie beside them."""
        changed = self._changed()
        live = {
            key: weight.detach()
            for key, weight in sorted(self._live.items())
            if key in self._pristine and key not in changed
            if (weight.device, weight.dtype) == group
        }
        base = {key: self._pristine.read(key) for key in live}
        self._plans.write(group, live, base, keys, wanted)

    def _in_pieces(self, device: torch.device, keys: list[str]) -> Iterator[list[str]]:
        """All at once on the CPU, where nothing is staged; else as many as may be."""
        if device.type == "cpu":
            yield keys
            return
        piece: list[str] = []
        size = 0
        for key in keys:
            if piece and size + self._live[key].nbytes > self._staging:
                yield piece
                piece, size = [], 0
            piece.append(key)
            size += self._live[key].nbytes
        yield piece

    def _merge(
        self,
        device: torch.device,
        keys: list[str],
        wanted: Applied,
    ) -> None:
        """One launch: each weight from its pristine values, with its terms or without."""
        parts: dict[str, list[tuple[Part, float]]] = defaultdict(list)
        for prepared, weight in wanted:
            for part in prepared.parts:
                parts[part.key].append((part, weight))
        base: list[Tensor] = []
        out: list[Tensor] = []
        terms: list[Term] = []
        for key in keys:
            live = self._live[key].detach()
            pristine = self._pristine.read(key)
            if pristine.device != device or pristine.stride() != live.stride():
                pristine = torch.empty_like(live).copy_(pristine, non_blocking=True)
            terms += [_term(len(out), part, weight) for part, weight in parts.get(key, ())]
            base.append(pristine)
            out.append(live)
        lora_merge(base, out, terms)

    def _check_result(self, touched: Sequence[str]) -> None:
        flags: dict[torch.device, list[Tensor]] = defaultdict(list)
        keys: dict[torch.device, list[str]] = defaultdict(list)
        for key in touched:
            live = self._live[key].detach()
            flags[live.device].append(torch.isfinite(live).all())
            keys[live.device].append(key)
        bad = []
        for device, each in flags.items():
            # One wait for a device, not for a weight.
            finite = torch.stack(each).tolist()
            bad += [key for key, good in zip(keys[device], finite, strict=True) if not good]
        if bad:
            raise NonFiniteWeights(
                f"{len(bad)} merged weights hold NaN or infinity, {bad[0]} say: nothing was changed"
            )


def _keys(applied: Applied) -> set[str]:
    return {part.key for prepared, _ in applied for part in prepared.parts}


def _term(index: int, part: Part, weight: float) -> Term:
    return Term(index, part.a, part.b, part.scale * weight, part.magnitude, part.row, part.step)


def _check_finite(deltas: Iterable[AdapterDelta]) -> None:
    refused = {}
    for delta in deltas:
        for name in ("a", "b", "magnitude"):
            values = getattr(delta, name)
            if values is not None and not bool(torch.isfinite(values).all()):
                path = f"{delta.component}.{delta.module_path}"
                refused[path] = f"non-finite: {name} holds NaN or infinity"
    if refused:
        told = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:5])
        raise AdapterError(f"{len(refused)} deltas are not finite: {told}", refused)
