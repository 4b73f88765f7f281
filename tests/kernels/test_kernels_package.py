from __future__ import annotations

import subprocess
import sys

import pytest

import heatsink.kernels as hk

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
