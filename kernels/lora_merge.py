"""Weights with low-rank adapters merged in, always from the pristine ones.

    W = W0 * (1 + sum_i (g_i - 1)) + sum_i g_i s_i (B_i A_i)
    g_i = 1, or m_i / |W0 + s_i B_i A_i| of each row where the adapter has magnitudes (DoRA)

One adapter merges as PEFT does; of several, each one's gain is that of the adapter alone, so that
only rounding depends on their order. A weight is a matrix of rows (its first dimension) and
columns (all others): linear layers and convolutions alike, in contiguous or channels_last memory.
Nothing is subtracted: going from one set of adapters to another and back, or to none, gives the
same bits. Rows without terms are copied bit by bit.

W0: fp16, bf16, fp32; A, B and m each fp16, bf16 or fp32. Computed in fp32, rounded once. CUDA:
Triton, sm_80 and later, all weights in one launch (of each class that there is, see
`_merge_tables`; a model's adapter is of one class as a rule); CPU: C++, or PyTorch operations,
within rounding and in other bits. A row's bits depend on its weight and that weight's terms alone;
on CUDA also on whether base and out begin at multiples of 16 bytes, as PyTorch's own memory does
and a view of it may not.

Sources: Hu et al., "LoRA" (https://arxiv.org/abs/2106.09685); Liu et al., "DoRA"
(https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._merge_tables import MergeTables, TermTable
from heatsink.kernels._merge_terms import (
    Term,
    check_memory,
    check_terms,
    check_weights,
    flat,
    unflat,
)
from heatsink.kernels._op import Case, Inputs, Op, normal

# What callers need.
__all__ = ["KERNEL", "OP", "Term", "key", "lora_merge", "plan"]

KERNEL = Kernel("lora_merge", module="lora_merge")


def lora_merge(base: Sequence[Tensor], out: Sequence[Tensor], terms: Sequence[Term]) -> None:
    """Write every `out[j]`: `base[j]` with its terms, in the order in which they are given.

    Args:
        base: pristine weights of any shapes, of one dtype: fp16, bf16 or fp32; each contiguous or
            channels_last.
        out: where to write, of the same shapes, dtype and layouts. `out[j]` may be `base[j]` itself
            where the weight has no terms, and is then left alone; else it shares no memory.
        terms: what is added, of finite values.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes, layouts or devices differ, memory overlaps, a term does not fit its
            weight or a gradient is required.
    """
    check_weights(base, out)
    check_terms(terms, base)
    # A compiler's stand-ins have no memory.
    if not torch.compiler.is_compiling():
        check_memory(base, out, [term.weight for term in terms if term.counts])
    if base:
        torch.ops.heatsink.lora_merge(list(base), list(out), *flat(terms))


def key(base: Sequence[Tensor], *_: object, **__: object) -> Key:
    """What the configuration depends on."""
    return {"dtype": short(base[0].dtype)}


def plan(
    config: Config, base: Sequence[Tensor], out: Sequence[Tensor], terms: Sequence[Term]
) -> tuple[list[Tensor], list[Launch]]:
    """`out` and the launch that fills it."""
    return list(out), MergeTables(base, out).launches(config, KERNEL, TermTable(base, terms))


def _lora_merge_triton(
    base: list[Tensor],
    out: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    magnitudes: list[Tensor],
    scales: list[float],
    places: list[int],
) -> None:
    config = lookup("lora_merge", key(base), target_of(base[0].device))
    _, launches = plan(config, base, out, unflat(a, b, magnitudes, scales, places))
    run(launches)


def _lora_merge_torch(
    base: list[Tensor],
    out: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    magnitudes: list[Tensor],
    scales: list[float],
    places: list[int],
) -> None:
    of_weight: dict[int, list[Term]] = {}
    for term in unflat(a, b, magnitudes, scales, places):
        of_weight.setdefault(term.weight, []).append(term)
    for j, (before, after) in enumerate(zip(base, out, strict=True)):
        after.copy_(before)
        if j in of_weight:
            _merge_one(before, after, of_weight[j])


def _merge_one(base: Tensor, out: Tensor, terms: Sequence[Term]) -> None:
    """Write the rows of `out` that have terms; the others hold base's."""
    wide = base.float()
    delta = torch.zeros(base.shape, device=base.device)
    per_row = (-1, *(1 for _ in base.shape[1:]))
    factor = torch.ones(base.shape[0], device=base.device)
    touched = torch.zeros(base.shape[0], dtype=torch.bool, device=base.device)
    for term in terms:
        rows = slice(term.row, term.row + (term.b.shape[0] - 1) * term.step + 1, term.step)
        part = term.b.float() @ term.a.float().flatten(1)
        part = part.mul_(term.scale).reshape(len(part), *base.shape[1:])
        if term.magnitude is not None:
            norm = torch.linalg.vector_norm((wide[rows] + part).flatten(1), dim=1)
            gain = term.magnitude.float() / norm
            factor[rows] += gain - 1
            part = part * gain.reshape(per_row)
        delta[rows] += part
        touched[rows] = True
    merged = (wide * factor.reshape(per_row)).add_(delta).to(base.dtype)
    out.copy_(torch.where(touched.reshape(per_row), merged, base))


