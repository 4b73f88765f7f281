from __future__ import annotations

import copy
import hashlib
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from heatsink.export.onnx import PATH_PROPERTY, OnnxFile, to_onnx
from heatsink.runtime.errors import NotBuilt, ResourceError
from heatsink.runtime.graph.capture import capture, capture_module
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec, module_path
from heatsink.runtime.graph.passes import run_passes, to_fixpoint
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.weight import Origin

PASSES = [to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code)]
NAMES = ["text_encoder_2", "vae_decoder", "vae_encoder", "unet"]


def _module(name: str) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    if name == "text_encoder_2":
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                vocab_size=40, max_position_embeddings=7, projection_dim=12,
                bos_token_id=1, eos_token_id=5, pad_token_id=5,
            )
        )  # fmt: skip
    if name == "unet":
        return UNet2DConditionModel(
            block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=2, cross_attention_dim=12,
        )  # fmt: skip
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def graphs() -> Callable[[str], Graph]:
    done: dict[str, Graph] = {}

    def graph(name: str) -> Graph:
        if name not in done:
            torch.manual_seed(len(name))
            module = _module(name).eval()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            shapes = input_shapes(
                name, module.config.to_dict() if name == "text_encoder_2" else module.config,
                height=8, width=8, text_length=7,
            )  # fmt: skip
            meta = copy.deepcopy(module).to("meta")
            captured = capture(name, meta, module.state_dict(), example_shapes=shapes)
            done[name] = run_passes(captured, PASSES)
        return done[name]

    return graph


@pytest.fixture(scope="module")
def files(
    graphs: Callable[[str], Graph], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], OnnxFile]:
    """The graph of a name, written once with the defaults."""
    done: dict[str, OnnxFile] = {}

    def written(name: str) -> OnnxFile:
        if name not in done:
            done[name] = to_onnx(graphs(name), tmp_path_factory.mktemp(name) / f"{name}.onnx")
        return done[name]

    return written


