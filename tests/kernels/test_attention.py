from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heatsink.kernels import reference
from heatsink.kernels._config import Config, Target, lookup
from heatsink.kernels._heads import parts
from heatsink.kernels._launch import ARCHS, run
from heatsink.kernels.attention import attention

module = import_module("heatsink.kernels.attention")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS: Config = {
    "WHOLE": 0,
    "BLOCK_M": 32,
    "BLOCK_N": 32,
    "SPLIT_D": 1,
    "PROGRAMS": 0,
    "TMA": 0,
    "PRECISION": 0,
    "warps": 4,
    "stages": 2,
}
WHOLE: Config = {**BLOCKS, "WHOLE": 1, "SPLIT_N": 1, "BLOCKS": 2, "BLOCK_M": 16}
# The kernel for many keys in each of its forms, and the one for few.
CONFIGS = {
    "blocks": BLOCKS,
    "padded": {**BLOCKS, "SPLIT_D": 0},
    "persistent": {**BLOCKS, "PROGRAMS": 3},
    "descriptors": {**BLOCKS, "TMA": 1},
    "whole": WHOLE,
    "whole-padded": {**WHOLE, "SPLIT_D": 0, "SPLIT_N": 0, "BLOCKS": 1},
}
# (batch, queries, keys, heads, head dim): aligned; ragged with a head of two parts; few keys, a
# head below the least tile; SD1.5's cross-attention; the bundled model's; one key, one column.
SHAPES = (
    (1, 64, 64, 1, 64),
    (2, 37, 45, 1, 40),
    (1, 19, 7, 2, 4),
    (1, 16, 77, 1, 80),
    (1, 64, 24, 2, 32),
    (1, 3, 1, 1, 1),
)
Inputs = dict[str, Any]


