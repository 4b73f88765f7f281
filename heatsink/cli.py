"""The command line: `heatsink build`, `heatsink generate`, `heatsink inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from heatsink import console
from heatsink.runtime.errors import HeatsinkError, InvalidRequest, NotBuilt

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` (height x width) or `512` as a pair of pixels."""
    parts = text.lower().split("x")
    if ":" in text:
        raise NotBuilt(f"--size {text}: a range of sizes is not built yet; name one, such as 512x512")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise InvalidRequest(f"--size: expected HEIGHTxWIDTH, such as 512x512, got {text!r}")
    return int(parts[0]), int(parts[-1])


def parse_batch(text: str) -> tuple[int, int, int]:
    """`MIN:OPT:MAX`, or one number for the largest, as a triple of rows."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise InvalidRequest(f"--batch: expected MIN:OPT:MAX, such as 1:8:16, got {text!r}")
    low, best, high = (1, int(parts[0]), int(parts[0])) if len(parts) == 1 else map(int, parts)
    return low, best, high


def parse_adapter(text: str) -> tuple[Path, float]:
    """`FILE:SCALE` or `FILE` (scale 1)."""
    path, _, scale = text.rpartition(":")
    if not path:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise InvalidRequest(f"--fuse: expected FILE:SCALE, such as noto.safetensors:0.8, got {text!r}") from None


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="a diffusers folder, or a single-file checkpoint (SD1.5, SDXL)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the engine folder to write")],
    backend: Annotated[str, typer.Option(help="onnxruntime (torch, tensorrt, tensorrt-rtx: not yet)")] = "onnxruntime",
    batch: Annotated[str, typer.Option(help="rows of a UNet batch, MIN:OPT:MAX")] = "1:8:16",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels; the model's own by default")] = "",
    precision: Annotated[str, typer.Option(help="fp32 (bf16, fp16, fp8: not yet)")] = "fp32",
    fuse: Annotated[list[str] | None, typer.Option(help="FILE:SCALE, a LoRA to merge; may be repeated")] = None,
    adapters: Annotated[str, typer.Option(help="SLOTSxRANK adapter ports (not yet)")] = "",
    controlnet: Annotated[str, typer.Option(help="a ControlNet folder (not yet)")] = "",
    arch: Annotated[str, typer.Option(help="GPU architectures (not yet)")] = "",
    opset: Annotated[int, typer.Option(help="of the ONNX files; 0: the default")] = 0,
    strict: Annotated[bool, typer.Option("--strict/--fast", help="use only batch sizes that agree bit by bit")] = True,
    reuse: Annotated[list[Path] | None, typer.Option(help="an engine to take equal components from")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="of a single-file checkpoint: its tokenizer's folder")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:  # fmt: skip
    """Build an engine folder out of a model."""
    for flag, value in (("--adapters", adapters), ("--controlnet", controlnet), ("--arch", arch)):
        if value:
            raise NotBuilt(f"{flag} {value}: not built yet by this version")
    from heatsink.export.build import Options
    from heatsink.export.build import build as build_engine
    from heatsink.runtime.model import Model

    options = Options(
        backend=backend,
        batch=parse_batch(batch),
        size=parse_size(size) if size else None,
        precision=precision,
        fuse=tuple(parse_adapter(text) for text in fuse or ()),
        strict=strict,
        opset=opset or None,
    )
    options.check()
    with console.quiet_libraries(), console.bars(quiet) as progress:
        opened = Model.open(model, tokenizer=tokenizer)
        report = build_engine(opened, out, options, reuse=reuse or (), progress=progress)
    say = console.console().print
    for note in report.notes:
        say(f"note: {note}")
    say(f"built {', '.join(report.built) or 'nothing'}; reused {', '.join(report.reused) or 'nothing'}")
    print(f"{out}  engine {report.manifest.digest}")


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="what to draw; several prompts share a batch")],
    engine: Annotated[Path, typer.Option(help="the engine folder")],
    out: Annotated[Path, typer.Option("--out", "-o", help="where the pictures go")] = Path("out"),
    count: Annotated[int, typer.Option("-n", help="pictures of each prompt, with seeds SEED, SEED+1, ...")] = 1,
    negative: Annotated[str, typer.Option(help="what to keep away from")] = "",
    image: Annotated[Path | None, typer.Option(help="start from this picture")] = None,
    strength: Annotated[float | None, typer.Option(help="with --image: share of the steps that is run, 0.8 by default")] = None,
    seed: Annotated[int, typer.Option(help="of the first picture")] = 0,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 20,
    guidance: Annotated[float, typer.Option(help="scale of classifier-free guidance; 1: off")] = 5.0,
    scheduler: Annotated[str, typer.Option(help="euler, dpm++2m, ddim or lcm")] = "dpm++2m",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")] = False,
) -> None:  # fmt: skip
    """Make pictures with an engine; writes PNGs and `receipts.json`."""
    import heatsink

    if count < 1:
        raise InvalidRequest(f"-n: expected at least 1, got {count}")
    start = _open_image(image) if image else None
    prompts = [text for text in prompt for _ in range(count)]
    with console.bars(quiet) as progress:
        opened = heatsink.load(engine, progress=lambda _, done, total: progress("opening", done, total))
        result = opened.generate(
            prompts,
            negative_prompt=negative,
            image=start,
            strength=strength,
            seed=seed,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            size=parse_size(size) if size else None,
            progress=progress,
        )
    paths = result.save(out)
    _write_receipts(out, paths, result)
    for path in paths:
        print(path)


def _open_image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise InvalidRequest(f"--image: {path} can't be read as a picture: {error}") from None


def _write_receipts(out: Path, paths: list[Path], result: Any) -> None:
    entries = [
        {"file": path.name, "request": request.model_dump(mode="json"), "receipt": receipt.as_dict()}
        for path, request, receipt in zip(paths, result.requests, result.receipts, strict=True)
    ]
    (out / "receipts.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


@app.command()
def inspect(engine: Annotated[Path, typer.Argument(help="the engine folder")]) -> None:
    """Print what an engine is: its components, shapes, exactness and parity."""
    from rich.console import Console
    from rich.table import Table

    from heatsink.export.manifest import read_manifest

    manifest = read_manifest(engine)
    table = Table(title=f"{manifest.source.name} · {manifest.backend} · {manifest.digest[:16]}")
    for column in ("component", "parameters", "MB", "precision", "batches", "error", "allowed"):
        table.add_column(column, justify="left" if column == "component" else "right")
    for name, part in manifest.components.items():
        known = manifest.exactness.components[name]
        table.add_row(
            name, f"{part.parameters:,}", f"{sum(a.bytes for a in part.artefacts) / 1e6:.1f}", part.precision,
            ",".join(map(str, known.buckets)), f"{part.parity.max_abs:.1e}", f"{part.parity.allowed:.1e}",
        )  # fmt: skip
    Console().print(table)


@app.command()
def version() -> None:
    """Print the version."""
    import heatsink

    print(heatsink.__version__)


def main() -> None:
    """Run the command line; errors are one line, with exit code 2 for the caller's mistakes."""
    try:
        app(standalone_mode=False)
    except HeatsinkError as error:
        print(f"heatsink: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("heatsink: interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Click's own complaints about flags and arguments.
        if hasattr(error, "format_message"):
            print(f"heatsink: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
