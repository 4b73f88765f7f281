"""Merging adapters on the CPU against PEFT, whose layers diffusers' `fuse_lora` calls, as ratios.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_merges_bench.py -q

Raced are one swap, from one adapter to another of rank 16 or 64 on every linear of the attentions:
ours writes each weight once from the pristine one; PEFT takes the old adapter out and merges the
new one. And copies of the same weights, which read and write what a swap must. A ratio above 1
means that the other takes longer. The whole of Stable Diffusion 1.5 is marked slow.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.kernels import _native
from heatsink.kernels.lora_merge import Term
from heatsink.kernels.merge_plan import MergePlan

peft = pytest.importorskip("peft", reason="needs PEFT to race against")
pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Width and blocks at each level of Stable Diffusion 1.5's UNet; a block has two attentions, one of
# them over 768 channels of text.
LEVELS = ((320, 5), (640, 5), (1280, 6))


def attentions(levels: tuple[tuple[int, int], ...], dtype: torch.dtype) -> nn.ModuleList:
    """The linears of the attentions, of random values."""
    shapes = [
        (inputs, width)
        for width, blocks in levels
        for _ in range(blocks)
        for inputs in (*[width] * 6, 768, 768)
    ]
    return nn.ModuleList(
        nn.Linear(inputs, width, bias=False, dtype=dtype) for inputs, width in shapes
    )


def with_adapters(layers: nn.ModuleList, rank: int) -> list[Any]:
    """PEFT's layers around the same weights, with adapters `a` and `b`."""
    names = [str(j) for j in range(len(layers))]
    config = peft.LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=names)
    for name in ("a", "b"):
        config.init_lora_weights = False
        peft.inject_adapter_in_model(config, layers, adapter_name=name)
    return list(layers)


def terms_of(layers: list[Any], name: str) -> list[Term]:
    return [
        Term(j, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for j, layer in enumerate(layers)
    ]


def swap_by_peft(layers: list[Any]) -> None:
    for name in ("a", "b"):
        for layer in layers:
            layer.merge(adapter_names=[name])
        for layer in layers:
            layer.unmerge()


def copy(base: list[Tensor], out: list[Tensor]) -> None:
    for _ in range(2):
        for x, y in zip(base, out, strict=True):
            y.copy_(x)


@pytest.mark.parametrize("against", ["peft", "copy"])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "levels", [((320, 1),), pytest.param(LEVELS, marks=pytest.mark.slow)], ids=["block", "sd15"]
)
def test_swap(
    levels: tuple[tuple[int, int], ...], dtype: str, rank: int, against: str, race: Any
) -> None:
    torch.manual_seed(rank)
    layers = with_adapters(attentions(levels, DTYPES[dtype]), rank)
    base = [layer.base_layer.weight.detach().clone() for layer in layers]
    out = [torch.empty_like(x) for x in base]
    plan = MergePlan(base, out)
    one, other = (plan.prepare(terms_of(layers, name)) for name in ("a", "b"))

    def swap() -> None:
        plan.merge([(one, 1.0)])
        plan.merge([(other, 1.0)])

    swap()
    for layer in layers:
        layer.merge(adapter_names=["b"])
    eps = torch.finfo(DTYPES[dtype]).eps
    for x, layer in zip(out, layers, strict=True):
        torch.testing.assert_close(x, layer.base_layer.weight.detach(), rtol=eps, atol=eps)
        layer.unmerge()
    others = {"peft": partial(swap_by_peft, layers), "copy": partial(copy, base, out)}
    race(f"merge-{len(layers)}-{dtype}-{rank}", swap, {against: others[against]})
