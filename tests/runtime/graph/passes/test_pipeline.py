"""All passes of the native engine on whole components."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import heatsink.runtime
from heatsink.runtime.components import meta_module
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import BATCH, Graph, module_path
from heatsink.runtime.graph.packing import spans
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator, traced
from heatsink.runtime.graph.passes.pipeline import NATIVE, PASSES_NATIVE
from heatsink.runtime.graph.weight import COMPUTED
from heatsink.runtime.model import Model

ALL = (
    "text_encoder", "text_encoder of SDXL", "text_encoder_2", "vae_decoder", "vae_encoder",
    "unet", "unet of SDXL",
)  # fmt: skip
MODEL = Path(__file__).resolve().parents[4] / "models" / "emoji"
CONFIGS = Path(heatsink.runtime.__file__).parent / "configs"
# What the passes leave nothing of in a UNet: products, norms and gates on their own, and copies.
GONE = {
    "aten.linear", "aten.conv2d", "aten.scaled_dot_product_attention", "aten.group_norm",
    "aten.layer_norm", "aten.gelu", "aten.chunk", "aten.transpose", "aten.contiguous",
    "aten.clone", "aten.reshape", "aten.add", "aten.dropout", "aten.upsample_nearest2d",
}  # fmt: skip


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


@pytest.fixture(scope="module")
def native(graphs: Callable[[str], Graph]) -> Callable[[str], Graph]:
    """The graph of a case as the native engine gets it."""
    done: dict[str, Graph] = {}

    def graph(name: str) -> Graph:
        if name not in done:
            done[name] = run_passes(graphs(name), PASSES_NATIVE)
        return done[name]

    return graph


@pytest.mark.parametrize("name", ALL)
def test_results_stay(
    name: str, cases: Any, graphs: Any, native: Any, agree: Callable[..., None], seed: int
) -> None:
    agree(graphs(name), native(name), cases[name].inputs(3, seed))


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_and_one_row_run(name: str, cases: Any, native: Any, seed: int) -> None:
    graph = native(name)
    for rows in (0, 1):
        for output, value in graph.run(cases[name].inputs(rows, seed)).items():
            sizes = [rows if s == BATCH else s for s in graph.outputs[output].shape]
            assert list(value.shape) == sizes


@pytest.mark.parametrize("name", ["unet", "unet of SDXL", "text_encoder", "vae_decoder"])
def test_every_product_norm_and_copy_is_found(name: str, graphs: Any, native: Any) -> None:
    before, after = _ops(graphs(name)), _ops(native(name))
    # Tokens and positions of a prompt are added once; an autoencoder transposes views.
    allowed = {"text_encoder": {"aten.add"}, "vae_decoder": {"aten.transpose"}}
    assert set(after) & GONE == allowed.get(name, set())
    norms = before["aten.group_norm"]
    assert after["heatsink.group_norm_silu"] in range(norms, norms + 9)
    assert after["heatsink.layer_norm"] == before["aten.layer_norm"]
    assert after["heatsink.attention"] == before["aten.scaled_dot_product_attention"] > 0
    assert after["heatsink.conv2d"] == before["aten.conv2d"]


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae_encoder"])
def test_a_second_time_changes_nothing(name: str, native: Any, structure: Any) -> None:
    graph = native(name)
    assert structure(run_passes(graph, PASSES_NATIVE)) == structure(graph)


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder", "unet", "unet of SDXL"])
def test_nothing_depends_on_names(
    name: str, graphs: Any, native: Any, renamed: Any, structure: Any
) -> None:
    other = run_passes(renamed(graphs(name)), PASSES_NATIVE)
    assert structure(other) == structure(native(name))
    assert structure(other) != structure(graphs(name))
    rows = [[(o.slice, o.transform) for o in origins] for origins in other.origins.values()]
    plain = native(name).origins.values()
    assert rows == [[(o.slice, o.transform) for o in origins] for origins in plain]


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "unet", "unet of SDXL"])
def test_every_row_of_every_weight_is_its_origins(name: str, graphs: Any, native: Any) -> None:
    captured, graph = graphs(name), native(name)
    used: Counter[str] = Counter()
    for weight, origins in graph.origins.items():
        values = graph.weights[weight].load()
        for start, stop, origin in spans(origins, values.shape[0]):
            if origin.transform == COMPUTED:
                continue
            assert origin.transform == "identity" or "by" in origin.transform
            whole = captured.weights[origin.parameter].load()
            low, high = origin.slice[0] if origin.slice else (0, whole.shape[0])
            used[origin.parameter] += high - low
            if origin.transform == "identity":
                assert torch.equal(values[start:stop], whole[low:high])
    # No row is used twice, and none is lost but those that no output used.
    for parameter, rows in used.items():
        assert rows == captured.weights[parameter].shape[0]
    assert set(used) <= set(captured.weights)
    assert sum(used.values()) > 100


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "unet", "unet of SDXL"])
def test_modules_keep_their_operations(name: str, graphs: Any, native: Any) -> None:
    paths = {module_path(n) for n in graphs(name).nodes if n.op == "call_function"}
    kept = {module_path(n) for n in native(name).nodes if n.op == "call_function"}
    assert kept <= paths
    # Attentions, norms and convolutions are still told apart.
    found = [
        module_path(n) for n in native(name).nodes if operator(n).startswith("heatsink.conv2d")
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["text_encoder_2", "vae_encoder", "unet", "unet of SDXL"])
def test_the_batch_stays_a_symbol(name: str, graphs: Any, native: Any) -> None:
    (symbol,) = {str(symbol) for symbol in graphs(name).ranges}
    values = [v for n in native(name).nodes if (v := traced(n)) is not None]
    batched = [v for v in values if v.dim() and symbol in str(v.shape[0])]
    assert len(batched) > 20
    for output in native(name).output_nodes():
        assert symbol in str(output.meta["val"].shape[0])


@pytest.fixture(scope="module")
def bundled() -> Callable[[str], tuple[Graph, Graph]]:
    """The bundled model's components, captured and as the native engine gets them."""
    if not (MODEL / "model_index.json").is_file():
        pytest.skip("the bundled model is not in this checkout")
    model = Model.open(MODEL)

    def graph(name: str) -> tuple[Graph, Graph]:
        config = model.config(name)
        shapes = input_shapes(name, config, height=8, width=8, text_length=24)
        captured = capture(
            name,
            model.module(name),
            model.weights(name),
            model.buffers(name),
            example_shapes=shapes,
        )
        return captured, run_passes(captured, PASSES_NATIVE)

    return graph


