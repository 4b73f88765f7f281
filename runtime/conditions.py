"""The UNet's inputs that a request's text and size decide: embeddings, and SDXL's conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from heatsink.runtime.backends.session import Array
from heatsink.runtime.request import Request
from heatsink.runtime.text import Tokenizer

RunComponent = Callable[[str, dict[str, Array]], dict[str, Array]]
AdapterInputs = Callable[[str, Sequence[int]], dict[str, Array]]


@dataclass
class Conditions:
    """For every request its rows of UNet inputs (negative prompt first), and notes on cuts."""

    rows: list[list[dict[str, Array]]]
    notes: list[list[str]] = field(default_factory=list)


def _no_adapters(component: str, owners: Sequence[int]) -> dict[str, Array]:
    return {}


def encode(
    requests: Sequence[Request],
    encoders: Sequence[str],
    tokenizers: Sequence[Tokenizer],
    run: RunComponent,
    *,
    zero_empty_negative: bool = False,
    adapter_inputs: AdapterInputs = _no_adapters,
) -> Conditions:
    """Encode the prompts of all requests in one batch.

    Args:
        requests: with their sizes resolved.
        encoders: the text encoders' component names; two for SDXL, whose hidden states are
            concatenated.
        tokenizers: one for each encoder.
        run: runs a component on rows.
        zero_empty_negative: an empty negative prompt is zeros instead of encoded, as SDXL's base
            asks.
        adapter_inputs: the inputs of a component's adapter ports, for rows of the requests at
            these places; empty where none has an adapter there.
    """
    texts: list[str] = []
    spans: list[range] = []
    for request in requests:
        own = [request.prompt] if request.rows == 1 else [request.negative_prompt, request.prompt]
        spans.append(range(len(texts), len(texts) + len(own)))
        texts += own
    owners = [place for place, span in enumerate(spans) for _ in span]
    hidden: list[Array] = []
    notes: list[list[str]] = [[] for _ in texts]
    pooled: Array | None = None
    for name, tokenizer in zip(encoders, tokenizers, strict=True):
        ids, cuts = tokenizer.encode(texts)
        out = run(name, {"input_ids": ids, **adapter_inputs(name, owners)})
        hidden.append(out["hidden"])
        pooled = out.get("pooled", pooled)
        for place, cut in enumerate(cuts):
            if cut is not None and str(cut) not in notes[place]:
                notes[place].append(str(cut))
    states = hidden[0] if len(hidden) == 1 else np.concatenate(hidden, axis=-1)
    result = Conditions([], [])
    for request, span in zip(requests, spans, strict=True):
        rows = []
        for place in span:
            row = {"encoder_hidden_states": states[place]}
            if pooled is not None:
                row["text_embeds"] = pooled[place]
                row["time_ids"] = _time_ids(request)
            negative = len(span) == 2 and place == span[0]
            if negative and zero_empty_negative and not request.negative_prompt:
                for key in ("encoder_hidden_states", "text_embeds"):
                    row[key] = np.zeros_like(row[key])
            rows.append(row)
        result.rows.append(rows)
        result.notes.append([note for place in span for note in notes[place]])
    return result


def _time_ids(request: Request) -> Array:
    """SDXL's size conditions: original size, crop, target size; float32 `(6,)`."""
    height, width = request.height or 0, request.width or 0
    return np.array([height, width, 0, 0, height, width], np.float32)
