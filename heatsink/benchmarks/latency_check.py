"""What a system's result must be before its time counts.

Components are compared with the captured graph in float64. Allowed is a multiple of the error that
plain PyTorch makes in the table's own precision, operation by operation, and a rounding: another
order of sums is another draw of that error, a mistake is far larger. Images are compared by PSNR
with diffusers in float32 from the same noise.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from heatsink.benchmarks.latency_systems import Eager
from heatsink.benchmarks.latency_work import COMPONENTS, DTYPES, Artefacts, Level
from heatsink.runtime.errors import HeatsinkError

# In float32 some backends sum normalisations value by value; `export.parity` has the same margin.
MARGINS = {"fp32": 8.0, "bf16": 2.0}
MIN_PSNR = {"fp32": 50.0, "bf16": 30.0}
"""In dB, or this much below diffusers' own in the table's precision, where that is less."""
EQUAL = 120.0
"""What stands for images without a difference, in dB."""
_BELOW_DIFFUSERS = 6.0


@dataclass(frozen=True)
class Quality:
    """How right a result is.

    Attributes:
        error: 2-norm of the difference from float64 over that of the result.
        allowed: the largest error that is let pass.
        psnr: of the worst image, in dB.
        least: the PSNR that is let pass.
    """

    error: float | None = None
    allowed: float | None = None
    psnr: float | None = None
    least: float | None = None


class Check:
    """References of a workload's turn 0, each computed when it is first needed.

    Args:
        artefacts: of the workload.
        counts: at each level; the references are of the most.
    """

    def __init__(self, artefacts: Artefacts, counts: Mapping[Level, tuple[int, ...]]) -> None:
        self._artefacts, self._counts = artefacts, counts
        self._exact: dict[str, Tensor] = {}
        self._plain: dict[tuple[str, str], float] = {}
        self._images: dict[str, Tensor] = {}

    def __call__(self, level: Level, precision: str, result: Tensor) -> Quality:
        """The quality of a result of turn 0.

        Raises:
            HeatsinkError: it is not right.
        """
        found = self._of_images if level == "image" else self._of_component
        quality = found(level, precision, result)
        # Written so that a NaN is refused too.
        if quality.error is not None and not quality.error <= (quality.allowed or 0.0):
            raise HeatsinkError(
                f"wrong: its error is {quality.error:.1e}, {quality.allowed:.1e} is allowed"
            )
        if quality.psnr is not None and not quality.psnr >= (quality.least or 0.0):
            raise HeatsinkError(
                f"wrong: {quality.psnr:.1f} dB from diffusers in float32, at least "
                f"{quality.least:.1f} are expected"
            )
        return quality

    def _of_component(self, level: Level, precision: str, result: Tensor) -> Quality:
        wanted = self._float64(level)[: len(result)]
        plain = self._plain_error(level, precision)
        allowed = MARGINS[precision] * plain + torch.finfo(DTYPES[precision]).eps
        return Quality(error=relative(result, wanted), allowed=allowed)

    def _of_images(self, level: Level, precision: str, result: Tensor) -> Quality:
        del level
        wanted = self._diffusers("fp32")
        least = MIN_PSNR[precision]
        if precision != "fp32":
            own = psnr(self._diffusers(precision), wanted)
            least = min(least, own - _BELOW_DIFFUSERS)
        return Quality(psnr=psnr(result, wanted[: len(result)]), least=least)

    def _float64(self, level: Level) -> Tensor:
        if level not in self._exact:
            self._exact[level] = self._by_row(level, "fp32", torch.float64)
        return self._exact[level]

    def _plain_error(self, level: Level, precision: str) -> float:
        if (level, precision) not in self._plain:
            found = self._by_row(level, precision, None)
            self._plain[level, precision] = relative(found, self._float64(level))
        return self._plain[level, precision]

    def _by_row(self, level: Level, precision: str, dtype: torch.dtype | None) -> Tensor:
        """The level's component, computed one row after another: its memory is bounded."""
        artefacts = self._artefacts
        graph = artefacts.graph(COMPONENTS[level], precision)
        request = artefacts.request(level, max(self._counts[level]), 0)
        assert isinstance(request, Mapping)
        rows = []
        for row in range(max(self._counts[level])):
            given = {name: value[row : row + 1] for name, value in request.items()}
            made = graph.run(given, dtype=dtype, device=artefacts.workload.device)
            rows.append(next(iter(made.values())).double().cpu())
        found = torch.cat(rows)
        if not bool(torch.isfinite(found).all()):
            raise HeatsinkError(f"{level}: plain PyTorch gives values that are not finite")
        return found

    def _diffusers(self, precision: str) -> Tensor:
        if precision not in self._images:
            artefacts = self._artefacts
            (runner,) = Eager(artefacts, precision).runners("image", 1)
            runner.load(artefacts.request("image", max(self._counts["image"]), 0))
            self._images[precision] = runner.result(runner.run())
            del runner
            gc.collect()
        return self._images[precision]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The 2-norm of the difference over that of `wanted`."""
    return float((found.double() - wanted).norm() / wanted.norm())


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of the worst image, in dB; values in [0, 1]."""
    errors = (found.double() - wanted.double()).square().flatten(1).mean(1)
    return float(-10 * torch.log10(errors.max().clamp_min(10 ** (-EQUAL / 10))))
