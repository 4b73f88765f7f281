"""What an engine with adapter ports refuses, and that nothing of it disturbs what it serves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heatsink.runtime.adapter_file import write_adapter
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.arguments import make_requests
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import (
    AdapterError,
    CapacityError,
    DamagedFile,
    HeatsinkError,
    InvalidRequest,
    NotBuilt,
    UnknownAdapter,
    UnsafeFile,
)
from heatsink.runtime.port_layout import PortLayout


def test_an_engine_without_ports_says_how_to_get_them(fakes: Any) -> None:
    engine = fakes.engine(None)
    assert engine.adapters == {}
    attempts: list[Callable[[], object]] = [
        lambda: engine.generate("a", adapters="noto"),
        lambda: engine.add_adapter("noto", fakes.style("noto")),
        lambda: engine.remove_adapter("noto"),
    ]
    for attempt in attempts:
        with pytest.raises(NotBuilt, match=r"no adapter ports; .*--adapters SLOTSxRANK.*--fuse"):
            attempt()


def test_what_can_not_be_run_is_told_before_any_work(styled: Engine, fakes: Any) -> None:
    with pytest.raises(UnknownAdapter, match="no 'sepia' here: clay, ink, noto, twemoji"):
        styled.generate(["a", "b"], adapters=["noto", "sepia"])
    styled.add_adapter("fifth", fakes.style("fifth"))
    with pytest.raises(CapacityError, match=r"5 different ones .* this bank has 4 slots"):
        styled.generate(["a"] * 5, adapters=[*fakes.styles, "fifth"])
    with pytest.raises(InvalidRequest, match=r"adapters\.noto: expected a weight that is finite"):
        styled.generate("a", adapters={"noto": 1e300})
    assert fakes.calls(styled, "text_encoder") == []
    assert styled.bank is not None
    assert styled.bank.stats().loads == 0
    # Four at a time are fine, and one after the other there is room for any number.
    assert len(fakes.images(styled, ["a"] * 4, adapters=list(fakes.styles))) == 4
    assert fakes.images(styled, ["a"], adapters="fifth")


def test_more_adapters_than_a_row_has_room_for_are_told_before_any_work(fakes: Any) -> None:
    engine = fakes.engine(fakes.bank(most={"unet": 2, "text_encoder": 1}))
    for name in fakes.styles:
        engine.add_adapter(name, fakes.style(name))
    engine.add_adapter("clay again", fakes.style("clay"))
    three = {"noto": 1.0, "clay": 1.0, "twemoji": 1.0}
    for mix, message in (
        (three, r"takes 2 at once in its unet, the request has 3 \((clay|noto|twemoji), "),
        ({"noto": 1.0, "ink": 1.0}, "takes 1 at once in its text_encoder, the request has 2"),
    ):
        (request,) = make_requests("a", negative_prompt=None, image=None, strength=None, seed=0,
                                   size=None, adapters=mix)[0]  # fmt: skip
        attempts: list[Callable[[], object]] = [
            lambda mix=mix: engine.generate(["a", "b"], adapters=["noto", mix]),  # type: ignore[misc]
            lambda request=request: engine.resolve(request),  # type: ignore[misc]
            lambda mix=mix: engine.bank.acquire({}, mix),  # type: ignore[misc]
        ]
        for attempt in attempts:
            with pytest.raises(NotBuilt, match=message):
                attempt()
    assert fakes.calls(engine, "text_encoder") == []
    assert engine.bank.stats().loads == engine.bank.stats().leased == 0
    # One content is one adapter, nothing is none, and each component has a limit of its own.
    for mix in (
        {"clay": 0.5, "clay again": 0.5, "noto": 1.0},
        {**three, "noto": 0.0},
        {"ink": 1.0, "clay": 1.0, "twemoji": 1.0},
    ):
        assert fakes.images(engine, ["a"], adapters=mix)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (5, r"adapters: expected \{name: weight\}, a name or None .* got 5"),
        ([["noto"]], r"adapters: expected \{name: weight\}"),
        (["noto", "ink"], "adapters: expected one for each of 1 prompts, got 2"),
        ({"noto": float("nan")}, "adapters.*: expected adapter names, each with a finite weight"),
        ({"noto": "much"}, "adapters.*: expected adapter names, each with a finite weight"),
        ({"": 1.0}, "adapters.*: expected adapter names"),
        ({5: 1.0}, "adapters.*: expected adapter names"),
    ],
)
def test_wrong_arguments_are_named(styled: Engine, adapters: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        styled.generate("a", adapters=adapters)


def test_a_file_needs_the_list_of_modules(fakes: Any, tmp_path: Path) -> None:
    layout = PortLayout.of("unet", fakes.slots, fakes.rank, fakes.shapes["unet"])
    engine = fakes.engine(AdapterBank([layout]))
    write_adapter(tmp_path / "a.safetensors", fakes.style("clay"))
    with pytest.raises(NotBuilt, match="without the list of its modules"):
        engine.add_adapter("clay", tmp_path / "a.safetensors")


def test_keys_of_a_file_can_be_left_out(fakes: Any, tmp_path: Path) -> None:
    # Its text encoder's part has no port in this engine.
    engine, path = fakes.engine(fakes.bank("unet")), tmp_path / "a.safetensors"
    write_adapter(path, fakes.style("noto"))
    with pytest.raises(AdapterError, match=rf"{path}: 1 of 2 modules .*text_encoder") as caught:
        engine.add_adapter("noto", path)
    text = [key for key in load_file(path) if key.startswith("text_encoder")]
    assert sorted(caught.value.refused) == sorted(text) != []
    info = engine.add_adapter("noto", path, ignore=["text_encoder.*"])
    assert info.modules == ("unet.mid.to_q",)
    assert info.receipt is not None
    assert sorted(info.receipt.ignored) == sorted(text)
    with pytest.raises(InvalidRequest, match="ignore: 'vae' matches no key"):
        engine.add_adapter("noto", path, ignore=["vae"])
    with pytest.raises(InvalidRequest, match="ignore: expected a file beside it"):
        engine.add_adapter("noto", fakes.style("clay"), ignore=["vae"])
    assert engine.adapters == {"noto": info}


Damage = Callable[[Path, Any], object]


def change(value: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda path, fakes: save_file(value(load_file(path)), path)


BAD: dict[str, tuple[Damage, type[HeatsinkError], str]] = {
    "truncated": (
        lambda path, fakes: path.write_bytes(path.read_bytes()[:-40]),
        DamagedFile,
        "is truncated",
    ),
    "empty": (lambda path, fakes: path.write_bytes(b""), DamagedFile, "is empty"),
    "wrong shape": (
        change(lambda tensors: {**tensors, min(tensors): torch.ones(2, 9)}),
        AdapterError,
        "wrong shape",
    ),
    "NaN": (
        change(lambda tensors: {k: v * float("nan") for k, v in tensors.items()}),
        AdapterError,
        "non-finite",
    ),
    "another architecture": (
        change(lambda tensors: {f"transformer.single_blocks.{k}": v for k, v in tensors.items()}),
        AdapterError,
        "4 of 4 keys can't be applied, so none is",
    ),
    "pickle": (
        lambda path, fakes: path.write_bytes(pickle.dumps({"a": [1.0]})),
        UnsafeFile,
        "pickle",
    ),
    "high rank": (
        lambda path, fakes: write_adapter(path, fakes.style("noto", fakes.rank + 1)),
        AdapterError,
        "rank 5, this engine's ports take 4",
    ),
    "missing": (lambda path, fakes: path.unlink(), AdapterError, "bad.safetensors is missing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_leave_the_engine_as_it_was(
    styled: Engine, tmp_path: Path, kind: str, fakes: Any
) -> None:
    damage, error, message = BAD[kind]
    mixes: list[Any] = ["noto", None, {"ink": 0.5, "clay": 1.0}]
    before = styled.generate(["a fox"] * 3, adapters=mixes, steps=2)
    infos = styled.adapters
    path = tmp_path / "bad.safetensors"
    write_adapter(path, fakes.style("noto"))
    # The file is one that is taken until it is damaged.
    assert styled.add_adapter("good", path).digest == infos["noto"].digest
    styled.remove_adapter("good")
    damage(path, fakes)
    for name in ("bad", "noto"):
        with pytest.raises(error, match=message):
            styled.add_adapter(name, path)
    assert styled.adapters == infos
    after = styled.generate(["a fox"] * 3, adapters=mixes, steps=2)
    assert after.receipts == before.receipts


def test_adding_a_file_says_what_it_changes(styled: Engine, tmp_path: Path, fakes: Any) -> None:
    write_adapter(tmp_path / "a.safetensors", fakes.style("twemoji"), "kohya")
    info = styled.add_adapter("from a file", str(tmp_path / "a.safetensors"))
    assert info.modules == ("unet.mid.to_k", "unet.up.conv")
    assert info == styled.adapters["from a file"]
    assert info.digest == styled.adapters["twemoji"].digest
    assert info.receipt is not None
    assert info.receipt.format == "kohya"
    assert styled.adapters["twemoji"].receipt is None
    # It was copied: what is written over the file doesn't reach it, as it would a mapping.
    size = (tmp_path / "a.safetensors").stat().st_size
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    pair = fakes.images(styled, ["a fox"] * 2, adapters=["from a file", "twemoji"])
    assert pair[0] == pair[1]
