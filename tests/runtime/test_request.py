"""Requests: what is accepted, what is refused and how, and what the digest means."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from heatsink.runtime.digest import canonical_json, sha256_bytes
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Request, Scheduler

IMAGE = "ab" * 32


def request(**changes: Any) -> Request:
    return Request.parse(**{"prompt": "a red apple", "seed": 7, **changes})


def test_defaults() -> None:
    plain = request()
    assert (plain.negative_prompt, plain.steps, plain.scheduler) == ("", 20, "dpm++2m")
    assert (plain.height, plain.width, plain.strength, plain.image_digest) == (None,) * 4
    assert plain.adapters == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("euler", "euler"),
        ("Euler", "euler"),
        ("EulerDiscreteScheduler", "euler"),
        ("dpm++2m", "dpm++2m"),
        ("dpmpp_2m", "dpm++2m"),
        ("DPM++ 2M", "dpm++2m"),
        ("DPM-Solver++(2M)", "dpm++2m"),
        ("DPMSolverMultistepScheduler", "dpm++2m"),
        ("DDIM", "ddim"),
        ("LCMScheduler", "lcm"),
        (Scheduler.LCM, "lcm"),
    ],
)
def test_scheduler_aliases(name: object, expected: str) -> None:
    parsed = request(scheduler=name)
    assert parsed.scheduler is Scheduler(expected)
    assert parsed.digest == request(scheduler=expected).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed: expected an integer from 0 to 2\^64 - 1, got -1 \(int\)"),
        ({"seed": 2**64}, "seed: expected an integer from 0"),
        ({"seed": True}, r"seed: .* got True \(bool\)"),
        ({"seed": 1.0}, r"seed: .* got 1\.0 \(float\)"),
        ({"seed": "1"}, r"seed: .* got '1' \(str\)"),
        ({"steps": 0}, "steps: expected an integer from 1 to 1000, got 0"),
        ({"steps": 1001}, "steps: expected an integer from 1 to 1000, got 1001"),
        ({"scheduler": "heun"}, r"scheduler: expected one of euler, dpm\+\+2m, ddim, lcm, got"),
        ({"scheduler": 3}, "scheduler: expected one of"),
        ({"guidance": -0.5}, "guidance: expected a finite number of at least 0, got -0.5"),
        ({"guidance": float("inf")}, "guidance: .* got inf"),
        ({"guidance": float("nan")}, "guidance: .* got nan"),
        ({"height": 0}, "height: expected a positive multiple of 8 or none, got 0"),
        ({"width": 516}, "width: expected a positive multiple of 8 or none, got 516"),
        ({"width": -8}, "width: expected a positive"),
        ({"strength": 0.0, "image_digest": IMAGE}, "strength: expected a number above 0"),
        ({"strength": 1.01, "image_digest": IMAGE}, "strength: expected a number above 0"),
        ({"strength": 0.5}, "strength: expected an image beside it, got 0.5 alone"),
        ({"image_digest": IMAGE}, "strength: .* with an image, got none"),
        ({"strength": 0.5, "image_digest": IMAGE.upper()}, "image_digest: expected a SHA-256"),
        ({"strength": 0.5, "image_digest": IMAGE + "\n"}, "image_digest: expected a SHA-256"),
        ({"adapters": {"noto": float("nan")}}, "adapters.noto: expected adapter names, .* got nan"),
        ({"adapters": {"noto": "1"}}, "adapters.noto: expected"),
        ({"adapters": {"": 1.0}}, "adapters.*: expected adapter names"),
        ({"adapters": {"e\u0301": 1.0, "\u00e9": 2.0}}, "adapters: expected adapter names"),
        ({"prompt": None}, "prompt: expected a text"),
        ({"prompt": "\ud800"}, "prompt: expected a text of valid Unicode"),
        ({"promt": "x"}, "promt: no such field; expected one of version, prompt"),
        ({"tenant": "x"}, "tenant: no such field"),
        ({"version": 2}, "version: expected the schema version 1, got 2"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        request(**changes)
    assert caught.value.exit_code == 2


def test_every_problem_is_named_at_once_and_long_values_are_cut() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request.parse(prompt=["x" * 10_000], steps=-1)
    message = str(caught.value)
    assert all(f"{name}: expected" in message for name in ("prompt", "seed", "steps"))
    assert len(message) < 500


def test_a_request_is_frozen_hashable_and_survives_pickle_and_json() -> None:
    full = request(
        strength=0.5, image_digest=IMAGE, height=64, width=128, adapters={"b": 1, "a": 0.5}
    )
    with pytest.raises(ValidationError, match="frozen"):
        full.seed = 1
    for copy in (
        pickle.loads(pickle.dumps(full)),  # noqa: S301 - made one line above
        Request.model_validate_json(full.model_dump_json()),
    ):
        assert copy == full
        assert copy.digest == full.digest
        assert {copy, full} == {full}


@pytest.mark.parametrize(("guidance", "rows"), [(0, 1), (0.5, 1), (1, 1), (1.0001, 2), (7.5, 2)])
def test_rows(guidance: float, rows: int) -> None:
    assert request(guidance=guidance).rows == rows


def test_integers_of_numpy_are_welcome() -> None:
    parsed = request(seed=np.uint64(2**64 - 1), steps=np.int32(5))
    assert (parsed.seed, parsed.steps) == (2**64 - 1, 5)
    assert type(parsed.seed) is int


def test_resolved_fills_only_what_is_missing() -> None:
    assert (
        request(height=64).resolved(512, 768).model_dump()
        == request(height=64, width=768).model_dump()
    )
    with pytest.raises(InvalidRequest, match="width: expected a positive multiple of 8"):
        request().resolved(512, 7)


def test_replace_validates() -> None:
    assert request().replace(seed=8, scheduler="DDIM") == request(seed=8, scheduler="ddim")
    with pytest.raises(InvalidRequest, match="strength"):
        request().replace(strength=0.5)


def test_digest_is_what_the_document_says() -> None:
    fields = {
        "version": 1,
        "prompt": "a red apple",
        "negative_prompt": "",
        "seed": 7,
        "steps": 20,
        "scheduler": "dpm++2m",
        "guidance": 5.0,
        "height": None,
        "width": None,
        "strength": None,
        "image_digest": None,
        "adapters": {},
    }
    assert request().digest == sha256_bytes(canonical_json({"request": fields}))
    # Published: it must not change while the version stays.
    assert request().digest == "4928bc063903eba5917c4a333793497efb8d57f7b87f0ab1d5abb229965a769f"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"guidance": 7}, {"guidance": 7.0}),
        ({"adapters": {"a": 1, "b": 2.0}}, {"adapters": {"b": 2, "a": 1.0}}),
        ({"adapters": {"a": -0.0}}, {"adapters": {"a": 0.0}}),
        ({"prompt": "cafe\u0301"}, {"prompt": "caf\u00e9"}),
        # Without guidance neither the scale nor the negative prompt is used.
        ({"guidance": 1.0, "negative_prompt": "blurry"}, {"guidance": 1.0}),
        ({"guidance": 0.0}, {"guidance": -0.0}),
        ({"guidance": 0.5}, {"guidance": 1.0}),
    ],
)
def test_equal_meaning_gives_equal_digests(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert request(**one).digest == request(**other).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a red apple "},
        {"negative_prompt": "blurry"},
        {"seed": 8},
        {"steps": 21},
        {"scheduler": "euler"},
        {"guidance": 5.000001},
        {"height": 64},
        {"width": 64},
        {"strength": 0.5, "image_digest": IMAGE},
        {"strength": 0.5, "image_digest": "cd" * 32},
        {"strength": 0.6, "image_digest": IMAGE},
        {"adapters": {"a": 1.0}},
        {"adapters": {"a": 0.5}},
        {"adapters": {"b": 1.0}},
    ],
    ids=str,
)
def test_every_field_counts(changes: dict[str, Any]) -> None:
    base = request(strength=0.5, image_digest="ef" * 32)
    assert base.replace(**changes).digest != base.digest


@given(
    st.permutations([("a", 1.0), ("b", 0.5), ("c", -2.0)]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_digest_ignores_adapter_order_and_survives_json(
    order: list[tuple[str, float]], prompt: str
) -> None:
    one = request(prompt=prompt, adapters=dict(order))
    other = request(prompt=prompt, adapters={"a": 1.0, "b": 0.5, "c": -2.0})
    assert one.digest == other.digest
    assert Request.model_validate_json(one.model_dump_json()).digest == one.digest


def test_importing_requests_loads_no_torch() -> None:
    code = "import sys, heatsink.runtime.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_what_steers_and_masks_counts_where_it_is_there() -> None:
    base: dict[str, Any] = {"prompt": "a", "seed": 7}
    plain = Request.parse(**base)
    # Later fields: a request without them has the digest it always had.
    assert Request.parse(**base, controls={}, mask_digest=None).digest == plain.digest
    lines, depth = "1" * 64, "2" * 64
    asked: list[dict[str, Any]] = [
        {},
        {"controls": {"lines": {"image_digest": lines}}},
        {"controls": {"lines": {"image_digest": depth}}},
        {"controls": {"depth": {"image_digest": lines}}},
        {"controls": {"lines": {"image_digest": lines, "scale": 0.5}}},
        {"image_digest": lines, "strength": 0.5},
        {"image_digest": lines, "strength": 0.5, "mask_digest": depth},
    ]
    digests = [Request.parse(**base, **fields).digest for fields in asked]
    assert len(set(digests)) == len(digests)
    both = {"lines": {"image_digest": lines}, "depth": {"image_digest": depth, "scale": 1}}
    first = Request.parse(**base, controls=both)
    other = Request.parse(**base, controls=dict(reversed(both.items())))
    assert first.digest == other.digest
    assert list(first.controls) == list(other.controls) == ["depth", "lines"]
    assert first.replace(seed=8).controls == first.controls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_digest": "1" * 64}, "mask: expected an image beside it, got a mask alone"),
        ({"mask_digest": "1"}, "mask_digest: expected a SHA-256"),
        (
            {"controls": {"lines": {"image_digest": "1"}}},
            r"controls\.lines\.image_digest: expected",
        ),
        ({"controls": {"lines": "1" * 64}}, r"controls\.lines: expected up to 4 ControlNets"),
        ({"controls": {"lines": {"scale": 1.0}}}, r"controls\.lines\.image_digest: expected"),
        (
            {"controls": {"lines": {"image_digest": "1" * 64, "scale": float("nan")}}},
            r"controls\.lines\.scale: expected",
        ),
        (
            {"controls": {str(i): {"image_digest": "1" * 64} for i in range(5)}},
            "controls: expected up to 4",
        ),
    ],
)
def test_wrong_controls_and_masks_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Request.parse(prompt="a", seed=1, **fields)
