"""How heads, strides and addresses reach the attention kernels: one binary, whatever they are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels._config import Config
from heatsink.kernels._heads import parts, settled
from heatsink.kernels._launch import Launch

attention = import_module("heatsink.kernels.attention")
attention_fp8 = import_module("heatsink.kernels.attention_fp8")

SHARED: Config = {"SPLIT_D": 1, "PRECISION": 0, "BLOCK_M": 32, "warps": 4, "stages": 2}
BLOCKS: Config = {**SHARED, "WHOLE": 0, "BLOCK_N": 32, "PROGRAMS": 0, "TMA": 0}
DESCRIPTORS: Config = {**BLOCKS, "TMA": 1, "PROGRAMS": 4}
WHOLE: Config = {**SHARED, "WHOLE": 1, "SPLIT_N": 1, "BLOCKS": 2, "TMA": 0}
EIGHT: Config = {**SHARED, "BLOCK_N": 32, "CHUNK": 16, "side_warps": 4}
CONFIGS = {
    "blocks": BLOCKS,
    "descriptors": DESCRIPTORS,
    "whole": WHOLE,
    "int8": EIGHT,
    "e4m3": EIGHT,
}


def launches(name: str, *views: Tensor, **options: Any) -> list[Launch]:
    """What attention launches under a configuration of its own."""
    if name in ("int8", "e4m3"):
        options["pure"] = name == "e4m3"
        return list(attention_fp8.plan(CONFIGS[name], *views, **options)[1])
    return list(attention.plan(CONFIGS[name], *views, **options)[1])


def views_of(batch: int, keys: int, head_dim: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """q, k and v of 64 queries and 2 heads, as they come: alone, in a batch, packed, askew."""
    found: dict[str, list[Tensor]] = {}
    for n in (64, keys, keys):
        shape = (batch, n, 2, head_dim)
        packed = torch.zeros(batch + 1, n, 3, 2, head_dim, dtype=dtype)
        views = {
            "dense": torch.zeros(shape, dtype=dtype),
            "second": torch.zeros(batch + 1, *shape[1:], dtype=dtype)[1:],
            "packed": packed[1:, :, 1],
            "heads first": torch.zeros(batch, 2, n, head_dim, dtype=dtype).transpose(1, 2),
            "apart": torch.zeros(batch, 2, head_dim, n, dtype=dtype).permute(0, 3, 1, 2),
            "odd": torch.zeros(batch, n, 2, head_dim + 1, dtype=dtype)[..., 1:],
            "expanded": torch.zeros(1, n, 1, head_dim, dtype=dtype).expand(shape),
        }
        for name, view in views.items():
            found.setdefault(name, []).append(view)
    return found


@pytest.mark.parametrize("head_dim", [20, 33, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_binary_for_every_place(name: str, head_dim: int) -> None:
    """Triton's layouts, and with them the order of sums, follow strides and addresses."""
    keys = {
        tuple(launch.key() for launch in launches(name, *views))
        for batch in (1, 2, 17)
        for views in views_of(batch, 45, head_dim, torch.float16).values()
    }
    assert len(keys) == 1


@pytest.mark.parametrize("keys", [45, 64])
def test_one_binary_for_every_bias(keys: int) -> None:
    found = set()
    for batch in (1, 3):
        views = views_of(batch, keys, 32, torch.float16)["dense"]
        bias = torch.zeros(batch + 1, 1, 64, keys + 1, dtype=torch.float16)
        whole = bias[1:, :, :, :-1]
        rows, columns = bias[0, 0, :1, 1:], bias[0, 0, :, 1:2]
        for view in (whole, whole.contiguous(), bias[:1, :, :, 1:], rows, columns):
            found |= {launch.key() for launch in launches("blocks", *views, bias=view)}
    assert len(found) == 1


def test_what_settles_without_a_copy() -> None:
    x = torch.zeros(3, 8, 3, 2, 40, dtype=torch.float16)
    q = x[:, :, 0]
    for view in (x[:, :, 1], x[1:2, :, 2], q.transpose(1, 2), q[:1].expand(3, 8, 2, 40)):
        assert settled(view) is view
    # Heads of 20 in fp16 are no multiple of 16 bytes: read by elements, wherever they are.
    narrow = torch.zeros(3, 8, 3, 2, 20, dtype=torch.float16)[:, :, 2]
    assert settled(narrow) is narrow


def test_what_settles_by_a_copy() -> None:
    x = torch.arange(3.0 * 8 * 2 * 41).view(3, 8, 2, 41)
    odd, apart = x[..., 1:], x.transpose(1, 3)
    for view in (odd, apart):
        assert torch.equal(settled(view), view)
        assert settled(view).is_contiguous()
    # What is broadcast is copied once, unless it must lie there.
    wide = x[:1, :1, :1, 1:].expand(3, 2, 8, 40)
    assert torch.equal(settled(wide), wide)
    assert settled(wide).stride() == (0, 0, 0, 1)
    assert settled(wide, broadcast=False).is_contiguous()


@pytest.mark.parametrize(("head_dim", "wanted"), [(64, True), (40, True), (20, False)])
def test_descriptors_only_where_they_can_be(head_dim: int, wanted: bool) -> None:
    for name in ("packed", "odd", "expanded"):
        q, k, v = views_of(2, 45, head_dim, torch.float16)[name]
        (launch,) = launches("descriptors", q, k, v)
        assert launch.constants["TMA"] is wanted
        steps = [launch.args[f"stride_{of}"] for of in ("kb", "kh", "kn", "vb", "vh", "vn")]
        assert not wanted or 0 not in steps


def test_parts() -> None:
    wanted = {1: (16, 0), 40: (32, 16), 64: (64, 0), 77: (64, 16), 80: (64, 16), 96: (64, 32)}
    wanted |= {112: (128, 0), 160: (128, 32), 512: (512, 0)}
    assert {size: parts(size, 1) for size in wanted} == wanted
    assert [parts(size, 0) for size in (40, 80, 160)] == [(64, 0), (128, 0), (256, 0)]
    for size in range(1, 257):
        for least in (16, 32):
            assert sum(parts(size, 1, least)) >= size


def test_a_stride_beyond_32_bits_costs_a_copy() -> None:
    # Nothing is read: the memory that these strides span is not there.
    x = torch.empty(0, dtype=torch.float16, device="meta").new_empty(1).expand(2, 16, 1, 16)
    far = torch.as_strided(x, (2, 16, 1, 16), (2**31, 16, 16, 1))
    near = torch.as_strided(x, (2, 16, 1, 16), (2**31 - 16, 16, 16, 1))
    assert settled(near) is near
    assert settled(far).stride() == (256, 16, 16, 1)
