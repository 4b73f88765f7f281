"""`make demo`: an engine, a contact sheet of four styles in one batch, a measured comparison."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink import console
from heatsink.runtime.errors import HeatsinkError, ModelError

if TYPE_CHECKING:
    from heatsink.comparison import Comparison
    from heatsink.runtime.engine import Engine

Progress = Callable[[str, int, int], None]
PROMPTS = (
    "a red apple",
    "a penguin",
    "a sunflower",
    "a hamburger",
    "a tiger face",
    "an owl",
    "a sailboat",
    "a rocket",
    "a purple heart",
    "a cactus",
    "an octopus",
    "a guitar",
)
STYLES = {"flat": None, "fluent": "fluent", "noto": "noto", "twemoji": "twemoji"}
# Slots and rank of the ports.
PORTS = (4, 16)
STEPS, GUIDANCE = 20, 4.0
ZOOM = 1.5


def find_model() -> Path:
    """The bundled model, beside the package's sources or under the current folder."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "models" / "emoji" / "model_index.json").is_file():
            return root / "models" / "emoji"
    raise ModelError("models/emoji is not here: run the demo from a checkout of the repository")


def build_engine(model: Path, out: Path, progress: Progress) -> Path:
    """The base model's engine, with ports for the brands' LoRAs."""
    from heatsink.export.build import Options, build

    folder = out / "engines" / "emoji"
    build(model, folder, Options(adapters=PORTS), progress=progress)
    return folder


def draw(engine: Engine, model: Path, progress: Progress) -> dict[str, Sequence[Any]]:
    """All prompts in all styles, in one batch; a style's adapter is an input of its rows.

    Raises:
        HeatsinkError: a picture has other bytes than when its prompt is alone in the batch.
    """
    brands = [name for name in STYLES.values() if name]
    for name in brands:
        engine.add_adapter(name, model / "adapters" / f"{name}.safetensors")
    wanted = [
        (prompt, seed, name) for name in STYLES.values() for seed, prompt in enumerate(PROMPTS)
    ]
    images = _pictures(engine, wanted, progress)
    # The first prompt in every style, each by itself.
    for place in range(0, len(wanted), len(PROMPTS)):
        (alone,) = _pictures(engine, wanted[place : place + 1], lambda *_: None)
        if alone.tobytes() != images[place].tobytes():
            raise HeatsinkError(f"{wanted[place]}: the batch changed the picture's bytes")
    rows = [images[at : at + len(PROMPTS)] for at in range(0, len(images), len(PROMPTS))]
    return dict(zip(STYLES, rows, strict=True))


def _pictures(
    engine: Engine, wanted: Sequence[tuple[str, int, str | None]], progress: Progress
) -> list[Any]:
    prompts, seeds, adapters = zip(*wanted, strict=True)
    chosen = [{name: 1.0} if name else None for name in adapters]
    return engine.generate(
        prompts,
        seed=seeds,
        adapters=chosen,
        steps=STEPS,
        guidance=GUIDANCE,
        progress=progress,
    ).images


