"""Modules that stand in a pipeline for the library's own and run them as captured programs."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec
from heatsink.runtime.graph.passes.pipeline import PASSES_ONNX
from heatsink.runtime.native.component import NativeComponent, Workspace

MAX_GRAPHS = 8
"""Captured graphs that a module keeps, one for each set of shapes; the oldest in use goes."""

# Times, sizes and tokens keep their dtype whatever the network computes in.
_EXACT = {"input_ids": torch.int64, "timestep": torch.float32, "time_ids": torch.float32}
# How a pipeline reads them is no question of the network's: the original answers.
_ANSWERED = frozenset(
    {
        "config",
        "dtype",
        "device",
        "name_or_path",
        "_internal_dict",
        "save_pretrained",
        "num_parameters",
    }
)


class Live(Mapping[str, Tensor]):
    """A module's parameters and buffers by name, each looked up when it is asked for.

    They may be moved or cast after a graph was captured.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], get: Callable[[str], Tensor]):
        self._module, self._names, self._get = module, dict.fromkeys(names), get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Spaces:
    """The workspaces of a pipeline's modules, one a device."""

    def __init__(self) -> None:
        self._held: dict[torch.device, Workspace] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Workspace:
        """The workspace of a device."""
        with self._lock:
            return self._held.setdefault(device, Workspace(device))


class Replacement(nn.Module):
    """Stands in a pipeline for `original`, whose weights it uses where they lie.

    Every set of input shapes is captured when it is first met, and each batch size becomes a
    program. `.to(...)` reaches the original, and what was built on its old weights is dropped. What
    the captured network can't do is refused; nothing falls back to the original but what a
    subclass says.

    Attributes:
        original: the very module that `heatsink.restore` puts back.
    """

    kept: frozenset[str] = frozenset()
    # Whatever class of a library it is of.
    original: Any

    def __init__(
        self, original: nn.Module, component: str, spaces: Spaces, precision: torch.dtype | None
    ) -> None:
        super().__init__()
        self.training = False
        self.original = original
        # By this and the class, pipelines write down which library a module is of.
        self.__module__ = type(original).__module__
        self._component, self._spaces, self._precision = component, spaces, precision
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._components: dict[Any, NativeComponent] = {}
        self._guard = threading.RLock()

    # Pipelines ask `isinstance(controlnet, ControlNetModel)`, and save by the class they find.
    @property  # type: ignore[misc]  # as `unittest.mock` does with a spec
    def __class__(self) -> type:
        original = self.__dict__.get("_modules", {}).get("original")
        return type(self) if original is None else type(original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_modules", {}).get("original")
        if original is not None and (name in _ANSWERED or name in self.kept):
            return getattr(original, name)
        if original is not None and hasattr(original, name):
            raise AttributeError(
                f"{self._component}: {type(original).__name__}.{name} is not available while "
                "Heatsink runs it; heatsink.restore(pipe) puts the original back"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, with the original's names."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original; what was built on its weights is dropped."""
        found = self.original.load_state_dict(*args, **kwargs)
        self._drop()
        return found

    def train(self, mode: bool = True) -> Replacement:
        """Do nothing: the captured network is for inference, and the original is left alone."""
        if mode:
            raise InvalidRequest(f"{self._component}: runs inference only; heatsink.restore(pipe)")
        return self

    def graphs(self) -> list[Graph]:
        """The graphs captured until now, the last used at the end."""
        with self._guard:
            return list(self._graphs.values())

    def _apply(self, fn: Any, recurse: bool = True) -> Replacement:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._drop()
        return self

    def _drop(self) -> None:
        with self._guard:
            self._components.clear()

    def _refuse(self, **given: Any) -> None:
        """Raise InvalidRequest for the first argument that is not None."""
        for name, value in given.items():
            if value is not None:
                raise InvalidRequest(
                    f"{self._component}: argument {name!r} is not supported by the captured "
                    f"network, got {type(value).__name__}; heatsink.restore(pipe) puts the "
                    "original back"
                )

    def _compute(
        self,
        kind: str,
        wrapper: Callable[[nn.Module], nn.Module],
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        """Run the network that `wrapper` makes of the original, captured once for these shapes.

        Args:
            kind: the graph's name; one for each wrapper.
            wrapper: makes of a copy on meta a module that takes the inputs in order and returns a
                tuple.
            inputs: by name; the first dimension of each is the row.
            outputs: names of what is returned.
        """
        self._check(inputs)
        own: torch.dtype = self.original.dtype
        dtype = self._precision or own
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in inputs.items())
        key = (kind, dtype, shapes)
        with self._guard:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(kind, wrapper, dict(shapes), outputs, dtype)
                self._graphs[key] = graph
            self._graphs.move_to_end(key)
            while len(self._graphs) > MAX_GRAPHS:
                self._components.pop(self._graphs.popitem(last=False)[0], None)
            component = self._components.get(key)
            if component is None:
                device = torch.device(self.original.device)
                component = NativeComponent(
                    graph, device=device, passes=PASSES_ONNX, workspace=self._spaces.on(device)
                )
                self._components[key] = component
        found = component.run(inputs)
        return {name: value.to(own) for name, value in found.items()}

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        own, device = self.original.dtype, torch.device(self.original.device)
        if torch.is_autocast_enabled(device.type):
            raise InvalidRequest(
                f"{self._component}: autocast does not reach a captured network; "
                "heatsink.optimize(pipe, precision=...) chooses what it computes in"
            )
        for name, value in inputs.items():
            want = _EXACT.get(name, own)
            if value.dtype != want and (name not in _EXACT or name == "input_ids"):
                raise InvalidRequest(
                    f"{self._component}: input {name!r} wants {want}, got {value.dtype}"
                )
            if value.device != device:
                raise InvalidRequest(
                    f"{self._component}: input {name!r} should be on {device}, is on {value.device}"
                )
            if torch.is_grad_enabled() and value.requires_grad:
                raise InvalidRequest(
                    f"{self._component}: input {name!r} requires a gradient; inference only"
                )

    def _capture(
        self,
        kind: str,
        wrapper: Callable[[nn.Module], nn.Module],
        shapes: Mapping[str, tuple[int, ...]],
        outputs: Sequence[str],
        dtype: torch.dtype,
    ) -> Graph:
        original = self.original
        parameters = [name for name, _ in original.named_parameters(remove_duplicate=False)]
        buffers = [name for name, _ in original.named_buffers(remove_duplicate=False)]
        specs = {
            name: TensorSpec((BATCH, *shape), _EXACT.get(name, dtype))
            for name, shape in shapes.items()
        }
        return capture_module(
            kind,
            wrapper(on_meta(original, dtype)),
            Live(original, parameters, original.get_parameter),
            Live(original, buffers, original.get_buffer),
            specs,
            outputs,
            dtype=dtype,
        )


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on meta that computes in `dtype`; no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    made: nn.Module = copy.deepcopy(module, memo)
    # `nn.Module`'s own: the libraries' ask whether the module was loaded in another precision.
    return nn.Module.to(made, dtype=dtype)
