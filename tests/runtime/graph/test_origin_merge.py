"""Adapters reach the rows that passes packed, interleaved and scaled, through the origin map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.errors import AdapterError, HeatsinkError
from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import inherit
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.weight import Origin, Weight, placed, transform_rows
from heatsink.runtime.merge import Merger
from heatsink.runtime.merge_terms import places_of, transform_scale

SIZE = 6
SCALE = -0.5
aten = torch.ops.aten


class Net(nn.Module):
    """Q, K and V of one input, Q scaled, and a GEGLU: what passes pack, fold and interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(SIZE, SIZE, bias=False)
        self.to_k = nn.Linear(SIZE, SIZE, bias=False)
        self.to_v = nn.Linear(SIZE, SIZE, bias=False)
        self.proj = nn.Linear(SIZE, 2 * SIZE)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mixed = self.to_q(x) * SCALE * self.to_k(x) + self.to_v(x)
        value, gate = self.proj(mixed).chunk(2, dim=-1)
        return (value * torch.nn.functional.gelu(gate),)


def linears(graph: Graph) -> dict[str, fx.Node]:
    found = (n for n in graph.nodes if n.target is aten.linear.default)
    return {n.args[1].meta[WEIGHT_KEY]: n for n in found}  # type: ignore[union-attr]


def rename(graph: Graph, node: fx.Node, new: str, weight: Weight, origins: list[Origin]) -> None:
    old = node.meta[WEIGHT_KEY]
    node.meta = {**node.meta, WEIGHT_KEY: new, "val": torch.empty(weight.shape, device="meta")}
    del graph.weights[old], graph.origins[old]
    graph.weights[new], graph.origins[new] = replace(weight, name=new), origins


def pack_qkv(graph: Graph) -> tuple[Graph, bool]:
    """Three products of one input become one, its weight their weights one below the other."""
    found, names = linears(graph), [f"to_{each}.weight" for each in "qkv"]
    if not all(name in found for name in names):
        return graph, False
    nodes = [found[name] for name in names]
    weights = [graph.weights[name] for name in names]
    origins = [origin for name in names for origin in graph.origins[name]]
    rows = [weight.shape[0] for weight in weights]
    origins = [o if o.slice else o.rows(0, n) for o, n in zip(origins, rows, strict=True)]
    packed = replace(
        weights[0],
        shape=(sum(rows), SIZE),
        source=lambda: torch.cat([weight.load(torch.float64) for weight in weights]),
    )
    first = nodes[0]
    with graph.module.graph.inserting_before(first):
        product = graph.module.graph.call_function(aten.linear.default, first.args[:2])
        inherit(product, first)
        pieces = [
            graph.module.graph.call_function(aten.slice.Tensor, (product, -1, start, start + SIZE))
            for start in range(0, sum(rows), SIZE)
        ]
    for node, piece in zip(nodes, pieces, strict=True):
        inherit(piece, node)
        node.replace_all_uses_with(piece)
        graph.module.graph.erase_node(node)
    holders = graph.weight_nodes()
    for name in names[1:]:
        del graph.weights[name], graph.origins[name]
        graph.module.graph.erase_node(holders[name])
    rename(graph, holders[names[0]], "to_qkv.weight", packed, origins)
    return graph, True


def interleave_geglu(graph: Graph) -> tuple[Graph, bool]:
    """Value and gate of a GEGLU row by row: row i of either is row 2i or 2i + 1."""
    product = linears(graph).get("proj.weight")
    if product is None:
        return graph, False
    (cut,) = product.users
    for holder in (product.args[1], product.args[2]):
        assert isinstance(holder, fx.Node)
        name = holder.meta[WEIGHT_KEY]
        weight = graph.weights[name]
        mixed = replace(weight, source=partial(interleaved, weight))
        origins = [Origin(name, ((i * SIZE, (i + 1) * SIZE),), at=(i, 2)) for i in range(2)]
        rename(graph, holder, f"mixed_{name}", mixed, origins)
    for piece in list(cut.users):
        with graph.module.graph.inserting_before(piece):
            rows = (product, -1, piece.args[1], 2**62, 2)
            new = graph.module.graph.call_function(aten.slice.Tensor, rows)
        inherit(new, piece)
        piece.replace_all_uses_with(new)
        graph.module.graph.erase_node(piece)
    graph.module.graph.erase_node(cut)
    return graph, True


def interleaved(weight: Weight) -> Tensor:
    return torch.stack(weight.load(torch.float64).chunk(2), dim=1).flatten(0, 1)


