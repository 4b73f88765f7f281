"""The data step of the bundled model: npm packages of icons -> pictures with captions.

Icons come from `@iconify-json/*` packages, names, tags and subgroups from `emojibase-data`; every
icon is rendered by `resvg-py` on white at `SIZE` x `SIZE` pixels. The pictures of a subject line up
over all styles, so the brands (one LoRA each) and the line art (ControlNet) are real pairs of the
same subject.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SIZE = 64
BASE_STYLE = "flat"
BRANDS = ("fluent", "noto", "twemoji")
LINE_ART = "lineart"
STYLES = (BASE_STYLE, *BRANDS, LINE_ART)
PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "lineart": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "names": "emojibase-data@17.0.0",
}
# How many subjects of each subgroup may be chosen: things a person can name from the picture alone.
_CAPS = {
    "animal-mammal": 30, "animal-bird": 14, "animal-amphibian": 1, "animal-reptile": 6,
    "animal-marine": 12, "animal-bug": 10, "plant-flower": 9, "plant-other": 12,
    "food-fruit": 20, "food-vegetable": 14, "food-prepared": 20, "food-asian": 6, "food-sweet": 12,
    "drink": 10, "transport-ground": 22, "transport-water": 5, "transport-air": 7,
    "sky-weather": 16, "event": 6, "award-medal": 3, "sport": 10, "game": 5,
    "musical-instrument": 8, "clothing": 14, "heart": 18, "cat-face": 3, "monkey-face": 1,
    "face-smiling": 8, "face-affection": 4, "face-glasses": 2, "face-hat": 2, "face-concerned": 6,
    "face-negative": 4, "face-costume": 6, "face-unwell": 4, "tool": 8, "science": 3,
    "household": 5, "light-video": 5, "book-paper": 4, "place-building": 6, "place-geographic": 3,
    "computer": 2,
}  # fmt: skip
_COMPONENTS = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "200D"}
HOLD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Icons:
    """All shared subjects; `pictures` is uint8 `(subject, style, SIZE, SIZE, 3)`, as `STYLES`."""

    pictures: npt.NDArray[np.uint8]
    names: list[str]
    tags: list[list[str]]
    subgroups: list[str]
    selected: npt.NDArray[np.bool_]

    def held_out(self, purpose: str, share: float = HOLD_OUT_SHARE) -> npt.NDArray[np.bool_]:
        """A fixed pseudo-random `share` of the subjects, by their names and `purpose` alone."""
        return np.array([_fraction(f"{purpose}:{name}") < share for name in self.names])


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def fetch(folder: Path) -> dict[str, Path]:
    """Download the pinned npm packages into `folder` (once) and return their archives by style."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for key, spec in PACKAGES.items():
        name, version = spec.lstrip("@").replace("/", "-").rsplit("@", 1)
        archive = folder / f"{name}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, timeout=600)
        archives[key] = archive
    return archives


def _read_json(archive: Path, member: str) -> Any:
    with tarfile.open(archive) as tar:
        handle = tar.extractfile(f"package/{member}")
        if handle is None:
            raise FileNotFoundError(f"{archive} holds no package/{member}")
        return json.load(handle)


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _icon_svg(icons: dict[str, Any], name: str) -> str:
    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"][alias["parent"] if alias else name]
    size = {k: icon.get(k, icons.get(k, 0)) for k in ("left", "top", "width", "height")}
    box = f"{size['left']} {size['top']} {size['width'] or 16} {size['height'] or 16}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def render(svg: str, size: int = SIZE) -> npt.NDArray[np.uint8]:
    """Render an SVG text on white, as uint8 `(size, size, 3)`."""
    import resvg_py
    from PIL import Image

    svg = svg.replace("currentColor", "#000000")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((size, size)), dtype=np.uint8)


def build(archives: dict[str, Path], subjects: int) -> Icons:
    """Render every subject that all styles share; mark the `subjects` to train on."""
    from rich.progress import track

    emoji = _read_json(archives["names"], "en/data.json")
    messages = _read_json(archives["names"], "en/messages.json")
    subgroup_key = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    sets = {style: _read_json(archives[style], "icons.json") for style in STYLES}
    chars = {}
    for style in STYLES:
        # The 3D Fluent package ships no code table; its icons carry the names of the flat one.
        table = _read_json(archives[style], "chars.json") or _read_json(
            archives["flat"], "chars.json"
        )
        known = sets[style]["icons"].keys() | sets[style].get("aliases", {}).keys()
        chars[style] = {_code(code): name for code, name in table.items() if name in known}
    shared = []
    for entry in emoji:
        code = _code(entry["hexcode"])
        if "group" not in entry or entry["group"] in (2, 9) or _COMPONENTS & set(code.split("-")):
            continue
        if all(code in chars[style] for style in STYLES):
            shared.append(entry)
    pictures = np.empty((len(shared), len(STYLES), SIZE, SIZE, 3), np.uint8)
    for i, entry in enumerate(track(shared, "rendering icons")):
        for j, style in enumerate(STYLES):
            name = chars[style][_code(entry["hexcode"])]
            pictures[i, j] = render(_icon_svg(sets[style], name))
    names = [re.sub(r"[^a-z0-9 ]+", " ", e["label"].lower()).strip() for e in shared]
    subgroups = [subgroup_key[e["subgroup"]] for e in shared]
    selected = np.zeros(len(shared), bool)
    left = dict(_CAPS)
    # The oldest emoji are the best known ones, and those with short names the plainest.
    for i in sorted(
        range(len(shared)), key=lambda i: (shared[i].get("version", 99), shared[i]["order"])
    ):
        if left.get(subgroups[i], 0) and len(names[i].split()) <= 3 and selected.sum() < subjects:
            left[subgroups[i]] -= 1
            selected[i] = True
    tags = [[t for t in e.get("tags", []) if t.isascii()] for e in shared]
    return Icons(pictures, names, tags, subgroups, selected)


def load_or_build(folder: Path, subjects: int) -> Icons:
    """The cached arrays in `folder`, rendered first where they are missing."""
    cache = folder / f"icons-{subjects}.npz"
    if not cache.exists():
        icons = build(fetch(folder / "npm"), subjects)
        text = json.dumps({"names": icons.names, "tags": icons.tags, "subgroups": icons.subgroups})
        temporary = cache.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, pictures=icons.pictures, selected=icons.selected, text=text)
        temporary.replace(cache)
    with np.load(cache) as data:
        text = json.loads(str(data["text"]))
        return Icons(
            data["pictures"], text["names"], text["tags"], text["subgroups"], data["selected"]
        )


def caption(icons: Icons, subject: int, rng: np.random.Generator) -> str:
    """A caption of the subject: its name in one of a few templates, sometimes with tags."""
    name = icons.names[subject]
    article = "an" if name[0] in "aeiou" else "a"
    choice = rng.random()
    if choice < 0.35:
        return f"{article} {name}"
    if choice < 0.7:
        return name
    if choice < 0.8:
        return f"an emoji of {article} {name}"
    tags = icons.tags[subject]
    few = [tags[k] for k in rng.permutation(len(tags))[:2]]
    return ", ".join([name, *few])
