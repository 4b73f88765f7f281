"""On a GPU, with the configurations that are looked up there: a sample's bits are its own.

Neither the batch (1 to 17), nor the place in it, nor how the arguments lie in memory may change a
bit. Each op's own tests show the same of its kernels under the interpreter, for few batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels.attention import attention
from heatsink.kernels.fingerprint import fingerprint
from heatsink.kernels.geglu import geglu
from heatsink.kernels.group_norm_silu import group_norm_silu
from heatsink.kernels.guided_step import guided_step
from heatsink.kernels.layer_norm import layer_norm
from heatsink.kernels.noise import normal
from heatsink.kernels.rms_norm import rms_norm
from heatsink.kernels.rotary import rotary
from heatsink.kernels.silu_mul import silu_mul

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BATCHES = range(1, 18)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Given = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """An op at one shape.

    Attributes:
        run: the op.
        rows: by argument, a sample's shape.
        shared: arguments that the samples share, by shape.
        rest: what is no tensor.
    """

    run: Callable[..., Any]
    rows: dict[str, tuple[int, ...]]
    shared: dict[str, tuple[int, ...]]
    rest: Given


def use(run: Callable[..., Any], rows: dict[str, Any], **rest: Any) -> Use:
    shared = {name: rest.pop(name) for name in ("weight", "bias_c") if name in rest}
    renamed = {name.removesuffix("_c"): shape for name, shape in shared.items()}
    return Use(run, rows, renamed, rest)


def step(out: Tensor, **rows: Any) -> tuple[Tensor, Tensor]:
    """`guided_step` of samples that bring their two rows of `out` with them."""
    index = torch.arange(len(out), dtype=torch.int32, device=out.device)
    pairs = out.transpose(0, 1)
    joined = torch.cat([pairs[0], pairs[1]])
    return guided_step(out=joined, uncond=index, cond=index + len(out), **rows)


def norm(channels: int, *pixels: int, groups: int = 32) -> Use:
    rows = {"x": (channels, *pixels), "scale": (channels,), "shift": (channels,)}
    return use(group_norm_silu, rows, weight=(channels,), bias_c=(channels,), groups=groups)


def of_rows(tokens: int, width: int) -> Use:
    rows = {"x": (tokens, width), "scale": (width,), "shift": (width,)}
    return use(layer_norm, rows, weight=(width,), bias_c=(width,))


def turned(heads: int, head_dim: int, interleaved: bool) -> Use:
    angles = (77, head_dim // 2)
    rows = {"x": (77, heads, head_dim), "cos": angles, "sin": angles}
    return use(rotary, rows, interleaved=interleaved)


def latents(*shape: int) -> Use:
    rows = {"x": shape, "out": (2, *shape), "x0_prev": shape}
    return use(step, {**rows, "coef": (8,), "guidance": (), "seeds": (), "steps": ()})


USES = {
    "group_norm_silu-whole": norm(1280, 8, 8),
    "group_norm_silu-whole-16": norm(1280, 16, 16),
    "group_norm_silu-chunked": norm(320, 64, 64),
    "group_norm_silu-ragged": norm(30, 7, 5, groups=3),
    "group_norm_silu-one-group": norm(640, 33, 31, groups=1),
    "layer_norm-320": of_rows(77, 320),
    "layer_norm-1280": of_rows(9, 1280),
    "layer_norm-ragged": of_rows(5, 77),
    "rms_norm-128": use(rms_norm, {"x": (77, 24, 128)}, weight=(128,)),
    "rms_norm-ragged": use(rms_norm, {"x": (5, 1000)}, weight=(1000,)),
    "silu_mul": use(silu_mul, {"gate": (77, 1280), "up": (77, 1280)}),
    "silu_mul-ragged": use(silu_mul, {"gate": (3, 77), "up": (3, 77)}),
    "geglu": use(geglu, {"x": (64, 2560)}),
    "geglu-ragged": use(geglu, {"x": (3, 154)}),
    "rotary-pairs": turned(24, 128, True),
    "rotary-halves": turned(5, 40, False),
    "guided_step": latents(4, 64, 64),
    "guided_step-ragged": latents(3, 5, 7),
    "fingerprint": use(fingerprint, {"x": (320, 33, 32)}),
    "fingerprint-ragged": use(fingerprint, {"x": (5, 7)}),
    "normal": use(normal, {"keys": (), "steps": ()}, purpose=1, count=4097),
}
# Arguments of a dtype of their own.
FIXED = dict.fromkeys(("cos", "sin", "coef", "guidance", "x0_prev"), torch.float32)
INTEGERS = ("keys", "seeds", "steps")


def make(one: Use, batch: int, dtype: torch.dtype, seed: int) -> Given:
    """Arguments: the samples' of this batch alone, the shared ones of all."""

    def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if name in INTEGERS:
            return torch.randint(0, 2**32, shape, generator=generator).to(DEVICE)
        own = torch.float32 if one.run is step and name == "x" else FIXED.get(name, dtype)
        return torch.randn(shape, generator=generator).to(own).to(DEVICE)

    generators = [torch.Generator().manual_seed(n) for n in (seed, seed + batch)]
    shared = {name: values(name, shape, generators[0]) for name, shape in one.shared.items()}
    rows = {name: values(name, (batch, *s), generators[1]) for name, s in one.rows.items()}
    return {**rows, **shared, **one.rest}


