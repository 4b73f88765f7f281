"""Configurations of the attention ops that are worth trying, the likeliest first.

What can't fit is left out by an estimate of a block's shared memory and of a thread's registers:
trying it would cost a compilation and give nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from heatsink.kernels._config import Config, Key
from heatsink.kernels._heads import MAX_HEAD_DIM, parts
from heatsink.kernels._resources import SHARED_LIMIT

# The most keys that a program is tried to hold whole.
WHOLE_KEYS = 256
# The most configurations for a key.
MOST = 60

# Where descriptors exist, and as many programs as an H100 or H200 has multiprocessors.
_TMA_ARCH = 90
_PROGRAMS = 132
# fp32 sums that a thread of 255 registers can hold beside what else it needs.
_SUMS = 192
# Fewer than so many sums a thread are too little work for a warp.
_LEAST_SUMS = 16
_WARP = 32


def _covered(size: int, split: int, least: int = 16) -> int:
    """How many columns are worked on for `size` of them."""
    return sum(parts(size, split, least))


def _shared_limit(arch: int) -> int:
    """A block's shared memory on an architecture, or on the nearest older one that is known."""
    return SHARED_LIMIT[max((known for known in SHARED_LIMIT if known <= arch), default=80)]


def _fits(config: Config, key: Key, arch: int, size_qk: int, size_v: int) -> bool:
    """Whether tiles fit in shared memory, and sums in registers.

    Args:
        config: of the kernel that works block by block.
        key: of the op.
        arch: 90 is sm_90.
        size_qk: bytes of an element of q and k as they are multiplied.
        size_v: bytes of an element of v.
    """
    width = _covered(int(key["head_dim"]), config["SPLIT_D"])
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    # The pipeline holds one block fewer than it is deep, where it holds few.
    held = max(1, config["stages"] - 1)
    shared = size_qk * block_m + held * block_n * (size_qk + size_v)
    sums = block_m * (width + block_n) / (_WARP * config["warps"])
    return shared * width <= _shared_limit(arch) and _LEAST_SUMS <= sums <= _SUMS


def _blocks(sizes: Iterable[tuple[int, int, int]], stages: Iterable[int]) -> Iterator[Config]:
    """Each of `(BLOCK_M, BLOCK_N, warps)` at each depth of the pipeline."""
    depths = tuple(stages)
    for block_m, block_n, warps in sizes:
        for depth in depths:
            yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "warps": warps, "stages": depth}


def _sizes(key: Key) -> list[tuple[int, int, int]]:
    """`(BLOCK_M, BLOCK_N, warps)` by what a head and its dtype leave room for."""
    if int(key["bits"]) == 32:
        return [(32, 32, 4), (64, 32, 8), (32, 16, 4), (16, 32, 4), (16, 16, 4), (64, 64, 8)]
    if int(key["head_dim"]) > MAX_HEAD_DIM:
        return [(64, 16, 8), (64, 32, 8), (32, 32, 8), (32, 16, 4), (128, 16, 8), (16, 16, 4)]
    found = [(128, 64, 8), (128, 64, 4), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 32, 4)]
    return [*found, (128, 32, 8), (64, 32, 4), (64, 128, 8), (32, 64, 4), (32, 32, 4)]


def _whole(key: Key, arch: int) -> list[Config]:
    """Programs that hold all keys; a pair of parts of the keys where that pads less."""
    keys, head_dim = int(key["seq_k"]), int(key["head_dim"])
    if keys > WHOLE_KEYS or head_dim > MAX_HEAD_DIM:
        return []
    size = int(key["bits"]) // 8
    found = []
    for split in (1, 0) if parts(keys, 1) != parts(keys, 0) else (1,):
        columns, width = _covered(keys, split), _covered(head_dim, 1)
        for block_m, warps in ((64, 4), (128, 8), (128, 4), (32, 4), (16, 1), (16, 4)):
            sums = block_m * (width + columns) / (_WARP * warps)
            shared = size * width * (block_m + 2 * columns)
            if shared > _shared_limit(arch) or not _LEAST_SUMS <= sums <= _SUMS:
                continue
            blocks = -(-int(key["seq_q"]) // block_m)
            found += [
                {"WHOLE": 1, "BLOCK_M": block_m, "SPLIT_N": split, "BLOCKS": count}
                | {"warps": warps, "stages": 1}
                for count in (4, 1, 8)
                if count <= blocks
            ]
    return found


def attention_space(key: Key, arch: int) -> list[Config]:
    """What to try for `attention`: at most `MOST`."""
    size = int(key["bits"]) // 8
    shared = {"SPLIT_D": 1, "PROGRAMS": 0, "TMA": 0, "PRECISION": 0}
    long = key["kv"] == "long"
    plain = [
        {**shared, "WHOLE": 0, **config}
        for config in _blocks(_sizes(key), (2, 3, 1) if long else (2, 1))
        if _fits({**shared, **config}, key, arch, size, size)
    ]
    others: list[Config] = []
    if parts(int(key["head_dim"]), 1) != parts(int(key["head_dim"]), 0):
        padded = ({**config, "SPLIT_D": 0} for config in plain)
        others += [one for one in padded if _fits(one, key, arch, size, size)][:1]
    if size == 4:
        # Products of fp32 on tensor cores, in three of tf32 each.
        others += [{**config, "PRECISION": 1} for config in plain[:6]]
    if long and arch >= _TMA_ARCH:
        others += [
            {**config, "TMA": tma, "PROGRAMS": programs}
            for config in plain[:8]
            for tma, programs in ((1, 0), (1, _PROGRAMS), (0, _PROGRAMS))
        ]
    whole = [{**shared, **config} for config in _whole(key, arch)]
    return [*whole[: MOST // 3], *others, *plain][:MOST]


def attention_fp8_space(key: Key, arch: int) -> list[Config]:
    """What to try for `attention_fp8`: at most `MOST`."""
    shared = {"CHUNK": 128, "SPLIT_D": 1, "side_warps": 8}
    sizes = [(128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (64, 32, 4)]
    size_v = 1 if key["pure"] else 2
    plain = [
        {**shared, **config}
        for config in _blocks(sizes, (3, 2, 4))
        if _fits({**shared, **config}, key, arch, 1, size_v)
    ]
    padded = []
    if parts(int(key["head_dim"]), 1) != parts(int(key["head_dim"]), 0):
        padded = [{**config, "SPLIT_D": 0} for config in plain]
        padded = [one for one in padded if _fits(one, key, arch, 1, size_v)][:1]
    side = [{**config, "side_warps": 4} for config in plain[:2]]
    return [*padded, *side, *plain][:MOST]
