"""Two hundred random requests give the same pixels alone and in any company, in as few launches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatsink.export.backends import backend
from heatsink.export.exactness import probe
from heatsink.export.manifest import read_manifest
from heatsink.export.opening import OpenComponent, open_session
from heatsink.runtime.digest import image_digest
from heatsink.runtime.engine import Engine
from heatsink.runtime.native.program import Program
from heatsink.runtime.request import Request

COUNT = 200
WORDS = ["red", "cat", "owl", "boat", "tiger", "of glass", "at night", "small", "two", "drawing"]
Asked = tuple[Request, Image.Image | None]


def draw(rng: random.Random, styles: Sequence[str] = ()) -> Asked:
    """A request that may differ from the next in everything a request has."""
    fields: dict[str, Any] = {
        "prompt": " ".join(rng.sample(WORDS, rng.randint(0, 2))),
        "seed": rng.randrange(1 << 64),
        "steps": rng.randint(2, 4),
        "scheduler": rng.choice(["euler", "dpm++2m", "ddim", "lcm"]),
        "guidance": rng.choice([1.0, 1.0, round(rng.uniform(1.5, 9.0), 2)]),
    }
    if rng.random() < 0.3:
        fields["negative_prompt"] = rng.choice(WORDS)
    if styles and rng.random() < 0.7:
        names = rng.sample(styles, rng.randint(1, len(styles)))
        fields["adapters"] = {name: round(rng.uniform(-1.0, 1.0), 2) for name in names}
    image = None
    if rng.random() < 0.25:
        pixels = np.random.default_rng(rng.randrange(1 << 32)).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        fields |= {"strength": round(rng.uniform(0.5, 1.0), 2), "image_digest": image_digest(image)}
    return Request.parse(**fields), image


def digests(engine: Engine, asked: list[Asked]) -> list[str]:
    requests, images = zip(*asked, strict=True)
    return [receipt.image for receipt in engine.run(requests, images).receipts]


@pytest.mark.filterwarnings("ignore::heatsink.runtime.text.PromptTruncated")
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd1_styled"])
def test_the_same_pixels_alone_and_among_random_neighbours(
    kind: str, request: pytest.FixtureRequest, seed: int
) -> None:
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    rng = random.Random(seed)
    # Three of the five: as many as the bank has slots.
    asked = [draw(rng, sorted(engine.adapters)[:3]) for _ in range(COUNT)]
    alone = [digests(engine, [each])[0] for each in asked]
    assert len(set(alone)) == COUNT
    order = rng.sample(range(COUNT), COUNT)
    while order:
        size = rng.randint(2, 9)
        group, order = order[:size], order[size:]
        found = digests(engine, [asked[place] for place in group])
        assert found == [alone[place] for place in group], [asked[place] for place in group]


def test_launches_do_not_depend_on_the_rows(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(sd1_folder)
    component, known = manifest.components["unet"], manifest.exactness.components["unet"]
    session = open_session(manifest, sd1_folder, "unet", threads=1)
    seen: list[int] = []
    replay = Program.replay

    def watch(self: Program) -> None:
        seen.append(self.launches)
        replay(self)

    monkeypatch.setattr(Program, "replay", watch)
    unchecked = known.model_copy(update={"answers": []})
    run = OpenComponent(session, component, unchecked, backend("torch").runs)
    found = []
    for rows in range(1, max(known.buckets) + 1):
        seen.clear()
        run(probe(component.inputs, rows, 3))
        found.append(list(seen))
    assert len(found) == 4
    assert found == found[:1] * 4
    assert sum(found[0]) > 50
