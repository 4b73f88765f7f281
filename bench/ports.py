"""What adapter ports cost in ONNX Runtime, and which way a convolution's port is fastest.

    python bench/ports.py --model models/emoji

Builds the UNet without and with ports, runs batches on one thread, all variants interleaved, and
prints the median over the rounds of each one's time divided by that of the graph without ports in
the same round. Adapters are random and of the ports' full rank, on every linear and convolution.
The second table has ports on the 3x3 convolutions only, translated in other ways:

- taps: the channels are multiplied with all taps of A, Col2Im shifts and adds (what is used);
- windows: the nine shifted images are gathered, then multiplied with A (im2col);
- slots: one convolution with the filters of all slots, of which each row's are picked.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from heatsink import console
from heatsink.export import exactness, onnx_ports
from heatsink.export import plan as planning
from heatsink.export.manifest import TensorSpec
from heatsink.export.onnx import to_onnx
from heatsink.export.ported_exactness import bank_probe, port_inputs
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_ONNX_PORTS
from heatsink.runtime.graph.passes.ports import add_ports
from heatsink.runtime.model import Model
from heatsink.runtime.port_layout import PortLayout

SLOTS = 4


class _Windows(onnx_ports._Image):
    """Every convolution gathers its windows."""

    def shrink(self, picked: Any, x: Any, y: Any, a: Any, port: int) -> Any:
        """As the class it replaces."""
        self._margin = [-1, -1]
        return super().shrink(picked, x, y, a, port)


class _AllSlots(onnx_ports._Image):
    """One convolution with the filters of all slots; each row's are gathered from its result."""

    def shrink(self, picked: Any, x: Any, y: Any, a: Any, port: int) -> Any:
        """As the class it replaces; of rows with one adapter."""
        op, rank = self._op, int(a.shape[1])
        slots, channels = self._bank._bank_slots, int(x.shape[1])
        first = op.Constant(value_ints=[port * slots])
        last = op.Constant(value_ints=[(port + 1) * slots])
        filters = op.Slice(a, first, last, op.Constant(value_ints=[0]))
        shape = op.Constant(value_ints=[slots * rank, *self._kernel, channels])
        filters = op.Transpose(op.Reshape(filters, shape), perm=[0, 3, 1, 2])
        hidden = op.Conv(
            picked, filters,
            pads=list(self._padding) * 2, strides=list(self._stride), dilations=self._dilation,
        )  # fmt: skip
        sizes = int(y.shape[2]) * int(y.shape[3])
        shape = op.Constant(value_ints=[-1, slots, rank, sizes])
        own = op.Concat(
            op.Unsqueeze(op.Range(0, op.Squeeze(self._bank._count), 1), [1]),
            self._bank._slots, axis=1,
        )  # fmt: skip
        return op.GatherND(op.Reshape(hidden, shape), own)


WAYS: dict[str, type[onnx_ports._Image]] = {
    "taps": onnx_ports._Image,
    "windows": _Windows,
    "slots": _AllSlots,
}


def captured(model: Model) -> Any:
    """The UNet's graph, as engines with ports have it."""
    plan = planning.plan(
        model, "unet", planning.default_size(model), 1,
        opset=None, precision="fp32", backend="onnxruntime", report=lambda what, done, total: None,
    )  # fmt: skip
    graph = capture(
        "unet", model.module("unet"), model.weights("unet"), model.buffers("unet"),
        example_shapes=plan.shapes,
    )  # fmt: skip
    return run_passes(graph, PASSES_ONNX_PORTS)


def opened(graph: Any, layout: PortLayout | None, way: str, folder: Path) -> OnnxRuntimeSession:
    """The graph in ONNX Runtime on one thread."""
    path = folder / f"{layout is not None}-{way}-{len(list(folder.iterdir()))}.onnx"
    if layout is None:
        return OnnxRuntimeSession("unet", to_onnx(graph, path).path, threads=1)
    used, onnx_ports._Image = onnx_ports._Image, WAYS[way]  # type: ignore[misc]
    try:
        to_onnx(run_passes(graph, [add_ports(layout)]), path)
    finally:
        onnx_ports._Image = used  # type: ignore[misc]
    return OnnxRuntimeSession("unet", path, threads=1)


