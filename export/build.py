"""Builds an engine folder out of a model: capture, passes, ONNX, parity, exactness, manifest."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heatsink.export import components, environment
from heatsink.export.manifest import (
    FILE_NAME,
    Artefact,
    Component,
    Exactness,
    FusedAdapter,
    KnownAnswer,
    Manifest,
    Preflight,
    Range,
    Shapes,
    Source,
    read_manifest,
)
from heatsink.runtime.adapter_delta import fuse_model, scaled
from heatsink.runtime.adapter_file import read_adapter
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import CallerError, EngineMismatch, InvalidRequest, NotBuilt, ResourceError
from heatsink.runtime.model import Model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How an engine is built; the names are those of `heatsink build`'s flags.

    Attributes:
        backend: who runs it.
        batch: rows of a UNet batch, (smallest, best served, largest).
        size: (height, width) in pixels; the model's own where None.
        precision: what the components compute in.
        fuse: adapter files, each with a scale, merged into the weights.
        strict: batch sizes that change a row's bits are not used.
        opset: of the ONNX files; None takes the exporter's default.
    """

    backend: str = "onnxruntime"
    batch: tuple[int, int, int] = (1, 8, 16)
    size: tuple[int, int] | None = None
    precision: str = "fp32"
    fuse: Sequence[tuple[Path, float]] = ()
    strict: bool = True
    opset: int | None = None

    def check(self) -> None:
        """Refuse what can't be built.

        Raises:
            NotBuilt: this version can't build it yet.
            InvalidRequest: a value is out of range.
        """
        if self.backend != "onnxruntime":
            raise NotBuilt(f"backend {self.backend!r} is not built yet; this version builds onnxruntime")
        if self.precision != "fp32":
            raise NotBuilt(
                f"precision {self.precision!r} is not built yet for {self.backend}; this version builds fp32"
            )
        low, best, high = self.batch
        if not 1 <= low <= best <= high <= 256:
            raise InvalidRequest(f"batch: expected 1 <= min <= opt <= max <= 256, got {self.batch}")


