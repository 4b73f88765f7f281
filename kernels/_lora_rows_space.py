"""Configurations of `lora_rows` worth trying."""

from __future__ import annotations

from heatsink.kernels._config import Config, Key


def space(key: Key, arch: int) -> list[Config]:
    """Every configuration worth trying for a key."""
    tokens, outputs, inputs = (int(key[name]) for name in ("tokens", "outputs", "inputs"))
    wide = key["dtype"] == "fp32"
    configs: list[Config] = []
    for block_t in (t for t in (16, 32, 64) if t == 16 or t < 2 * tokens):
        for block_r in (16, 32) if wide else (32, 64):
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 3)):
                base: Config = {
                    "BLOCK_T": block_t,
                    "BLOCK_K": 32 if wide else 64,
                    "BLOCK_R": block_r,
                    "BLOCK_E": 16 if wide else 32,
                    "PRECISION": 0,
                    "warps": warps,
                    "stages": stages,
                }
                configs += _ways(base, tokens, inputs * int(key["taps"]), outputs)
    return configs + [{**config, "PRECISION": 1} for config in configs if wide]


def _ways(base: Config, tokens: int, terms: int, outputs: int) -> list[Config]:
    """One launch or two, with blocks of outputs and parts of long sums."""
    found = []
    for block_n, warps in ((64, 4), (128, 8)):
        if block_n >= 2 * outputs:
            continue
        both = {**base, "BLOCK_N": block_n}
        if block_n == 64 or base["warps"] == 8:
            found.append({**both, "FUSED": 1, "SPLITS": 1, "expand_warps": base["warps"]})
        found += [
            {**both, "FUSED": 0, "SPLITS": splits, "expand_warps": warps}
            for splits in (1, 2, 4, 8)
            if splits == 1 or (terms >= 512 * splits and tokens <= 1024)
        ]
    return found
