"""One module's tensors of a file, brought into the normal form `AdapterDelta`, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heatsink.runtime.adapter_config import check_config, scale_of
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_keys import Unknown
from heatsink.runtime.weights import Entry

Shape = tuple[int, ...]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MATRICES = {"down": "lora_A", "up": "lora_B"}


def read_module(
    component: str,
    module: str,
    tensors: Mapping[str, Entry],
    shape: Shape | None,
    config: Mapping[str, Any] | None,
) -> AdapterDelta:
    """The delta of one module.

    Args:
        component: its component's name.
        module: its path.
        tensors: by role (`adapter_keys.Key.role`).
        shape: of the weight it changes; None where no model is there to tell.
        config: PEFT's configuration of the component, if the file has one.

    Raises:
        Unknown: with the reason.
    """
    if config is not None:
        check_config(config)
    _check_form(tensors)
    values = {role: entry.read() for role, entry in tensors.items()}
    down = values["down"]
    if "mid" in values:
        down = _contract(down, values["mid"])
    a, b = _as_matrices(down, values["up"], shape)
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        raise Unknown(f"rank mismatch: down has rank {a.shape[0]}, up has rank {b.shape[1]}")
    _check_finite(values)
    rank = int(a.shape[0])
    weight = (int(b.shape[0]), *a.shape[1:])
    magnitude = _magnitude(tensors, values, weight, config)
    scale = _scale(values.get("alpha"), config, module, rank)
    return AdapterDelta(component, module, a, b, scale, magnitude)


def _check_form(tensors: Mapping[str, Entry]) -> None:
    for role, name in _MATRICES.items():
        if role not in tensors:
            raise Unknown(f"incomplete: no {role} matrix ({name})")
        if len(tensors[role].shape) not in (2, 4):
            raise Unknown(f"wrong shape: the {role} matrix is {tensors[role].shape}")
    for role, entry in tensors.items():
        if role != "alpha" and entry.dtype not in _DTYPES:
            raise Unknown(f"unsupported: the {role} tensor is {entry.dtype}")


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for role in ("down", "up", "mid", "magnitude", "dora_scale"):
        if role in values and not bool(torch.isfinite(values[role]).all()):
            what = "matrix" if role in _MATRICES else "tensor"
            raise Unknown(f"non-finite: the {role} {what} holds NaN or infinity")


def _contract(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's `A[q] = sum_p mid[q, p] down[p]` as `(r, in, kh, kw)`: float64 inside, then float32.

    Products and sums are rounded one by one in the order of p, so that the bits, and the adapter's
    digest with them, are the same on every machine.
    """
    rank = down.shape[0]
    if down.dim() == 4 and down.shape[2:] != (1, 1):
        raise Unknown(f"wrong shape: down is {tuple(down.shape)} where lora_mid has the kernel")
    if mid.dim() != 4:
        raise Unknown(f"wrong shape: the mid tensor is {tuple(mid.shape)}")
    if mid.shape[:2] != (rank, rank):
        raise Unknown(f"rank mismatch: down has rank {rank}, lora_mid is {tuple(mid.shape)}")
    inputs, wide = down.flatten(1).double(), mid.double()
    total = wide.new_zeros(rank, inputs.shape[1], *mid.shape[2:])
    for p in range(rank):
        total += wide[:, p, None] * inputs[p, :, None, None]
    return total.float()


def _as_matrices(a: Tensor, b: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """`a` as `(r, *shape[1:])`, `b` as `(out, r)`; 1x1 convolutions and linears are the same."""
    if b.dim() == 4:
        if b.shape[2:] != (1, 1):
            raise Unknown(f"wrong shape: the up matrix is a {tuple(b.shape[2:])} convolution")
        b = b.flatten(1)
    if shape is None:
        return a, b
    pointwise = shape[2:] in ((), (1, 1)) and a.shape[2:] in ((), (1, 1))
    if pointwise and a.shape[1] == shape[1]:
        a = a.reshape(a.shape[0], *shape[1:])
    if tuple(a.shape[1:]) != shape[1:] or b.shape[0] != shape[0]:
        raise Unknown(
            f"wrong shape: down {tuple(a.shape)} and up {tuple(b.shape)} for a weight {shape}"
        )
    return a, b


def _scale(value: Tensor | None, config: Mapping[str, Any] | None, module: str, rank: int) -> float:
    if value is None:
        return 1.0 if config is None else scale_of(config, module, rank)
    alpha = value.double().reshape(-1).tolist()
    if len(alpha) != 1 or not math.isfinite(alpha[0]):
        raise Unknown(f"non-finite: alpha is {alpha}, expected one finite number")
    if config is not None:
        raise Unknown("contradiction: alpha is given twice, as a key and in the metadata")
    return float(alpha[0]) / rank


def _magnitude(
    tensors: Mapping[str, Entry],
    values: Mapping[str, Tensor],
    weight: Shape,
    config: Mapping[str, Any] | None,
) -> Tensor | None:
    """DoRA's magnitude as `(out,)`; None for a plain LoRA."""
    found = [role for role in ("magnitude", "dora_scale") if role in tensors]
    if len(found) == 2:
        raise Unknown("contradiction: both lora_magnitude_vector and dora_scale are given")
    if config is not None and bool(config.get("use_dora")) != bool(found):
        if found:
            raise Unknown("contradiction: a magnitude is given, but the configuration has no DoRA")
        raise Unknown("incomplete: the configuration asks for DoRA, and there is no magnitude")
    if not found:
        return None
    _check_magnitude(found[0], tensors[found[0]].shape, weight)
    return values[found[0]].reshape(-1)


def _check_magnitude(role: str, shape: Shape, weight: Shape) -> None:
    """Refuse a magnitude that isn't one number for each output.

    A `dora_scale` is `(out, 1)` or `(out, 1, 1, 1)`; over the inputs it is `(1, in)` or
    `(1, in, 1, 1)`. PEFT's vector is `(out,)`, of a convolution `(1, out, 1, 1)`, and diffusers
    calls that one `dora_scale` when it writes kohya's names: of a square convolution it could mean
    either, and is refused.
    """
    outputs, inputs = weight[:2]
    if shape in ((outputs,), (outputs, 1), (outputs, 1, 1, 1)):
        return
    by_inputs = shape in ((1, inputs), (1, inputs, 1, 1))
    if shape == (1, outputs, 1, 1) and not (by_inputs and role == "dora_scale"):
        return
    if by_inputs and shape == (1, outputs, 1, 1):
        raise Unknown(
            f"unsupported: a dora_scale {shape} of a square convolution is over the inputs"
            " (LyCORIS) or over the outputs (PEFT); nothing tells which"
        )
    if by_inputs:
        raise Unknown(f"unsupported: the magnitude {shape} is over the inputs, not the outputs")
    raise Unknown(f"wrong shape: the magnitude is {shape} for {outputs} outputs")
