"""How a component's adapter ports are laid out in the bank: which tensors, and who has which rows.

Targets of one shape share two tensors, so that a graph has few inputs however many ports it has.
Port p of a group and slot s have row `p * slots + s` of both:

    bank.G.a  (ports * slots, rank, in)  or, of a convolution, (ports * slots, rank, kh, kw, in)
    bank.G.b  (ports * slots, rank, out)

A slot's unused ranks are zero. `b` is stored with the rank first, the transpose of an adapter's B,
so that a row's expansion reads it along its outputs. A convolution's `a` has its inputs last
(`PortGroup.stored`), so that each of its taps is a row of a matrix that the image's channels are
multiplied with; `a.movedim(-1, 2)` is the usual form, a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SLOTS_INPUT = "adapter_slots"
"""int64 `(batch, n)`: the slots of a row's adapters; -1 is none."""
SCALES_INPUT = "adapter_scales"
"""float32 `(batch, n)`: their scales; ignored where the slot is -1."""
ROWS_INPUT = "adapter_rows"
"""int64 `(adapted,)`: of a ported graph, which rows have adapters. There slots and scales are
`(adapted, n)`, theirs alone; who runs the graph makes this of the whole batch's."""


@dataclass(frozen=True)
class PortGroup:
    """Ports of one shape.

    Attributes:
        inputs: `(in,)` of a linear or a 1x1 convolution, `(in, kh, kw)` of another convolution.
        outputs: out.
        members: module paths, in the order of their ports.
    """

    inputs: tuple[int, ...]
    outputs: int
    members: tuple[str, ...]

    @property
    def stored_inputs(self) -> tuple[int, ...]:
        """A slot's `a` without the rank: `(in,)` or `(kh, kw, in)`."""
        return (*self.inputs[1:], self.inputs[0])

    def stored(self, a: Tensor) -> Tensor:
        """An adapter's `a` `(r, in[, kh, kw])` as the bank holds it, `(r, *stored_inputs)`."""
        return a.reshape(a.shape[0], *self.inputs).movedim(1, -1)


@dataclass(frozen=True)
class PortLayout:
    """The ports of one component.

    Attributes:
        component: its name.
        slots: how many adapters the bank holds.
        rank: the largest rank of an adapter.
        groups: sorted by shape.
    """

    component: str
    slots: int
    rank: int
    groups: tuple[PortGroup, ...]

    def places(self) -> dict[str, tuple[int, int]]:
        """(group, port) of every module path."""
        return {
            path: (g, p)
            for g, group in enumerate(self.groups)
            for p, path in enumerate(group.members)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the bank's tensors by name, in order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for g, group in enumerate(self.groups):
            rows = len(group.members) * self.slots
            shapes[f"bank.{g}.a"] = (rows, self.rank, *group.stored_inputs)
            shapes[f"bank.{g}.b"] = (rows, self.rank, group.outputs)
        return shapes

    def rank_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the true ranks of the bank's rows by name, in order.

        `bank.G.ranks` int32 `(ports * slots,)`: how many ranks of a row count; the native engine
        computes no others.
        """
        return {
            f"bank.{g}.ranks": (len(group.members) * self.slots,)
            for g, group in enumerate(self.groups)
        }

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        groups = [
            {"inputs": list(g.inputs), "outputs": g.outputs, "members": list(g.members)}
            for g in self.groups
        ]
        return {
            "component": self.component,
            "slots": self.slots,
            "rank": self.rank,
            "groups": groups,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PortLayout:
        """The inverse of `as_dict`."""
        groups = tuple(
            PortGroup(tuple(g["inputs"]), g["outputs"], tuple(g["members"]))
            for g in values["groups"]
        )
        return cls(values["component"], values["slots"], values["rank"], groups)

    @classmethod
    def of(
        cls, component: str, slots: int, rank: int, weights: Mapping[str, tuple[int, ...]]
    ) -> PortLayout:
        """The layout for modules whose weights have these shapes, by module path.

        Args:
            component: its name.
            slots: as the attribute.
            rank: as the attribute.
            weights: `(out, in)` or `(out, in, kh, kw)` by module path.
        """
        members: dict[tuple[tuple[int, ...], int], list[str]] = {}
        for path, shape in sorted(weights.items()):
            inputs = shape[1:2] if shape[2:] in ((), (1, 1)) else shape[1:]
            members.setdefault((inputs, shape[0]), []).append(path)
        groups = tuple(
            PortGroup(inputs, outputs, tuple(paths))
            for (inputs, outputs), paths in sorted(members.items())
        )
        return cls(component, slots, rank, groups)