def wider(x: Tensor) -> Tensor:
    """In the first half of something twice as wide."""
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]] if x.dim() > 1 else x


def wider_end(x: Tensor) -> Tensor:
    """In its second half, so that the address is another."""
    return torch.cat([x, x], dim=-1)[..., x.shape[-1] :] if x.dim() > 1 else x


def reversed_axes(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


def every_third(x: Tensor) -> Tensor:
    """Samples apart, as in a projection of which others take the rest."""
    return torch.stack([x, x, x], dim=1)[:, 1]


def off_by_one(x: Tensor) -> Tensor:
    """At an address that no vector begins at."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


LAYOUTS = (wider, wider_end, reversed_axes, channels_last, every_third, off_by_one)


def check(one: Use, dtype: torch.dtype, seed: int, row_exact: Any) -> None:
    def as_bits(out: Any) -> list[Tensor]:
        parts = (out,) if isinstance(out, Tensor) else tuple(out)
        return [part.contiguous().view(torch.uint8) for part in parts]

    row_exact(one.run, lambda batch: make(one, batch, dtype, seed), tuple(one.rows), BATCHES)
    given = make(one, 3, dtype, seed)
    expected = as_bits(one.run(**given))
    for layout in LAYOUTS:
        moved = {name: layout(given[name]) for name in one.rows}
        for found, wanted in zip(as_bits(one.run(**{**given, **moved})), expected, strict=True):
            assert torch.equal(found, wanted), f"{layout.__name__}: other bits than contiguous"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", USES)
def test_a_samples_bits_are_its_own(
    name: str, dtype: torch.dtype, seed: int, row_exact: Any
) -> None:
    if name == "normal" and dtype != torch.float32:
        pytest.skip("there are no inputs of another dtype")
    check(USES[name], dtype, seed, row_exact)


def heads(form: str, keys: int, head_dim: int) -> Use:
    rows: dict[str, tuple[int, ...]] = {
        "q": (70, 2, head_dim),
        "k": (keys, 2, head_dim),
        "v": (keys, 2, head_dim),
    }
    if form == "bias":
        rows["bias"] = (2, 70, keys)
    return use(attention, rows, causal=form == "causal")


@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128, 160, 512])
@pytest.mark.parametrize(
    ("form", "keys"),
    [
        *(("plain", keys) for keys in (24, 77, 300, 512, 1024)),
        *((form, keys) for form in ("bias", "causal") for keys in (77, 1024)),
    ],
)
def test_attention(form: str, keys: int, head_dim: int, seed: int, row_exact: Any) -> None:
    check(heads(form, keys, head_dim), torch.float16, seed, row_exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["plain", "bias", "causal"])
@pytest.mark.parametrize("keys", [24, 300, 1024])
def test_attention_in_other_dtypes(
    keys: int, form: str, dtype: torch.dtype, seed: int, row_exact: Any
) -> None:
    check(heads(form, keys, 64), dtype, seed, row_exact)
