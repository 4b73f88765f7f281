"""What a prompt and a size turn into: the UNet's inputs besides sample and timestep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heatsink.runtime.backends.session import Array
from heatsink.runtime.conditions import encode
from heatsink.runtime.request import Request
from heatsink.runtime.text import PromptTruncated, Tokenizer


class Encoders:
    """Row-exact stand-ins: `hidden` holds the ids, `pooled` their sum and the encoder's number."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Array]] = []

    def __call__(self, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
        ids = inputs["input_ids"]
        self.calls.append((name, ids))
        width = 3 if name == "text_encoder" else 2
        out: dict[str, Array] = {
            "hidden": np.repeat(ids[..., None], width, axis=-1).astype(np.float32)
        }
        if name == "text_encoder_2":
            out["pooled"] = np.stack([ids.sum(1), np.full(len(ids), 2)], axis=1).astype(np.float32)
        return out


def request(prompt: str, negative: str = "", guidance: float = 5.0) -> Request:
    return Request.parse(
        prompt=prompt, negative_prompt=negative, guidance=guidance, seed=1, height=64, width=48
    )


@pytest.fixture(scope="module")
def one(tiny_sd1: Path) -> Tokenizer:
    return Tokenizer(tiny_sd1 / "tokenizer")


@pytest.fixture(scope="module")
def two(tiny_sdxl: Path) -> list[Tokenizer]:
    return [Tokenizer(tiny_sdxl / "tokenizer"), Tokenizer(tiny_sdxl / "tokenizer_2")]


def test_one_batch_for_all_negative_prompts_first(one: Tokenizer) -> None:
    run = Encoders()
    requests = [request("cat", "dog"), request("owl", "unused", 1.0), request("fox")]
    result = encode(requests, ["text_encoder"], [one], run)
    ids, _ = one.encode(["dog", "cat", "owl", "", "fox"])
    assert [name for name, _ in run.calls] == ["text_encoder"]
    np.testing.assert_array_equal(run.calls[0][1], ids)
    assert [len(rows) for rows in result.rows] == [2, 1, 2]
    flat = [row for rows in result.rows for row in rows]
    for row, expected in zip(flat, ids, strict=True):
        assert set(row) == {"encoder_hidden_states"}
        np.testing.assert_array_equal(row["encoder_hidden_states"][:, 0], expected)
    assert result.notes == [[], [], []]


def test_sdxl_concatenates_and_adds_conditions(two: list[Tokenizer]) -> None:
    run = Encoders()
    result = encode([request("cat", "dog")], ["text_encoder", "text_encoder_2"], two, run)
    for place, text in enumerate(["dog", "cat"]):
        row = result.rows[0][place]
        first, second = (tokenizer.encode([text])[0][0] for tokenizer in two)
        # The second tokenizer pads with another token.
        assert (first != second).any()
        states = row["encoder_hidden_states"]
        assert states.shape == (16, 5)
        np.testing.assert_array_equal(states, np.stack([first] * 3 + [second] * 2, axis=1))
        np.testing.assert_array_equal(row["text_embeds"], [second.sum(), 2])
        np.testing.assert_array_equal(row["time_ids"], [64, 48, 0, 0, 64, 48])
        assert row["time_ids"].dtype == np.float32


@pytest.mark.parametrize("zero", [False, True])
def test_an_empty_negative_prompt_is_zeros_where_the_model_asks(
    two: list[Tokenizer], zero: bool
) -> None:
    requests = [request("cat"), request("", "dog"), request("", guidance=1.0)]
    encoders = ["text_encoder", "text_encoder_2"]
    result = encode(requests, encoders, two, Encoders(), zero_empty_negative=zero)
    negative = result.rows[0][0]
    for key in ("encoder_hidden_states", "text_embeds"):
        assert bool((negative[key] == 0).all()) is zero
        # Empty prompts are encoded, and so is a negative prompt that is given.
        for row in (*result.rows[1], *result.rows[2], result.rows[0][1]):
            assert (row[key] != 0).any()
    np.testing.assert_array_equal(negative["time_ids"], [64, 48, 0, 0, 64, 48])


def test_notes_say_what_was_cut_of_which_request(two: list[Tokenizer]) -> None:
    long = "a very long prompt indeed"
    requests = [request("cat"), request("cat", long), request(long)]
    with pytest.warns(PromptTruncated):
        result = encode(requests, ["text_encoder", "text_encoder_2"], two, Encoders())
    assert result.notes[0] == []
    # Both encoders cut at the same place: one note.
    for notes in result.notes[1:]:
        assert len(notes) == 1
        assert "cut to 16 tokens" in notes[0]
        assert "indeed" in notes[0]