def packed(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed projections: not contiguous."""
    batch, queries, keys, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((batch, queries, 3, heads, head_dim), generator=generator)[:, :, 1]
    kv = torch.randn((batch, keys, 2, heads, head_dim), generator=generator)
    # Converted first: a conversion may change strides.
    k, v = (spread * kv).to(dtype).unbind(2)
    return q.to(dtype), k, v


def triton(config: Config, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out: Tensor
    out, launches = module.plan(config, q, k, v, **options)
    run(launches)
    return out


def as_op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Any, ...]:
    """The arguments as the public function gives them to the op."""
    scale = options.get("scale") or q.shape[-1] ** -0.5
    bias = options.get("bias")
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return q, k, v, scale, options.get("causal", False), bias


def default(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The Triton implementation with the configuration that is looked up."""
    out: Tensor = module._attention_triton(*as_op(q, k, v, **options))
    return out


def in_torch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The PyTorch implementation, whether or not the extension is loaded."""
    out: Tensor = module._attention_torch(*as_op(q, k, v, **options))
    return out


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """The formula in operations of the same dtype."""
    scale = options.get("scale") or q.shape[-1] ** -0.5
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if options.get("causal"):
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhmn,bnhd->bmhd", torch.softmax(scores, -1).nan_to_num(0.0), v)


RUNS: dict[str, Callable[..., Tensor]] = {
    "op": attention,
    "torch": in_torch,
    "triton": default,
    **{name: lambda *a, c=config, **k: triton(c, *a, **k) for name, config in CONFIGS.items()},
}
ALL = pytest.mark.parametrize("run_as", RUNS)


@ALL
@pytest.mark.parametrize(("shape", "dtype"), [*zip(SHAPES, 2 * DTYPES, strict=True)], ids=str)
def test_against_float64(
    run_as: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    q, k, v = packed(shape, dtype, seed)
    out = RUNS[run_as](q, k, v)
    within_budget(out, plain(q, k, v), reference.attention(*(float64(x) for x in (q, k, v))))
    assert out.is_contiguous()


@ALL
@pytest.mark.parametrize(
    ("shape", "causal", "biased"),
    [
        ((1, 37, 45, 2, 40), True, None),
        ((1, 45, 37, 1, 16), True, (2, 1, -1, -1)),
        ((1, 45, 37, 1, 16), False, (-1,)),
        ((2, 37, 45, 2, 40), False, (1, 2, 1, -1)),
    ],
    ids=["causal", "causal-bias", "bias-of-keys", "bias-of-heads"],
)
def test_masks(
    run_as: str,
    shape: tuple[int, ...],
    causal: bool,
    biased: tuple[int, ...] | None,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    q, k, v = packed(shape, torch.float32, seed)
    batch, queries, keys, heads, _ = shape
    bias = None
    if biased is not None:
        whole = (batch, heads, queries, keys)[-len(biased) :]
        sizes = [n if m < 0 else min(m, n) for m, n in zip(biased, whole, strict=True)]
        bias = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    options: Inputs = {"scale": 0.3, "causal": causal, "bias": bias}
    exact = reference.attention(
        float64(q), float64(k), float64(v), 0.3, causal, None if bias is None else float64(bias)
    )
    within_budget(RUNS[run_as](q, k, v, **options), plain(q, k, v, **options), exact)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [(), (7,), (5, 1), (3, 1, 7), (2, 1, 5, 7), (1, 3, 1, 1)])
def test_any_bias_in_pytorch(
    biased: tuple[int, ...],
    causal: bool,
    backend: SDPBackend,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    """As the op's schema allows it, not expanded, whichever backend PyTorch takes."""
    q, k, v = packed((2, 5, 7, 3, 8), torch.float32, seed)
    bias = torch.randn(biased, generator=torch.Generator().manual_seed(seed))
    with sdpa_kernel(backend):
        out = module._attention_torch(q, k, v, 0.3, causal, bias)
    exact = reference.attention(float64(q), float64(k), float64(v), 0.3, causal, float64(bias))
    within_budget(out, plain(q, k, v, scale=0.3, causal=causal, bias=bias), exact)


@ALL
def test_bias_that_hides_keys(run_as: str, seed: int, float64: Any) -> None:
    """-inf hides; the lowest value of the dtype everywhere hides nothing; no key gives 0."""
    q, k, v = packed((1, 4, 40, 1, 16), torch.bfloat16, seed)
    bias = torch.zeros(1, 1, 4, 40, dtype=torch.bfloat16)
    bias[..., 0, :] = -torch.inf
    bias[..., 1, :] = torch.finfo(torch.bfloat16).min
    bias[..., 2, :33] = -torch.inf
    out = RUNS[run_as](q, k, v, bias=bias)
    assert (out[0, 0] == 0).all()
    mean = v[0, :, 0].double().mean(0)
    assert torch.allclose(out[0, 1, 0].double(), mean, atol=2**-7)
    last = reference.attention(*(float64(x) for x in (q[:, 2:3], k[:, 33:], v[:, 33:])))
    assert torch.allclose(out[0, 2, 0].double(), torch.from_numpy(last[0, 0, 0]), atol=2**-5)


@pytest.mark.parametrize("run_as", ["op", "torch", "triton", "blocks", "persistent"])
def test_rows_are_exact(run_as: str, seed: int, row_exact: Any) -> None:
    def make(batch: int) -> Inputs:
        q, k, v = packed((batch, 5, 37, 1, 40), torch.float32, seed + batch)
        return {"q": q, "k": k, "v": v}

    batches = range(1, 18) if run_as in ("op", "torch") else (17,)
    row_exact(RUNS[run_as], make, ("q", "k", "v"), batches)


@ALL
def test_strides_do_not_matter(run_as: str, seed: int) -> None:
    q, k, v = packed((2, 19, 37, 2, 24), torch.float32, seed)
    expected = RUNS[run_as](*(x.contiguous() for x in (q, k, v)))
    # Heads first, the last dimension apart, and offset by an element: no alignment at all.
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    offset = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in (q, k, v)]
    for views in ((q, k, v), heads_first, apart, offset):
        assert torch.equal(RUNS[run_as](*views), expected)


@ALL
def test_large_scores(run_as: str, seed: int) -> None:
    """Scores of some thousands: the largest wins, and nothing overflows."""
    q, k, v = packed((1, 16, 40, 1, 32), torch.float32, seed)
    out = RUNS[run_as](1e3 * q, 1e3 * k, v)
    best = torch.einsum("bmhd,bnhd->bhmn", q, k).argmax(-1)
    assert torch.allclose(out[0, :, 0], v[0, best[0, 0], 0], atol=1e-6)


def test_vae_head_dim(seed: int, within_budget: Any, float64: Any) -> None:
    q, k, v = packed((1, 40, 40, 1, 512), torch.float16, seed)
    exact = reference.attention(*(float64(x) for x in (q, k, v)))
    for name in ("op", "torch", "triton", "blocks"):
        within_budget(RUNS[name](q, k, v), plain(q, k, v), exact)


def test_empty() -> None:
    x = torch.ones(2, 3, 1, 8)
    assert attention(x[:0], x[:0], x[:0]).shape == (0, 3, 1, 8)
    assert attention(x[:, :0], x, x).shape == (2, 0, 1, 8)
    assert (attention(x, x[:, :0], x[:, :0]) == 0).all()


def test_parts() -> None:
    wanted = {1: (16, 0), 40: (32, 16), 64: (64, 0), 77: (64, 16), 80: (64, 16), 96: (64, 32)}
    wanted |= {112: (128, 0), 160: (128, 32), 512: (512, 0)}
    assert {size: parts(size, 1) for size in wanted} == wanted
    assert [parts(size, 0) for size in (40, 80, 160)] == [(64, 0), (128, 0), (256, 0)]
    for size in range(1, 257):
        for least in (16, 32):
            assert sum(parts(size, 1, least)) >= size


