from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.runtime.errors import ModelError, NotBuilt
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import INTERFACES, input_dtype, input_shapes
from heatsink.runtime.graph.graph import BATCH, PATH_KEY, WEIGHT_KEY, Graph, module_path
from heatsink.runtime.graph.weight import IDENTITY, Origin

NAMES = [
    "text_encoder", "text_encoder of SDXL", "text_encoder_2", "vae_decoder", "vae_encoder", "unet",
    "unet of SDXL", "controlnet", "controlnet of SDXL", "unet with residuals",
    "unet of SDXL with residuals",
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_graph_computes_what_the_library_does(
    name: str, rows: int, cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    case, graph = cases[name], graphs(name)
    inputs = case.inputs(rows, seed)
    # diffusers computes the sinusoids of the timestep in float32 whatever the network's dtype: the
    # reference of everything in float64 is the graph's own, which its run in float32 has to earn.
    exact = graph.run(inputs, dtype=torch.float64)
    with torch.no_grad():
        plain = case.reference(case.module, inputs)
    for (output, result), expected, reference in zip(
        graph.run(inputs).items(), plain, exact.values(), strict=True
    ):
        spec = graph.outputs[output]
        assert tuple(rows if s == BATCH else s for s in spec.shape) == tuple(result.shape)
        limit = reference.abs().max() * torch.finfo(torch.float32).eps
        budget = 2 * ((expected.double() - reference).abs().max() + limit)
        assert (result.double() - reference).abs().max() <= budget
        # Not two wrongs: the library's own result is near to float64 as well.
        assert (expected.double() - reference).abs().max() <= 1e3 * limit


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "vae_encoder"])
def test_float64_run_equals_the_library_in_float64(
    name: str, cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    case = cases[name]
    inputs = case.inputs(2, seed, torch.float64)
    module = copy.deepcopy(case.module).double()
    with torch.no_grad():
        expected = case.reference(module, inputs)
    for result, reference in zip(
        graphs(name).run(inputs, dtype=torch.float64).values(), expected, strict=True
    ):
        # Layer norm's eps and the like are the same, so only rounding is left.
        assert (result - reference).abs().max() <= 1e-12 * reference.abs().max()


def test_one_row_never_changes_another(
    cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    for name in NAMES:
        case = cases[name]
        inputs = case.inputs(3, seed)
        changed = {key: value.clone() for key, value in inputs.items()}
        for key, value in case.inputs(3, seed + 1).items():
            changed[key][1] = value[1]
        before, after = graphs(name).run(inputs), graphs(name).run(changed)
        for output in before:
            assert torch.equal(before[output][0], after[output][0]), name
            assert torch.equal(before[output][2], after[output][2]), name
            assert not torch.equal(before[output][1], after[output][1]), name


def test_batch_is_not_limited_by_the_library(cases: Any, graphs: Callable[[str], Graph]) -> None:
    graph, case = graphs("unet"), cases["unet"]
    (interval,) = graph.ranges.values()
    assert (int(interval.lower), int(interval.upper)) == (1, 4096)
    # diffusers' upsampling takes another way from 64 rows on.
    inputs = case.inputs(65, 0)
    last = graph.run({key: value[-1:] for key, value in inputs.items()})["out"]
    everything = graph.run(inputs)["out"]
    torch.testing.assert_close(everything[-1:], last, rtol=1e-4, atol=1e-5)


class Unreadable(Mapping[str, Tensor]):
    """Knows its names, and must not be read."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = list(names)

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def test_capture_reads_no_weight_and_leaves_the_module(cases: Any) -> None:
    case = cases["vae_decoder"]
    module = copy.deepcopy(case.module).to("meta")
    before = {name: (p.dtype, p.device) for name, p in module.named_parameters()}
    weights = Unreadable(case.module.state_dict())
    graph = capture("vae_decoder", module, weights, example_shapes=case.shapes, dtype=torch.float16)
    assert {name: (p.dtype, p.device) for name, p in module.named_parameters()} == before
    assert not any("forward" in vars(m) for m in module.modules())
    assert all(weight.dtype == torch.float16 for weight in graph.weights.values())
    assert graph.inputs["latents"].dtype == graph.outputs["image"].dtype == torch.float16


def test_weights_have_the_checkpoints_names_and_origins(
    cases: Any, graphs: Callable[[str], Graph]
) -> None:
    graph = graphs("unet")
    assert set(graph.weights) == set(cases["unet"].module.state_dict())
    assert graph.origins["conv_in.weight"] == [Origin("conv_in.weight", None, IDENTITY)]
    for name, weight in graph.weights.items():
        assert torch.equal(weight.load(), cases["unet"].module.state_dict()[name])


def test_a_half_of_the_autoencoder_holds_its_own_weights_only(
    graphs: Callable[[str], Graph],
) -> None:
    decoder, encoder = set(graphs("vae_decoder").weights), set(graphs("vae_encoder").weights)
    assert {name.split(".")[0] for name in decoder} == {"decoder", "post_quant_conv"}
    assert {name.split(".")[0] for name in encoder} == {"encoder", "quant_conv"}


def test_paths_are_the_modules(cases: Any, graphs: Callable[[str], Graph]) -> None:
    graph = graphs("unet")
    modules = {name for name, _ in cases["unet"].module.named_modules()}
    for node in graph.nodes:
        if node.op == "call_function":
            assert module_path(node) in modules
    linear = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default]
    for node in linear:
        # The module of a linear product is the one that owns its weight.
        weight: Any = node.args[1]
        assert module_path(node) + ".weight" == weight.meta[WEIGHT_KEY]
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in map(module_path, linear)


def test_clips_prefix_is_taken_from_the_checkpoint(cases: Any, seed: int) -> None:
    case = cases["text_encoder"]
    plain = {k.removeprefix("text_model."): v for k, v in case.module.state_dict().items()}
    prefixed = {f"text_model.{name}": value for name, value in plain.items()}
    inputs = case.inputs(2, seed)
    results = []
    for weights, first in ((plain, ""), (prefixed, "text_model.")):
        graph = case.capture(weights=weights)
        assert set(graph.weights) <= set(weights)
        paths = {module_path(n) for n in graph.nodes if PATH_KEY in n.meta}
        assert f"{first}encoder.layers.0.self_attn.q_proj" in paths
        results.append(graph.run(inputs)["hidden"])
    assert torch.equal(*results)


def test_no_device_of_the_capture_is_left(graphs: Callable[[str], Graph]) -> None:
    for name in NAMES:
        for node in graphs(name).nodes:
            assert "meta" not in f"{node.args} {node.kwargs}", (name, node)


def test_a_missing_parameter_is_named(cases: Any) -> None:
    case = cases["vae_decoder"]
    weights = case.module.state_dict()
    del weights["decoder.conv_in.bias"]
    with pytest.raises(ModelError, match=r"lacks the parameters.*decoder\.conv_in\.bias"):
        case.capture(weights=weights)


def test_shapes_must_name_the_inputs(cases: Any) -> None:
    case = cases["vae_decoder"]
    module = copy.deepcopy(case.module).to("meta")
    with pytest.raises(ValueError, match=r"vae_decoder must name \['latents'\]"):
        capture("vae_decoder", module, {}, example_shapes={"sample": (BATCH, 4, 4, 4)})
    shapes = {"latents": (BATCH, 4, "height", 4)}
    with pytest.raises(NotBuilt, match="'height'"):
        capture("vae_decoder", module, {}, example_shapes=shapes)


def test_what_cannot_be_captured_says_so(cases: Any) -> None:
    case = cases["unet"]
    shapes = dict(case.shapes, encoder_hidden_states=(BATCH, 7, 999))
    with pytest.raises(NotBuilt, match=r"unet: torch\.export can't capture UNet"):
        capture(
            "unet",
            copy.deepcopy(case.module).to("meta"),
            case.module.state_dict(),
            example_shapes=shapes,
        )


def test_input_shapes_follow_the_configuration(cases: Any) -> None:
    config = cases["unet of SDXL"].module.config
    shapes = input_shapes("unet", config, height=3, width=5, text_length=7)
    assert shapes == {
        "sample": (BATCH, 4, 3, 5),
        "timestep": (BATCH,),
        "encoder_hidden_states": (BATCH, 7, 12),
        "text_embeds": (BATCH, 10),
        "time_ids": (BATCH, 6),
    }
    half = {name: input_dtype(name, torch.float16) for name in shapes}
    # A size such as 2,049 is no number of half precision.
    assert {n for n, dtype in half.items() if dtype == torch.float32} == {"timestep", "time_ids"}
    assert set(shapes) == {*INTERFACES["unet"].inputs, *INTERFACES["unet"].optional}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_cond_proj_dim", 256),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "image"),
    ],
)
def test_a_unet_with_conditions_that_no_input_carries_is_refused(key: str, value: object) -> None:
    config = {"in_channels": 4, "cross_attention_dim": 8}
    assert "text_embeds" not in input_shapes("unet", config, height=8, width=8)
    with pytest.raises(NotBuilt, match=f"unet: {key} "):
        input_shapes("unet", {**config, key: value}, height=8, width=8)