def _lora_merge_fake(
    base: list[Tensor],
    out: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    magnitudes: list[Tensor],
    scales: list[float],
    places: list[int],
) -> None:
    return None


torch.library.define(
    "heatsink::lora_merge",
    "(Tensor[] base, Tensor(a!)[] out, Tensor[] a, Tensor[] b, Tensor[] magnitudes, "
    "float[] scales, int[] places) -> ()",
)
torch.library.impl("heatsink::lora_merge", "default", _lora_merge_torch)
torch.library.impl("heatsink::lora_merge", "cuda", _lora_merge_triton)
torch.library.register_fake("heatsink::lora_merge", _lora_merge_fake)
_native.load()


# (rows, columns) and how often: the linears of every transformer block's attention and feed-forward
# at a level of Stable Diffusion XL, and the attentions of 1.5.
_SDXL = ((1280, 1280, 6), (1280, 2048, 2), (10240, 1280, 1), (1280, 5120, 1))
_SD15 = (
    *((width, width, 6 * blocks) for width, blocks in ((320, 5), (640, 5), (1280, 6))),
    *((width, 768, 2 * blocks) for width, blocks in ((320, 5), (640, 5), (1280, 6))),
)


def _case(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    rank: int,
    adapter: torch.dtype | None = None,
    *,
    magnitude: bool = False,
    timed: bool = True,
) -> Case:
    def make(device: torch.device) -> Inputs:
        kind = dtype if adapter is None else adapter
        base = [normal(shape, dtype, device, seed=j) for j, shape in enumerate(shapes)]
        # Weights of convolutions as native engines have them.
        base = [
            x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in base
        ]
        terms = []
        for j, shape in enumerate(shapes):
            a = normal((rank, *shape[1:]), kind, device, seed=2 * j)
            b = normal((shape[0], rank), kind, device, seed=2 * j + 1)
            lengths = normal((shape[0],), kind, device, seed=j) if magnitude else None
            terms.append(Term(j, a, b, 0.5 / rank, lengths))
        return {"base": base, "out": [torch.empty_like(x) for x in base], "terms": terms}

    return Case(name, make, timed)


def _layers(*groups: tuple[int, int, int]) -> list[tuple[int, ...]]:
    return [(rows, columns) for rows, columns, count in groups for _ in range(count)]


_CONVOLUTIONS = [(320, 320, 3, 3), (640, 320, 1, 1), (320, 4, 3, 3)]

OP = Op(
    name="lora_merge",
    public=lora_merge,
    kernels=(KERNEL,),
    cases=(
        _case("sdxl-block-16-fp16", _layers(*_SDXL), torch.float16, 16),
        _case("sdxl-block-64-fp16", _layers(*_SDXL), torch.float16, 64),
        _case("sdxl-block-16-bf16", _layers(*_SDXL), torch.bfloat16, 16),
        _case("sdxl-block-16-fp32-in-fp16", _layers(*_SDXL), torch.float16, 16, torch.float32),
        _case("sdxl-block-dora-16-fp16", _layers(*_SDXL), torch.float16, 16, magnitude=True),
        _case("sdxl-10-blocks-16-fp16", 10 * _layers(*_SDXL), torch.float16, 16, timed=False),
        _case("sd15-attentions-16-fp16", _layers(*_SD15), torch.float16, 16),
        _case("sd15-attentions-16-fp32", _layers(*_SD15), torch.float32, 16, timed=False),
        _case(
            "sd15-attentions-16-bf16-in-fp16",
            _layers(*_SD15),
            torch.float16,
            16,
            torch.bfloat16,
            timed=False,
        ),
        _case("sd15-convolutions-16-fp16", _CONVOLUTIONS, torch.float16, 16),
        _case(
            "sd15-convolutions-dora-16-fp16",
            _CONVOLUTIONS,
            torch.float16,
            16,
            magnitude=True,
            timed=False,
        ),
        _case(
            "bundled-16-fp32",
            _layers((128, 128, 8), (192, 192, 8), (1024, 128, 2)),
            torch.float32,
            16,
        ),
        _case("bundled-dora-16-fp32", _layers((128, 128, 4)), torch.float32, 16, magnitude=True),
    ),
    key=key,
    plan=plan,
    outputs=lambda inputs, result: inputs["out"],
    space=lambda key, arch: [
        {
            "BLOCK_M": m,
            "ANY_M": 32,
            "BLOCK_N": n,
            "BLOCK_K": 16,
            "COLUMNS": c,
            "warps": w,
            "stages": 2,
        }
        for m, n, w in ((32, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8))
        for c in (1024, 2048)
    ],
)