@pytest.mark.parametrize(
    ("keys", "head_dim", "config", "kernel"),
    [
        (77, 64, None, "attention_whole"),
        (512, 64, None, "attention"),
        (64, 512, None, "attention"),
        (64, 64, BLOCKS, "attention"),
        (64, 64, WHOLE, "attention_whole"),
    ],
)
def test_which_kernel_runs(keys: int, head_dim: int, config: Config | None, kernel: str) -> None:
    q = torch.empty(1, 64, 1, head_dim, dtype=torch.float16, device="meta")
    k = torch.empty(1, keys, 1, head_dim, dtype=torch.float16, device="meta")
    for arch in ARCHS:
        chosen = config or lookup("attention", module.key(q, k, k), Target("", arch))
        _, (launch,) = module.plan(chosen, q, k, k)
        assert launch.kernel.name == kernel


def test_descriptors_only_where_they_can_be() -> None:
    x = torch.empty(2, 64, 2, 64, dtype=torch.float16, device="meta")
    config = {**BLOCKS, "TMA": 1}
    for views, wanted in (((x, x, x), True), ((x, x[..., ::2], x), False)):
        q, k, v = (view[..., :32] for view in views)
        _, (launch,) = module.plan(config, q, k, v)
        assert launch.constants["TMA"] is wanted
    # Heads of 20 are no multiple of 16 bytes apart, so strides are in single elements.
    narrow = torch.empty(2, 64, 3, 20, dtype=torch.float16, device="meta")
    _, (launch,) = module.plan(config, narrow, narrow, narrow)
    assert (launch.constants["TMA"], launch.constants["UNIT"]) == (False, 1)


def test_opcheck_and_compile(seed: int) -> None:
    q, k, v = packed((2, 9, 12, 2, 16), torch.float32, seed)
    bias = torch.ones(9, 12).expand(2, 2, 9, 12)
    torch.library.opcheck(torch.ops.heatsink.attention, (q, k, v, 0.25, False, bias))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, causal=True), attention(q, k, v, causal=True))
    assert torch.equal(compiled(q, k, v, bias=bias[0]), attention(q, k, v, bias=bias[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 160])
def test_on_cuda(
    name: str, dtype: torch.dtype, head_dim: int, seed: int, within_budget: Any, float64: Any
) -> None:
    q, k, v = packed((2, 173, 77, 2, head_dim), dtype, seed)
    exact = reference.attention(*(float64(x) for x in (q, k, v)))
    out = triton(CONFIGS[name], q.cuda(), k.cuda(), v.cuda())
    within_budget(out.cpu(), plain(q, k, v), exact)


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    q, k, v = (x.cuda() for x in packed((2, 256, 256, 2, 64), torch.float16, seed))
    expected = attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


X = torch.ones(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": X.double()}, TypeError, "q: expected one of float16, bfloat16, float32"),
        ({"k": X.half()}, TypeError, "k: expected torch.float32 like q"),
        ({"v": X.to("meta")}, ValueError, "v: expected device cpu like q, got meta"),
        ({"q": X.clone().requires_grad_()}, ValueError, "q: expected no gradient"),
        ({"q": X[0]}, ValueError, r"q: expected \(B, Sq, H, D\), got shape \(3, 4, 8\)"),
        ({"k": X[0]}, ValueError, r"k: expected \(B, Sk, H, D\), got shape \(3, 4, 8\)"),
        ({"k": X[:, :, :2]}, ValueError, r"k: expected shape \(2, 3, 4, 8\), got \(2, 3, 2, 8\)"),
        ({"v": X[:, :2]}, ValueError, r"v: expected shape \(2, 3, 4, 8\), got \(2, 2, 4, 8\)"),
        ({"q": torch.ones(2, 3, 4, 300)}, ValueError, "q: expected a head dim of 1 to 256, or 512"),
        ({"scale": 0.0}, ValueError, "scale: expected a positive finite number, got 0.0"),
        ({"scale": float("inf")}, ValueError, "scale: expected a positive finite number, got inf"),
        ({"bias": torch.ones(2, 3, 3)}, ValueError, r"bias: .*\(2, 4, 3, 3\), got \(2, 3, 3\)"),
        ({"bias": torch.ones(1, 2, 4, 3, 3)}, ValueError, "bias: expected a shape that broadcasts"),
        ({"bias": torch.ones(3, 3).bool()}, TypeError, "bias: expected torch.float32 like q"),
    ],
)
def test_bad_arguments(change: Inputs, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attention(**{"q": X, "k": X, "v": X, **change})
