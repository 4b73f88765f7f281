"""How long it takes to swap an adapter on every linear and convolution of a UNet.

Each system goes from adapter one to adapter two, or back, in every round, beside ours:

- heatsink: `Merger.apply` from host memory (checked, copied to the device, merged from the pristine
  weights in one launch), and with the adapter prepared on the device before.
- diffusers: `unfuse_lora` and `fuse_lora`, both adapters loaded on the device; and with the new one
  loaded from host memory first.
- PEFT without fusing: `set_adapter`, and a hot swap of the values. These move little, and every
  step after them pays for the unmerged adapter (`lora_batch`).

Before anything is timed each system's weights are compared with float64 after a swap.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.benchmarks.ceilings import copy_rate
from heatsink.benchmarks.lora_models import (
    peft_state,
    random_adapter,
    random_unet,
    targets,
    unet_config,
)
from heatsink.kernels.timing import Spread
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.merge import Merger

Progress = Callable[[str, int, int], None]
Adapters = list[list[AdapterDelta]]
NAMES = ("one", "two")
OURS = "heatsink merge, from host memory"
# In units of the last place. Ours rounds the sum once; fusing rounds the product and the sum, and
# unfusing the adapter before did so too.
_ROUNDINGS = {"heatsink": 0.51, "diffusers": 3.01}
# What float32 sums over the rank err besides, where the weights are float32.
_SLACK = 4.0
_CHECKED = 24


@dataclass(frozen=True)
class SwapRow:
    """One system.

    Attributes:
        system: its name.
        ratio: its time as a multiple of ours in the same round.
        error: largest error of a merged weight against float64, in units of its last place; None
            where nothing is merged.
        seconds: of a swap; None on a CPU.
        of_floor: the least time at the copy rate of this run over the time it took.
    """

    system: str
    ratio: Spread
    error: float | None
    seconds: Spread | None
    of_floor: float | None


@dataclass(frozen=True)
class SwapResult:
    """All systems, on one model.

    Attributes:
        kind: `sd15` or `sdxl`.
        dtype: of the weights.
        rank: of the adapters.
        weights: how many are changed.
        floor_bytes: every weight read and written once, and the adapter read once.
        copy_rate: bytes a second read and written by a large copy in this run.
        rows: ours first.
    """

    kind: str
    dtype: str
    rank: int
    weights: int
    floor_bytes: int
    copy_rate: float
    rows: list[SwapRow]


class _System:
    """A UNet and a way of swapping its adapter."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def weight(self, path: str) -> Tensor:
        """The weight that is computed with."""
        return _weight(self.unet, path)

    def swap(self, index: int) -> None:
        """Put adapter `index` in place of the other."""
        raise NotImplementedError


class _Heatsink(_System):
    def __init__(self, unet: nn.Module, adapters: Adapters) -> None:
        super().__init__(unet)
        live = {f"unet.{path}.weight": weight for path, weight in targets(unet)}
        self.merger = Merger(live, keep="device")
        self._adapters = [_pinned(deltas, unet) for deltas in adapters]

    def swap(self, index: int) -> None:
        self.merger.apply([(self._adapters[index], 1.0)])


class _Prepared(_System):
    """The same merger, on the same weights; the adapters' values are on the device before."""

    def __init__(self, ours: _Heatsink, adapters: Adapters) -> None:
        super().__init__(ours.unet)
        self._merger = ours.merger
        self._adapters = [ours.merger.prepare(deltas) for deltas in adapters]

    def swap(self, index: int) -> None:
        self._merger.apply([(self._adapters[index], 1.0)])


def _pinned(deltas: list[AdapterDelta], unet: nn.Module) -> list[AdapterDelta]:
    if next(unet.parameters()).device.type != "cuda":
        return deltas
    return [replace(d, a=d.a.pin_memory(), b=d.b.pin_memory()) for d in deltas]


class _Fuse(_System):
    """Both adapters loaded; the one that is fused is unfused before the other is fused."""

    def __init__(self, unet: Any, adapters: Adapters) -> None:
        super().__init__(unet)
        for name, deltas in zip(NAMES, adapters, strict=True):
            _load(unet, deltas, name)
        self._fused = False

    def swap(self, index: int) -> None:
        unet: Any = self.unet
        if self._fused:
            unet.unfuse_lora()
        unet.set_adapters([NAMES[index]], [1.0])
        unet.fuse_lora(adapter_names=[NAMES[index]])
        self._fused = True


class _LoadFuse(_System):
    """One adapter loaded: it is unfused and deleted, the other loaded and fused."""

    def __init__(self, unet: Any, adapters: Adapters) -> None:
        super().__init__(unet)
        self._adapters = adapters
        self._fused: int | None = None

    def swap(self, index: int) -> None:
        unet: Any = self.unet
        if self._fused is not None:
            unet.unfuse_lora()
            unet.delete_adapters([NAMES[self._fused]])
        _load(unet, self._adapters[index], NAMES[index])
        unet.set_adapters([NAMES[index]], [1.0])
        unet.fuse_lora(adapter_names=[NAMES[index]])
        self._fused = index


class _SetAdapter(_System):
    def __init__(self, unet: Any, adapters: Adapters) -> None:
        super().__init__(unet)
        for name, deltas in zip(NAMES, adapters, strict=True):
            _load(unet, deltas, name)

    def swap(self, index: int) -> None:
        unet: Any = self.unet
        unet.set_adapters([NAMES[index]], [1.0])


