"""The command line's flags: their types and help texts, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from heatsink.runtime.errors import AdapterError, InvalidRequest, NotBuilt

# heatsink build
Model = Annotated[
    Path, typer.Argument(help="a diffusers folder, or a single-file checkpoint (SD1.5, SDXL)")
]
EngineOut = Annotated[Path, typer.Option("--out", "-o", help="the engine folder to write")]
Backend = Annotated[
    str,
    typer.Option(
        help="who runs it: torch (Heatsink's own), onnxruntime, or auto: torch where its C++ ops "
        "are, else onnxruntime (tensorrt, tensorrt-rtx: not yet)"
    ),
]
Batch = Annotated[
    str, typer.Option(help="rows of a UNet batch, MIN:OPT:MAX or MAX; only MAX counts yet")
]
BuildSize = Annotated[
    str, typer.Option(help="HEIGHTxWIDTH in pixels; the model's own if not given")
]
Precision = Annotated[str, typer.Option(help="fp32, or with torch bf16 (fp16, fp8: not yet)")]
High = Annotated[
    list[str] | None,
    typer.Option(
        help="COMPONENT=MODULE, or COMPONENT=MODULE:OPERATOR: stays fp32 in a lower precision; may "
        "be repeated"
    ),
]
Fuse = Annotated[
    list[str] | None, typer.Option(help="FILE:SCALE, a LoRA to merge; may be repeated")
]
Adapters = Annotated[
    str,
    typer.Option(
        help="SLOTSxRANK: ports for so many adapters at a time, of that rank at most; a picture "
        "can have up to 4 of them"
    ),
]
Ports = Annotated[
    str, typer.Option(help="which layers get ports: all, linear or attention (its projections)")
]
ControlNet = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=FOLDER, a ControlNet for requests to name (or FOLDER, then its name is the "
        "folder's); may be repeated"
    ),
]
Arch = Annotated[str, typer.Option(help="GPU architectures (not yet)")]
Opset = Annotated[int, typer.Option(help="of onnxruntime's files; 0: the default")]
Strict = Annotated[
    bool, typer.Option("--strict/--fast", help="use only batch sizes that agree bit by bit")
]
Reuse = Annotated[
    list[Path] | None, typer.Option(help="an engine to take equal components from; repeatable")
]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="of a single-file checkpoint: its tokenizer's folder")
]

# heatsink generate
Prompt = Annotated[list[str], typer.Argument(help="what to draw; several prompts share a batch")]
Engine = Annotated[Path, typer.Option(help="the engine folder")]
PicturesOut = Annotated[Path, typer.Option("--out", "-o", help="where the pictures go")]
Count = Annotated[
    int, typer.Option("-n", help="pictures of each prompt; the seeds count on over all of them")
]
Negative = Annotated[str, typer.Option(help="what to keep away from")]
StartImage = Annotated[Path | None, typer.Option(help="start from this picture")]
Strength = Annotated[
    float | None,
    typer.Option(
        help="with --image: share of the steps that is run; by default 0.8, with --mask 1"
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(help="with --image: a picture, bright where it is painted anew"),
]
Control = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=IMAGE:SCALE, a picture for one of the engine's ControlNets; may be repeated, "
        "once for each"
    ),
]
Seed = Annotated[int, typer.Option(help="of the first picture")]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Guidance = Annotated[float, typer.Option(help="scale of classifier-free guidance; 1: off")]
Sampler = Annotated[str, typer.Option(help="euler, dpm++2m, ddim or lcm")]
Size = Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels; the engine's own if not given")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        help="FILE:WEIGHT or NAME=FILE:WEIGHT, a LoRA for all pictures; may be repeated, up to 4 "
        "times (fewer if the build's note says so). Needs an engine built with --adapters"
    ),
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace pictures of an earlier run")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
EngineFolder = Annotated[Path, typer.Argument(help="the engine folder")]


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def parse_size(text: str) -> tuple[int, int] | None:
    """`512x768` (height x width) or `512` as a pair of pixels; None where nothing is given."""
    if not text:
        return None
    if ":" in text:
        raise NotBuilt(
            f"--size {text}: a range of sizes is not built yet; name one, such as 512x512"
        )
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(map(_number, parts)):
        raise InvalidRequest(f"--size: expected HEIGHTxWIDTH, such as 512x512, got {text!r}")
    return int(parts[0]), int(parts[-1])


def parse_high(texts: Sequence[str]) -> dict[str, list[str]] | None:
    """`unet=conv_out` and so on, by component; None where nothing is given."""
    found: dict[str, list[str]] = {}
    for text in texts:
        component, sign, module = text.partition("=")
        if not sign or not component or not module:
            raise InvalidRequest(f"--high: expected COMPONENT=MODULE, got {text!r}")
        found.setdefault(component, []).append(module)
    return found or None


def parse_batch(text: str) -> tuple[int, int, int]:
    """`MIN:OPT:MAX`, or one number for the largest, as a triple of rows."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(map(_number, parts)):
        raise InvalidRequest(f"--batch: expected MIN:OPT:MAX, such as 1:8:16, got {text!r}")
    if len(parts) == 1:
        return 1, int(parts[0]), int(parts[0])
    low, best, high = map(int, parts)
    return low, best, high


