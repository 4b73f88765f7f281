"""Requests with adapters are routed by row and decided by content (`conftest.py`: stand-ins)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_loads import ThreadLoader
from heatsink.runtime.backends.session import Array
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import AdapterError, NumericError, ResourceError
from heatsink.runtime.request import Request

# Many styles in one batch


def test_four_styles_in_one_batch_are_four_batches_of_one(styled: Engine, fakes: Any) -> None:
    prompts, unet = ["a fox"] * 4, fakes.calls(styled, "unet")
    alone = [fakes.images(styled, ["a fox"], adapters={name: 0.8})[0] for name in fakes.styles]
    apart = [len(call["sample"]) for call in unet]
    unet.clear()
    together = fakes.images(styled, prompts, adapters=[{name: 0.8} for name in fakes.styles])
    assert together == alone
    assert len(set(together)) == 4
    # Executed rows are counted: nothing was answered without running.
    assert apart == [2] * 12
    assert [len(call["sample"]) for call in unet] == [8] * 3


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0], [3, 3, 1, 3], [4, 1]]
)
def test_a_request_gives_the_same_pixels_beside_any_mix(styled: Engine, order: list[int]) -> None:
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

    alone = {place: styled.run([ask(place)]).receipts[0] for place in set(order)}
    together = styled.run([ask(place) for place in order])
    assert together.receipts == [alone[place] for place in order]


def test_rows_without_an_adapter_are_those_of_components_that_are_given_none(
    styled: Engine, fakes: Any
) -> None:
    # The same stand-ins: of a real engine this holds against its own twin, not against a plain one.
    plain = fakes.images(fakes.engine(None), ["a fox"])
    assert fakes.images(styled, ["a fox"]) == plain
    assert (
        fakes.images(styled, ["a fox"] * 3, adapters=["noto", None, {"ink": 0.0}])[1:] == plain * 2
    )
    assert fakes.images(styled, ["a fox"], adapters={"noto": 1.0}) != plain


def test_the_picture_is_the_definitions(styled: Engine, fakes: Any) -> None:
    # An engine whose port is one adapter that is the sum of two, weights and scales in its b.
    parts = {"noto": 0.8, "twemoji": 0.3}
    summed: dict[tuple[str, str], AdapterDelta] = {}
    for name, weight in parts.items():
        for d in fakes.style(name):
            a, b = d.a.double(), d.b.double() * (d.scale * weight)
            summed[d.component, d.module_path] = AdapterDelta(d.component, d.module_path, a, b)
    other = fakes.engine(fakes.bank())
    other.add_adapter("sum", list(summed.values()))
    first = np.asarray(styled.generate("a fox", adapters=parts, steps=2).images[0], np.float32)
    second = np.asarray(other.generate("a fox", adapters="sum", steps=2).images[0], np.float32)
    plain = np.asarray(styled.generate("a fox", steps=2).images[0], np.float32)
    # Roundings of fp32 show as single levels, the adapters as many.
    assert np.abs(first - second).max() <= 1
    assert np.abs(first - plain).max() > 10


def test_both_rows_of_a_guided_request_and_each_components_own(styled: Engine, fakes: Any) -> None:
    mixes: list[Any] = [{"noto": 0.5, "twemoji": 0.25}, None, "ink"]
    styled.generate(["a", "b", "c"], adapters=mixes, steps=1, guidance=3.0)
    (unet,), (text,) = fakes.calls(styled, "unet"), fakes.calls(styled, "text_encoder")
    infos = styled.adapters
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


def test_a_batch_is_as_narrow_as_its_rows_allow(styled: Engine, fakes: Any) -> None:
    # The request with the most adapters ends first, then the last with any.
    requests = [
        Request.parse(prompt="a", seed=1, steps=1, adapters={"noto": 1.0, "twemoji": 1.0}),
        Request.parse(prompt="a", seed=1, steps=2, adapters={"clay": 1.0}),
        Request.parse(prompt="a", seed=1, steps=3),
        Request.parse(prompt="a", seed=1, steps=3, height=128, adapters={"ink": 1.0}),
    ]
    styled.run(requests)
    shapes = [
        call["adapter_slots"].shape if "adapter_slots" in call else None
        for call in fakes.calls(styled, "unet")
    ]
    assert shapes == [(6, 2), (4, 1), None, None, None, None]


def test_an_engine_with_ports_in_its_unet_only(fakes: Any) -> None:
    engine = fakes.engine(fakes.bank("unet"))
    engine.add_adapter("clay", fakes.style("clay"))
    with pytest.raises(AdapterError, match="no adapter ports in its text_encoder"):
        engine.add_adapter("noto", fakes.style("noto"))
    engine.generate("a", adapters="clay", steps=1)
    assert "adapter_slots" not in fakes.calls(engine, "text_encoder")[0]
    assert "adapter_slots" in fakes.calls(engine, "unet")[0]


# What decides the pixels, and what a receipt says


def test_content_decides_not_names_order_or_slots(styled: Engine, fakes: Any) -> None:
    mix = {"noto": 0.8, "twemoji": 0.3, "clay": -0.5}
    result = styled.generate("a fox", adapters=mix, steps=2)
    other = fakes.engine(fakes.bank(slots=3))
    # Other names, loaded in another order into other slots, one content under two names.
    for new, old in (("c", "clay"), ("t", "twemoji"), ("n", "noto"), ("n2", "noto")):
        other.add_adapter(new, fakes.style(old))
        other.generate("warm", adapters=new, steps=1)
    again = other.generate("a fox", adapters={"c": -0.5, "n": 0.5, "t": 0.3, "n2": 0.3}, steps=2)
    (first,), (second,) = result.receipts, again.receipts
    assert first.image == second.image
    assert first.request == second.request
    assert [use.digest for use in first.adapters] == sorted(use.digest for use in first.adapters)
    assert {use.name: use.weight for use in first.adapters} == mix
    digests = {name: info.digest for name, info in styled.adapters.items()}
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
    (third,) = styled.run([by_content]).receipts
    assert (third.image, third.request) == (first.image, first.request)


def test_other_weights_and_contents_are_other_requests(styled: Engine, fakes: Any) -> None:
    mixes: list[Any] = [None, "noto", {"noto": 0.5}, "clay", {"noto": 1.0, "clay": 1.0}, "ink"]
    receipts = styled.generate(["a fox"] * 6, adapters=mixes, seed=[1] * 6, steps=2).receipts
    assert len({receipt.image for receipt in receipts}) == 6
    assert len({receipt.request for receipt in receipts}) == 6
    styled.add_adapter("noto", fakes.style("noto", rank=3))
    (changed,) = styled.generate("a fox", adapters="noto", seed=1, steps=2).receipts
    assert changed.image != receipts[1].image
    assert changed.request != receipts[1].request


def test_requests_without_adapters_keep_their_digests(styled: Engine) -> None:
    result = styled.generate(["a fox"] * 2, adapters=[None, {"noto": 0.0}], steps=1, seed=[1, 1])
    plain, nothing = result.receipts
    assert plain.request == result.requests[0].digest == nothing.request
    assert plain.adapters == nothing.adapters == ()
    assert plain == nothing


# Adapters come and go


def test_a_name_may_change_while_a_request_runs(styled: Engine, fakes: Any) -> None:
    expected = styled.generate("a fox", adapters="noto", steps=4)
    unet = styled._components["unet"]
    turns: list[int] = []

    def meddle(inputs: Mapping[str, Array]) -> dict[str, Array]:
        turns.append(len(turns))
        if len(turns) == 2:
            styled.add_adapter("noto", fakes.style("clay"))
            styled.remove_adapter("ink")
            # All other slots are written meanwhile.
            for number in range(5):
                styled.add_adapter(f"new {number}", fakes.style(f"new {number}"))
                assert styled.bank is not None
                styled.bank.prefetch(f"new {number}")
        return unet(inputs)

    watched = Engine(styled.spec, {**styled._components, "unet": meddle}, styled.bank)
    result = watched.generate("a fox", adapters="noto", steps=4)
    assert len(turns) == 4
    assert result.receipts == expected.receipts
    assert styled.bank is not None
    assert styled.bank.stats().leased == 0
    assert styled.adapters["noto"].digest != expected.receipts[0].adapters[0].digest


def test_slots_are_given_back_when_a_component_fails(styled: Engine) -> None:
    bank = styled.bank
    assert bank is not None
    for broken in (lambda inputs: {"out": inputs["sample"] * np.nan}, lambda inputs: {}):
        faulty = Engine(styled.spec, {**styled._components, "unet": broken}, bank)
        with pytest.raises((NumericError, KeyError)):
            faulty.generate("a", adapters="noto", steps=1)
        assert bank.stats().leased == 0


def test_a_copy_that_fails_fails_the_request_and_no_other(fakes: Any) -> None:
    class Failing(ThreadLoader):
        broken = True

        def submit(self, write: Any, after: Any) -> Any:
            def run() -> None:
                if self.broken:
                    raise RuntimeError("no memory")
                write()

            return super().submit(run, after)

    loader = Failing()
    engine = fakes.engine(fakes.bank(loader=loader))
    engine.add_adapter("noto", fakes.style("noto"))
    plain = fakes.images(engine, ["a fox"])
    with pytest.raises(ResourceError, match="no memory"):
        engine.generate(["a fox"] * 2, adapters=[None, "noto"], steps=1)
    assert fakes.images(engine, ["a fox"]) == plain
    loader.broken = False
    assert fakes.images(engine, ["a fox"], adapters="noto") != plain


def test_calls_of_several_threads_share_the_bank(styled: Engine, fakes: Any) -> None:
    mixes: list[dict[str, float]] = [{"noto": 0.8}, {"ink": 1.0, "clay": 0.5}, {"clay": 1.0}, {}]
    expected = [fakes.images(styled, ["a fox"], adapters=mix) for mix in mixes]
    found: list[list[str]] = [[] for _ in mixes]

    def work(place: int) -> None:
        for _ in range(3):
            found[place] += fakes.images(styled, ["a fox"], adapters=mixes[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [one * 3 for one in expected]
