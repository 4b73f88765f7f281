"""Requests with adapters: routed by row, decided by content, and never disturbed by bad files.

The components are stand-ins whose ports compute `y + sum scale B (A x)` from the bank's tensors.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import Targets, write_adapter
from heatsink.runtime.adapter_loads import ThreadLoader
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.backends.session import Array
from heatsink.runtime.components import text_prefix
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import (
    AdapterError,
    CapacityError,
    HeatsinkError,
    InvalidRequest,
    NotBuilt,
    NumericError,
    ResourceError,
    UnknownAdapter,
    UnsafeFile,
)
from heatsink.runtime.port_layout import PortLayout
from heatsink.runtime.request import Request
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.text import Tokenizer

SLOTS, RANK, WIDTH = 4, 4, 6
TEXT = text_prefix("text_encoder") + "encoder.layers.0.mlp.fc1"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {"mid.to_q": (4, 4), "mid.to_k": (4, 4), "up.conv": (4, 4, 3, 3)},
    "text_encoder": {TEXT: (WIDTH, WIDTH)},
}
CONFIG = ScheduleConfig.from_diffusers(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
)


class Part:
    """A component with ports: a row's base, then each adapter's product, row by row."""

    def __init__(self, name: str, bank: AdapterBank | None) -> None:
        self.name, self.calls = name, list[dict[str, Array]]()
        self.layout = bank.layouts.get(name) if bank else None
        # As a session binds them: once, for good.
        self.tensors = (
            {k: t.numpy() for k, t in bank.tensors(name).items()} if bank and self.layout else {}
        )

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        rows = dict(inputs)
        slots, scales = rows.pop("adapter_slots", None), rows.pop("adapter_scales", None)
        if slots is not None:
            assert self.layout is not None
            assert scales is not None
            assert slots.dtype == np.int64
            assert scales.dtype == np.float32
            assert slots.shape == scales.shape
            # Without an adapter in any row the engine leaves them out.
            assert (slots >= 0).any(axis=0).all()
        found = []
        for row in range(len(next(iter(rows.values())))):
            x, y = getattr(self, self.name)({name: value[row] for name, value in rows.items()})
            if slots is not None:
                assert scales is not None
                for slot, scale in zip(slots[row], scales[row], strict=True):
                    if slot >= 0:
                        y = y + np.float32(scale) * self.ported(x, int(slot))
            found.append(y.astype(np.float32))
        return {"hidden" if self.name == "text_encoder" else "out": np.stack(found)}

    def text_encoder(self, row: Mapping[str, Array]) -> tuple[Array, Array]:
        ids = row["input_ids"].astype(np.float32)
        x = np.sin(ids[:, None] * np.arange(1, WIDTH + 1, dtype=np.float32))
        return x, x

    def unet(self, row: Mapping[str, Array]) -> tuple[Array, Array]:
        x = row["sample"]
        mean = row["encoder_hidden_states"].mean(dtype=np.float32)
        return x, np.tanh(x) * np.float32(0.7) + mean / (row["timestep"] / 100 + np.float32(1))

    def ported(self, x: Array, slot: int) -> Array:
        """The sum over all ports: on channels of the UNet's rows, on features of the text's."""
        assert self.layout is not None
        total = np.zeros_like(x)
        for path, (group, port) in sorted(self.layout.places().items()):
            row = port * self.layout.slots + slot
            a, b = (torch.from_numpy(self.tensors[f"bank.{group}.{side}"][row]) for side in "ab")
            value = torch.from_numpy(x)
            if a.dim() == 4:
                kernel = a.movedim(-1, 1)
                value = torch.conv2d(torch.conv2d(value, kernel, padding=1), b.t()[..., None, None])
            elif self.name == "unet":
                value = torch.einsum("ro,ri,ihw->ohw", b, a, value)
            else:
                value = value @ a.t() @ b
            total = total + value.numpy() * np.float32(len(path))
        return total


def decode(inputs: Mapping[str, Array]) -> dict[str, Array]:
    pixels = np.tanh(inputs["latents"][:, :3] / 4).astype(np.float32)
    return {"image": pixels.repeat(8, axis=2).repeat(8, axis=3)}


@pytest.fixture
def tokenizer(tiny_sd1: Path) -> Tokenizer:
    return Tokenizer(tiny_sd1 / "tokenizer")


def engine_of(tokenizer: Tokenizer, bank: AdapterBank | None) -> Engine:
    spec = EngineSpec(
        name="fake",
        digest="e" * 64,
        text_encoders=["text_encoder"],
        tokenizers=[tokenizer],
        schedule=CONFIG,
        latent_channels=4,
        vae_factor=8,
        default_size=(64, 64),
        heights=(64, 128),
        widths=(64, 128),
    )
    parts = {name: Part(name, bank) for name in ("text_encoder", "unet")}
    return Engine(spec, {**parts, "vae_decoder": decode}, bank)


def bank_of(
    *components: str, slots: int = SLOTS, loader: ThreadLoader | None = None
) -> AdapterBank:
    layouts = [PortLayout.of(name, slots, RANK, SHAPES[name]) for name in components or SHAPES]
    flat = {
        name: {path.replace(".", "_"): path for path in table} for name, table in SHAPES.items()
    }
    return AdapterBank(layouts, targets=Targets(SHAPES, flat), loader=loader)


STYLES = ("noto", "twemoji", "ink", "clay")
TOUCHES = {
    "noto": [("unet", "mid.to_q"), ("text_encoder", TEXT)],
    "twemoji": [("unet", "mid.to_k"), ("unet", "up.conv")],
    "ink": [("text_encoder", TEXT)],
    "clay": [("unet", "up.conv")],
}


def style(name: str, rank: int = 2) -> list[AdapterDelta]:
    torch.manual_seed(sum(map(ord, name)))
    deltas = []
    for component, path in TOUCHES.get(name, TOUCHES["noto"]):
        shape = SHAPES[component][path]
        a, b = torch.randn(rank, *shape[1:]) / 4, torch.randn(shape[0], rank) / 4
        deltas.append(AdapterDelta(component, path, a, b, 0.25))
    return deltas


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    """An engine with four slots that knows the four styles."""
    made = engine_of(tokenizer, bank_of())
    for name in STYLES:
        made.add_adapter(name, style(name))
    return made


def calls(engine: Engine, component: str) -> list[dict[str, Array]]:
    part = engine._components[component]
    assert isinstance(part, Part)
    return part.calls


def images(engine: Engine, prompts: list[str], **fields: Any) -> list[str]:
    given = {"steps": 3, "guidance": 4.0, "seed": [7] * len(prompts), **fields}
    return [receipt.image for receipt in engine.generate(prompts, **given).receipts]


# Many styles in one batch


def test_four_styles_in_one_batch_are_four_batches_of_one(engine: Engine) -> None:
    prompts, unet = ["a fox"] * 4, calls(engine, "unet")
    alone = [images(engine, ["a fox"], adapters={name: 0.8})[0] for name in STYLES]
    apart = [len(call["sample"]) for call in unet]
    unet.clear()
    together = images(engine, prompts, adapters=[{name: 0.8} for name in STYLES])
    assert together == alone
    assert len(set(together)) == 4
    # Executed rows are counted: nothing was answered without running.
    assert apart == [2] * 12
    assert [len(call["sample"]) for call in unet] == [8] * 3


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0], [3, 3, 1, 3], [4, 1]]
)
def test_a_request_gives_the_same_pixels_beside_any_mix(engine: Engine, order: list[int]) -> None:
    mixes: list[Any] = [
        {"noto": 0.8, "twemoji": 0.3},
        None,
        {"ink": -1.5},
        "clay",
        {"clay": 0.5, "ink": 0.5, "noto": 0.25, "twemoji": 2.0},
        {},
    ]
    sizes = [(64, 64), (64, 64), (128, 64), (64, 64), (64, 64), (64, 128)]
    fields = [{"steps": 4 + place % 3, "guidance": 1.0 + place % 2 * 3} for place in range(6)]

    def ask(place: int) -> Request:
        mix = {mixes[place]: 1.0} if isinstance(mixes[place], str) else mixes[place] or {}
        height, width = sizes[place]
        return Request.parse(
            prompt=f"prompt {place}", seed=place, height=height, width=width, adapters=mix,
            **fields[place],
        )  # fmt: skip

    alone = {place: engine.run([ask(place)]).receipts[0] for place in set(order)}
    together = engine.run([ask(place) for place in order])
    assert together.receipts == [alone[place] for place in order]


def test_rows_without_an_adapter_are_those_of_an_engine_without_ports(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    plain = images(engine_of(tokenizer, None), ["a fox"])
    assert images(engine, ["a fox"]) == plain
    assert images(engine, ["a fox"] * 3, adapters=["noto", None, {"ink": 0.0}])[1:] == plain * 2
    assert images(engine, ["a fox"], adapters={"noto": 1.0}) != plain


def test_the_picture_is_the_definitions(engine: Engine, tokenizer: Tokenizer) -> None:
    # An engine whose port is one adapter that is the sum of two, weights and scales in its b.
    parts = {"noto": 0.8, "twemoji": 0.3}
    summed: dict[tuple[str, str], AdapterDelta] = {}
    for name, weight in parts.items():
        for d in style(name):
            a, b = d.a.double(), d.b.double() * (d.scale * weight)
            summed[d.component, d.module_path] = AdapterDelta(d.component, d.module_path, a, b)
    other = engine_of(tokenizer, bank_of())
    other.add_adapter("sum", list(summed.values()))
    first = np.asarray(engine.generate("a fox", adapters=parts, steps=2).images[0], np.float32)
    second = np.asarray(other.generate("a fox", adapters="sum", steps=2).images[0], np.float32)
    plain = np.asarray(engine.generate("a fox", steps=2).images[0], np.float32)
    # Roundings of fp32 show as single levels, the adapters as many.
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - plain).max() > 10


def test_both_rows_of_a_guided_request_and_each_components_own(engine: Engine) -> None:
    mixes: list[Any] = [{"noto": 0.5, "twemoji": 0.25}, None, "ink"]
    engine.generate(["a", "b", "c"], adapters=mixes, steps=1, guidance=3.0)
    (unet,), (text,) = calls(engine, "unet"), calls(engine, "text_encoder")
    infos = engine.adapters
    order = sorted(("noto", "twemoji"), key=lambda name: infos[name].digest)
    weights = {"noto": 0.5, "twemoji": 0.25}
    both = [infos[name].slot for name in order]
    # ink leaves the UNet alone: its rows are as without adapters there.
    np.testing.assert_array_equal(unet["adapter_slots"], [both] * 2 + [[-1, -1]] * 4)
    np.testing.assert_array_equal(
        unet["adapter_scales"], [[weights[n] for n in order]] * 2 + [[0, 0]] * 4
    )
    noto, ink = infos["noto"].slot, infos["ink"].slot
    np.testing.assert_array_equal(text["adapter_slots"], [[noto], [noto], [-1], [-1], [ink], [ink]])
    np.testing.assert_array_equal(text["adapter_scales"].ravel(), [0.5, 0.5, 0, 0, 1, 1])


def test_a_batch_is_as_narrow_as_its_rows_allow(engine: Engine) -> None:
    # The request with the most adapters ends first, then the last with any.
    requests = [
        Request.parse(prompt="a", seed=1, steps=1, adapters={"noto": 1.0, "twemoji": 1.0}),
        Request.parse(prompt="a", seed=1, steps=2, adapters={"clay": 1.0}),
        Request.parse(prompt="a", seed=1, steps=3),
        Request.parse(prompt="a", seed=1, steps=3, height=128, adapters={"ink": 1.0}),
    ]
    engine.run(requests)
    shapes = [
        call["adapter_slots"].shape if "adapter_slots" in call else None
        for call in calls(engine, "unet")
    ]
    assert shapes == [(6, 2), (4, 1), None, None, None, None]


def test_an_engine_with_ports_in_its_unet_only(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, bank_of("unet"))
    engine.add_adapter("clay", style("clay"))
    with pytest.raises(AdapterError, match="no adapter ports in its text_encoder"):
        engine.add_adapter("noto", style("noto"))
    engine.generate("a", adapters="clay", steps=1)
    assert "adapter_slots" not in calls(engine, "text_encoder")[0]
    assert "adapter_slots" in calls(engine, "unet")[0]


# What decides the pixels, and what a receipt says


def test_content_decides_not_names_order_or_slots(engine: Engine, tokenizer: Tokenizer) -> None:
    mix = {"noto": 0.8, "twemoji": 0.3, "clay": -0.5}
    result = engine.generate("a fox", adapters=mix, steps=2)
    other = engine_of(tokenizer, bank_of(slots=3))
    # Other names, loaded in another order into other slots, one content under two names.
    for new, old in (("c", "clay"), ("t", "twemoji"), ("n", "noto"), ("n2", "noto")):
        other.add_adapter(new, style(old))
        other.generate("warm", adapters=new, steps=1)
    again = other.generate("a fox", adapters={"c": -0.5, "n": 0.5, "t": 0.3, "n2": 0.3}, steps=2)
    (first,), (second,) = result.receipts, again.receipts
    assert first.image == second.image
    assert first.request == second.request
    assert [use.digest for use in first.adapters] == sorted(use.digest for use in first.adapters)
    assert {use.name: use.weight for use in first.adapters} == mix
    digests = {name: info.digest for name, info in engine.adapters.items()}
    assert {use.name: use.digest for use in first.adapters} == {n: digests[n] for n in mix}
    assert [(use.name, use.weight) for use in second.adapters if use.name[0] == "n"] == [
        ("n", 0.5),
        ("n2", 0.3),
    ]
    assert first.as_dict()["adapters"] == [use.__dict__ for use in first.adapters]
    # The request keeps its names; its digest in the receipt is over contents.
    (request,) = result.requests
    assert request.adapters == mix
    by_content = request.replace(adapters={digests[name]: weight for name, weight in mix.items()})
    assert first.request == by_content.digest != request.digest
    # By content it can be asked for again.
    (third,) = engine.run([by_content]).receipts
    assert (third.image, third.request) == (first.image, first.request)


def test_other_weights_and_contents_are_other_requests(engine: Engine) -> None:
    mixes: list[Any] = [None, "noto", {"noto": 0.5}, "clay", {"noto": 1.0, "clay": 1.0}, "ink"]
    receipts = engine.generate(["a fox"] * 6, adapters=mixes, seed=[1] * 6, steps=2).receipts
    assert len({receipt.image for receipt in receipts}) == 6
    assert len({receipt.request for receipt in receipts}) == 6
    engine.add_adapter("noto", style("noto", rank=3))
    (changed,) = engine.generate("a fox", adapters="noto", seed=1, steps=2).receipts
    assert changed.image != receipts[1].image
    assert changed.request != receipts[1].request


def test_requests_without_adapters_keep_their_digests(engine: Engine) -> None:
    result = engine.generate(["a fox"] * 2, adapters=[None, {"noto": 0.0}], steps=1, seed=[1, 1])
    plain, nothing = result.receipts
    assert plain.request == result.requests[0].digest == nothing.request
    assert plain.adapters == nothing.adapters == ()
    assert plain == nothing


# Adapters come and go


def test_a_name_may_change_while_a_request_runs(engine: Engine) -> None:
    expected = engine.generate("a fox", adapters="noto", steps=4)
    unet = engine._components["unet"]
    turns: list[int] = []

    def meddle(inputs: Mapping[str, Array]) -> dict[str, Array]:
        turns.append(len(turns))
        if len(turns) == 2:
            engine.add_adapter("noto", style("clay"))
            engine.remove_adapter("ink")
            # All other slots are written meanwhile.
            for number in range(5):
                engine.add_adapter(f"new {number}", style(f"new {number}"))
                assert engine.bank is not None
                engine.bank.prefetch(f"new {number}")
        return unet(inputs)

    watched = Engine(engine.spec, {**engine._components, "unet": meddle}, engine.bank)
    result = watched.generate("a fox", adapters="noto", steps=4)
    assert len(turns) == 4
    assert result.receipts == expected.receipts
    assert engine.bank is not None
    assert engine.bank.stats().leased == 0
    assert engine.adapters["noto"].digest != expected.receipts[0].adapters[0].digest


def test_slots_are_given_back_when_a_component_fails(engine: Engine) -> None:
    bank = engine.bank
    assert bank is not None
    for broken in (lambda inputs: {"out": inputs["sample"] * np.nan}, lambda inputs: {}):
        faulty = Engine(engine.spec, {**engine._components, "unet": broken}, bank)
        with pytest.raises((NumericError, KeyError)):
            faulty.generate("a", adapters="noto", steps=1)
        assert bank.stats().leased == 0


def test_a_copy_that_fails_fails_the_request_and_no_other(tokenizer: Tokenizer) -> None:
    class Failing(ThreadLoader):
        broken = True

        def submit(self, write: Any, after: Any) -> Any:
            def run() -> None:
                if self.broken:
                    raise RuntimeError("no memory")
                write()

            return super().submit(run, after)

    loader = Failing()
    engine = engine_of(tokenizer, bank_of(loader=loader))
    engine.add_adapter("noto", style("noto"))
    plain = images(engine, ["a fox"])
    with pytest.raises(ResourceError, match="no memory"):
        engine.generate(["a fox"] * 2, adapters=[None, "noto"], steps=1)
    assert images(engine, ["a fox"]) == plain
    loader.broken = False
    assert images(engine, ["a fox"], adapters="noto") != plain


def test_calls_of_several_threads_share_the_bank(engine: Engine) -> None:
    mixes: list[dict[str, float]] = [{"noto": 0.8}, {"ink": 1.0, "clay": 0.5}, {"clay": 1.0}, {}]
    expected = [images(engine, ["a fox"], adapters=mix) for mix in mixes]
    found: list[list[str]] = [[] for _ in mixes]

    def work(place: int) -> None:
        for _ in range(3):
            found[place] += images(engine, ["a fox"], adapters=mixes[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [one * 3 for one in expected]


# Refusals


def test_an_engine_without_ports_says_how_to_get_them(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer, None)
    assert engine.adapters == {}
    for attempt in (
        lambda: engine.generate("a", adapters="noto"),
        lambda: engine.add_adapter("noto", style("noto")),
        lambda: engine.remove_adapter("noto"),
    ):
        with pytest.raises(NotBuilt, match=r"no adapter ports; .*--adapters SLOTSxRANK.*--fuse"):
            attempt()


def test_what_can_not_be_run_is_told_before_any_work(engine: Engine) -> None:
    with pytest.raises(UnknownAdapter, match="no 'sepia' here: clay, ink, noto, twemoji"):
        engine.generate(["a", "b"], adapters=["noto", "sepia"])
    engine.add_adapter("fifth", style("fifth"))
    with pytest.raises(CapacityError, match=r"5 different ones .* this bank has 4 slots"):
        engine.generate(["a"] * 5, adapters=[*STYLES, "fifth"])
    with pytest.raises(InvalidRequest, match=r"adapters\.noto: expected a weight that is finite"):
        engine.generate("a", adapters={"noto": 1e300})
    assert calls(engine, "text_encoder") == []
    assert engine.bank is not None
    assert engine.bank.stats().loads == 0
    # Four at a time are fine, and one after the other there is room for any number.
    assert len(images(engine, ["a"] * 4, adapters=list(STYLES))) == 4
    assert images(engine, ["a"], adapters="fifth")


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
def test_wrong_arguments_are_named(engine: Engine, adapters: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.generate("a", adapters=adapters)


def test_a_file_needs_the_list_of_modules(tokenizer: Tokenizer, tmp_path: Path) -> None:
    layout = PortLayout.of("unet", SLOTS, RANK, SHAPES["unet"])
    engine = engine_of(tokenizer, AdapterBank([layout]))
    write_adapter(tmp_path / "a.safetensors", style("clay"))
    with pytest.raises(NotBuilt, match="without the list of its modules"):
        engine.add_adapter("clay", tmp_path / "a.safetensors")


def test_keys_of_a_file_can_be_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Its text encoder's part has no port in this engine.
    engine, path = engine_of(tokenizer, bank_of("unet")), tmp_path / "a.safetensors"
    write_adapter(path, style("noto"))
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
        engine.add_adapter("noto", style("clay"), ignore=["vae"])
    assert engine.adapters == {"noto": info}


Damage = Callable[[Path], None]


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def change(value: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def apply(path: Path) -> None:
        save_file(value(load_file(path)), path)

    return apply


def with_first(tensors: dict[str, torch.Tensor], new: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors, min(tensors): new}


BAD: dict[str, tuple[Damage, type[HeatsinkError], str]] = {
    "truncated": (
        lambda path: write(path, path.read_bytes()[:-40]),
        AdapterError,
        "bad.safetensors",
    ),
    "empty": (lambda path: write(path, b""), AdapterError, "bad.safetensors"),
    "wrong shape": (
        change(lambda tensors: with_first(tensors, torch.ones(2, 9))),
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
        "can't be applied",
    ),
    "pickle": (
        lambda path: write(path, pickle.dumps({"a": [1.0]})),
        UnsafeFile,
        "pickle",
    ),
    "high rank": (
        lambda path: write_adapter(path, style("noto", RANK + 1)),
        AdapterError,
        "rank 5, this engine's ports take 4",
    ),
    "missing": (lambda path: path.unlink(), AdapterError, "bad.safetensors is missing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_leave_the_engine_as_it_was(engine: Engine, tmp_path: Path, kind: str) -> None:
    damage, error, message = BAD[kind]
    mixes: list[Any] = ["noto", None, {"ink": 0.5, "clay": 1.0}]
    before = engine.generate(["a fox"] * 3, adapters=mixes, steps=2)
    infos = engine.adapters
    path = tmp_path / "bad.safetensors"
    write_adapter(path, style("noto"))
    # The file is one that is taken until it is damaged.
    assert engine.add_adapter("good", path).digest == infos["noto"].digest
    engine.remove_adapter("good")
    damage(path)
    for name in ("bad", "noto"):
        with pytest.raises(error, match=message):
            engine.add_adapter(name, path)
    assert engine.adapters == infos
    after = engine.generate(["a fox"] * 3, adapters=mixes, steps=2)
    assert after.receipts == before.receipts


def test_adding_a_file_says_what_it_changes(engine: Engine, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", style("twemoji"), "kohya")
    info = engine.add_adapter("from a file", str(tmp_path / "a.safetensors"))
    assert info.modules == ("unet.mid.to_k", "unet.up.conv")
    assert info == engine.adapters["from a file"]
    assert info.digest == engine.adapters["twemoji"].digest
    assert info.receipt is not None
    assert info.receipt.format == "kohya"
    assert engine.adapters["twemoji"].receipt is None
    # It was copied: the file may go.
    (tmp_path / "a.safetensors").unlink()
    pair = images(engine, ["a fox"] * 2, adapters=["from a file", "twemoji"])
    assert pair[0] == pair[1]
