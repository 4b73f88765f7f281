"""What adapters cost in a batch whose rows have different ones, and in a bank that grows.

A UNet step of some rows: the base alone; with `heatsink.kernels.lora_rows` on every linear and
convolution, 1 to 8 different adapters among the rows; and PEFT's mixed batch (`adapter_names`) of
the same adapters. All in turn, as multiples of the base in the same round. Before that both are
compared row by row with the step of a UNet whose weights have the row's adapter merged.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.benchmarks.lora_models import (
    peft_state,
    random_adapter,
    random_unet,
    targets,
    unet_inputs,
)
from heatsink.kernels.lora_rows import lora_rows
from heatsink.kernels.timing import Spread
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.merge import Merger

Progress = Callable[[str, int, int], None]
ROWS = 8
COUNTS = (1, 2, 4, 8)
BASE = "base UNet, no adapters"
# Of the output's norm: what the networks' own rounding makes of another order of sums.
_ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class BatchRow:
    """One system with one number of adapters.

    Attributes:
        system: its name.
        adapters: different ones in the batch, or in the bank.
        rank: of each.
        ratio: its step's time as a multiple of the base's in the same round.
        error: largest relative error of a row in the 2-norm against merged weights; None where
            none was compared.
        seconds: of a step; None on a CPU.
    """

    system: str
    adapters: int
    rank: int
    ratio: Spread
    error: float | None
    seconds: Spread | None


class Bank:
    """Adapters in slots, added to the outputs of a UNet's layers by `lora_rows`.

    Args:
        unet: its linears and convolutions get hooks; `close` takes them away.
        adapters: of one rank, each for all layers; slot s holds the s-th.
    """

    def __init__(self, unet: nn.Module, adapters: Sequence[list[AdapterDelta]]) -> None:
        first = next(unet.parameters())
        count = len(adapters)
        self.choice: tuple[Tensor, Tensor] | None = None
        self.nbytes = 0
        self._handles = []
        for parts in zip(*adapters, strict=True):
            layer: Any = unet.get_submodule(parts[0].module_path)
            shapes = (count, *parts[0].a.shape), (count, *parts[0].b.T.shape)
            a, b = (torch.empty(s, dtype=first.dtype, device=first.device) for s in shapes)
            for slot, delta in enumerate(parts):
                a[slot].copy_(delta.a)
                b[slot].copy_(delta.b.T)
            self.nbytes += a.nbytes + b.nbytes
            self._handles.append(layer.register_forward_hook(self._hook(layer, a, b)))
        ranks = [deltas[0].rank for deltas in adapters]
        self._ranks = torch.tensor(ranks, dtype=torch.int32, device=first.device)
        self._device = first.device

    def choose(self, slots: Sequence[int]) -> None:
        """Each row's slot, -1 for none."""
        rows = torch.tensor(slots, device=self._device)[:, None]
        self.choice = rows, torch.ones(len(slots), 1, device=self._device)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: Any, a: Tensor, b: Tensor) -> Callable[..., None]:
        geometry: dict[str, Any] = (
            {"stride": layer.stride[0], "padding": layer.padding[0]}
            if isinstance(layer, nn.Conv2d)
            else {}
        )

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.choice is not None:
                slots, scales = self.choice
                lora_rows(output, args[0], a, b, slots, scales, ranks=self._ranks, **geometry)

        return add


def measure_mixed(
    config: dict[str, Any],
    *,
    rank: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    progress: Progress | None = None,
) -> list[BatchRow]:
    """A batch of 8 rows with 1, 2, 4 and 8 different adapters, by `lora_rows` and by PEFT.

    Args:
        config: the UNet's.
        rank: of the adapters.
        side: of the latents.
        dtype: of the weights.
        device: where.
        rounds: timed steps of each.
        progress: called with (what, done, total).

    Raises:
        HeatsinkError: a row is not what merged weights give.
    """
    report = progress or (lambda what, done, total: None)
    unet = random_unet(config, dtype, device)
    inputs = unet_inputs(config, ROWS, side, dtype, device)
    adapters = [random_adapter(unet, rank, seed) for seed in range(10, 10 + max(COUNTS))]
    wanted = _merged_rows(unet, inputs, adapters)
    bank, mixed = Bank(unet, adapters), _peft(config, adapters, dtype, device)
    steps: dict[tuple[str, int], Callable[[], Tensor]] = {(BASE, 0): lambda: _step(unet, inputs)}
    for count in COUNTS:
        steps["heatsink lora_rows", count] = _ours(unet, bank, inputs, count)
    for count in COUNTS:
        steps["PEFT mixed batch", count] = _theirs(mixed, inputs, count)
    errors = {key: _error(key, step(), wanted) for key, step in steps.items() if key[1]}
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for turn in range(rounds + 1):
        for key, step in steps.items():
            samples[key].append(_timed(step, device))
        report(f"batches of rank {rank}", turn + 1, rounds + 1)
    bank.close()
    base = samples[BASE, 0]
    return [
        _row(key[0], key[1], rank, own, base, errors.get(key), device)
        for key, own in samples.items()
    ]