def with_adapters(
    layout: PortLayout, values: dict[str, Any], styles: int, of_row: int, share: int = 1
) -> dict[str, Any]:
    """Inputs whose rows (one of `share`) have `of_row` of `styles` adapters."""
    rows = len(next(iter(values.values())))
    mixes = [
        [((row + i) % max(styles, of_row), 0.5) for i in range(of_row)] if row % share == 0 else []
        for row in range(rows)
    ]
    bank = bank_probe(layout, list(range(layout.slots)), exactness.PROBE_SEED)
    return {**values, **bank, **port_inputs(mixes, max(1, of_row))}


def measure(runs: dict[str, tuple[Any, Any]], rounds: int) -> dict[str, str]:
    """The median ratio of each run to the first, and its range."""
    table: list[list[float]] = []
    for _ in range(rounds + 1):
        one = []
        for session, values in runs.values():
            begun = time.perf_counter()
            session.run(values)
            one.append(time.perf_counter() - begun)
        table.append(one)
    ratios = np.array(table[1:]) / np.array(table[1:])[:, :1]
    return {
        name: f"{statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
        for name, column in zip(runs, ratios.T.tolist(), strict=True)
    }


def main(
    model: Annotated[Path, typer.Option(help="a diffusers folder")] = Path("models/emoji"),
    batch: Annotated[int, typer.Option(help="rows")] = 16,
    rank: Annotated[int, typer.Option(help="of the adapters")] = 16,
    rounds: Annotated[int, typer.Option(help="of each variant")] = 25,
) -> None:
    """Measure and print two Markdown tables."""
    with tempfile.TemporaryDirectory() as folder, console.quiet_libraries():
        source = Model.open(model)
        shapes = Targets.of(source).shapes["unet"]
        graph = captured(source)
        everything = PortLayout.of("unet", SLOTS, rank, shapes)
        images = {path: shape for path, shape in shapes.items() if shape[2:] == (3, 3)}
        convolutions = PortLayout.of("unet", SLOTS, rank, images)
        specs = [
            TensorSpec(name=n, dtype=str(s.dtype).removeprefix("torch."), shape=list(s.shape))
            for n, s in graph.inputs.items()
        ]
        values = exactness.probe(specs, batch, exactness.PROBE_SEED)
        plain = opened(graph, None, "", Path(folder))
        ported = opened(graph, everything, "taps", Path(folder))
        whole: dict[str, tuple[Any, Any]] = {
            "no ports": (plain, values),
            "ports, no row with an adapter": (ported, with_adapters(everything, values, 1, 0)),
            "one style": (ported, with_adapters(everything, values, 1, 1)),
            "four styles": (ported, with_adapters(everything, values, 4, 1)),
            "four styles, a row in four": (ported, with_adapters(everything, values, 4, 1, 4)),
            "two adapters a row": (ported, with_adapters(everything, values, 4, 2)),
            "four adapters a row": (ported, with_adapters(everything, values, 4, 4)),
        }
        ways: dict[str, tuple[Any, Any]] = {"no ports": (plain, values)}
        given = with_adapters(convolutions, values, 4, 1)
        for way in WAYS:
            ways[way] = (opened(graph, convolutions, way, Path(folder)), given)
        outputs = [session.run(inputs)["out"] for session, inputs in list(ways.values())[1:]]
        for output in outputs[1:]:
            np.testing.assert_allclose(output, outputs[0], rtol=0, atol=1e-3)
        tables = [measure(whole, rounds), measure(ways, rounds)]
    for title, table in zip(("every layer", "3x3 convolutions only"), tables, strict=True):
        print(f"\n| batch {batch}, rank {rank}, {title} | time, no ports = 1 |\n|---|---|")
        for name, cell in table.items():
            print(f"| {name} | {cell} |")


if __name__ == "__main__":
    typer.run(main)
