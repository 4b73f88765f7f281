from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import heatsink.kernels as hk
from heatsink.kernels import catalog

# In a process of its own: which module is imported first matters.
FIRST = """
import sys
{first}
import heatsink.kernels as hk
from heatsink.kernels import silu_mul
assert callable(hk.silu_mul) and hk.silu_mul is silu_mul
assert sys.modules["heatsink.kernels.silu_mul"].silu_mul is silu_mul
"""


@pytest.mark.parametrize(
    "first",
    [
        "",
        "from heatsink.kernels.silu_mul import silu_mul",
        "import heatsink.kernels.catalog as c; c.ops()",
    ],
    ids=["op", "module", "catalog"],
)
def test_an_op_is_its_function_whatever_was_imported_first(first: str) -> None:
    subprocess.run([sys.executable, "-P", "-c", FIRST.format(first=first)], check=True)


def test_every_op_is_there() -> None:
    for name in hk.__all__:
        assert callable(getattr(hk, name)), name
    with pytest.raises(AttributeError, match="no attribute 'conv_everything'"):
        _ = hk.conv_everything  # type: ignore[attr-defined]


def test_naming_the_package_imports_no_torch() -> None:
    code = "import sys, heatsink.kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


# In a process of its own: here every op may be there already.
LOADED = """
import sys, torch
import heatsink.kernels as hk
path, names = sys.argv[1], sys.argv[2:]
assert names and not any(hasattr(torch.ops.heatsink, name) for name in names)
assert hk.load() is None
assert [name for name in names if not hasattr(torch.ops.heatsink, name)] == []
gate, up = torch.arange(-6.0, 6.0).reshape(2, 2, 3)
out = torch.ops.heatsink.silu_mul(gate, up)
assert torch.equal(out, hk.silu_mul(gate, up))
assert torch.equal(torch.export.load(path).module()(gate, up), out)
"""


def test_load_registers_every_op_for_torch_ops_and_exported_programs(tmp_path: Path) -> None:
    class Gate(torch.nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return hk.silu_mul(gate, up)

    path = tmp_path / "gate.pt2"
    torch.export.save(torch.export.export(Gate(), (torch.ones(2, 3), torch.ones(2, 3))), path)
    names = [name for name in hk.__all__ if name not in ("load", "use_cache")]
    # The products have no Triton kernels, so the catalogue leaves them out.
    products = {"linear", "lora_linear", "conv2d"}
    assert {*names} - products - {"normal"} == {*catalog.MODULES} - {"noise"}
    subprocess.run([sys.executable, "-P", "-c", LOADED, str(path), *names], check=True)