def measure_growth(
    config: dict[str, Any],
    *,
    slots: Sequence[int],
    rank: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    progress: Progress | None = None,
) -> list[BatchRow]:
    """A batch of 8 rows whose adapters are spread over a bank of so many, and the bank's bytes.

    Arguments are as in `measure_mixed`.
    """
    report = progress or (lambda what, done, total: None)
    unet = random_unet(config, dtype, device)
    inputs = unet_inputs(config, ROWS, side, dtype, device)
    adapters = [random_adapter(unet, rank, seed) for seed in range(10, 10 + ROWS)]
    rows = []
    for place, count in enumerate(slots):
        bank = Bank(unet, [adapters[slot % ROWS] for slot in range(count)])
        step = _ours(unet, bank, inputs, count)
        pairs = [
            (_timed(lambda: _step(unet, inputs), device), _timed(step, device))
            for _ in range(rounds + 1)
        ]
        name = f"heatsink lora_rows, bank of {bank.nbytes / 1e6:.0f} MB"
        base, own = ([pair[side] for pair in pairs] for side in (0, 1))
        rows.append(_row(name, count, rank, own, base, None, device))
        bank.close()
        del bank, step
        gc.collect()
        report("growth of the bank", place + 1, len(slots))
    return rows


def _ours(unet: nn.Module, bank: Bank, inputs: dict[str, Any], count: int) -> Callable[[], Tensor]:
    """A step with `count` adapters of the bank, as far from each other as they can be."""

    def step() -> Tensor:
        bank.choose(_spread(count))
        try:
            return _step(unet, inputs)
        finally:
            bank.choice = None

    return step


def _spread(count: int) -> list[int]:
    """Every row's adapter: all of up to 8, else 8 spread over them."""
    return [row % count if count <= ROWS else row * count // ROWS for row in range(ROWS)]


def _theirs(mixed: Any, inputs: dict[str, Any], count: int) -> Callable[[], Tensor]:
    names = [f"adapter{slot}" for slot in _spread(count)]
    return lambda: _step(mixed, {**inputs, "adapter_names": names})


def _peft(
    config: dict[str, Any],
    adapters: list[list[AdapterDelta]],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The same UNet as PEFT's model with all adapters loaded."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    unet: Any = random_unet(config, dtype, device)
    rank = adapters[0][0].rank
    paths = [delta.module_path for delta in adapters[0]]
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixed = get_peft_model(unet, lora, adapter_name="adapter0")
        for index in range(1, len(adapters)):
            mixed.add_adapter(f"adapter{index}", lora)
        for index, deltas in enumerate(adapters):
            state = {f"base_model.model.{key}": v for key, v in peft_state(deltas).items()}
            set_peft_model_state_dict(mixed, state, adapter_name=f"adapter{index}")
    # PEFT makes its matrices in float32 by default; its best here is the weights' own dtype.
    return mixed.to(device, dtype).eval()


def _step(unet: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = unet(**inputs)[0]
    return out


def _timed(step: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _merged_rows(
    unet: nn.Module, inputs: dict[str, Any], adapters: list[list[AdapterDelta]]
) -> dict[int, Tensor]:
    """What the whole batch gives with one adapter merged: the first, and the last."""
    live = {f"unet.{path}.weight": weight for path, weight in targets(unet)}
    merger = Merger(live, keep="device")
    found = {}
    for index in (0, len(adapters) - 1):
        merger.apply([(adapters[index], 1.0)])
        found[index] = _step(unet, inputs)
    merger.release()
    return found


def _error(key: tuple[str, int], out: Tensor, wanted: dict[int, Tensor]) -> float:
    """The largest relative error in the 2-norm of rows whose adapter was merged."""
    worst = 0.0
    for row, slot in enumerate(_spread(key[1])):
        if slot in wanted:
            exact = wanted[slot][row].double()
            worst = max(worst, float((out[row].double() - exact).norm() / exact.norm()))
    if not worst <= _ALLOWED[out.dtype]:
        raise HeatsinkError(f"{key[0]}: a row is {worst:.1e} away from merged weights")
    return worst


def _row(
    name: str,
    adapters: int,
    rank: int,
    own: list[float],
    base: list[float],
    error: float | None,
    device: torch.device,
) -> BatchRow:
    # The first of each warms up.
    ratio = Spread.of([a / b for a, b in zip(own[1:], base[1:], strict=True)])
    seconds = Spread.of(own[1:]) if device.type == "cuda" else None
    return BatchRow(name, adapters, rank, ratio, error, seconds)
