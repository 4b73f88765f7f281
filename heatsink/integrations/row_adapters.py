"""Adapters by prompt in one batch of a pipeline: hooks that add each row's own to what it computes.

`y[r] += sum_n scale[r, n] B[slot[r, n]] (A[slot[r, n]] x[r])` after every linear and convolution
that an adapter in use changes (`heatsink.kernels.lora_rows`), in place. Rows without adapters keep
their bits, and no weight is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.prompt_rows import PromptRows
from heatsink.integrations.replacement import Replacement
from heatsink.kernels.lora_rows import lora_rows
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import AdapterError, InvalidRequest

Rows = Sequence[Sequence[tuple[str, float]]]
"""The adapters of every prompt, with their weights."""
_ROWS_ARGUMENT = {"unet": "sample", "controlnet": "sample"}


@dataclass(frozen=True, eq=False)
class Port:
    """What the adapters in use do to one layer.

    Attributes:
        a: `(S, rank, in)` or `(S, rank, in, kh, kw)`, padded with zeros to the largest rank.
        b: `(S, rank, out)`.
        ranks: `(S,)`, the true ones.
        scales: of each slot's adapter, by name, in the order of the slots.
        geometry: stride, padding and dilation of a convolution.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: tuple[tuple[str, float], ...]
    geometry: Mapping[str, int]