def merged(net: nn.Module, deltas: list[AdapterDelta], weight: float) -> nn.Module:
    """The same network with the definition applied to its own parameters, in float64."""
    double = Net().double()
    double.load_state_dict(net.state_dict())
    for delta in deltas:
        parameter = double.get_parameter(delta.weight_name)
        moved = parameter + weight * delta.scale * delta.b.double() @ delta.a.double()
        if delta.magnitude is not None:
            moved = moved * (delta.magnitude.double() / moved.norm(dim=1))[:, None]
        parameter.data = moved.detach()
    return double


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_packed_and_interleaved_weights(
    dora: bool, capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    net, x = Net(), torch.randn(3, SIZE, dtype=torch.float64)
    plain = capture_net(net, SIZE)
    graph = run_passes(plain, [fold_scales, pack_qkv, interleave_geglu])
    assert graph.weights.keys() == {"to_qkv.weight", "mixed_proj.weight", "mixed_proj.bias"}
    assert [o.transform for o in graph.origins["to_qkv.weight"]] == [
        f"scale by {SCALE}",
        "identity",
        "identity",
    ]
    live = {f"net.{name}": w.load(torch.float32) for name, w in graph.weights.items()}
    origins = {f"net.{name}": parts for name, parts in graph.origins.items()}

    def run() -> Tensor:
        weights = {
            name: replace(w, source=partial(live.__getitem__, f"net.{name}"))
            for name, w in graph.weights.items()
        }
        return replace(graph, weights=weights).run({"x": x}, dtype=torch.float64)["y"]

    base = run()
    assert torch.allclose(base, plain.run({"x": x}, dtype=torch.float64)["y"], atol=1e-12)
    deltas = [
        AdapterDelta(
            "net",
            path,
            torch.randn(2, SIZE),
            torch.randn(rows, 2),
            0.5,
            torch.rand(rows) + 0.5 if dora else None,
        )
        for path, rows in (("to_q", SIZE), ("to_v", SIZE), ("proj", 2 * SIZE))
    ]
    merger = Merger(live, origins=origins)
    for some in ([deltas[0]], deltas[1:], deltas):
        merger.apply([(some, 0.75)])
        (expected,) = merged(net, some, 0.75)(x)
        assert (run() - expected).abs().max() < 1e-6 * expected.abs().max()
        assert (run() - base).abs().max() > 1e-2 * expected.abs().max()
    untouched = live["net.to_qkv.weight"][SIZE : 2 * SIZE]
    assert torch.equal(untouched, net.to_k.weight.detach())
    merger.remove()
    assert torch.equal(run(), base)


def test_a_dora_of_cut_columns_is_refused() -> None:
    live = {"net.left": torch.randn(4, 3), "net.right": torch.randn(4, 2)}
    origins = {
        "net.left": [Origin("w.weight", ((0, 4), (0, 3)))],
        "net.right": [Origin("w.weight", ((0, 4), (3, 5)), "divide by 2.0, scale by 8.0")],
    }
    before = {name: value.clone() for name, value in live.items()}
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    merger = Merger(live, origins=origins)
    merger.apply([([AdapterDelta("net", "w", a, b)], 1.0)])
    assert torch.allclose(live["net.left"], before["net.left"] + b @ a[:, :3], atol=1e-6)
    assert torch.allclose(live["net.right"], before["net.right"] + 4 * b @ a[:, 3:], atol=1e-5)
    with pytest.raises(AdapterError, match="cut this weight's columns"):
        merger.apply([([AdapterDelta("net", "w", a, b, 1.0, torch.ones(4))], 1.0)])
    for wide, tall in ((torch.randn(2, 6), b), (a, torch.randn(5, 2))):
        with pytest.raises(AdapterError, match="but dimension"):
            merger.apply([([AdapterDelta("net", "w", wide, tall)], 1.0)])


def test_transforms_are_numbers_or_refused() -> None:
    assert transform_scale("identity") == 1.0
    assert transform_scale("scale by 3.0, divide by -2.0, scale by 0.5") == -0.75
    with pytest.raises(HeatsinkError, match="through the transform 'square'"):
        transform_scale("scale by 2.0, square")
    computed = [Origin("positions", None, "computed")]
    assert places_of({"net.positions": (4, 2)}, {"net.positions": computed}) == {}


def test_interleaved_origins_are_placed_and_split() -> None:
    mixed = [Origin("p", ((0, 3),), at=(0, 2)), Origin("p", ((3, 6),), at=(1, 2))]
    assert [rows for _, rows in placed(mixed, 6)] == [range(0, 6, 2), range(1, 7, 2)]
    # Rows 2, 3 and 4 of the weight: the second and third of one half, the second of the other.
    assert transform_rows(mixed, 6, 2, 5, "t") == [
        Origin("p", ((0, 1),), at=(0, 2)),
        Origin("p", ((1, 3),), "t", at=(2, 2)),
        Origin("p", ((3, 4),), at=(1, 2)),
        Origin("p", ((4, 5),), "t", at=(3, 2)),
        Origin("p", ((5, 6),), at=(5, 2)),
    ]
    assert mixed[1].as_list() == ["p", ((3, 6),), "identity", [1, 2]]
    assert Origin("p").as_list() == ["p", None, "identity"]
    for wrong in ([mixed[0]], [mixed[0], mixed[0]], [*mixed, Origin("q", ((0, 1),))]):
        with pytest.raises(ValueError, match="don't make each of 6 rows once"):
            placed(wrong, 6)
    with pytest.raises(HeatsinkError, match=r"net\.w: the origins"):
        places_of({"net.w": (5, 2)}, {"net.w": mixed})
    for at, cut in (((0, 0), ((0, 1),)), ((-1, 1), ((0, 1),)), ((0, 1), None)):
        with pytest.raises(ValueError, match="an origin of p lies at"):
            Origin("p", cut, at=at)