def _inputs(graph: Graph, rows: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    given = {}
    for name, spec in graph.inputs.items():
        size = [rows if s == BATCH else int(s) for s in spec.shape]
        if spec.dtype == torch.int64:
            given[name] = torch.randint(0, 40, size, generator=draw)
        else:
            given[name] = torch.randn(size, generator=draw) * (300 if name == "timestep" else 1)
    return given


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _files(path: Path) -> list[str]:
    return [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.parent.glob("*.onnx*"))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_computes_the_graph(
    name: str, graphs: Callable[[str], Graph], files: Callable[[str], OnnxFile], seed: int
) -> None:
    graph, written = graphs(name), files(name)
    onnx.checker.check_model(str(written.path), full_check=True)
    session = _session(written.path)
    assert [i.name for i in session.get_inputs()] == list(graph.inputs)
    assert [o.name for o in session.get_outputs()] == list(graph.outputs)
    for value, spec in zip(session.get_inputs(), graph.inputs.values(), strict=True):
        assert tuple(value.shape) == spec.shape
    for value, spec in zip(session.get_outputs(), graph.outputs.values(), strict=True):
        assert tuple(value.shape) == spec.shape
    for rows in (1, 3):
        inputs = _inputs(graph, rows, seed)
        exact, plain = graph.run(inputs, dtype=torch.float64), graph.run(inputs)
        results = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for result, (output, reference) in zip(results, exact.items(), strict=True):
            limit = reference.abs().max() * torch.finfo(torch.float32).eps
            error = (plain[output].double() - reference).abs().max()
            difference = (torch.from_numpy(result).double() - reference).abs().max()
            assert difference <= 2 * (error + limit)


def test_every_node_has_its_modules_path(
    graphs: Callable[[str], Graph], files: Callable[[str], OnnxFile]
) -> None:
    graph, written = graphs("unet"), files("unet")
    model = onnx.load(str(written.path), load_external_data=False)
    assert written.nodes == len(model.graph.node) > 100
    paths = {module_path(n) for n in graph.nodes if n.op == "call_function"}
    weights = set(graph.weights)
    for node in model.graph.node:
        (entry,) = node.metadata_props
        assert entry.key == PATH_PROPERTY
        assert entry.value in paths
        if node.op_type in {"Conv", "MatMul", "Gemm"}:
            # The weight may come through a transposition of the same module.
            assert any(name.startswith(entry.value + ".") for name in weights) or (
                ".attn" in entry.value
            )
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    for node in convolutions:
        assert node.input[1] == f"{node.metadata_props[0].value}.weight"


def test_initialisers_are_the_checkpoints_and_have_origins(
    graphs: Callable[[str], Graph], files: Callable[[str], OnnxFile]
) -> None:
    graph, written = graphs("vae_decoder"), files("vae_decoder")
    model = onnx.load(str(written.path))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert set(stored) == set(written.origins) == set(graph.weights)
    for name, values in stored.items():
        np.testing.assert_array_equal(values, graph.weights[name].load().numpy())
    (origin,) = written.origins["post_quant_conv.weight"]
    assert origin == Origin("post_quant_conv.weight", None, "divide by 0.18215")


def test_the_same_graph_gives_the_same_bytes(
    graphs: Callable[[str], Graph], files: Callable[[str], OnnxFile], tmp_path: Path
) -> None:
    again = to_onnx(graphs("vae_encoder"), tmp_path / "vae_encoder.onnx")
    first = _files(files("vae_encoder").path)
    assert len(first) == 2
    assert _files(again.path) == first


def test_nothing_of_this_machine_is_written(
    files: Callable[[str], OnnxFile],
) -> None:
    path = files("vae_encoder").path
    content = path.read_bytes()
    for word in (b"site-packages", b".py", str(Path.cwd()).encode(), str(path.parent).encode()):
        assert word not in content


def test_group_norm_is_written_as_asked(
    graphs: Callable[[str], Graph], files: Callable[[str], OnnxFile], tmp_path: Path
) -> None:
    fused = to_onnx(graphs("vae_encoder"), tmp_path / "fused.onnx", fused_group_norm=True)
    kinds = []
    for path in (files("vae_encoder").path, fused.path):
        model = onnx.load(str(path), load_external_data=False)
        kinds.append(Counter(node.op_type for node in model.graph.node))
    assert kinds[0]["InstanceNormalization"] == kinds[1]["GroupNormalization"] > 0
    assert kinds[0]["GroupNormalization"] == kinds[1]["InstanceNormalization"] == 0


def test_an_older_opset_decomposes_attention(
    graphs: Callable[[str], Graph], tmp_path: Path, seed: int
) -> None:
    graph = graphs("text_encoder_2")
    written = to_onnx(graph, tmp_path / "old.onnx", opset=18)
    onnx.checker.check_model(str(written.path), full_check=True)
    model = onnx.load(str(written.path), load_external_data=False)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 18)]
    assert not any(node.op_type == "Attention" for node in model.graph.node)
    inputs = _inputs(graph, 2, seed)
    results = _session(written.path).run(None, {k: v.numpy() for k, v in inputs.items()})
    for result, expected in zip(results, graph.run(inputs).values(), strict=True):
        # Attention is computed in another order: a few roundings more.
        limit = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert float((torch.from_numpy(result) - expected).abs().max()) <= limit
    with pytest.raises(NotBuilt, match="opset 17 is too old: at least 18"):
        to_onnx(graph, tmp_path / "older.onnx", opset=17)


class Products(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            x = layer(x)
        return (x,)


def test_weights_are_streamed_one_after_the_other(tmp_path: Path) -> None:
    count, width = 24, 1024
    with torch.device("meta"):
        net = Products(count, width)
    alive: list[int] = [0]
    most: list[int] = [0]

    class Counting(dict[str, Tensor]):
        def __contains__(self, name: object) -> bool:
            return True

        def __getitem__(self, name: str) -> Tensor:
            values = torch.full((width, width), float(name.split(".")[1]))
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref_finalize(values, alive)
            return values

    graph = capture_module(
        "net", net, Counting(), {}, {"x": TensorSpec((BATCH, width), torch.float32)}, ["y"]
    )
    assert most == [0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written = to_onnx(graph, tmp_path / "net.onnx")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most[0] <= 2
    assert written.data is not None
    assert written.data.stat().st_size == count * width * width * 4
    # Less than the weights together, though the exporter's own libraries are counted too.
    assert (after - before) * 1024 < count * width * width * 4
    assert written.path.stat().st_size < 100_000


def weakref_finalize(values: Tensor, alive: list[int]) -> None:
    import weakref

    def gone() -> None:
        alive[0] -= 1

    weakref.finalize(values, gone)


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (torch.special.bessel_j0(x),)

    graph = capture_module(
        "odd", Odd(), {}, {}, {"x": TensorSpec((BATCH, 4), torch.float32)}, ["y"]
    )
    with pytest.raises(NotBuilt, match=r"odd: no translation to ONNX.*bessel_j0"):
        to_onnx(graph, tmp_path / "odd.onnx")


def test_a_file_that_cannot_be_written_leaves_nothing(
    graphs: Callable[[str], Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def full(model: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        path.with_name(options["external_data"]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        to_onnx(graphs("vae_encoder"), tmp_path / "vae_encoder.onnx")
    assert list(tmp_path.iterdir()) == []
