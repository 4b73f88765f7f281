"""ControlNets and UNets with inputs for their residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_dtype, input_names, input_shapes, output_names
from heatsink.runtime.graph.denoisers import residual_names, residual_shapes, residuals_among
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, PASSES_ONNX
from heatsink.runtime.graph.phases import Phase, split
from heatsink.runtime.native.component import NativeComponent

KINDS = ["", " of SDXL"]


def without(shapes: dict[str, Any], rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Residuals that change nothing."""
    return {
        name: torch.full((rows, *map(int, shapes[name][1:])), -0.0, dtype=dtype)
        for name in residuals_among(shapes)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [(), PASSES_ONNX, PASSES_NATIVE], ids=["none", "onnx", "native"])
def test_rows_without_a_controlnet_have_the_bits_of_the_unet_without_the_inputs(
    kind: str, passes: Any, cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    case = cases[f"unet{kind} with residuals"]
    plain = run_passes(graphs(f"unet{kind}"), passes)
    controlled = run_passes(graphs(f"unet{kind} with residuals"), passes)
    inputs = case.inputs(3, seed)
    own = {name: inputs[name] for name in plain.inputs}
    mixed = {
        name: torch.cat([value[:1], inputs[name][1:2], value[2:]])
        for name, value in without(case.shapes, 3, torch.float32).items()
    }
    expected = plain.run(own)["out"]
    found = controlled.run({**inputs, **mixed})["out"]
    assert torch.equal(found[::2].view(torch.int32), expected[::2].view(torch.int32))
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_program_keeps_them_too(dtype: torch.dtype, cases: Any, seed: int) -> None:
    case, plain_case = cases["unet with residuals"], cases["unet"]
    inputs = case.inputs(2, seed)
    plain, controlled = (
        NativeComponent(run_passes(each.capture(dtype=dtype), PASSES_NATIVE))
        for each in (plain_case, case)
    )
    expected = plain.run({name: inputs[name] for name in plain.graph.inputs})["out"]
    empty = without(case.shapes, 2, torch.float32)
    empty = {name: torch.cat([value[:1], inputs[name][1:]]) for name, value in empty.items()}
    found = controlled.run({**inputs, **empty})["out"]
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_runs_natively(kind: str, dtype: torch.dtype, cases: Any, seed: int) -> None:
    case = cases[f"controlnet{kind}"]
    inputs = case.inputs(3, seed)
    graph = case.capture(dtype=dtype)
    found = NativeComponent(run_passes(graph, PASSES_NATIVE)).run(inputs)
    exact = case.capture().run(inputs, dtype=torch.float64)
    typed = {n: v.to(input_dtype(n, dtype)) for n, v in inputs.items()}
    plain = graph.run(typed)
    assert list(found) == list(output_names("controlnet", case.module))
    for name, reference in exact.items():
        largest = reference.abs().max()
        error = (plain[name].double() - reference).abs().max()
        budget = 2 * (error + torch.finfo(dtype).eps * largest)
        assert (found[name].double() - reference).abs().max() <= budget
        assert largest > 0


def test_a_scale_of_zero_gives_nothing_and_a_scale_is_its_rows_own(
    cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    inputs = cases["controlnet"].inputs(3, seed)
    scales = torch.tensor([0.0, 1.0, 0.25])
    found = graphs("controlnet").run({**inputs, "conditioning_scale": scales})
    whole = graphs("controlnet").run({**inputs, "conditioning_scale": torch.ones(3)})
    for name, value in found.items():
        assert not value[0].any()
        assert torch.equal(value[1], whole[name][1])
        assert torch.equal(value[2], whole[name][2] / 4)


def test_the_embedding_of_the_picture_leaves_the_loop(
    graphs: Callable[[str], Graph], cases: Any
) -> None:
    graph = graphs("controlnet")
    phases = split(graph)
    assert "controlnet_cond" in phases.graphs[Phase.REQUEST].inputs
    assert "controlnet_cond" not in phases.graphs[Phase.STEP].inputs
    inputs = cases["controlnet"].inputs(2, 1)
    whole = graph.run(inputs)
    for name, value in phases.run(inputs).items():
        assert torch.equal(value, whole[name])
    # A residual is new at every step.
    step = split(graphs("unet with residuals")).graphs[Phase.STEP]
    assert set(residual_names(3)) <= set(step.inputs)


def test_shapes_follow_the_configuration() -> None:
    config = {"block_out_channels": (8, 16, 32), "layers_per_block": 2}
    shapes = residual_shapes(config, (BATCH, 4, 6, 10))
    assert list(shapes) == list(residual_names(9))
    assert [shape[1:] for shape in shapes.values()] == [
        (8, 6, 10), (8, 6, 10), (8, 6, 10), (8, 3, 5), (16, 3, 5), (16, 3, 5), (16, 2, 3),
        (32, 2, 3), (32, 2, 3), (32, 2, 3),
    ]  # fmt: skip


def test_the_library_has_residuals_of_these_shapes(cases: Any) -> None:
    for kind in KINDS:
        case = cases[f"controlnet{kind}"]
        with torch.no_grad():
            found = case.reference(case.module, case.inputs(1, 0))
        own = residual_shapes(case.module.config, case.shapes["sample"])
        assert [tuple(value.shape[1:]) for value in found] == [s[1:] for s in own.values()]


def test_some_of_the_residuals_alone_are_refused(cases: Any) -> None:
    case = cases["unet with residuals"]
    for left_out in ("down_residual_1", "mid_residual"):
        shapes = {name: shape for name, shape in case.shapes.items() if name != left_out}
        with pytest.raises(ValueError, match=left_out):
            input_names("unet", shapes)
        with pytest.raises(ValueError, match=left_out):
            capture("unet", case.module, {}, example_shapes=shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"conditioning_channels": 1}, "expected 3 conditioning_channels, got 1"),
        ({"class_embed_type": "timestep"}, "controlnet: class_embed_type 'timestep'"),
    ],
)
def test_controlnets_of_another_kind_are_refused(
    cases: Any, change: dict[str, Any], message: str
) -> None:
    config = {**cases["controlnet"].module.config, **change}
    with pytest.raises(NotBuilt, match=message):
        input_shapes("controlnet_lines", config, height=8, width=8)
