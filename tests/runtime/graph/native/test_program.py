"""Programs: the graph's own results bit by bit, from static buffers, again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heatsink.kernels import _native
from heatsink.runtime.graph.capture import capture, capture_module
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.memory import plan
from heatsink.runtime.model import Model
from heatsink.runtime.native.layout import lay_out
from heatsink.runtime.native.program import Arena, Program


class Net(nn.Module):
    """Convolutions, normalisation, a view, a cut, a product that no pass knows, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        steps = torch.exp(torch.arange(0, 8, device=x.device, dtype=x.dtype) * -0.5)
        h = self.norm(self.first(x)) + (t[:, None] * steps[None])[:, :, None, None]
        tokens = h.flatten(2).transpose(1, 2)
        left, right = self.out(tokens).chunk(2, dim=-1)
        return torch.cumsum(left * nn.functional.gelu(right), dim=1), torch.cat([left, right], 1)


def _graph() -> Graph:
    torch.manual_seed(5)
    net = Net()
    specs = {
        "x": TensorSpec(("batch", 4, 6, 5), torch.float32),
        "t": TensorSpec(("batch",), torch.float32),
    }
    weights = net.state_dict()
    return capture_module("net", Net().to("meta"), weights, {}, specs, ("sums", "both"))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return _graph()


def _weights(graph: Graph) -> dict[str, Tensor]:
    return {name: weight.load() for name, weight in graph.weights.items()}


def _inputs(rows: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, 6, 5, generator=draw),
        "t": torch.rand(rows, generator=draw),
    }


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_replays_give_the_graphs_own_bits(graph: Graph, rows: int) -> None:
    program = Program(graph, rows, _weights(graph))
    for seed in range(3):
        given = _inputs(rows, seed)
        found = program.run(given)
        for name, value in graph.run(given).items():
            assert torch.equal(found[name], value)


def test_every_value_is_written_before_it_is_read(graph: Graph) -> None:
    layout = lay_out(graph, 2)
    memory = plan(layout.lifetimes)
    arena = Arena(memory.peak, torch.device("cpu"))
    program = Program(graph, 2, _weights(graph), layout=layout, memory=memory, arena=arena)
    given = _inputs(2, 1)
    wanted = {name: value.clone() for name, value in program.run(given).items()}
    # All bytes set: NaN in every float dtype.
    with torch.inference_mode():
        arena.memory.fill_(255)
    for name, value in program.run(given).items():
        assert torch.equal(value, wanted[name])


def test_inputs_stay_for_the_next_replay(graph: Graph) -> None:
    program = Program(graph, 2, _weights(graph))
    given = _inputs(2, 1)
    wanted = {name: value.clone() for name, value in program.run(given).items()}
    for _ in range(2):
        program.replay()
        assert all(torch.equal(program.outputs[name], value) for name, value in wanted.items())
        assert all(torch.equal(program.inputs[name], value) for name, value in given.items())


def test_programs_of_several_batch_sizes_share_an_arena(graph: Graph) -> None:
    layouts = {rows: lay_out(graph, rows) for rows in (4, 1)}
    plans = {rows: plan(layout.lifetimes) for rows, layout in layouts.items()}
    arena = Arena(max(p.peak for p in plans.values()), torch.device("cpu"))
    weights = _weights(graph)
    programs = {
        rows: Program(graph, rows, weights, layout=layouts[rows], memory=plans[rows], arena=arena)
        for rows in layouts
    }
    for rows in (4, 1, 4):
        given = _inputs(rows, rows)
        found = programs[rows].run(given)
        for name, value in graph.run(given).items():
            assert torch.equal(found[name], value)


def test_what_no_kernel_writes_in_place_is_listed(graph: Graph) -> None:
    program = Program(graph, 2, _weights(graph))
    names = [name for name, _ in program.unplanned]
    assert "aten.cumsum.default" in names
    assert "aten.add.Tensor" not in names
    assert ("aten.linear.default", "out") in program.unplanned


def test_constants_and_views_are_no_work(graph: Graph) -> None:
    program = Program(graph, 2, _weights(graph))
    # conv, norm, mul, add, linear, gelu, mul, cumsum, cat; no arange, exp, chunk, transpose.
    assert program.launches == 9


def test_the_plan_is_near_its_lower_bound(graphs: Callable[[str], Graph]) -> None:
    for name in ("unet", "vae_decoder"):
        memory = plan(lay_out(graphs(name), 4).lifetimes)
        assert memory.peak <= 1.1 * memory.lower_bound


