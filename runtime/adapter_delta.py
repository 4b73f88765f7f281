"""The one normal form of a LoRA inside this package, and its fusion into weights.

A target's weight becomes, always from the pristine `W0`,

    W = W0 (1 + sum_i (g_i - 1)) + sum_i g_i s_i (B_i A_i)

with `g_i = 1` for a plain LoRA and `g_i = m_i / |W0 + s_i B_i A_i|` for DoRA (https://arxiv.org/abs/
2402.09353): m_i the magnitudes, the norm that of each output's row over all its inputs. Of one
adapter it is what PEFT merges; of several, the sum of the changes that each makes alone, whatever
their order. Products and sums are in fp32 (or W0's own dtype where that is wider), with one
rounding to the dtype of `W0`.
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
    """What an adapter does to one module: it adds `scale * (b @ a)`; DoRA sets row lengths, too.

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
    """The same adapter at `weight` times its strength; at 0 nothing of it is left, DoRA or not."""
    if weight == 0:
        return []
    return [replace(delta, scale=delta.scale * weight) for delta in deltas]


def owned(deltas: Iterable[AdapterDelta]) -> list[AdapterDelta]:
    """The same adapter in memory of its own: what is mapped changes, or ends, with its file."""

    def copied(tensor: Tensor) -> Tensor:
        # What is pinned stays so: it goes to a device without waiting.
        pinned = tensor.is_pinned()
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, pin_memory=pinned)
        return own.copy_(tensor.detach())

    return [
        replace(
            delta,
            a=copied(delta.a),
            b=copied(delta.b),
            magnitude=None if delta.magnitude is None else copied(delta.magnitude),
        )
        for delta in deltas
    ]


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
        if delta.magnitude is not None:
            digest.update(b"magnitude\0")
            hash_tensor(digest, delta.magnitude.float())
    return str(digest.hexdigest())


def fuse(weights: Weights, deltas: Iterable[AdapterDelta], scale: float = 1.0) -> Weights:
    """The component's weights with its deltas fused in, by this module's formula.

    Nothing is computed here: a changed tensor is made anew each time it is used, every other one
    stays mapped. Give the deltas of all adapters in one call (see `scaled`); a second call would
    round twice.

    Args:
        weights: pristine weights of one component.
        deltas: of any components; those of others are passed over.
        scale: multiplies every delta's own scale. At 0 the weights are returned as they are.

    Raises:
        AdapterError: a delta's target is missing or of another shape, its magnitude is not one
            number for each output, or its scale is not finite.
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
        elif delta.magnitude is not None and delta.magnitude.shape != delta.b.shape[:1]:
            found = tuple(delta.magnitude.shape)
            refused[delta.module_path] = f"wrong shape: the magnitude is {found}"
        elif not math.isfinite(delta.scale):
            refused[delta.module_path] = f"the scale is {delta.scale}"
        # With scale 0 a DoRA still sets the rows' lengths.
        elif delta.scale or delta.magnitude is not None:
            terms.setdefault(delta.weight_name, []).append(delta)
    if refused:
        told = "; ".join(f"{path}: {reason}" for path, reason in list(refused.items())[:8])
        raise AdapterError(f"{len(refused)} deltas don't fit {weights.component}: {told}", refused)
    changed = {name: _fused_entry(weights.entries[name], these) for name, these in terms.items()}
    return Weights(weights.component, {**weights.entries, **changed})


def _fused_entry(entry: Entry, deltas: list[AdapterDelta]) -> Entry:
    how = f"+ {len(deltas)} adapter{'s'[: len(deltas) != 1]}"
    return entry.derive(lambda base: _fused(base, deltas), entry.shape, how)


def _fused(base: Tensor, deltas: list[AdapterDelta]) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    pristine = base.to(wide)
    total = pristine.clone()
    # What the rows of W0 are multiplied by, less one; None without DoRA.
    growth: Tensor | None = None
    for delta in deltas:
        product = (delta.b.to(wide) @ delta.a.to(wide).flatten(1)).reshape(base.shape)
        if delta.magnitude is None:
            total.add_(product, alpha=delta.scale)
            continue
        product *= delta.scale
        length = torch.linalg.vector_norm((pristine + product).flatten(1), dim=1)
        gain = delta.magnitude.to(wide) / length
        growth = gain - 1 if growth is None else growth + (gain - 1)
        total.add_(product.mul_(_by_row(gain, base)))
    if growth is not None:
        total.add_(pristine * _by_row(growth, base))
    return total.to(base.dtype)


def _by_row(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (weight.dim() - 1))


def fuse_model(model: Model, deltas: Iterable[AdapterDelta], scale: float = 1.0) -> Model:
    """The model with the deltas fused into every component they touch; its digests tell."""
    deltas = list(deltas)
    touched = sorted({delta.component for delta in deltas})
    return model.with_weights({c: fuse(model.weights(c), deltas, scale) for c in touched})
