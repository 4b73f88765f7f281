from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels._config import lookup, target_of
from heatsink.kernels._launch import run as run_launches
from heatsink.kernels._pixels import group_norm_torch
from heatsink.kernels.group_norm_silu import group_norm_silu

module = import_module("heatsink.kernels.group_norm_silu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Run = Callable[..., Tensor]


def flat(run: Run) -> Run:
    """An implementation, called as the public function is."""

    def call(x: Tensor, groups: int, weight: Any = None, bias: Any = None, **rest: Any) -> Tensor:
        rest = {"eps": 1e-5, "scale": None, "shift": None, "silu": True} | rest
        return run(x, groups, weight, bias, **rest)

    return call


def in_chunks(x: Tensor, groups: int, *parameters: Any, **rest: Any) -> Tensor:
    """The three launches, whatever the shape: chunks of two blocks of pixels, the last ragged."""
    config = {"WHOLE": 0, "CHUNK": 32, "BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 2, "warps": 4}
    out: Tensor
    out, launches = module.plan(config, x, groups, *parameters, **rest)
    run_launches(launches)
    return out


# The op as a user calls it, what serves without a compiler, and the Triton kernels, here under the
# interpreter.
RUNS = {
    "op": group_norm_silu,
    "torch": flat(group_norm_torch),
    "triton": flat(module._group_norm_silu_triton),
    "chunks": in_chunks,
}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
# Groups of 4, 10 (ragged), 8 (one dimension of pixels), 3 and one of 40; no samples, no pixels;
# what is looked up as three launches; many groups in one program.
SHAPES = (
    ((2, 64, 8, 8), 16),
    ((3, 30, 7, 5), 3),
    ((2, 40, 5), 5),
    ((1, 33, 3, 1, 3), 11),
    ((1, 40, 4, 4), 1),
    ((0, 16, 4, 4), 4),
    ((2, 16, 0, 4), 4),
    ((1, 20, 37, 31), 2),
    ((1, 64, 5, 8), 32),
)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, mean: float = 0.5
) -> dict[str, Any]:
    """Arguments with channels innermost; scale and shift are views of one projection."""
    generator = torch.Generator().manual_seed(seed)
    samples, channels = shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(samples, *shape[2:], channels).movedim(-1, 1) + mean
    scale, shift = normal(samples, 2 * channels).to(dtype).chunk(2, dim=1)
    return {
        "x": x.to(dtype),
        "weight": normal(channels).to(dtype),
        "bias": normal(channels).to(dtype),
        "scale": scale,
        "shift": shift,
    }


def plain(x: Tensor, groups: int, **given: Any) -> Tensor:
    """What a user would write."""
    y = torch.nn.functional.group_norm(x, groups, given.get("weight"), given.get("bias"))
    spread = (..., *(None for _ in x.shape[2:]))
    if given.get("scale") is not None:
        y = y * (1 + given["scale"][spread])
    if given.get("shift") is not None:
        y = y + given["shift"][spread]
    return torch.nn.functional.silu(y) if given.get("silu", True) else y


def exact(float64: Any, x: Tensor, groups: int, **given: Any) -> Any:
    """The reference."""
    arrays = {name: float64(v) if isinstance(v, Tensor) else v for name, v in given.items()}
    return reference.group_norm_silu(float64(x), groups, **arrays)


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_against_float64(
    run: Run,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    groups: int,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    given = make(shape, dtype, seed)
    out = run(groups=groups, **given)
    expected = plain(groups=groups, **given) if out.numel() else torch.empty_like(out)
    within_budget(out, expected, exact(float64, groups=groups, **given))
    assert out.movedim(1, -1).is_contiguous()


@ALL
@pytest.mark.parametrize("without", ["weight", "bias", "scale", "shift", "all", "silu"])
def test_each_part_is_optional(
    run: Run, without: str, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make((2, 24, 5, 11), torch.float32, seed)
    if without == "silu":
        given["silu"] = False
    elif without == "all":
        given = {"x": given["x"]}
    else:
        del given[without]
    out = run(groups=4, **given)
    within_budget(out, plain(groups=4, **given), exact(float64, groups=4, **given))


@ALL
def test_a_mean_of_a_thousand_deviations(
    run: Run, seed: int, within_budget: Any, float64: Any
) -> None:
    given = make((2, 60, 8, 21), torch.float32, seed, mean=1e3)
    out = run(groups=6, **given)
    within_budget(out, plain(groups=6, **given), exact(float64, groups=6, **given))


@ALL
def test_strides_change_no_bit(run: Run, seed: int) -> None:
    given = make((2, 36, 7, 5), torch.float32, seed)
    x = given.pop("x")
    expected = run(x, 3, **given)
    wide = torch.cat([x, x], dim=1)
    assert wide[:, :36].stride(-1) == 72
    spread = {name: torch.stack([v, v], dim=-1)[..., 0] for name, v in given.items()}
    for same in (x.contiguous(), wide[:, :36], wide[:, 36:], x.mT.contiguous().mT):
        assert torch.equal(run(same, 3, **spread), expected)


@ALL
def test_expanded_views(run: Run, seed: int) -> None:
    # Steps of 0: along one axis of pixels, along both, and between samples.
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, 16, 4, 1, generator=generator).to(memory_format=torch.channels_last)
    narrow = torch.randn(2, 4, 1, 16, generator=generator).expand(2, 4, 5, 16)
    views = (
        narrow.permute(0, 3, 1, 2),
        wide.expand(2, 16, 4, 5),
        wide[:, :, :1].expand(2, 16, 4, 5),
        wide[:1].expand(3, 16, 4, 1),
    )
    for view in views:
        assert 0 in view.stride()
        assert torch.equal(run(view, 4), run(view.clone(), 4))


@ALL
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
def test_rows_are_exact(run: Run, modulated: bool, seed: int, row_exact: Any) -> None:
    shared = make((1, 30, 7, 5), torch.float32, seed)

    def arguments(batch: int) -> dict[str, Any]:
        given = make((batch, 30, 7, 5), torch.float32, seed + batch)
        rows = {name: given[name] if modulated else None for name in ("scale", "shift")}
        parameters = {"weight": shared["weight"], "bias": shared["bias"]}
        return {"x": given["x"], "groups": 3, **parameters, **rows}

    # The interpreter takes milliseconds a program, and these are many.
    batches = (1, 2, 9) if run is in_chunks else None
    rows = ("x", "scale", "shift")
    row_exact(run, arguments, rows, batches, interpreted=run is RUNS["triton"])


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not _native.available(), reason="there is no extension to compare with")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extension_gives_the_bits_of_pytorch_whatever_the_threads(
    dtype: torch.dtype, seed: int
) -> None:
    # 64 and 96: whole vectors; 33 and 10: a tail. One sample on two threads is cut into chunks.
    cases = (((1, 64, 32, 32), 8), ((3, 96, 8, 8), 8), ((1, 33, 20, 20), 3), ((2, 10, 3, 3), 5))
    for shape, groups in cases:
        given = make(shape, dtype, seed, mean=3.0)
        expected = RUNS["torch"](groups=groups, **given)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(group_norm_silu(groups=groups, **given), expected)


@pytest.mark.parametrize(
    ("shape", "groups", "launches"),
    [((2, 2560, 8, 8), 32, 1), ((2, 1280, 16, 16), 32, 1), ((2, 320, 64, 64), 32, 3)],
)
def test_launches(shape: tuple[int, ...], groups: int, launches: int) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    config = lookup("group_norm_silu", module.key(x, groups), target_of(x.device))
    names = [launch.kernel.name for launch in module.plan(config, x, groups)[1]]
    whole, chunked = ["whole"], ["moments", "finish", "apply"]
    assert names == [f"group_norm_{name}" for name in (whole if launches == 1 else chunked)]


@pytest.mark.parametrize("whole", [1, 0], ids=["whole", "chunked"])
@pytest.mark.parametrize("channels", [48, 30])
def test_one_binary_wherever_a_sample_lies(channels: int, whole: int, seed: int) -> None:
    # The order of a GPU's sums follows from what a kernel is specialised for.
    config = {"WHOLE": whole, "CHUNK": 32, "BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 2, "warps": 4}

    def keys(given: dict[str, Any]) -> list[str]:
        return [launch.key() for launch in module.plan(config, groups=6, **given)[1]]

    given = make((3, channels, 7, 5), torch.float16, seed)
    shared = {"weight": given["weight"], "bias": given["bias"]}
    rows = {name: given[name] for name in ("x", "scale", "shift")}
    expected = keys(given)
    for i in range(3):
        assert keys(shared | {name: value[i : i + 1] for name, value in rows.items()}) == expected
    wide = torch.cat([rows["x"], rows["x"]], dim=1)
    for x in (wide[:, :channels], wide[:, channels:], rows["x"].contiguous()):
        assert keys(shared | rows | {"x": x}) == expected


@pytest.mark.parametrize("groups", [1, 2, 4, 32])
@pytest.mark.parametrize("channels", [32, 640, 2560])
def test_the_tile_of_the_second_launch_is_bounded(channels: int, groups: int) -> None:
    x = torch.empty((1, channels, 512, 512), device="meta", dtype=torch.float16)
    config = lookup("group_norm_silu", module.key(x, groups), target_of(x.device))
    _, finish, _ = module.plan(config, x, groups)[1]
    tile = finish.constants["BLOCK_K"] * finish.constants["BLOCK_C"]
    assert tile <= max(4096, finish.constants["BLOCK_C"])
    assert tile <= 32 * 32 * finish.warps


def test_pixels_too_far_apart_for_32_bits_are_moved_together() -> None:
    # No machine has this tensor: the meta device lends its strides.
    x = torch.empty_strided((1, 40, 1, 3), (2**33, 1, 2**33, 2**30), device="meta")
    (launch,) = module.plan({"WHOLE": 1, "warps": 4}, x, 4)[1]
    assert launch.args["stride_xp"] == 40


def test_a_real_shape(seed: int, within_budget: Any, float64: Any) -> None:
    # Stable Diffusion 1.5's narrowest pixels: 2560 channels in groups of 80.
    given = make((1, 2560, 8, 8), torch.float16, seed)
    expected = plain(groups=32, **given), exact(float64, groups=32, **given)
    for name in ("op", "torch", "triton"):
        within_budget(RUNS[name](groups=32, **given), *expected)


def test_opcheck_and_compile(seed: int) -> None:
    for shape in ((3, 24, 7, 5), (2, 24, 9)):
        given = make(shape, torch.float32, seed)
        x, weight, bias, scale, shift = given.values()
        rest = (weight, bias, 1e-5, scale, shift, True)
        torch.library.opcheck(torch.ops.heatsink.group_norm_silu, (x, 4, *rest))
        torch.library.opcheck(
            torch.ops.heatsink.group_norm_silu,
            (x.contiguous(), 4, None, None, 1e-5, None, None, False),
        )
        compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(groups=4, **given), group_norm_silu(groups=4, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int, within_budget: Any, float64: Any) -> None:
    for shape, groups in (*SHAPES, ((2, 320, 64, 64), 32), ((2, 1280, 16, 16), 32)):
        given = {name: x.cuda() for name, x in make(shape, dtype, seed).items()}
        out = group_norm_silu(groups=groups, **given)
        expected = plain(groups=groups, **given) if out.numel() else torch.empty_like(out)
        within_budget(out, expected, exact(float64, groups=groups, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 640, 16, 16), (2, 320, 64, 64)], ids=["whole", "chunked"])
def test_in_a_cuda_graph(shape: tuple[int, ...], seed: int) -> None:
    given = {name: x.cuda() for name, x in make(shape, torch.float16, seed).items()}
    expected = group_norm_silu(groups=32, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_norm_silu(groups=32, **given)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


X = torch.ones(2, 6, 3, 3)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.double()}, TypeError, "x: expected one of float16, bfloat16, float32"),
        (
            {"x": X[:, :, 0, 0]},
            ValueError,
            r"x: expected \(N, C, ...\) with pixels, got .*\(2, 6\)",
        ),
        ({"x": X.clone().requires_grad_()}, ValueError, "x: expected no gradient"),
        ({"groups": 4}, ValueError, "groups: expected a divisor of 6 channels, got 4"),
        ({"groups": 0}, ValueError, "groups: expected a divisor of 6 channels, got 0"),
        ({"groups": 2.0}, TypeError, "groups: expected an integer, got float"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number below .* got 0.0"),
        ({"eps": "a"}, TypeError, "eps: expected a number, got str"),
        ({"eps": float("inf")}, ValueError, "eps: expected a positive number below .* got inf"),
        ({"eps": float("nan")}, ValueError, "eps: expected a positive number below .* got nan"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: expected torch.float32 like x"),
        ({"scale": torch.ones(6)}, ValueError, r"scale: expected shape \(2, 6\), got \(6,\)"),
        ({"shift": torch.ones(3, 6)}, ValueError, r"shift: expected shape \(2, 6\)"),
        ({"shift": torch.ones(2, 6, device="meta")}, ValueError, "shift: expected device cpu"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        group_norm_silu(**{"x": X, "groups": 3, **given})
