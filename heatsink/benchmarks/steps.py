"""What `fingerprint` is measured against: the same digest in PyTorch, and a hash on the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from heatsink.benchmarks.bundled import CASES
from heatsink.benchmarks.family import Family, LeftOut, Variant, compiled_variant, same
from heatsink.kernels._op import Inputs
from heatsink.kernels.fingerprint import _fingerprint_torch


def fingerprint(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The digest, non-finite count and absolute maximum of each row, in PyTorch operations."""
    return _fingerprint_torch(x)


def _sha256(inputs: Inputs) -> Callable[[], Any]:
    x = inputs["x"]
    bits = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[x.element_size()]

    def call() -> list[str]:
        import torch

        host = x.contiguous().view(getattr(torch, bits)).cpu().numpy()
        return [hashlib.sha256(row).hexdigest() for row in host]

    return call


def _digests(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    return [
        compiled_variant("torch.compile", fingerprint),
        Variant("SHA-256 on the host", _sha256, comparable=False),
    ]


FAMILIES = {
    "fingerprint": Family(fingerprint, _digests, bundled=CASES["fingerprint"], widen=same),
}
