from __future__ import annotations

from importlib import import_module

import pytest
import torch

from heatsink.kernels._attention_space import MOST
from heatsink.kernels._config import Config, Key
from heatsink.kernels._launch import ARCHS
from heatsink.kernels._op import Op
from heatsink.kernels._resources import SHARED_LIMIT

OPS = {n: import_module(f"heatsink.kernels.{n}").OP for n in ("attention", "attention_fp8")}
USES = [(op, case.name, arch) for op in OPS.values() for case in op.cases for arch in ARCHS]


def key_of(op: Op, name: str) -> Key:
    (case,) = (case for case in op.cases if case.name == name)
    return op.key(**case.make(torch.device("meta")))


def as_set(configs: list[Config]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(config.items()) for config in configs}


def test_a_few_for_every_key() -> None:
    for op, case, arch in USES:
        found = op.space(key_of(op, case), arch)
        assert 2 <= len(found) <= MOST, (case, arch)
        assert len(as_set(found)) == len(found), (case, arch)


def test_what_cannot_fit_is_not_tried() -> None:
    """A head of 512 in fp32: 128 queries and a block of as many keys are 512 KiB."""
    key = key_of(OPS["attention"], "vae-4096x4096x512-fp32")
    for arch in ARCHS:
        for config in OPS["attention"].space(key, arch):
            tiles = config["BLOCK_M"] + 2 * config["BLOCK_N"]
            assert 4 * 512 * tiles <= SHARED_LIMIT[arch]
    plain = {
        arch: as_set([c for c in OPS["attention"].space(key, arch) if not c["PRECISION"]])
        for arch in (80, 89)
    }
    assert plain[89] < plain[80]
    # Devices between the architectures that are known: as the older of them.
    assert OPS["attention"].space(key, 86) == OPS["attention"].space(key, 80)


@pytest.mark.parametrize(
    ("case", "tma", "whole", "padded"),
    [
        ("sdxl-self-4096x4096x64-fp16", True, False, 0),
        ("sd15-self-4096x4096x40-fp16", True, False, 1),
        ("text-cross-4096x512x128-bf16", False, False, 0),
        ("sd15-cross-4096x77x40-fp16", False, True, 1),
    ],
)
def test_forms(case: str, tma: bool, whole: bool, padded: int) -> None:
    op = OPS["attention"]
    for arch in ARCHS:
        found = op.space(key_of(op, case), arch)
        forms = {(c["TMA"], c["PROGRAMS"] > 0) for c in found}
        both = {(0, False), (1, False), (0, True), (1, True)}
        assert forms == (both if tma and arch >= 90 else {(0, False)})
        assert any(c["WHOLE"] for c in found) is whole
        assert sum(not c["SPLIT_D"] for c in found) == padded


def test_fp32_is_tried_on_tensor_cores() -> None:
    op = OPS["attention"]
    for case, wanted in (("vae-4096x4096x512-fp32", {0, 1}), ("sdxl-self-4096x4096x64-fp16", {0})):
        found = op.space(key_of(op, case), 90)
        assert {config["PRECISION"] for config in found} == wanted
