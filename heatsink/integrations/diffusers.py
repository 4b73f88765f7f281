"""Adapters for a diffusers pipeline: merged exactly for all images, or by prompt in one batch.

    adapters = heatsink.adapters(pipe)
    adapters.add("noto", "noto.safetensors")
    adapters.use({"noto": 0.8})                    # for all images: merged in place
    adapters.use([{"noto": 0.8}, None])            # by prompt, in one batch
    adapters.remove()                              # the base model again, bit by bit

docs/merge.md tells more.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heatsink.integrations.holders import HOLDERS, Holder, restore
from heatsink.integrations.pipeline_calls import PipelineCalls
from heatsink.integrations.pipeline_modules import (
    check_held,
    check_networks,
    check_weights,
    components_of,
    targets_of,
    weights_of,
)
from heatsink.integrations.row_adapters import RowAdapters
from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas, owned
from heatsink.runtime.adapter_file import inspect_adapter
from heatsink.runtime.adapter_receipt import AdapterReceipt
from heatsink.runtime.errors import AdapterError, CallerError, InvalidRequest, UnknownAdapter
from heatsink.runtime.merge import Merger
from heatsink.runtime.merge_gate import MergeGate
from heatsink.runtime.merge_terms import Prepared
from heatsink.runtime.model import Model
from heatsink.runtime.pristine import ComponentSource, Cost, Keep

Choice = Mapping[str, float] | Sequence[Mapping[str, float] | None] | None
_ATTRIBUTE = "_heatsink_adapters"


def adapters(pipe: Any, *, keep: Keep | None = None, model: Model | None = None) -> Adapters:
    """The adapters of a pipeline; of one that has them already, the same object.

    Args:
        pipe: of Stable Diffusion 1.x, 2.x or XL, with ControlNet or without.
        keep: where the weights as they were are kept while adapters are merged: `"device"` (the
            default), `"host"` or `"mapped"`. `Adapters.costs` says what each takes, and
            `Adapters.keep` changes it.
        model: the folder or file that the pipeline was loaded from, for keep="mapped".

    Raises:
        AdapterError: something stands between the pipeline's weights and what is computed (PEFT's
            adapters, offload, fused projections, quantisation, other adapters of this package).
        CallerError: `keep` is given and the pipeline has adapters already.
    """
    existing = vars(pipe).get(_ATTRIBUTE)
    if existing is None:
        return Adapters(pipe, keep or "device", model)
    if keep is not None or model is not None:
        raise CallerError("this pipeline has adapters already: keep= of those can be changed")
    found: Adapters = existing
    return found


class Adapters:
    """The adapters of one pipeline. Made by `heatsink.adapters`."""

    def __init__(self, pipe: Any, keep: Keep = "device", model: Model | None = None) -> None:
        self._pipe = pipe
        self._modules = components_of(pipe)
        self._targets = targets_of(self._modules)
        self._deltas: dict[str, list[AdapterDelta]] = {}
        self._digests: dict[str, str] = {}
        self._receipts: dict[str, AdapterReceipt] = {}
        self._prepared: dict[str, Prepared] = {}
        self._rows: RowAdapters | None = None
        self._choice: Choice = None
        self._gate = MergeGate()
        self._calls = PipelineCalls(pipe, self._call)
        restore(self._modules)
        self._merger = self._new_merger(keep, model)
        self._calls.start()
        vars(pipe)[_ATTRIBUTE] = self
        self._holder = Holder(weakref.ref(self))
        HOLDERS.update(dict.fromkeys(self._modules.values(), self._holder))

    @property
    def names(self) -> list[str]:
        """The adapters that were added."""
        return sorted(self._deltas)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every adapter's values."""
        return dict(self._digests)

    @property
    def receipts(self) -> dict[str, AdapterReceipt]:
        """What became of every key of the files that were added."""
        return dict(self._receipts)

    @property
    def gate(self) -> MergeGate:
        """What every call of the pipeline holds, and changes of what is in use wait for.

        Whoever runs networks of the pipeline without calling it holds `gate.request()` meanwhile.
        """
        return self._gate

    @property
    def in_use(self) -> Choice:
        """What `use` was last given."""
        return self._choice

    def add(
        self,
        name: str,
        file: str | Path | Iterable[AdapterDelta],
        *,
        ignore: Sequence[str] = (),
    ) -> str:
        """Read an adapter, whole or not at all; nothing is applied yet.

        Args:
            name: what `use` calls it.
            file: a LoRA file (safetensors; diffusers, PEFT or kohya), or its deltas.
            ignore: keys of the file, or shell patterns, that may be left out.

        Returns:
            The digest of its values.

        Raises:
            AdapterError: the file can't be applied whole; `refused` maps keys to reasons.
            CallerError: the name is taken.
        """
        self._check_open()
        if name in self._deltas:
            raise CallerError(f"there is an adapter {name!r} already: drop() it first")
        if isinstance(file, str | Path):
            receipt, deltas = inspect_adapter(file, self._targets, ignore=ignore)
            if not receipt.accepted:
                raise AdapterError(receipt.refusal(), receipt.refused)
            # The file may be written again later, in the memory that it is mapped to.
            deltas = owned(deltas)
            digest = digest_deltas(deltas)
            if digest != receipt.digest:
                raise AdapterError(f"{file} was written while it was read")
            self._receipts[name] = receipt
        else:
            deltas = owned(file)
            self._merger.costs(deltas)  # Raises where a target is unknown or of another shape.
            digest = digest_deltas(deltas)
        self._deltas[name], self._digests[name] = deltas, digest
        return digest

    def drop(self, name: str) -> None:
        """Forget an adapter that is not in use."""
        self._check_open()
        self._known([name])
        chosen = self._choice
        rows = [chosen] if isinstance(chosen, Mapping) else chosen or ()
        if any(name in row for row in rows if row):
            raise CallerError(f"the adapter {name!r} is in use: remove() it first")
        del self._deltas[name], self._digests[name]
        self._prepared.pop(name, None)
        self._receipts.pop(name, None)

    def costs(self, *names: str) -> dict[Keep, Cost]:
        """What merging these adapters (default: all) would keep, for each choice of `keep`."""
        self._check_open()
        self._known(names)
        return self._merger.costs(d for n in names or self._deltas for d in self._deltas[n])

    @property
    def cost(self) -> Cost:
        """What is kept now."""
        return self._merger.cost

    def keep(self, keep: Keep, model: Model | None = None) -> None:
        """Keep pristine weights elsewhere from now on; what is in use is removed."""
        with self._alone(None):
            merger = self._new_merger(keep, model)
            self._remove()
            self._merger.release()
            self._merger = merger
            self._prepared.clear()

    def use(self, choice: Choice, *, timeout: float | None = None) -> None:
        """Apply adapters to what the pipeline computes from now on.

        Waits until the calls of the pipeline that are under way in other threads are over.

        Args:
            choice: names and weights: for all images, merged into the weights in place; a list of
                them, or None, by prompt, in one batch; None: the base model. Weight 0 is none. The
                order of the names does not matter.
            timeout: seconds to wait; None waits for ever.

        Raises:
            AdapterError: an adapter can't be applied so, or something came between weights and
                computation. Nothing is changed.
            NonFiniteWeights: a merged weight overflowed. Nothing is changed.
            UnknownAdapter: a name is unknown.
            MergeTimeout: calls took longer. Nothing is changed.
            WaitsForItself: this is called from inside of a call. Nothing is changed.
        """
        with self._alone(timeout):
            if choice is None:
                self._remove()
                return
            components_of(self._pipe)
            check_networks(self._pipe, self._modules)
            check_weights(self._modules, self._merger.live)
            if isinstance(choice, Mapping):
                self._merge(self._sorted(choice))
            elif isinstance(choice, Sequence) and not isinstance(choice, str) and choice:
                self._use_rows([self._sorted(row or {}) for row in choice])
            else:
                raise InvalidRequest(
                    "use takes names with weights, a list of those by prompt, or None; got"
                    f" {choice!r}"
                )
            self._choice = dict(choice) if isinstance(choice, Mapping) else list(choice)

    def remove(self, *, timeout: float | None = None) -> None:
        """The base model again, bit by bit: hooks go, weights are put back.

        Waits, and raises, as `use` does.
        """
        with self._alone(timeout):
            self._remove()

    def close(self) -> None:
        """Leave the pipeline as it was found; waits until its calls are over."""
        if vars(self._pipe).get(_ATTRIBUTE) is not self:
            return
        with self._alone(None):
            self._remove()
            self._merger.release()
            del vars(self._pipe)[_ATTRIBUTE]
            for module in self._modules.values():
                del HOLDERS[module]
            self._calls.stop()

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """What a call of the pipeline is inside of."""
        with self._gate.request():
            if self._merger.torn:
                raise AdapterError(
                    "a merge was broken off half way, and so was its undoing: use() or remove()"
                    " first"
                )
            if self._choice is not None:
                check_networks(self._pipe, self._modules)
            if isinstance(self._choice, Mapping):
                check_held(self._modules, self._merger.live)
            yield

    @contextmanager
    def _alone(self, timeout: float | None) -> Iterator[None]:
        """No call is under way, and none begins."""
        self._check_open()
        with self._gate.merge(timeout):
            # Another thread may have been first.
            self._check_open()
            yield

    def _remove(self) -> None:
        self._put_back()
        self._stop_rows()
        self._choice = None

    def _new_merger(self, keep: Keep, model: Model | None) -> Merger:
        source = None
        if (keep == "mapped") != (model is not None):
            raise CallerError(f"keep={keep!r}: model= is given with 'mapped', and only with it")
        if model is not None:
            known = [component for component in self._modules if component in model.components]
            source = ComponentSource({component: model.weights(component) for component in known})
        return Merger(weights_of(self._modules), keep=keep, source=source)

    def _merge(self, chosen: Sequence[tuple[str, float]]) -> None:
        for name, _ in chosen:
            if name not in self._prepared:
                self._prepared[name] = self._merger.prepare(self._deltas[name])
                # One copy is enough.
                self._deltas[name] = list(self._prepared[name].deltas)
        # Before anything is written: what breaks off half way must be put back, too.
        self._holder.merger = self._merger
        try:
            self._merger.apply([(self._prepared[name], w) for name, w in chosen], check=True)
        finally:
            self._note()
        self._stop_rows()

    def _put_back(self) -> None:
        try:
            self._merger.remove()
        finally:
            self._note()

    def _note(self) -> None:
        self._holder.merger = None if self._merger.pristine else self._merger

    def _use_rows(self, rows: Sequence[Sequence[tuple[str, float]]]) -> None:
        new, old = RowAdapters(self._pipe, self._modules, self._deltas, rows), self._rows
        try:
            # Their hooks can't be there together.
            self._stop_rows()
            new.start()
            self._put_back()
        except BaseException:
            new.stop()
            if old is not None:
                old.stop()
                old.start()
                self._rows = old
            raise
        self._rows = new

    def _stop_rows(self) -> None:
        if self._rows is not None:
            self._rows.stop()
            self._rows = None

    def _sorted(self, row: Mapping[str, float]) -> list[tuple[str, float]]:
        """By digest: an image must not depend on names, nor on their order."""
        if not isinstance(row, Mapping):
            raise InvalidRequest(f"a prompt's adapters are {row!r}, expected names with weights")
        self._known(row)
        for name, weight in row.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise InvalidRequest(f"the weight of {name!r} is {weight!r}, expected a number")
            if not math.isfinite(weight):
                raise InvalidRequest(f"the weight of {name!r} is {weight}, expected a finite one")
        chosen = [(name, float(weight)) for name, weight in row.items() if weight]
        return sorted(chosen, key=lambda pair: (self._digests[pair[0]], pair[1]))

    def _known(self, names: Iterable[str]) -> None:
        if unknown := sorted(set(names) - self._deltas.keys()):
            message = f"there is no adapter {unknown[0]!r}; there are {self.names}"
            raise UnknownAdapter(message, self.names)

    def _check_open(self) -> None:
        if vars(self._pipe).get(_ATTRIBUTE) is not self:
            raise CallerError("these adapters are closed")
