"""The passes that engines are built with, in order; the native ones by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.epilogues import fuse_epilogues
from heatsink.runtime.graph.passes.flat_sums import flatten_sums
from heatsink.runtime.graph.passes.fold_constants import fold_constants
from heatsink.runtime.graph.passes.fold_inputs import fold_inputs
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.passes.fuse_attention import fuse_attention
from heatsink.runtime.graph.passes.fuse_geglu import fuse_geglu
from heatsink.runtime.graph.passes.fuse_group_norm import fuse_group_norm
from heatsink.runtime.graph.passes.fuse_layer_norm import fuse_layer_norm
from heatsink.runtime.graph.passes.layouts import settle_layouts
from heatsink.runtime.graph.passes.lower_products import lower_products
from heatsink.runtime.graph.passes.merge_equal import merge_equal_nodes
from heatsink.runtime.graph.passes.pack_projections import pack_projections
from heatsink.runtime.graph.passes.precision import lower_precision
from heatsink.runtime.graph.passes.protocol import Pass, to_fixpoint
from heatsink.runtime.graph.passes.quantise import quantise_fp8
from heatsink.runtime.graph.passes.residual_tokens import add_residuals_to_tokens
from heatsink.runtime.graph.passes.row_ports import ROOM, add_row_ports
from heatsink.runtime.port_layout import PortLayout

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CLEAN = to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code)
PASSES_ONNX: tuple[Pass, ...] = (_CLEAN,)
# Of a graph with ports and of its twin without: else their rows differ in the last bits.
PASSES_ONNX_PORTS: tuple[Pass, ...] = (_CLEAN, flatten_sums)
# By the names that `heatsink graph show` takes.
NATIVE: dict[str, Pass] = {
    "clean": _CLEAN,
    "constants": fold_constants,
    "merge_equal": to_fixpoint(merge_equal_nodes, remove_dead_code),
    # Before the products are lowered: it looks for plain linear layers.
    "attention": fuse_attention,
    "pack": pack_projections,
    "group_norm": fuse_group_norm,
    "layer_norm": fuse_layer_norm,
    "geglu": fuse_geglu,
    "products": lower_products,
    "layouts": settle_layouts,
    # After the copies of layouts are gone, which lie between tokens and residuals.
    "residual_tokens": add_residuals_to_tokens,
    "epilogues": fuse_epilogues,
    # After the norms: a concatenation is split at them.
    "inputs": fold_inputs,
    "finish": to_fixpoint(settle_layouts, drop_noop_nodes, remove_dead_code),
}
PASSES_NATIVE: tuple[Pass, ...] = tuple(NATIVE.values())


def native_passes(
    layout: PortLayout | None = None, unused: Collection[str] = (), *, room: int = ROOM
) -> tuple[Pass, ...]:
    """The passes of the native engine, with adapter ports at their end.

    Args:
        layout: of the component's ports; without one these are `PASSES_NATIVE`.
        unused: modules of the layout that the graph does not use.
        room: adapters of a row, at most.
    """
    if layout is None:
        return PASSES_NATIVE
    return (*PASSES_NATIVE, add_row_ports(layout, unused, room=room))


def precision_passes(precision: str, high: Sequence[str] = ()) -> tuple[Pass, ...]:
    """What a float32 graph goes through before the passes of an engine of this precision.

    Args:
        precision: `fp32`, `bf16`, `fp16`, or `fp8`, whose products are those of values rounded to
            float8_e4m3fn, and whose rest is bf16. The fp8 is only simulated: no kernel has it yet.
        high: modules (`high.High`) that stay float32; of `fp8`, those whose products stay bf16.

    Raises:
        ValueError: another precision.
    """
    if precision == "fp32":
        return ()
    if precision == "fp8":
        return _CLEAN, quantise_fp8(high), lower_precision(torch.bfloat16)
    if precision not in HALVES:
        raise ValueError(f"precision: expected fp32, fp8 or one of {[*HALVES]}, got {precision!r}")
    return _CLEAN, lower_precision(HALVES[precision], high)