def _check_products(graph: Graph, blocks: int, others: int) -> None:
    """A transformer block holds seven products: q and k and v, out, q, k and v, out, and two."""
    assert _ops(graph)["heatsink.linear"] == 7 * blocks + others
    assert _ops(graph)["heatsink.attention"] == 2 * blocks
    assert _ops(graph)["heatsink.layer_norm"] == 3 * blocks
    assert set(_ops(graph)) & GONE == set()


@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae_decoder"])
def test_the_bundled_model(name: str, bundled: Any, agree: Callable[..., None], seed: int) -> None:
    captured, graph = bundled(name)
    before, after = (sum(_ops(each).values()) for each in (captured, graph))
    assert after < 0.55 * before
    if name == "unet":
        # Of time: an embedding of two products, and one for each of eleven residual blocks.
        _check_products(graph, blocks=7, others=2 + 11)
    draw = torch.Generator().manual_seed(seed)
    inputs = {}
    for given, spec in captured.inputs.items():
        size = [2 if s == BATCH else int(s) for s in spec.shape]
        if spec.dtype == torch.int64:
            inputs[given] = torch.randint(0, 1000, size, generator=draw)
        elif given == "timestep":
            inputs[given] = 999 * torch.rand(size, generator=draw)
        else:
            inputs[given] = torch.randn(size, generator=draw)
    agree(captured, graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    # Others: the embeddings of time and (SDXL) sizes, residual blocks, and the products at the ends
    # of 11 transformers (SDXL); SD1.5 has convolutions there.
    ("model", "latents", "blocks", "others", "seams"),
    [("sd1", 64, 16, 2 + 22, 8), ("sdxl", 128, 70, 4 + 17 + 2 * 11, 5)],
)
def test_whole_unets_on_meta(
    model: str, latents: int, blocks: int, others: int, seams: int
) -> None:
    configs: dict[str, Any] = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    config = configs["unet"]
    module = meta_module("unet", config)
    shapes = input_shapes("unet", config, height=latents, width=latents)
    captured = capture("unet", module, dict(module.named_parameters()), example_shapes=shapes)
    graph = run_passes(captured, PASSES_NATIVE)
    _check_products(graph, blocks, others)
    before, after = _ops(captured), _ops(graph)
    assert after["heatsink.conv2d"] == before["aten.conv2d"]
    # A concatenation whose groups end at its seam is gone, and its norm is two.
    assert after["heatsink.group_norm_silu"] == before["aten.group_norm"] + seams
    assert before["aten.cat"] - after["aten.cat"] == seams


def test_every_pass_has_a_name_of_its_own() -> None:
    assert tuple(NATIVE.values()) == PASSES_NATIVE
    assert len(set(NATIVE.values())) == len(NATIVE) >= 12


def test_an_unknown_operation_stays_and_runs(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Conv1d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                self.last(torch.cumsum(self.first(x), dim=1).as_strided((2, 4, 6), (24, 6, 1))),
            )

    torch.manual_seed(seed)
    graph = capture_net(Net(), 4, 6)
    edited = run_passes(graph, PASSES_NATIVE)
    assert {"aten.cumsum", "aten.as_strided", "aten.conv1d"} <= set(_ops(edited))
    agree(graph, edited, {"x": torch.randn(2, 4, 6)})