def contact_sheet(pictures: dict[str, Sequence[Any]], path: Path) -> None:
    """Write rows of pictures, one row a style, named above and beside."""
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(pictures.values()))
    cell = round(first[0].width * ZOOM)
    left, top, gap = 78, 26, 6
    width = left + len(first) * (cell + gap)
    sheet = Image.new("RGB", (width, top + len(pictures) * (cell + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, prompt in enumerate(PROMPTS):
        name = prompt.split(" ", 1)[1]
        x = left + column * (cell + gap) + cell / 2
        draw.text((x, top / 2), name, fill="black", font=font, anchor="mm")
    for row, (style, images) in enumerate(pictures.items()):
        y = top + row * (cell + gap)
        draw.text((8, y + cell / 2), style, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            big = image.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(big, (left + column * (cell + gap), y))
    sheet.save(path)


def plot(comparison: Comparison, path: Path) -> None:
    """Draw device-seconds per image at every batch, with the range of the rounds."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    grey, orange = "#9aa0a6", "#d9480f"
    rows = sorted(comparison.rows, key=lambda r: (-r.images, r.system), reverse=False)
    for place, row in enumerate(rows):
        spread = [[row.median - row.fastest], [row.slowest - row.median]]
        colour = orange if row.system.startswith("heatsink") else grey
        axes.barh(place, row.median, xerr=spread, color=colour, height=0.7, capsize=3)
        axes.text(row.slowest, place, f"  {row.median:.3f} s", va="center")
    labels = [f"{row.system}, {row.images} at once" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("device-seconds per image (median; bars: fastest and slowest round)")
    axes.set_xlim(0, max(row.slowest for row in rows) * 1.18)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{comparison.size}, {comparison.steps} steps, guidance {comparison.guidance:g}, fp32, "
        f"{comparison.threads} CPU threads",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _ratio(comparison: Comparison, count: int) -> str:
    factor = comparison.speedup(count)
    word = "fewer" if factor >= 1 else "more"
    return f"{max(factor, 1 / factor):.2f}x {word} at {count}"


def table(comparison: Comparison) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| system | images at once | device-seconds per image (median) | fastest to slowest |",
        "|---|---|---|---|",
    ]
    for row in comparison.rows:
        spread = f"{row.fastest:.4f} to {row.slowest:.4f}"
        lines.append(f"| {row.system} | {row.images} | {row.median:.4f} | {spread} |")
    counts = sorted({row.images for row in comparison.rows})
    ratios = ", ".join(_ratio(comparison, count) for count in counts)
    lines += [
        "",
        f"Device-seconds against diffusers eager: {ratios}. The device is the CPU: "
        f"{comparison.device}, {comparison.threads} threads. {comparison.steps} steps of "
        f"DPM-Solver++(2M), guidance {comparison.guidance:g}, {comparison.size} pixels, fp32, "
        f"medians of {comparison.rounds} interleaved rounds; diffusers in its faster layout here "
        f"({comparison.layout}). Both drew the same pictures ({comparison.psnr:.0f} dB apart at "
        "worst).",
    ]
    return "\n".join(lines)


def run(out: Path) -> None:
    """The whole demo; writes under `out`."""
    import torch

    import heatsink
    from heatsink.comparison import compare

    say = console.console().print
    begun = time.perf_counter()
    model = find_model()
    out.mkdir(parents=True, exist_ok=True)
    say(f"[bold]1/3[/] an engine of {model.name}, with ports for each brand's LoRA")
    with console.quiet_libraries(), console.bars() as progress:
        folder = build_engine(model, out, progress)
    say("[bold]2/3[/] contact sheet: 12 prompts in 4 styles, one batch")
    with console.bars() as progress:
        # As many threads as PyTorch has: the comparison is of equals.
        opened = heatsink.load(folder, threads=torch.get_num_threads(), progress=progress)
        pictures = draw(opened, model, progress)
    sheet = out / "contact_sheet.png"
    contact_sheet(pictures, sheet)
    say("[bold]3/3[/] device-seconds per image, against diffusers eager in the same run")
    with console.quiet_libraries(), console.bars() as progress:
        comparison = compare(
            opened, model, PROMPTS, steps=STEPS, guidance=GUIDANCE, progress=progress
        )
    text = table(comparison)
    (out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    (out / "comparison.json").write_text(
        json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8"
    )
    plot(comparison, out / "comparison.png")
    print(text)
    say(
        f"\nDone in {time.perf_counter() - begun:.0f} s. Written:\n"
        f"  {sheet}  the contact sheet\n"
        f"  {out / 'comparison.md'}, .json and .png  the measurement\n"
        f"  {folder}  the engine\n"
        "Next:\n"
        f'  .venv/bin/heatsink generate "a whale" --engine {folder} --adapter '
        f"{model}/adapters/noto.safetensors:0.8 -n 4 -o {out}/whales\n"
        f"  .venv/bin/heatsink inspect {folder}\n"
        "  .venv/bin/heatsink build PATH/TO/A/STABLE-DIFFUSION-1.5 -o out/engines/mine",
        soft_wrap=True,
    )


def main() -> None:
    """Run the demo under `out/`; errors are one line."""
    try:
        run(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out"))
    except HeatsinkError as error:
        print(f"heatsink demo: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
