"""The command line: `heatsink build`, `heatsink generate`, `heatsink inspect` and others."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from heatsink import console, flags, graph_command, kernel_commands, lora_commands, receipts
from heatsink.bench_command import app as bench_app
from heatsink.kernels.errors import KernelError
from heatsink.runtime.errors import HeatsinkError, InvalidRequest, NotBuilt
from heatsink.runtime.files import make_folder
from heatsink.tune_command import tune

if TYPE_CHECKING:
    from heatsink.export.manifest import Manifest
    from heatsink.runtime.result import Result

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
kernel_commands.app.command()(tune)
app.add_typer(kernel_commands.app, name="kernels")
app.add_typer(bench_app, name="bench")
app.add_typer(lora_commands.app, name="lora")
app.add_typer(graph_command.app, name="graph")


@app.command()
def build(
    model: flags.Model,
    out: flags.EngineOut,
    backend: flags.Backend = "auto",
    batch: flags.Batch = "1:8:16",
    size: flags.BuildSize = "",
    precision: flags.Precision = "fp32",
    high: flags.High = None,
    fuse: flags.Fuse = None,
    adapters: flags.Adapters = "",
    ports: flags.Ports = "all",
    controlnet: flags.ControlNet = None,
    arch: flags.Arch = "",
    opset: flags.Opset = 0,
    strict: flags.Strict = True,
    reuse: flags.Reuse = None,
    tokenizer: flags.TokenizerFolder = None,
    quiet: flags.Quiet = False,
) -> None:
    """Build an engine folder out of a model."""
    if arch:
        raise NotBuilt(f"--arch {arch}: not built yet by this version")
    fields: dict[str, Any] = {
        "backend": backend,
        "batch": flags.parse_batch(batch),
        "size": flags.parse_size(size),
        "precision": precision,
        "high": flags.parse_high(high or ()),
        "fuse": tuple(flags.parse_adapter(text) for text in fuse or ()),
        "adapters": flags.parse_ports(adapters),
        "ports": ports,
        "controlnets": flags.parse_controlnets(controlnet or ()),
        "strict": strict,
        "opset": opset or None,
    }
    _build(model, out, fields, reuse or (), tokenizer, quiet)


def _build(
    model: Path,
    out: Path,
    fields: dict[str, Any],
    reuse: list[Path] | tuple[()],
    tokenizer: Path | None,
    quiet: bool,
) -> None:
    from heatsink.export.build import Options
    from heatsink.export.build import build as build_engine
    from heatsink.runtime.model import Model

    options = Options(**fields)
    options.check()
    opened = Model.open(model, tokenizer=tokenizer)
    with console.quiet_libraries(), console.bars(quiet) as progress:
        report = build_engine(opened, out, options, reuse=reuse, progress=progress)
    for note in report.notes:
        console.note(note)
    made, reused = (", ".join(names) or "nothing" for names in (report.built, report.reused))
    console.console().print(f"built {made}; reused {reused}")
    print(f"{out}  engine {report.manifest.digest}")


@app.command()
def generate(
    prompt: flags.Prompt,
    engine: flags.Engine,
    out: flags.PicturesOut = Path("out"),
    count: flags.Count = 1,
    negative: flags.Negative = "",
    image: flags.StartImage = None,
    strength: flags.Strength = None,
    mask: flags.Mask = None,
    control: flags.Control = None,
    seed: flags.Seed = 0,
    steps: flags.Steps = 20,
    guidance: flags.Guidance = 5.0,
    scheduler: flags.Sampler = "dpm++2m",
    size: flags.Size = "",
    adapter: flags.Adapter = None,
    overwrite: flags.Overwrite = False,
    quiet: flags.Quiet = False,
) -> None:
    """Make pictures with an engine; writes PNGs and `receipts.json`."""
    if count < 1:
        raise InvalidRequest(f"-n: expected at least 1, got {count}")
    prompts = [text for text in prompt for _ in range(count)]
    files = flags.parse_named_adapters(adapter or ())
    fields: dict[str, Any] = {
        "negative_prompt": negative,
        "image": _open_image(image, "--image") if image else None,
        "mask": _open_image(mask, "--mask") if mask else None,
        "control": {
            name: (_open_image(path, "--control"), scale)
            for name, (path, scale) in flags.parse_controls(control or ()).items()
        },
        "strength": strength,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "size": flags.parse_size(size),
        "adapters": {name: weight for name, (_, weight) in files.items()},
    }
    earlier = receipts.read(out)
    paths = {name: path for name, (path, _) in files.items()}
    result = _generate(engine, out, prompts, fields, paths, overwrite, quiet)
    for note in dict.fromkeys(note for receipt in result.receipts for note in receipt.notes):
        console.note(note)
    pictures = result.save(out, overwrite=overwrite)
    receipts.write(out, earlier, pictures, result)
    for path in pictures:
        print(path)


def _generate(
    engine: Path,
    out: Path,
    prompts: list[str],
    fields: dict[str, Any],
    adapters: dict[str, Path],
    overwrite: bool,
    quiet: bool,
) -> Result:
    import heatsink
    from heatsink.runtime.arguments import make_requests
    from heatsink.runtime.result import picture_paths
    from heatsink.runtime.text import PromptTruncated

    # A wrong value is told before the engine is opened, and so is a picture in the way.
    requests, _ = make_requests(prompts, **fields)
    picture_paths(out, requests, overwrite=overwrite)
    with console.quiet_libraries(diffusers=False), warnings.catch_warnings():
        # The caller says it, once for each text.
        warnings.simplefilter("ignore", PromptTruncated)
        with console.bars(quiet) as progress:
            opened = heatsink.load(engine, progress=progress)
            for name, path in adapters.items():
                opened.add_adapter(name, path)
            for request in requests:
                opened.resolve(request)
            if opened.bank is not None:
                # What the slots can't hold is told now too, and loading begins.
                opened.bank.acquire(fields["adapters"]).release()
            # A folder that can't be written is told before the work, not after it.
            make_folder(out)
            return opened.generate(prompts, progress=progress, **fields)


def _open_image(path: Path, flag: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    # Pillow raises these on files that are cut off, of no known format, or too large to be honest.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{flag}: {path} can't be read as a picture: {error}") from None


@app.command()
def inspect(engine: flags.EngineFolder) -> None:
    """Print what an engine is: its components, shapes, exactness and parity."""
    from rich.console import Console
    from rich.table import Table

    from heatsink.export.manifest import read_manifest

    manifest = read_manifest(engine)
    table = Table(
        title=f"{manifest.source.name} · {manifest.backend} · {manifest.digest[:16]}",
        caption=_caption(manifest),
    )
    table.add_column("component")
    for column in ("parameters", "MB", "precision", "batches", "error", "allowed"):
        table.add_column(column, justify="right")
    for name, part in manifest.components.items():
        table.add_row(
            name,
            f"{part.parameters:,}",
            f"{sum(a.bytes for a in part.artefacts) / 1e6:.1f}",
            part.precision,
            ",".join(map(str, manifest.exactness.components[name].buckets)),
            f"{part.parity.max_abs:.1e}",
            f"{part.parity.allowed:.1e}",
        )
    Console().print(table)


def _caption(manifest: Manifest) -> str:
    height, width = manifest.source.default_size
    fused = ", ".join(f"{a.name}:{a.scale:g}" for a in manifest.adapters) or "none"
    batch, ports = manifest.shapes.batch, manifest.ports
    adapted = (
        f"{ports.adapter_slots}x{ports.adapter_rank} ({ports.which})" if ports.which else "none"
    )
    return (
        f"{height}x{width} pixels, batch {batch.min}:{batch.opt}:{batch.max}, "
        f"{manifest.exactness.mode}; fused adapters: {fused}; "
        f"adapter ports: {adapted}; "
        f"heatsink {manifest.heatsink_version}, built on {manifest.device}"
    )


@app.command()
def version() -> None:
    """Print the version."""
    import heatsink

    print(heatsink.__version__)


_INTERRUPTED = 128 + signal.SIGINT


def _terminated(signum: int, frame: FrameType | None) -> None:
    # An exception, so that what is half-written is taken away as after Ctrl-C.
    sys.exit(128 + signum)


def main() -> None:
    """Run the command line; errors are one line, with exit code 2 for the caller's mistakes."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        # The library makes a number or an Abort of Ctrl-C, by its version.
        code = app(standalone_mode=False)
    except (HeatsinkError, KernelError) as error:
        print(f"heatsink: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except Exception as error:
        # The library's own complaints about flags and arguments; empty where it printed the help.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():
            print(f"heatsink: {message}", file=sys.stderr)
        sys.exit(2)
    if code == _INTERRUPTED:
        print("heatsink: interrupted; nothing half-written is left", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
