from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.kernels import _launch as launch
from heatsink.kernels import reference
from heatsink.kernels._config import lookup, target_of
from heatsink.kernels.fingerprint import Fingerprint, fingerprint

module = import_module("heatsink.kernels.fingerprint")

DOCS = Path(__file__).parents[2] / "docs" / "fingerprint.md"
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
FLOATS = DTYPES[:4]
SHAPES = ((2, 4, 8, 8), (3, 5, 7), (4,), (0, 4), (3, 0), (2, 1025), (1, 20, 3, 5))


def torch_only(x: Tensor) -> Fingerprint:
    return Fingerprint(*module._fingerprint_torch(x))


def triton(x: Tensor) -> Fingerprint:
    """The kernel, here under the interpreter, whose time goes with the launch's programs."""
    if x.shape[1:].numel() < 4096:
        return Fingerprint(*module._fingerprint_triton(x))
    results, launches = module.plan({"ROWS": 4, "BLOCK": 4096, "STEPS": 2, "warps": 4}, x)
    launch.run(launches)
    return Fingerprint(*results)


# C++ where it was built, PyTorch, Triton: equal to the reference all. What says something of the
# digest itself, over thousands of rows, is left to the first two.
BOTH = pytest.mark.parametrize("run", [fingerprint, torch_only], ids=["op", "torch"])
ALL = pytest.mark.parametrize(
    "run", [fingerprint, torch_only, triton], ids=["op", "torch", "triton"]
)
Run = Callable[[Tensor], Fingerprint]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def patterns(row: Tensor) -> list[int]:
    """A row's bit patterns in logical order, unsigned."""
    flat = row.reshape(-1)
    if flat.dtype in (torch.bool, torch.uint8):
        return [int(v) for v in flat.tolist()]
    width = flat.element_size() * 8
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    return [v % 2**width for v in flat.view(signed).tolist()]


def from_patterns(bits: list[int], dtype: torch.dtype) -> Tensor:
    if dtype in (torch.bool, torch.uint8):
        return torch.tensor(bits, dtype=dtype)
    width = torch.empty(0, dtype=dtype).element_size() * 8
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    values = [b - 2**width if b >= 2 ** (width - 1) else b for b in bits]
    return torch.tensor(values, dtype=signed).view(dtype)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of every kind: for floats all bit patterns, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    if dtype == torch.uint8:
        return raw[..., 0]
    return raw.view(dtype)[..., 0]


def normals(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Fingerprint, expected: Fingerprint) -> None:
    assert actual.digest.tolist() == expected.digest.tolist()
    assert actual.nonfinite.tolist() == expected.nonfinite.tolist()
    assert actual.absmax.view(torch.int32).tolist() == expected.absmax.view(torch.int32).tolist()


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    run: Run, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    x = random(shape, dtype, seed)
    result = run(x)
    expected = [reference.fingerprint_row(patterns(row), name(dtype)) for row in x]
    assert [d % 2**64 for d in result.digest.tolist()] == [digest for digest, _ in expected]
    assert result.nonfinite.tolist() == [count for _, count in expected]
    wide = x.to(torch.float64).reshape(len(x), x.shape[1:].numel())
    if wide.shape[1]:
        finite = wide.isfinite()
        magnitude = torch.where(finite, wide.abs(), 0.0).amax(1).to(torch.float32)
        assert result.absmax.tolist() == magnitude.tolist()
    else:
        assert result.absmax.tolist() == [0.0] * len(x)
    assert result.digest.dtype == result.nonfinite.dtype == torch.int64
    assert result.absmax.dtype == torch.float32


def _table(heading: str) -> list[list[str]]:
    """The cells of the table below `heading` in the document."""
    text = DOCS.read_text().split(heading, 1)[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((i for i, line in enumerate(lines) if i > 1 and line.startswith("|---")), None)
    lines = lines[2 : end - 1 if end is not None else None]
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines]


def test_published_keys() -> None:
    rows = _table("Keys:")
    assert len(rows) == 10
    for index, key in rows:
        assert f"{reference.fingerprint_key(int(index)):016x}" == key
        made = module._keys(int(index), int(index) + 1, torch.device("cpu"))
        assert f"{int(made) % 2**64:016x}" == key


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 64, 77, 320, 1024, 4096, 16384])
def test_no_two_differences_of_keys_are_equal(distance: int) -> None:
    # Else a change made at two places of a row could cancel; among random keys there is none.
    keys = module._keys(0, 1 << 20, torch.device("cpu")).numpy()
    differences = np.sort(keys[distance:] - keys[:-distance])
    assert (differences[1:] != differences[:-1]).all()


