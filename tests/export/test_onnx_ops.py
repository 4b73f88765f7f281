"""The ops' translations to ONNX, run by ONNX Runtime against the ops in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heatsink.export.onnx_ops import MIN_OPSET, translations
from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.plain import PLAIN
from heatsink.runtime.graph.program import to_program

TABLE = translations(MIN_OPSET)


class Op(nn.Module):
    """An op whose tensors are this module's inputs, in order; the rest is written into it."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.target = getattr(torch.ops.heatsink, name).default
        self.given = [None if isinstance(a, Tensor) else (a,) for a in args]

    def forward(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        out: Tensor = self.target(*(next(left) if g is None else g[0] for g in self.given))
        return out


def _n(*shape: int) -> Tensor:
    return torch.randn(shape)


CASES: dict[str, Callable[[], tuple[str, tuple[Any, ...]]]] = {
    "attention": lambda: (
        "attention",
        (_n(2, 5, 2, 8), _n(2, 7, 2, 8), _n(2, 7, 2, 8), 0.3, False, None),
    ),
    "attention, causal": lambda: (
        "attention",
        (_n(2, 5, 2, 8), _n(2, 5, 2, 8), _n(2, 5, 2, 8), 0.3, True, None),
    ),
    "attention, bias": lambda: (
        "attention",
        (_n(2, 5, 2, 8), _n(2, 7, 2, 8), _n(2, 7, 2, 8), 0.3, False, _n(2, 1, 5, 7)),
    ),
    "group norm and silu": lambda: (
        "group_norm_silu",
        (_n(2, 8, 3, 4), 4, _n(8), _n(8), 1e-5, None, None, True),
    ),
    "group norm, modulated, of tokens": lambda: (
        "group_norm_silu",
        (_n(2, 8, 6), 2, None, None, 1e-5, _n(2, 8), _n(2, 8), False),
    ),
    "layer norm": lambda: ("layer_norm", (_n(2, 5, 8), _n(8), _n(8), 1e-5, None, None)),
    "layer norm, modulated": lambda: (
        "layer_norm",
        (_n(2, 5, 8), None, None, 1e-6, _n(2, 8), _n(2, 8)),
    ),
    "geglu": lambda: ("geglu", (_n(2, 5, 8),)),
    "linear": lambda: ("linear", (_n(2, 5, 8), _n(6, 8), None, None, None, "")),
    "linear, all": lambda: (
        "linear",
        (_n(2, 5, 8), _n(6, 8), _n(6), _n(2, 5, 6), _n(2, 6), "silu"),
    ),
    "linear, gelu": lambda: ("linear", (_n(2, 8), _n(6, 8), _n(6), None, None, "gelu")),
    "linear, tanh": lambda: ("linear", (_n(2, 8), _n(6, 8), _n(6), None, None, "gelu_tanh")),
    "linear, quick": lambda: ("linear", (_n(2, 8), _n(6, 8), _n(6), None, None, "quick_gelu")),
    "linear, geglu": lambda: (
        "linear",
        (_n(2, 5, 8), _n(6, 8), _n(6), _n(2, 5, 3), _n(2, 6), "geglu"),
    ),
    "conv2d": lambda: (
        "conv2d",
        (_n(2, 4, 6, 8), None, _n(5, 4, 3, 3), None, None, None, 2, 1, 1, ""),
    ),
    "conv2d, all": lambda: (
        "conv2d",
        (
            *(_n(2, 3, 4, 5), _n(2, 1, 4, 5), _n(6, 4, 3, 3), _n(6), _n(2, 6, 8, 10), _n(2, 6)),
            *(1, 1, 2, "silu"),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_the_same(case: str, tmp_path: Path, seed: int) -> None:
    import onnxruntime

    torch.manual_seed(seed)
    name, args = CASES[case]()
    tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
    file = tmp_path / "op.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Op(name, args).eval(),
            tensors,
            file,
            dynamo=True,
            opset_version=MIN_OPSET,
            custom_translation_table=TABLE,
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    fed = dict(zip(names, (t.numpy() for t in tensors), strict=True))
    (found,) = session.run(None, fed)
    wide = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    exact = PLAIN[f"heatsink.{name}"](*wide).numpy()
    plain = PLAIN[f"heatsink.{name}"](*args).numpy()
    limit = np.abs(exact).max() * np.finfo(np.float32).eps
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= 2 * (np.abs(plain - exact).max() + limit)


def test_an_older_opset_is_refused() -> None:
    with pytest.raises(NotBuilt, match="opset 22 is too old for fused graphs: 23 is needed"):
        translations(22)


def test_every_op_of_the_native_passes_has_a_translation() -> None:
    assert {str(target) for target in TABLE} == {f"{name}.default" for name in PLAIN}


def test_a_whole_fused_graph_is_translated() -> None:
    """Every node of it, with the ops under the names that backends look for."""
    net = _block()
    specs = {"x": TensorSpec(("batch", 8, 4, 4), torch.float32)}
    captured = capture_module(
        "net", copy.deepcopy(net).to("meta"), net.state_dict(), {}, specs, ("y",)
    )
    graph = run_passes(captured, PASSES_NATIVE)
    ours = {str(n.target).split(".")[1] for n in graph.nodes if "heatsink" in str(n.target)}
    assert ours == {"attention", "group_norm_silu", "layer_norm", "linear", "conv2d"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            to_program(graph),
            dynamo=True,
            optimize=False,
            opset_version=MIN_OPSET,
            custom_translation_table=TABLE,
        )
    assert exported is not None
    found = {node.op_type for node in exported.model.graph}
    assert {"Attention", "LayerNormalization", "InstanceNormalization", "Conv", "Gelu"} <= found
    assert {node.domain for node in exported.model.graph} == {""}


def _block() -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
            self.block = BasicTransformerBlock(8, 2, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.conv(nn.functional.silu(self.norm(x)))
            tokens = self.block(y.permute(0, 2, 3, 1).reshape(x.shape[0], 16, 8))
            return (x + tokens.reshape(x.shape[0], 4, 4, 8).permute(0, 3, 1, 2),)

    return Block()
