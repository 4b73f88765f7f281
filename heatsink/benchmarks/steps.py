"""What `guided_step`, `normal` and `fingerprint` are measured against.

Their values are specified to the bit, so the same in PyTorch operations is one baseline; what a
user would run otherwise has other values by design: `torch.randn` for the noise, SHA-256 on the
host for the digest. These are timed unchecked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heatsink.benchmarks.bundled import CASES
from heatsink.benchmarks.family import (
    Family,
    LeftOut,
    Variant,
    compiled_variant,
    eager_variant,
    same,
)
from heatsink.kernels._op import Inputs
from heatsink.kernels.fingerprint import _fingerprint_torch
from heatsink.kernels.noise import _normal_torch

# docs/noise.md: fresh noise of a scheduler's step.
_STEP = 1


def _advance(inputs: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
    x, out, x0_prev = (inputs[name] for name in ("x", "out", "x0_prev"))

    def spread(values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (x.dim() - 1))

    uncond, cond = inputs["uncond"].long(), inputs["cond"].long()
    low, high = out[uncond].to(x.dtype), out[cond].to(x.dtype)
    guided = low + spread(inputs["guidance"]) * (high - low)
    guided = torch.where(spread(uncond != cond), guided, high)
    _, _, p, q, a, b, c, d = (spread(column) for column in inputs["coef"].unbind(1))
    x0 = p * x + q * guided
    x_next = a * x + b * x0
    x_next = torch.where(c != 0, x_next + c * x0_prev, x_next)
    return torch.where(d != 0, x_next + d * noise, x_next), x0


def guided_step(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Guidance, the scheduler's update and the specified noise, in PyTorch operations."""
    x = inputs["x"]
    noise = _normal_torch(inputs["seeds"], inputs["steps"], _STEP, x.shape[1:].numel())
    return _advance(inputs, noise.view(x.shape))


def _step_with_randn(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    return _advance(inputs, torch.randn_like(inputs["x"]))


def normal(keys: Tensor, steps: Tensor, purpose: int, count: int) -> Tensor:
    """The specified noise in PyTorch operations."""
    return _normal_torch(keys, steps, purpose, count)


def _randn(inputs: Inputs) -> Callable[[], Tensor]:
    keys, count = inputs["keys"], inputs["count"]
    return lambda: torch.randn(keys.shape[0], count, device=keys.device)


def fingerprint(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The digest, non-finite count and absolute maximum of each row, in PyTorch operations."""
    return _fingerprint_torch(x)


def _sha256(inputs: Inputs) -> Callable[[], list[str]]:
    x = inputs["x"]

    def call() -> list[str]:
        host = x.contiguous().view(torch.uint8).cpu().numpy()
        return [hashlib.sha256(row).hexdigest() for row in host]

    return call


def _other(variant: Variant, name: str) -> Variant:
    """The variant under another name, its values other ones by design."""
    return Variant(name, variant.prepare, comparable=False)


def _step_others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    eager = eager_variant("", _step_with_randn)
    compiled = compiled_variant("", _step_with_randn)
    return [
        compiled_variant("torch.compile", guided_step),
        _other(eager, "PyTorch eager, torch.randn"),
        _other(compiled, "torch.compile, torch.randn"),
    ]


def _normal_others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    randn = Variant("torch.randn", _randn, comparable=False)
    return [compiled_variant("torch.compile", normal), randn]


def _digests(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    host = Variant("SHA-256 on the host", _sha256, comparable=False)
    return [compiled_variant("torch.compile", fingerprint), host]


FAMILIES: dict[str, Family] = {
    "guided_step": Family(guided_step, _step_others),
    "normal": Family(normal, _normal_others, widen=same),
    "fingerprint": Family(fingerprint, _digests, bundled=CASES["fingerprint"], widen=same),
}
