"""Memory that ONNX Runtime can't get is a `ResourceError`, on opening a file and on running it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.errors import EngineMismatch, HeatsinkError, ResourceError


def write_expand(path: Path) -> None:
    """A graph that repeats one number `size` times."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1]))
    size = ir.val("size", dtype=ir.DataType.INT64, shape=ir.Shape([1]))
    node = ir.node("Expand", [x, size])
    (y,) = node.outputs
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["n"])
    graph = ir.Graph([x, size], [y], nodes=[node], opset_imports={"": 18}, name="expand")
    ir.save(ir.Model(graph, ir_version=9), path)


def test_a_run_beyond_the_memory_names_component_and_shapes(tmp_path: Path) -> None:
    write_expand(tmp_path / "expand.onnx")
    session = OnnxRuntimeSession("expander", tmp_path / "expand.onnx", threads=1)

    def run(size: int) -> int:
        inputs = {"x": np.ones(1, np.float32), "size": np.array([size])}
        return len(session.run(inputs)["y"])

    # 16 TiB: no machine that runs this test has it.
    with pytest.raises(
        ResourceError, match=r"^no memory .* run expander on x \[1\], size \[1\]"
    ) as caught:
        run(2**42)
    assert run(5) == 5
    # The command line prints it on one line.
    assert "\n" not in str(caught.value)
    # A size that is no size is another fault, and stays what it is.
    with pytest.raises(Exception, match="overflow") as other:
        run(2**62)
    assert not isinstance(other.value, HeatsinkError)


def test_an_engine_beyond_the_memory_is_no_damaged_one(tmp_path: Path) -> None:
    """In a process of its own, whose address space ends before the weights' prepacked copy."""
    weights = ir.tensor(np.zeros((64, 2**20), np.float32), name="w")
    w = ir.val("w", const_value=weights)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 64]))
    node = ir.node("MatMul", [x, w])
    (y,) = node.outputs
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([1, 2**20])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[w], opset_imports={"": 18}, name="product"
    )
    ir.save(ir.Model(graph, ir_version=9), tmp_path / "big.onnx", external_data="big.bin")
    script = """
        import resource, sys
        from pathlib import Path
        import onnxruntime
        from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
        from heatsink.runtime.errors import ResourceError

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, -1))
        try:
            OnnxRuntimeSession("product", Path(sys.argv[1]), threads=1)
        except ResourceError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), str(tmp_path / "big.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "no memory is left to open big.onnx" in done.stdout, done


def test_a_file_that_is_none_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineMismatch, match=r"can't open none\.onnx"):
        OnnxRuntimeSession("none", tmp_path / "none.onnx", threads=1)