class _HotSwap(_System):
    def __init__(self, unet: Any, adapters: Adapters) -> None:
        super().__init__(unet)
        self._adapters = adapters
        _load(unet, adapters[0], NAMES[0])

    def swap(self, index: int) -> None:
        _load(self.unet, self._adapters[index], NAMES[0], hotswap=True)


def _load(unet: Any, deltas: list[AdapterDelta], name: str, hotswap: bool = False) -> None:
    unet.load_lora_adapter(peft_state(deltas), prefix=None, adapter_name=name, hotswap=hotswap)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


OTHERS: dict[str, Callable[[_Heatsink, Callable[[], nn.Module], Adapters], _System]] = {
    "heatsink merge, prepared on the device": lambda ours, _, a: _Prepared(ours, a),
    "diffusers unfuse_lora + fuse_lora, both loaded": lambda _, fresh, a: _Fuse(fresh(), a),
    "diffusers unfuse_lora + load + fuse_lora": lambda _, fresh, a: _LoadFuse(fresh(), a),
    "PEFT set_adapter (not merged)": lambda _, fresh, a: _SetAdapter(fresh(), a),
    "PEFT hot swap (not merged)": lambda _, fresh, a: _HotSwap(fresh(), a),
}


def measure(
    kind: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 16,
    rounds: int = 5,
    config: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> SwapResult:
    """Compare each system's weights with float64, then time its swaps in turn with ours.

    Args:
        kind: `sd15` or `sdxl`.
        dtype: of the weights; adapters are fp16, as files are.
        device: where the weights are.
        rank: of the adapters.
        rounds: timed swaps of each.
        config: another configuration than the kind's, for tests.
        progress: called with (what, done, total).

    Raises:
        HeatsinkError: a system's weights are further from float64 than its roundings explain.
    """
    report = progress or (lambda what, done, total: None)
    unet = random_unet(config or unet_config(kind), dtype, device)
    pristine = copy.deepcopy(unet)
    adapters = [random_adapter(unet, rank, seed) for seed in (3, 4)]
    changed = [weight.detach() for _, weight in targets(unet)]
    floor = sum(2 * w.nbytes for w in changed) + sum(d.a.nbytes + d.b.nbytes for d in adapters[0])
    rate = copy_rate(device)
    ours = _Heatsink(unet, adapters)
    first = check(OURS, ours, pristine, adapters)
    samples: list[float] = []
    rows = []
    with _quiet():
        for place, (name, make) in enumerate(OTHERS.items()):
            # Only one besides ours is in memory at a time.
            other = make(ours, lambda: copy.deepcopy(pristine), adapters)
            error = check(name, other, pristine, adapters)
            pairs = []
            for turn in range(rounds):
                pairs.append((_timed(ours, turn % 2, device), _timed(other, turn % 2, device)))
                report(f"swaps of {kind}", place * rounds + turn + 1, len(OTHERS) * rounds)
            del other
            gc.collect()
            samples += [mine for mine, _ in pairs]
            ratio = Spread.of([theirs / mine for mine, theirs in pairs])
            rows.append(_row(name, ratio, error, [t for _, t in pairs], floor / rate, device))
    own = _row(OURS, Spread(1.0, 1.0, 1.0), first, samples, floor / rate, device)
    name = str(dtype).removeprefix("torch.")
    return SwapResult(kind, name, rank, len(changed), floor, rate, [own, *rows])


def _timed(system: _System, index: int, device: torch.device) -> float:
    """Until the device is done: what a request after the swap has to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    system.swap(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _row(
    name: str,
    ratio: Spread,
    error: float | None,
    seconds: list[float],
    least: float,
    device: torch.device,
) -> SwapRow:
    spread = Spread.of(seconds)
    shown = spread if device.type == "cuda" else None
    return SwapRow(name, ratio, error, shown, None if error is None else least / spread.median)


def check(name: str, system: _System, pristine: nn.Module, adapters: Adapters) -> float | None:
    """Swap twice; the largest error of some weights in units of the last place.

    Returns:
        None for what is not merged.

    Raises:
        HeatsinkError: it is larger than the system's roundings explain.
    """
    for index in (0, 1):
        system.swap(index)
    allowed = next((n for word, n in _ROUNDINGS.items() if name.startswith(word)), None)
    if allowed is None:
        return None
    allowed += _SLACK if next(pristine.parameters()).dtype == torch.float32 else 0.0
    worst = 0.0
    for delta in adapters[1][:: max(1, len(adapters[1]) // _CHECKED)]:
        base = _weight(pristine, delta.module_path).cpu().double()
        b, a = delta.b.double(), delta.a.double().flatten(1)
        exact, size = base + (b @ a).reshape(base.shape), (b.abs() @ a.abs()).reshape(base.shape)
        found = system.weight(delta.module_path).cpu()
        worst = max(worst, _units(found, exact, torch.maximum(base.abs(), size)))
    if worst > allowed:
        raise HeatsinkError(f"{name}: a merged weight is {worst:.2f} units in the last place off")
    return worst


def _weight(unet: nn.Module, path: str) -> Tensor:
    module: Any = unet.get_submodule(path)
    weight: Tensor = getattr(module, "base_layer", module).weight.detach()
    return weight


def _units(found: Tensor, exact: Tensor, parts: Tensor) -> float:
    """The error in units of the last place of the sum, or of the largest part of it."""
    size = torch.maximum(exact.abs(), parts).clamp_min(torch.finfo(found.dtype).tiny)
    # The result's exponent: a value is in [2^e, 2^(e+1)).
    unit = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(found.dtype).eps
    return float(((found.double() - exact).abs() / unit).max())
