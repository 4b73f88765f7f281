"""The command line's `heatsink lora`: adapters inspected, converted, and merged into a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatsink import console
from heatsink.flags import Quiet
from heatsink.runtime.errors import AdapterError, CallerError, InvalidRequest
from heatsink.runtime.files import make_folder

if TYPE_CHECKING:
    from heatsink.runtime.adapter_delta import AdapterDelta
    from heatsink.runtime.adapter_file import AdapterReceipt
    from heatsink.runtime.model import Model

app = typer.Typer(no_args_is_help=True, help="Inspect, convert and merge LoRA files.")

File = Annotated[Path, typer.Argument(help="a LoRA file (safetensors)")]
For = Annotated[Path | None, typer.Option("--model", help="the model it is for: judges every key")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="a key, or shell pattern of keys, to let go; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
FileOut = Annotated[
    Path, typer.Option("--out", "-o", help="the file to write; for PEFT a folder, or a file in one")
]
Format = Annotated[str, typer.Option(help="diffusers, peft or kohya")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Base = Annotated[Path, typer.Argument(help="a model folder in diffusers layout")]
Weighted = Annotated[list[str], typer.Argument(help="FILE or FILE:SCALE")]
ModelOut = Annotated[Path, typer.Option("--out", "-o", help="the model folder to write")]


@app.command()
def inspect(file: File, model: For = None, ignore: Ignore = None, as_json: AsJson = False) -> None:
    """Print what a LoRA file holds; with --model, every key applied or refused."""
    receipt, deltas = _inspect(file, model, ignore)
    if as_json:
        values = {**receipt.as_dict(), "modules": [_module(delta) for delta in deltas]}
        print(json.dumps(values, indent=2))
    else:
        _print(receipt, deltas)
    if not receipt.accepted:
        raise typer.Exit(AdapterError.exit_code)


def _inspect(
    file: Path, model: Path | None, ignore: list[str] | None
) -> tuple[AdapterReceipt, list[AdapterDelta]]:
    from heatsink.runtime.adapter_file import inspect_adapter

    with console.quiet_libraries(diffusers=False):
        return inspect_adapter(file, _open(model) if model else None, ignore=ignore or ())


def _open(path: Path) -> Model:
    from heatsink.runtime.model import Model

    return Model.open(path)


def _module(delta: AdapterDelta) -> dict[str, Any]:
    return {
        "component": delta.component,
        "module": delta.module_path,
        "kind": _kind(delta),
        "rank": delta.rank,
        "scale": delta.scale,
        "dtype": str(delta.a.dtype).removeprefix("torch."),
        "shape": list(delta.weight_shape),
    }


def _kind(delta: AdapterDelta) -> str:
    kernel = delta.weight_shape[2:]
    layer = f"conv {kernel[0]}x{kernel[1]}" if kernel else "linear"
    return layer if delta.magnitude is None else f"{layer}, DoRA"


def _print(receipt: AdapterReceipt, deltas: list[AdapterDelta]) -> None:
    from rich.console import Console
    from rich.table import Table

    screen = Console(highlight=False)
    if receipt.refused:
        table = Table(title=f"{receipt.path}: refused")
        table.add_column("key", overflow="fold")
        table.add_column("why it can't be applied", overflow="fold")
        for key, reason in receipt.refused.items():
            table.add_row(_plain(key), _plain(reason))
    else:
        table = Table(title=f"{receipt.path}: {len(deltas)} modules")
        for column in ("component", "module", "kind"):
            table.add_column(column, overflow="fold")
        for column in ("rank", "scale", "dtype"):
            table.add_column(column, justify="right")
        for row in map(_module, deltas):
            shown = (row["component"], row["module"], row["kind"], row["rank"])
            table.add_row(*map(str, shown), f"{row['scale']:g}", row["dtype"])
    screen.print(table)
    for name, value in _summary(receipt).items():
        screen.print(f"{name}: {value}", markup=False, soft_wrap=True)
    for text in receipt.notes:
        screen.print(f"note: {text}", markup=False, soft_wrap=True)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _summary(receipt: AdapterReceipt) -> dict[str, str]:
    keys = f"{len(receipt.applied)} of {receipt.keys} "
    if receipt.refused:
        keys += "fit; none is applied"
    else:
        keys += "applied" if receipt.digest else "understood; give --model to judge them"
    return {
        "format": receipt.format,
        "dtypes": ", ".join(receipt.dtypes) or "none",
        "ranks": ", ".join(map(str, receipt.ranks)) or "none",
        "keys": keys,
        **({"ignored": ", ".join(receipt.ignored)} if receipt.ignored else {}),
        "sha256": receipt.sha256,
        **({"digest": receipt.digest} if receipt.digest else {}),
    }


@app.command()
def convert(
    file: File,
    out: FileOut,
    format: Format,
    model: For = None,
    ignore: Ignore = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a LoRA file in another format, with the same values bit by bit."""
    from heatsink.runtime.adapter_config import CONFIG_NAME, METADATA_KEY
    from heatsink.runtime.adapter_open import open_adapter
    from heatsink.runtime.adapter_write import FORMATS, write_adapter

    if format not in FORMATS:
        raise InvalidRequest(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    receipt, deltas = _inspect(file, model, ignore)
    if not receipt.accepted:
        raise AdapterError(receipt.refusal(), receipt.refused)
    if model is None and "kohya" in receipt.format:
        raise InvalidRequest(
            f"--model: {file} has kohya's names, whose underscores only a model tells from dots"
        )
    if format == "peft" and out.suffix != ".safetensors":
        out /= "adapter_model.safetensors"
    written = [out, out.parent / CONFIG_NAME] if format == "peft" else [out]
    for path in written:
        if path.exists() and not overwrite:
            raise CallerError(f"{path} exists; it is replaced only with --overwrite")
        if path.resolve() == file.resolve():
            raise CallerError(f"{path} is the file that is read; write to another one")
    kept = {k: v for k, v in open_adapter(file)[1].items() if k not in (METADATA_KEY, "format")}
    make_folder(out.parent)
    write_adapter(out, deltas, format, metadata=kept)
    for text in receipt.notes:
        console.note(text)
    print(f"{out}  {receipt.digest}" if receipt.digest else out)


@app.command()
def merge(
    model: Base,
    adapters: Weighted,
    out: ModelOut,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Bake adapters into a copy of a model folder, which anything can then open."""
    from heatsink.export.staging import staging
    from heatsink.runtime.adapter_bake import bake
    from heatsink.runtime.adapter_file import Targets, inspect_adapter, scaled

    wanted = [_weighted(text) for text in adapters]
    target = out.resolve()
    _check_out(target, model, [path for path, _ in wanted], overwrite)
    opened = _open(model)
    with console.quiet_libraries(diffusers=False), console.bars(quiet) as progress:
        opened.check()
        targets = Targets.of(opened)
        merged, lines = [], []
        for path, scale in wanted:
            receipt, deltas = inspect_adapter(path, targets)
            if not receipt.accepted:
                raise AdapterError(receipt.refusal(), receipt.refused)
            merged += scaled(deltas, scale)
            lines.append(f"{path}  {scale:g}  {len(deltas)} modules  {receipt.digest}")
        with staging(target, 0) as folder:
            bake(opened, merged, folder, progress)
    for note in opened.notes:
        console.note(note)
    print("\n".join([*lines, str(out)]))


def _weighted(text: str) -> tuple[Path, float]:
    """`FILE:SCALE` or `FILE` (scale 1); a file whose name holds a colon is itself."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(scale)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise InvalidRequest(
            f"expected FILE:SCALE, such as noto.safetensors:0.8 with a finite scale, got {text!r}"
        )
    return Path(path), weight


def _check_out(out: Path, model: Path, adapters: list[Path], overwrite: bool) -> None:
    """Refuse a place that holds anything but a model, or what is read."""
    source = model.resolve()
    if out == source or out.is_relative_to(source) or source.is_relative_to(out):
        raise CallerError(f"{out} overlaps the model {model}; write to another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "model_index.json").is_file():
        raise CallerError(f"{out} exists and is not a model folder; it is left as it is")
    if not overwrite:
        raise CallerError(f"{out} is a model folder; it is replaced only with --overwrite")
    for path in adapters:
        if path.resolve().is_relative_to(out):
            raise CallerError(f"{out} holds {path}, which would be removed; write to another one")
