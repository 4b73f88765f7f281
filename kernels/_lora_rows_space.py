"""Configurations of `lora_rows` worth trying."""

from __future__ import annotations

from heatsink.kernels._config import Config, Key


def space(key: Key, arch: int) -> list[Config]:
    """Every configuration worth trying for a key."""
    tokens, outputs, inputs = (int(key[name]) for name in ("tokens", "outputs", "inputs"))
    wide = key["dtype"] == "fp32"
    configs: list[Config] = []
    for block_t in (16, 32, 64, 128):
        if block_t > 16 and block_t >= 2 * tokens:
            continue
        for block_r in (16, 32) if wide else (16, 64):
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 3)):
                if block_t * block_r < 1024 * (warps // 4) and warps > 4:
                    continue
                base: Config = {
                    "BLOCK_T": block_t,
                    "BLOCK_K": 32 if wide else 64,
                    "BLOCK_R": block_r,
                    "PRECISION": int(wide),
                    "warps": warps,
                    "stages": stages,
                }
                configs += _ways(base, tokens, inputs * int(key["taps"]), outputs)
    return configs


def _ways(base: Config, tokens: int, terms: int, outputs: int) -> list[Config]:
    """One launch or two, with blocks of outputs and parts of long sums."""
    blocks = [n for n in (64, 128) if n < 2 * outputs] or [32]
    found = [
        {**base, "FUSED": 1, "SPLITS": 1, "BLOCK_N": n, "expand_warps": base["warps"]}
        for n in blocks
    ]
    splits = [s for s in (1, 2, 4, 8) if s == 1 or (terms >= 512 * s and tokens <= 1024)]
    return found + [
        {**base, "FUSED": 0, "SPLITS": s, "BLOCK_N": n, "expand_warps": 4}
        for s in splits
        for n in blocks
    ]