def parse_ports(text: str) -> tuple[int, int] | None:
    """`8x16` (slots x rank); None where nothing is given."""
    if not text:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(map(_number, parts)):
        raise InvalidRequest(f"--adapters: expected SLOTSxRANK, such as 8x16, got {text!r}")
    return int(parts[0]), int(parts[1])


def parse_controlnets(texts: Sequence[str]) -> dict[str, Path]:
    """Every `NAME=FOLDER` by its name; without one by the folder's own.

    Raises:
        InvalidRequest: a text is none of these, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            name, rest = Path(text).resolve().name, text
        if not (name and rest):
            raise InvalidRequest(f"--controlnet: expected NAME=FOLDER, got {text!r}")
        if name in found:
            raise InvalidRequest(f"--controlnet: two are called {name!r}")
        found[name] = Path(rest)
    return found


def parse_controls(texts: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Every `NAME=IMAGE:SCALE` or `NAME=IMAGE` (scale 1) by its name.

    Raises:
        InvalidRequest: a text is neither, or two have one name.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        if not (name and rest):
            raise InvalidRequest(f"--control: expected NAME=IMAGE:SCALE, got {text!r}")
        if name in found:
            raise InvalidRequest(f"--control: {name!r} is given twice")
        found[name] = parse_adapter(rest, "--control")
    return found


def parse_adapter(text: str, flag: str = "--fuse") -> tuple[Path, float]:
    """`FILE:SCALE` or `FILE` (scale 1); `flag` is what messages name."""
    path, _, scale = text.rpartition(":")
    if not path:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        example = "IMAGE:SCALE, such as lines.png:0.8"
        if flag != "--control":
            example = "FILE:SCALE, such as noto.safetensors:0.8"
        raise InvalidRequest(f"{flag}: expected {example}, got {text!r}") from None


def parse_named_adapters(texts: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Every `NAME=FILE:WEIGHT` by its name; without one, and without a weight, FILE's stem and 1.

    A path that holds `=` before its first slash is given as `./PATH`.

    Raises:
        InvalidRequest: a text is none of these, or two have one name.
        AdapterError: a file is missing.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            name, rest = "", text
        path, weight = parse_adapter(rest, "--adapter")
        name = name or path.stem
        if (equals and not rest) or not name:
            raise InvalidRequest(f"--adapter: expected NAME=FILE:WEIGHT, got {text!r}")
        if name in found:
            raise InvalidRequest(
                f"--adapter: two are called {name!r}; give one another name, NAME=FILE:WEIGHT"
            )
        if not path.is_file():
            raise AdapterError(f"--adapter: {path} is missing")
        found[name] = path, weight
    return found