class RowAdapters:
    """Adapters by prompt on a pipeline, from `start` to `stop`.

    Args:
        pipe: the pipeline.
        modules: its networks by component.
        adapters: the deltas of each adapter, by name.
        rows: by prompt, the adapters' names and weights.

    Raises:
        AdapterError: an adapter needs a merge, a layer can't have adapters by row, or the
            pipeline's rows are unknown.
    """

    def __init__(
        self,
        pipe: Any,
        modules: Mapping[str, nn.Module],
        adapters: Mapping[str, Sequence[AdapterDelta]],
        rows: Rows,
    ) -> None:
        used = {name: adapters[name] for row in rows for name, _ in row}
        components = {delta.component for deltas in used.values() for delta in deltas}
        encoded = any(component.startswith("text_encoder") for component in components)
        self._prompts = PromptRows(pipe, len(rows), encoded)
        self._rows = rows
        self._modules = modules
        self._now: dict[str, tuple[int, ...] | None] = dict.fromkeys(modules)
        self._choices: dict[Any, tuple[Tensor, Tensor] | None] = {}
        self._handles: list[Any] = []
        self._gone: Any = None
        for name, deltas in used.items():
            if any(delta.magnitude is not None for delta in deltas):
                raise AdapterError(
                    f"{name} is a DoRA: it rescales whole rows of the weight, which no addition to"
                    " a layer's output can do; merge it for all prompts"
                )
        _refuse_compiled(pipe, modules)
        self._ports = {
            component: _ports(component, module, used) for component, module in modules.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters beside the weights."""
        ports = (port for ports in self._ports.values() for port in ports.values())
        return sum(port.a.nbytes + port.b.nbytes + port.ranks.nbytes for port in ports)

    def start(self) -> None:
        """Put the hooks in place, all or none."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self._prompts.start()
        # With the pipeline its rows are gone: hooks on networks that others have go too.
        self._gone = weakref.finalize(self._prompts.pipe, _remove, self._handles)
        for component, module in self._modules.items():
            keep = self._handles.append
            keep(module.register_forward_pre_hook(self._enter(component), with_kwargs=True))
            keep(module.register_forward_hook(self._leave(component), always_call=True))
            for path, port in self._ports[component].items():
                hook = self._add(component, path, port)
                keep(module.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Take all hooks away."""
        _remove(self._handles)
        if self._gone is not None:
            self._gone.detach()
        self._prompts.stop()

    def _enter(self, component: str) -> Callable[..., None]:
        argument = _ROWS_ARGUMENT.get(component, "input_ids")

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else kwargs[argument]
            self._now[component] = self._prompts.of(component, int(first.shape[0]))

        return enter

    def _leave(self, component: str) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            self._now[component] = None

        return leave

    def _add(self, component: str, path: str, port: Port) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            prompts = self._now[component]
            if prompts is None or x.shape[0] != len(prompts):
                raise InvalidRequest(
                    f"{component}.{path} computes {x.shape[0]} rows where {component} has"
                    f" {len(prompts or ())}: with adapters by prompt a network runs whole, and"
                    " without forward chunking of its rows"
                )
            choice = self._choice(port, prompts)
            if choice is not None:
                slots, scales = choice
                lora_rows(
                    output, x, port.a, port.b, slots, scales, ranks=port.ranks, **port.geometry
                )

        return add

    def _choice(self, port: Port, prompts: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Slots and scales `(rows, n)`; None where no row has an adapter that changes the layer."""
        key = port.scales, prompts, port.a.device
        if key not in self._choices:
            self._choices[key] = self._chosen(port, prompts)
        return self._choices[key]

    def _chosen(self, port: Port, prompts: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        slot = {name: index for index, (name, _) in enumerate(port.scales)}
        own = [
            [(slot[n], weight * port.scales[slot[n]][1]) for n, weight in row if n in slot]
            for row in self._rows
        ]
        width = max(len(row) for row in own)
        if not width:
            return None
        padded = [row + [(-1, 0.0)] * (width - len(row)) for row in own]
        slots = torch.tensor([[s for s, _ in padded[p]] for p in prompts], dtype=torch.int64)
        scales = torch.tensor([[w for _, w in padded[p]] for p in prompts], dtype=torch.float32)
        return slots.to(port.a.device), scales.to(port.a.device)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _refuse_compiled(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    for component, module in modules.items():
        if isinstance(getattr(pipe, component), Replacement):
            raise AdapterError(
                f"the {component} is optimised, and its program has no place for adapters by"
                " prompt: merge one choice for all prompts, or heatsink.restore(pipe) first"
            )
        compiled = any(
            getattr(part, "_compiled_call_impl", None) is not None for part in module.modules()
        )
        if compiled or getattr(getattr(pipe, component), "_orig_mod", None) is module:
            raise AdapterError(
                f"the {component} is compiled, and hooks that come later are passed over: merge"
                " one choice for all prompts, or use the pipeline as it was"
            )


def _ports(
    component: str, module: nn.Module, adapters: Mapping[str, Sequence[AdapterDelta]]
) -> dict[str, Port]:
    by_path: dict[str, dict[str, AdapterDelta]] = {}
    for name, deltas in adapters.items():
        for delta in deltas:
            if delta.component != component:
                continue
            own = by_path.setdefault(delta.module_path, {})
            if name in own:
                raise AdapterError(f"{name} changes {component}.{delta.module_path} twice")
            own[name] = delta
    return {
        path: _port(f"{component}.{path}", module.get_submodule(path), own)
        for path, own in by_path.items()
    }


def _port(path: str, layer: nn.Module, own: Mapping[str, AdapterDelta]) -> Port:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight, rank = layer.weight, max(delta.rank for delta in own.values())
    a = torch.zeros(len(own), rank, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
    b = torch.zeros(len(own), rank, weight.shape[0], dtype=weight.dtype, device=weight.device)
    for slot, delta in enumerate(own.values()):
        a[slot, : delta.rank] = delta.a.to(weight.device).reshape(-1, *weight.shape[1:])
        b[slot, : delta.rank] = delta.b.to(weight.device).T
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{path}: an adapter holds values that {weight.dtype} can't")
    ranks = torch.tensor([delta.rank for delta in own.values()], dtype=torch.int32)
    scales = tuple((name, delta.scale) for name, delta in own.items())
    return Port(a, b, ranks.to(weight.device), scales, _geometry(path, layer))


def _geometry(path: str, layer: nn.Linear | nn.Conv2d) -> dict[str, int]:
    if isinstance(layer, nn.Linear):
        return {}
    found = {}
    for name in ("stride", "padding", "dilation"):
        value = getattr(layer, name)
        if isinstance(value, str) or len(set(value)) != 1:
            raise AdapterError(f"{path} has the {name} {value}, which differs by axis")
        found[name] = int(value[0])
    return found