@ALL
def test_published_rows(run: Run) -> None:
    rows = _table("Rows (")
    assert {row[0] for row in rows} == {name(dtype) for dtype in DTYPES}
    for dtype, cells, digest, nonfinite in rows:
        bits = [int(cell, 16) for cell in cells.replace("`", "").split()]
        assert reference.fingerprint_row(bits, dtype) == (int(digest, 16), int(nonfinite))
        result = run(from_patterns(bits, getattr(torch, dtype))[None])
        assert result.hex() == [digest]
        assert result.nonfinite.tolist() == [int(nonfinite)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize(
    "shape", [(2, 320, 64, 64), (1, 640, 32, 32), (2, 4, 128, 128)], ids=["sd15", "sdxl", "latents"]
)
def test_real_shapes_agree(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    x = normals(shape, seed).to(dtype)
    assert_same(fingerprint(x), torch_only(x))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "row_strided": lambda x: torch.stack([x, x * 2], dim=1)[:, 0],
    "last_first": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@ALL
@pytest.mark.parametrize("layout", LAYOUTS)
# Channels inside memory are read in place from 16 on, and copied below; 1,030 spans two tiles.
@pytest.mark.parametrize("channels", [3, 16, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=name)
def test_strides_do_not_matter(
    run: Run, layout: str, channels: int, dtype: torch.dtype, seed: int
) -> None:
    x = (normals((3, channels, 5, 4), seed) * 100).to(dtype)
    view = LAYOUTS[layout](x)
    assert torch.equal(view, x)
    assert_same(run(view), run(x))


@ALL
def test_expanded_and_offset_rows(run: Run, seed: int) -> None:
    x = normals((6, 33), seed)
    assert_same(run(x[1][None].expand(4, 33)), run(x[1].repeat(4, 1)))
    assert run(x[2:5]).hex() == run(x).hex()[2:5]


@ALL
def test_a_row_does_not_depend_on_its_neighbours(run: Run, seed: int) -> None:
    x = normals((17, 3, 19, 23), seed)
    alone = [run(row[None]).hex()[0] for row in x]
    assert len(set(alone)) == 17
    for rows in (2, 5, 17):
        assert run(x[:rows]).hex() == alone[:rows]
        assert run(x[:rows].flip(0)).hex() == alone[:rows][::-1]


def test_chunks_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    x = random((3, 100_003), torch.float32, seed)
    whole = torch_only(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(fingerprint(x), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "_CHUNK", 777)
    assert_same(torch_only(x), whole)
    integers = x.view(torch.int32)
    chunked = torch_only(integers)
    monkeypatch.undo()
    assert_same(torch_only(integers), chunked)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@ALL
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_special_values(run: Run, dtype: torch.dtype) -> None:
    width, infinity, quiet_nan = reference.FINGERPRINT_FORMATS[name(dtype)]
    assert infinity is not None
    assert quiet_nan is not None
    sign = 1 << (width - 1)
    nans = [quiet_nan, quiet_nan | sign, infinity | 1, infinity | sign | 1, sign * 2 - 1]
    rows = [from_patterns([bits, 1], dtype) for bits in nans]
    result = run(torch.stack(rows))
    assert len(set(result.hex())) == 1
    assert result.nonfinite.tolist() == [1] * len(nans)
    tiny = from_patterns([1], dtype).to(torch.float32).item()
    assert result.absmax.tolist() == [tiny] * len(nans)

    zeros = run(from_patterns([0, sign], dtype)[:, None])
    assert zeros.digest[0] != zeros.digest[1]
    ends = from_patterns([infinity, infinity | sign, infinity - 1, sign | (infinity - 1)], dtype)
    assert run(ends[None]).nonfinite.tolist() == [2]
    assert run(ends[None]).absmax.item() == torch.finfo(dtype).max or dtype == torch.float64
    nothing = run(torch.full((1, 3), torch.nan, dtype=dtype))
    assert (nothing.nonfinite.item(), nothing.absmax.item()) == (3, 0.0)


@ALL
def test_integer_extremes(run: Run) -> None:
    ends = torch.tensor([[-(2**63), 2**63 - 1], [-1, 0], [-(2**63), 0]])
    assert run(ends).absmax.tolist() == [2.0**63, 1.0, 2.0**63]
    assert run(torch.tensor([[-(2**31), 5]], dtype=torch.int32)).absmax.item() == 2.0**31


@ALL
def test_subnormals_survive_a_flushing_processor(run: Run) -> None:
    x = torch.tensor([[1e-41, -3e-42]])
    expected = run(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers")
    try:
        flushed = run(x)
        bits = flushed.absmax.view(torch.int32).item()
    finally:
        torch.set_flush_denormal(False)
    assert flushed.digest.item() == expected.digest.item()
    assert bits == expected.absmax.view(torch.int32).item() == x.view(torch.int32)[0, 0].item()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_single_bit_counts(run: Run, dtype: torch.dtype, seed: int) -> None:
    width = 1 if dtype == torch.bool else reference.FINGERPRINT_FORMATS[name(dtype)][0]
    # 1.0 and its like: no flip of a bit makes a NaN of it that another flip makes too.
    start = patterns(torch.ones(9).to(dtype))
    changed = [
        [bits ^ (1 << bit if i == place else 0) for i, bits in enumerate(start)]
        for place in range(9)
        for bit in range(width)
    ]
    rows = torch.stack([from_patterns(row, dtype) for row in [start, *changed]])
    assert len(set(run(rows).hex())) == 1 + 9 * width


@BOTH
def test_every_swap_counts(run: Run, seed: int) -> None:
    x = normals((1, 40), seed)
    rows = [x[0]]
    for i in range(40):
        for j in range(i):
            row = x[0].clone()
            row[[i, j]] = row[[j, i]]
            rows.append(row)
    assert len(set(run(torch.stack(rows)).hex())) == 1 + 40 * 39 // 2


@BOTH
def test_shifts_lengths_and_sign_patterns_count(run: Run, seed: int) -> None:
    x = normals((2048,), seed)
    shifted = torch.stack([x.roll(k) for k in range(64)])
    assert len(set(run(shifted).hex())) == 64
    lengths = {run(torch.zeros(1, n)).hex()[0] for n in range(1, 200)}
    assert len(lengths) == 199
    pairs = torch.stack([x.clone() for _ in range(500)])
    for k in range(500):
        pairs[k, [k, k + 7]] *= -1
    assert len(set(run(pairs).hex())) == 500


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x: expected \(rows, ...\), got a tensor without"):
        fingerprint(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"x: expected a dtype among .*, got torch.complex64"):
        fingerprint(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        fingerprint([1.0])  # type: ignore[arg-type]
    huge = torch.zeros(1, dtype=torch.uint8).expand(1, 2**31)
    with pytest.raises(ValueError, match=r"x: expected rows of fewer than 2\^31 elements"):
        fingerprint(huge)


def test_gradients_are_refused_where_they_are_taken() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="x: expected no gradient"):
        fingerprint(x)
    with torch.no_grad():
        assert_same(fingerprint(x), fingerprint(x.detach()))


@pytest.mark.parametrize("inside", [False, True], ids=["dense", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_one_binary_serves_every_batch(dtype: torch.dtype, inside: bool) -> None:
    keys = set()
    for rows in range(1, 18):
        x = torch.empty(rows, 64, 8, 8, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if inside else x
        config = lookup("fingerprint", module.key(x), target_of(x.device))
        keys |= {launch.key() for launch in module.plan(config, x)[1]}
    assert len(keys) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(dtype: torch.dtype, seed: int) -> None:
    x = random((3, 2, 5), dtype, seed)
    torch.library.opcheck(torch.ops.heatsink.fingerprint.default, (x,))


def test_compiles_whole(seed: int) -> None:
    def traced(x: Tensor) -> tuple[Tensor, Fingerprint]:
        y = x * 2 + 1
        return y, fingerprint(y)

    # aot_eager: the op is opaque to any backend, and the default one wants a C++ compiler.
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3):
        x = normals((rows, 4, 6), seed)
        y, result = compiled(x)
        assert torch.equal(y, x * 2 + 1)
        assert_same(result, fingerprint(y))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_configuration_does_not_matter(rows: int, seed: int) -> None:
    x = random((5, 8, 7, 5), torch.bfloat16, seed)
    inside = x.contiguous(memory_format=torch.channels_last)
    for block, steps in ((64, 1), (256, 2), (128, 3)):
        config = {"ROWS": rows, "BLOCK": block, "STEPS": steps, "warps": 4}
        for view in (x, inside):
            results, launches = module.plan(config, view)
            assert launches[0].constants["CHANNELS_INSIDE"] == (view is inside)
            launch.run(launches)
            assert_same(Fingerprint(*results), torch_only(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_on_a_gpu(dtype: torch.dtype, seed: int) -> None:
    x = random((5, 320, 33, 32), dtype, seed)
    for view in (x, *(make(x) for make in LAYOUTS.values())):
        there = Fingerprint(*(part.cpu() for part in fingerprint(view.cuda())))
        assert_same(there, torch_only(x))


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    x = normals((3, 320, 16, 16), seed).half().cuda()
    expected = fingerprint(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fingerprint(x)
    for _ in range(2):
        # Twice: a replay must start from 0.
        graph.replay()
        assert_same(result, expected)
