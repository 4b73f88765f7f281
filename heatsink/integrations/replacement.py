"""Modules that stand in a pipeline for the library's own and run them as captured programs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.integrations.captured import EXACT, Wrapper
from heatsink.integrations.programs import Programs, Spaces
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph

_log = logging.getLogger(__name__)

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
# What the libraries note on a module that PEFT has adapters in.
_PEFT_NOTES = frozenset({"peft_config", "_hf_peft_config_loaded"})


class Replacement(nn.Module):
    """Stands in a pipeline for `original`, whose weights it computes with.

    Every set of input shapes is captured when it is first met, and each batch size becomes a
    program. `.to(...)` reaches the original, and what was built on its old weights is read again,
    as after any write that PyTorch counts. What the captured network can't do is refused; nothing
    falls back to the original but what a subclass says, and a network with adapters of PEFT's.

    Attributes:
        original: the very module that `heatsink.restore` puts back.
        kept: names of the original's that it answers.
        changing: names of the original's methods that may change its weights in ways unseen.
    """

    kept: frozenset[str] = frozenset()
    changing: frozenset[str] = frozenset()
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
        self._component, self._precision = component, precision
        self._programs = Programs(original, spaces)
        self._told = False

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
        if original is not None and name in _ANSWERED | _PEFT_NOTES | self.kept:
            return getattr(original, name)
        if original is not None and name in self.changing:
            return self._followed(getattr(original, name))
        if original is not None and hasattr(original, name):
            raise AttributeError(
                f"{self._component}: {type(original).__name__}.{name} is not available while "
                "Heatsink runs it; heatsink.restore(pipe) puts the original back"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PEFT_NOTES:
            setattr(self.original, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _PEFT_NOTES:
            delattr(self.original, name)
        else:
            super().__delattr__(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, with the original's names."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original; what was built on its weights is read again."""
        found = self.original.load_state_dict(*args, **kwargs)
        self._programs.look()
        return found

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The original and its submodules, with the original's names."""
        found: Iterator[tuple[str, nn.Module]] = self.original.named_modules(*args, **kwargs)
        return found

    def get_submodule(self, target: str) -> nn.Module:
        """The original's."""
        found: nn.Module = self.original.get_submodule(target)
        return found

    def train(self, mode: bool = True) -> Replacement:
        """Do nothing: the captured network is for inference, and the original is left alone."""
        if mode:
            raise InvalidRequest(f"{self._component}: runs inference only; heatsink.restore(pipe)")
        return self

    def graphs(self) -> list[Graph]:
        """The graphs captured until now, after the passes; the last used at the end."""
        return self._programs.graphs

    def refresh(self) -> None:
        """Read every weight again: one was written in a way that PyTorch does not count."""
        self._programs.refresh()

    def _followed(self, method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                # PEFT writes through `.data`.
                self.refresh()

        return call

    def _apply(self, fn: Any, recurse: bool = True) -> Replacement:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._programs.look()
        return self

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
        wrapper: Wrapper,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
    ) -> dict[str, Tensor]:
        """Run the network that `wrapper` makes of the original, captured once for these shapes.

        Args:
            kind: the graph's name; one for each wrapper.
            wrapper: how its arguments are given.
            inputs: by name; the first dimension of each is the row.
            outputs: names of what is returned.
        """
        ours = self._programs.look()
        self._check(inputs)
        if not ours:
            return self._as_it_is(wrapper, inputs, outputs)
        own = self._programs.dtype
        found = self._programs.run(kind, wrapper, inputs, outputs, self._precision or own)
        return {name: value.to(own) for name, value in found.items()}

    def _as_it_is(
        self, wrapper: Wrapper, inputs: Mapping[str, Tensor], outputs: Sequence[str]
    ) -> dict[str, Tensor]:
        """Run the original: with every choice of PEFT's adapters it is another network."""
        if not self.changing:
            raise InvalidRequest(f"{self._component}: has adapters of PEFT's; unload them first")
        if not self._told:
            _log.warning(
                "heatsink: the %s has adapters of PEFT's and runs as PyTorch has it until they are "
                "fused and unloaded; heatsink.adapters(pipe) needs no such step",
                self._component,
            )
            self._told = True
        with torch.no_grad():
            values = wrapper(self.original)(*inputs.values())
        return dict(zip(outputs, values, strict=True))

    def _check(self, inputs: Mapping[str, Tensor]) -> None:
        own, device = self._programs.dtype, self._programs.device
        if torch.is_autocast_enabled(device.type):
            raise InvalidRequest(
                f"{self._component}: autocast does not reach a captured network; "
                "heatsink.optimize(pipe, precision=...) chooses what it computes in"
            )
        for name, value in inputs.items():
            want = EXACT.get(name, own)
            if value.dtype != want and (name not in EXACT or name == "input_ids"):
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