@dataclass
class Report:
    """What `build` did.

    Attributes:
        folder: the engine.
        manifest: its description.
        built: components that were built now.
        reused: components taken over from an engine built of the same parts.
        notes: what the user should know.
    """

    folder: Path
    manifest: Manifest
    built: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build(
    model: str | Path | Model,
    out: str | Path,
    options: Options | None = None,
    *,
    reuse: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Report:
    """Build the engine folder `out`, whole or not at all.

    Components that an engine in `reuse` (or the one that stands at `out`) already holds, built of the same
    weights with the same options and libraries, are taken over.

    Args:
        model: a diffusers folder, a single-file checkpoint, or an opened model.
        out: where the engine goes; an engine there is replaced, anything else is refused.
        options: how to build it.
        reuse: engine folders to take equal components from.
        progress: called with (what is being done, done, total).

    Raises:
        ModelError, UnsafeFile, AdapterError, NumericError: the model or an adapter can't be used.
        NotBuilt, InvalidRequest: the options can't be built.
        ResourceError: no space is left.
    """
    options = options or Options()
    options.check()
    report = progress or (lambda what, done, total: None)
    out = Path(out)
    _check_target(out)
    opened = model if isinstance(model, Model) else Model.open(model)
    notes = list(opened.notes)
    opened.check()
    opened.check_finite(lambda done, total: report("checking weights", done, total))
    opened, adapters = _fuse(opened, options.fuse)
    size = options.size or components.default_size(opened)
    components.check_size(opened, size)
    plans = {
        name: components.plan(opened, name, size, options.batch[2], options.opset, options.precision, report)
        for name in opened.components
    }
    donors = _donors([out, *reuse])
    result = Report(out, None, notes=notes)  # type: ignore[arg-type]
    with _staging(out, sum(plan.disk_bytes for plan in plans.values())) as folder:
        built: dict[str, components.Built] = {}
        for name, plan in plans.items():
            taken = _take_over(donors, plan, folder)
            (result.reused if taken else result.built).append(name)
            built[name] = taken or components.build(opened, plan, folder, options.strict, report)
        files, source = _describe(opened, size, folder, plans)
        manifest = _manifest(options, size, built, plans, files, source, adapters)
        manifest.write(folder)
        result.manifest = manifest
    return result


def _check_target(out: Path) -> None:
    if out.exists() and not (out / FILE_NAME).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise CallerError(f"{out} exists and is not an engine folder; it is left as it is")


@contextlib.contextmanager
def _staging(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise ResourceError(f"can't make {out.parent}: {error}") from error
    if free < needed:
        raise ResourceError(
            f"{out.parent} has {free / 1e6:.0f} MB free; this engine needs about {needed / 1e6:.0f} MB"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    old = folder.with_suffix(".replaced")
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space is left for {out}: nothing was written") from error
        raise
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _fuse(
    model: Model, fuse: Sequence[tuple[Path, float]]
) -> tuple[Model, list[FusedAdapter]]:
    """The model with the adapters merged into its weights, from the pristine ones."""
    adapters, merged = [], []
    for path, scale in fuse:
        deltas = read_adapter(path, model)
        merged += scaled(deltas, scale)
        adapters.append(
            FusedAdapter(name=Path(path).stem, sha256=sha256_file(path), scale=scale, keys=len(deltas))
        )
    return (fuse_model(model, merged) if merged else model), adapters


def _donors(folders: Sequence[str | Path]) -> list[tuple[Path, Manifest]]:
    """Engines that can be read; one of another version or damaged is no donor."""
    found = []
    for folder in map(Path, folders):
        with contextlib.suppress(EngineMismatch):
            found.append((folder, read_manifest(folder)))
    return found


def _take_over(
    donors: Sequence[tuple[Path, Manifest]], plan: components.Plan, folder: Path
) -> components.Built | None:
    """Copy the component of a donor that was built of the same parts, if its files are whole."""
    for donor, manifest in donors:
        component = manifest.components.get(plan.name)
        if component is None or component.build_key != plan.key(manifest.exactness.mode == "strict"):
            continue
        if any(not _same_file(donor, a) for a in component.artefacts):
            continue
        for artefact in component.artefacts:
            shutil.copyfile(donor / artefact.path, folder / artefact.path)
        known = manifest.exactness.components[plan.name]
        return components.Built(component, known, manifest.preflight.get(plan.name, Preflight()))
    return None


def _same_file(folder: Path, artefact: Artefact) -> bool:
    path = folder / artefact.path
    return path.is_file() and sha256_file(path) == artefact.sha256


def _describe(
    model: Model, size: tuple[int, int], folder: Path, plans: dict[str, components.Plan]
) -> tuple[list[Artefact], Source]:
    """Copy what the runtime needs besides the networks; the list of those files and the source's section."""
    files, tokenizers = [], []
    for index in range(model.tokenizer_count):
        name = "tokenizer" if index == 0 else f"tokenizer_{index + 1}"
        (folder / name).mkdir()
        tokenizers.append(name)
        for path in sorted(model.tokenizer_folder(index).iterdir()):
            if path.is_file():
                shutil.copyfile(path, folder / name / path.name)
                files.append(components.artefact(folder, f"{name}/{path.name}"))
    unet, vae = model.config("unet"), model.config("vae_decoder")
    encoders = [name for name in model.components if name.startswith("text_encoder")]
    source = Source(
        name=model.path.stem if model.path.is_file() else model.path.name,
        kind=model.kind,
        digests={name: plan.source_digest for name, plan in plans.items()},
        scheduler=model.scheduler_config,
        text_encoders=encoders,
        tokenizers=tokenizers,
        added_conditions=["text_embeds", "time_ids"] if unet.get("addition_embed_type") else [],
        latent_channels=vae.get("latent_channels", 4),
        vae_factor=components.vae_factor(model),
        default_size=size,
        force_zeros_for_empty_prompt=bool(model.settings.get("force_zeros_for_empty_prompt", False)),
    )
    return files, source


def _manifest(
    options: Options,
    size: tuple[int, int],
    built: dict[str, components.Built],
    plans: dict[str, components.Plan],
    files: list[Artefact],
    source: Source,
    adapters: list[FusedAdapter],
) -> Manifest:
    low, best, high = options.batch
    parts: dict[str, Component] = {name: b.component for name, b in built.items()}
    known: dict[str, KnownAnswer] = {name: b.known for name, b in built.items()}
    return Manifest(
        heatsink_version=environment.version(),
        backend="onnxruntime",
        libraries=environment.libraries(),
        device=environment.processor(),
        source=source,
        shapes=Shapes(
            batch=Range(min=low, opt=best, max=high),
            height=Range(min=size[0], opt=size[0], max=size[0]),
            width=Range(min=size[1], opt=size[1], max=size[1]),
        ),
        components=parts,
        files=files,
        precisions={name: part.precision for name, part in parts.items()},
        adapters=adapters,
        exactness=Exactness(mode="strict" if options.strict else "fast", components=known),
        preflight={name: b.preflight for name, b in built.items()},
    )

