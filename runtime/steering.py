"""Runs the UNet's rows with what their requests bring besides text: ControlNets, masked latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from heatsink.runtime import pictures
from heatsink.runtime.adapter_lease import trimmed
from heatsink.runtime.backends.session import Array
from heatsink.runtime.components import CONTROL_PREFIX
from heatsink.runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

RunComponent = Callable[[str, dict[str, Array]], dict[str, Array]]

OWNER, KEPT = "steering_owner", "kept_latents"
"""Inputs of a row that the UNet does not see: whose row it is, and what joins its sample."""
# What a ControlNet reads besides its picture, where the UNet has it.
_SHARED = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")


@dataclass(frozen=True)
class Steer:
    """One ControlNet's part in an image.

    Attributes:
        picture: float32 `(3, H, W)` in [0, 1].
        scale: what its outputs are multiplied by.
    """

    picture: Array
    scale: float


def steers(request: Request, controls: Mapping[str, Image]) -> dict[str, Steer]:
    """What steers a request's image, by ControlNet; one of scale 0 is not run.

    Args:
        request: with its size resolved.
        controls: its pictures, resized where their size differs.
    """
    assert request.height is not None
    assert request.width is not None
    return {
        name: Steer(
            pictures.to_unit_array(controls[name], request.height, request.width), control.scale
        )
        for name, control in request.controls.items()
        if control.scale
    }


def mark_rows(
    rows: Sequence[Sequence[dict[str, Array]]],
    steering: Sequence[Mapping[str, Steer]],
    kept: Sequence[Array | None],
) -> None:
    """Tell the UNet's rows whose they are, where any is steered, and what joins their samples.

    Args:
        rows: of every owner; changed in place.
        steering: what steers each owner's rows.
        kept: float32 `(1 + C, h, w)`, the mask and the latents that an inpainting model keeps, of
            each owner or of none.
    """
    for owner, (own, joined) in enumerate(zip(rows, kept, strict=True)):
        for row in own:
            if any(steering):
                row[OWNER] = np.array(owner)
            if joined is not None:
                row[KEPT] = joined


class SteeredUNet:
    """The UNet and the ControlNets before it; a row's bits depend on that row alone.

    A ControlNet runs the rows that it steers, and only those. Where several steer a row, what they
    give is added in the order of their names. A row that none steers gets residuals of -0.0: adding
    that changes no bit of any number.

    Args:
        run: runs a component on rows.
        residuals: of an engine with ControlNets: the shapes of a row's residuals, by name.
        owners: what steers the rows of each owner.
    """

    def __init__(
        self,
        run: RunComponent,
        residuals: Mapping[str, Sequence[int]],
        owners: Sequence[Mapping[str, Steer]],
    ) -> None:
        self._run, self._shapes, self._owners = run, residuals, owners
        self._nothing: dict[str, Array] = {}

    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        """The output's rows of named arrays of rows (`OWNER` and `KEPT` may be among them)."""
        given = trimmed(inputs)
        owners, kept = given.pop(OWNER, None), given.pop(KEPT, None)
        rows = len(given["sample"])
        residuals: dict[str, Array] = {}
        if self._shapes:
            own = [self._owners[owner] for owner in owners.tolist()] if owners is not None else []
            residuals = self._steered(given, own) if any(own) else self._unsteered(rows)
        if kept is not None:
            given["sample"] = np.concatenate([given["sample"], kept], axis=1)
        return self._run("unet", {**given, **residuals})["out"]

    def ahead(
        self, rows: Sequence[Mapping[str, Array]], times: Sequence[Array]
    ) -> Iterator[tuple[str, dict[str, Array], list[Array]]]:
        """What can be computed before the loop: a component, its rows' inputs and their times.

        Args:
            rows: of the UNet, without samples and timesteps.
            times: the timesteps of each.
        """
        if not rows:
            return
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        owners = stacked.pop(OWNER, None)
        stacked.pop(KEPT, None)
        yield "unet", trimmed(stacked), list(times)
        own = [self._owners[owner] for owner in owners.tolist()] if owners is not None else []
        for net, places in _steered_rows(own).items():
            yield (
                CONTROL_PREFIX + net,
                _net_inputs(net, stacked, own, places),
                [times[place] for place in places],
            )

    def _unsteered(self, rows: int) -> dict[str, Array]:
        if not self._nothing or len(next(iter(self._nothing.values()))) < rows:
            self._nothing = _nothing(self._shapes, rows)
        return {name: value[:rows] for name, value in self._nothing.items()}

    def _steered(
        self, given: Mapping[str, Array], own: Sequence[Mapping[str, Steer]]
    ) -> dict[str, Array]:
        total = _nothing(self._shapes, len(own))
        for net, rows in _steered_rows(own).items():
            inputs = _net_inputs(net, given, own, rows)
            for name, value in self._run(CONTROL_PREFIX + net, inputs).items():
                total[name][rows] += value
        return total


def _steered_rows(own: Sequence[Mapping[str, Steer]]) -> dict[str, list[int]]:
    """The ControlNets in the order of their names, and the rows that each steers."""
    nets = sorted({name for steers in own for name in steers})
    return {net: [row for row, steers in enumerate(own) if net in steers] for net in nets}


def _net_inputs(
    net: str, given: Mapping[str, Array], own: Sequence[Mapping[str, Steer]], rows: list[int]
) -> dict[str, Array]:
    """A ControlNet's inputs for some of the UNet's rows."""
    inputs = {name: given[name][rows] for name in _SHARED if name in given}
    inputs["controlnet_cond"] = np.stack([own[row][net].picture for row in rows])
    inputs["conditioning_scale"] = np.array([own[row][net].scale for row in rows], np.float32)
    return inputs


def _nothing(shapes: Mapping[str, Sequence[int]], rows: int) -> dict[str, Array]:
    return {name: np.full((rows, *shape), -0.0, np.float32) for name, shape in shapes.items()}
