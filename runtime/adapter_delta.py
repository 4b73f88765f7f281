"""The one normal form of a LoRA inside this package, and its fusion into weights.

A target's weight becomes `W = W0 + sum_i s_i (B_i A_i)`, always from the pristine `W0`: products
and sums in fp32 (or W0's own dtype where that is wider), one rounding to the dtype of `W0`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heatsink.runtime.components import lasting_name
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.weights import Entry, Weights, hash_tensor, sha256_of

if TYPE_CHECKING:
    from heatsink.runtime.model import Model


@dataclass(frozen=True, eq=False)
class AdapterDelta:
    """What an adapter adds to one module: `scale * (b @ a)`.

    Attributes:
        component: the component's name (`"unet"`).
        module_path: the module's path in it (`"mid_block.attentions.0.proj_in"`).
        a: `(r, in)`, or `(r, in, kh, kw)` for a convolution.
        b: `(out, r)`, for a convolution too.
        scale: alpha / r (1 where the file gives no alpha).
        magnitude: of DoRA, `(out,)`, the length of every row of the adapted weight; else None.
    """

    component: str
    module_path: str
    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return int(self.a.shape[0])

    @property
    def weight_name(self) -> str:
        """The name of the weight it changes."""
        return f"{self.module_path}.weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight it changes."""
        return (int(self.b.shape[0]), *self.a.shape[1:])


def scaled(deltas: Iterable[AdapterDelta], weight: float) -> list[AdapterDelta]:
    """The same adapter at `weight` times its strength, as a sum of several adapters needs it."""
    return [replace(delta, scale=delta.scale * weight) for delta in deltas]


def digest_deltas(deltas: Iterable[AdapterDelta]) -> str:
    """SHA-256 (hex) of the adapter's values, the same in every file format and dtype."""
    digest = sha256_of("adapter\0")
    named = {
        (d.component, lasting_name(d.component, d.module_path), i): d for i, d in enumerate(deltas)
    }
    for (component, path, _), delta in sorted(named.items()):
        shape = "x".join(map(str, (delta.rank, *delta.weight_shape)))
        digest.update(f"{component}\0{path}\0{shape}\0{delta.scale!r}\0".encode())
        hash_tensor(digest, delta.a.float())
        hash_tensor(digest, delta.b.float())
    return str(digest.hexdigest())


def fuse(weights: Weights, deltas: Iterable[AdapterDelta], scale: float = 1.0) -> Weights:
    """The component's weights with its deltas fused in: `W = W0 + sum_i scale s_i (B_i A_i)`.

    Nothing is computed here: a changed tensor is made anew each time it is used, every other one
    stays mapped. Give the deltas of all adapters in one call (see `scaled`); a second call would
    round twice.

    Args:
        weights: pristine weights of one component.
        deltas: of any components; those of others are passed over.
        scale: multiplies every delta's own scale. At 0 the weights are returned as they are.

    Raises:
        AdapterError: a delta's target is missing or of another shape, or its scale is not finite.
    """
    terms: dict[str, list[AdapterDelta]] = {}
    refused: dict[str, str] = {}
    for delta in scaled(deltas, scale):
        if delta.component != weights.component:
            continue
        if delta.weight_name not in weights:
            refused[delta.module_path] = "unknown target"
        elif weights.shape(delta.weight_name) != delta.weight_shape:
            was = weights.shape(delta.weight_name)
            refused[delta.module_path] = f"wrong shape: {delta.weight_shape} onto {was}"
        elif not math.isfinite(delta.scale):
            refused[delta.module_path] = f"the scale is {delta.scale}"
        elif delta.scale:
            terms.setdefault(delta.weight_name, []).append(delta)
    if refused:
        told = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:8])
        raise AdapterError(f"{len(refused)} deltas don't fit {weights.component}: {told}", refused)
    changed = {name: _fused_entry(weights.entries[name], these) for name, these in terms.items()}
    return Weights(weights.component, {**weights.entries, **changed})


def _fused_entry(entry: Entry, deltas: list[AdapterDelta]) -> Entry:
    def add(base: Tensor) -> Tensor:
        wide = torch.promote_types(base.dtype, torch.float32)
        total = base.to(wide, copy=True)
        for delta in deltas:
            product = delta.b.to(wide) @ delta.a.to(wide).flatten(1)
            total.add_(product.reshape(base.shape), alpha=delta.scale)
        return total.to(base.dtype)

    return entry.derive(add, entry.shape, f"+ {len(deltas)} adapter{'s'[: len(deltas) != 1]}")


def fuse_model(model: Model, deltas: Iterable[AdapterDelta], scale: float = 1.0) -> Model:
    """The model with the deltas fused into every component they touch; its digests tell."""
    deltas = list(deltas)
    touched = sorted({delta.component for delta in deltas})
    return model.with_weights({c: fuse(model.weights(c), deltas, scale) for c in touched})