def test_a_planned_program_allocates_nothing(
    capture_net: Callable[..., Graph], allocations: Callable[..., int]
) -> None:
    class Elementwise(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (torch.nn.functional.silu(x * 2.0 + x).sigmoid(),)

    graph = capture_net(Elementwise(), 64)
    program = Program(graph, 8, {})
    assert program.unplanned == []
    assert allocations(program.replay) == 0
    # The count can see one.
    assert allocations(lambda: torch.zeros(100)) > 0


class Ours(nn.Module):
    """Ops of this package with another operator between them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ours = torch.ops.heatsink
        h = ours.layer_norm(x, None, None, 1e-5, None, None)
        both = torch.cat([h, ours.silu_mul(h, x)], dim=-1)
        pixels = ours.geglu(both).view(-1, 4, 4, 2).permute(0, 3, 1, 2)
        images = (pixels, 1, None, None, 1e-5, None, None, True)
        return (ours.rms_norm(ours.group_norm_silu(*images), None, 1e-6),)


def test_ops_of_this_package_run_in_a_row(capture_net: Callable[..., Graph], seed: int) -> None:
    graph = capture_net(Ours(), 4, 8)
    program = Program(graph, 3, {})
    assert program.unplanned == []
    assert program.launches == 6
    if _native.available():
        assert program.recorded == 5
    for at in range(2):
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(seed + at))
        assert torch.equal(program.run({"x": x})["y"], graph.run({"x": x})["y"])


def test_a_profile_has_every_call_in_order(graph: Graph, seed: int) -> None:
    program = Program(graph, 2, _weights(graph))
    expected = {name: value.clone() for name, value in program.run(_inputs(2, seed)).items()}
    ticks = iter(range(10_000))
    profile = program.profile(3, lambda: float(next(ticks)))
    assert len(profile) == program.launches
    # A clock that ticks at every look: each call takes one.
    assert [seconds for _, seconds in profile] == [1.0] * program.launches
    order = {node: place for place, node in enumerate(graph.nodes)}
    places = [order[node] for node, _ in profile]
    assert places == sorted(set(places))
    for name, value in program.outputs.items():
        assert torch.equal(value, expected[name])


def test_an_error_names_the_operator_and_its_module(graph: Graph) -> None:
    program = Program(graph, 1, _weights(graph))
    with torch.inference_mode():
        # Nothing lies there any more.
        for value in program.inputs.values():
            value.resize_(0)
    with pytest.raises(RuntimeError, match=r"aten\.conv2d\.default of first: "):
        program.replay()


UNFUSED = {
    "aten.linear.default",
    "aten.conv2d.default",
    "aten.scaled_dot_product_attention.default",
    "aten.group_norm.default",
    "aten.layer_norm.default",
}


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae_decoder"])
def test_of_the_bundled_model_only_what_passes_replace_is_unplanned(name: str) -> None:
    folder = Path(__file__).resolve().parents[3] / "models" / "emoji"
    if not (folder / "model_index.json").is_file():
        pytest.skip("the bundled model is not in this checkout")
    model = Model.open(folder)
    shapes = input_shapes(name, model.config(name), height=8, width=8, text_length=24)
    graph = capture(
        name, model.module(name), model.weights(name), model.buffers(name), example_shapes=shapes
    )
    program = Program(graph, 2, _weights(graph))
    assert {operator for operator, _ in program.unplanned} <= UNFUSED
    if name == "unet":
        assert {operator for operator, _ in program.unplanned} == UNFUSED


def test_what_is_held_is_read_where_it_is(graph: Graph) -> None:
    held = torch.rand(2)
    program = Program(graph, 2, _weights(graph), held={"t": held})
    assert program.inputs["t"].data_ptr() == held.data_ptr()
    planned = {each.name for each in lay_out(graph, 2, ["t"]).lifetimes}
    assert {each.name for each in lay_out(graph, 2).lifetimes} - planned == {"t:0"}
    for seed in range(2):
        given = _inputs(2, seed)
        held.copy_(given["t"])
        found = program.run({"x": given["x"]})
        for name, value in graph.run(given).items():
            assert torch.equal(found[name], value)
        assert torch.equal(held, given["t"])


def test_what_is_held_must_be_an_input_of_the_graph(graph: Graph) -> None:
    for held, told in (
        ({"u": torch.rand(2)}, "takes no 'u'"),
        ({"t": torch.rand(3)}, r"expected 't' \(2,\) torch.float32 on cpu, got \(3,\)"),
        ({"t": torch.rand(2).double()}, "got .* torch.float64"),
    ):
        with pytest.raises(ValueError, match=told):
            Program(graph, 2, _weights(graph), held=held)


def test_what_is_held_has_the_strides_of_the_plan(graph: Graph) -> None:
    # A reshape of it would be a copy, made once, and not a view.
    turned = torch.rand(6, 4, 5, 2).permute(3, 1, 0, 2)
    with pytest.raises(ValueError, match=r"expected 'x' with strides \(120, 30, 5, 1\), got \(1, "):
        Program(graph, 2, _weights(graph), held={"x": turned})
    # The stride of a dimension of one place means nothing.
    alone = torch.rand(6, 4, 5, 1).permute(3, 1, 0, 2).contiguous().as_strided(
        (1, 4, 6, 5), (1, 30, 5, 1)
    )  # fmt: skip
    Program(graph, 1, _weights(graph), held={"x": alone})
