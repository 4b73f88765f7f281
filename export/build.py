"""Builds an engine folder out of a model: capture, passes, files, parity, exactness, manifest."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from heatsink.export import backends, components, environment, port_table, ported
from heatsink.export import plan as planning
from heatsink.export.backends import Backend, OnnxRuntime
from heatsink.export.donors import find_donors, take_over
from heatsink.export.manifest import (
    Artefact,
    Exactness,
    FusedAdapter,
    Manifest,
    PortedGraph,
    Ports,
    Precision,
    Range,
    Shapes,
    Source,
)
from heatsink.export.staging import check_target, staging
from heatsink.runtime.adapter_delta import fuse_model, scaled
from heatsink.runtime.adapter_file import read_adapter
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import InvalidRequest, NonFiniteWeights, NotBuilt, NumericError
from heatsink.runtime.model import Model
from heatsink.runtime.model_control import check_name

Progress = Callable[[str, int, int], None]
MAX_BATCH = 256
# What stays float32 by default in a lower precision, by component (`bench/precision.py` measures).
HIGH: Mapping[str, Sequence[str]] = {}
# What tokenizers read; a tokenizer's folder may be a whole repository with weights beside them.
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
}


@dataclass(frozen=True)
class Options:
    """How an engine is built; the names are those of `heatsink build`'s flags.

    Attributes:
        backend: who runs it: `torch` (this package's own), `onnxruntime`, or `auto`, the fastest on
            this machine, which the manifest names.
        device: where it runs, and is measured.
        batch: rows of a UNet batch, (smallest, best served, largest).
        size: (height, width) in pixels; the model's own where None.
        precision: what the components compute in.
        fuse: adapter files, each with a scale, merged into the weights.
        strict: batch sizes that change a row's bits are not used.
        opset: of the ONNX files; None takes the exporter's default.
        high: by component the modules (`path` or `path:operator`) that stay float32 in a lower
            precision; `export.precision_search` finds such lists. None takes `HIGH`.
        adapters: (slots, rank) of adapter ports on the UNet and the text encoders; None: no ports.
        ports: which of their layers get ports: "all" linears and convolutions, "linear" ones, or
            the linear projections of "attention".
        controlnets: folders of ControlNets, by the names that requests call them.
    """

    backend: str = backends.AUTO
    device: str = environment.CPU
    batch: tuple[int, int, int] = (1, 8, 16)
    size: tuple[int, int] | None = None
    precision: Precision = "fp32"
    high: Mapping[str, Sequence[str]] | None = None
    fuse: Sequence[tuple[Path, float]] = ()
    strict: bool = True
    opset: int | None = None
    adapters: tuple[int, int] | None = None
    ports: str = "all"
    controlnets: Mapping[str, Path] = field(default_factory=dict)

    @property
    def chosen(self) -> Backend:
        """The backend, which `auto` leaves to the machine.

        Raises:
            NotBuilt: this version has none of that name.
        """
        return backends.backend(backends.choose(self.backend))

    def high_of(self, component: str) -> Sequence[str]:
        """The modules of a component that stay float32."""
        if self.precision == "fp32":
            return ()
        return (HIGH if self.high is None else self.high).get(component, ())

    def check(self) -> None:
        """Refuse what can't be built.

        Raises:
            NotBuilt: this version can't build it yet.
            InvalidRequest: a value is out of range.
        """
        environment.check_device(self.device)
        chosen = self.chosen
        if self.precision not in chosen.precisions:
            raise NotBuilt(
                f"precision {self.precision!r} is not built yet for {chosen.name}; "
                f"this version builds {', '.join(chosen.precisions)}"
            )
        if self.high and self.precision == "fp32":
            raise InvalidRequest("high: everything is high in fp32")
        if self.opset is not None and chosen.name != OnnxRuntime.name:
            raise InvalidRequest(f"opset: engines of {chosen.name} hold no ONNX files")
        ported.check_options(self.adapters, self.ports)
        low, best, high = self.batch
        if not 1 <= low <= best <= high <= MAX_BATCH:
            raise InvalidRequest(
                f"batch: expected 1 <= min <= opt <= max <= {MAX_BATCH}, got {low}:{best}:{high}"
            )
        for name in self.controlnets:
            check_name(name)
        for path, scale in self.fuse:
            if not math.isfinite(scale):
                raise InvalidRequest(f"fuse: expected a finite scale for {path}, got {scale}")


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

    Components that an engine in `reuse` (or the one that stands at `out`) already holds, built of
    the same weights with the same options and libraries, are taken over.

    Args:
        model: a diffusers folder, a single-file checkpoint, or an opened model.
        out: where the engine goes; an engine there is replaced, anything else is refused.
        options: how to build it.
        reuse: engine folders to take equal components from.
        progress: called with (what is being done, done, total).

    Raises:
        ModelError, UnsafeFile, AdapterError, NonFiniteWeights: the model or an adapter can't be
            used.
        NotBuilt, InvalidRequest: the options can't be built.
        CallerError: `out` holds something else, or may not be written.
        ResourceError: no space is left.
    """
    options = options or Options()
    options.check()
    options = replace(options, backend=options.chosen.name)
    report = progress or (lambda what, done, total: None)
    # Through a link, what it points to is replaced, not the link.
    target = Path(out).resolve()
    check_target(target)
    opened = model if isinstance(model, Model) else Model.open(model)
    if options.controlnets:
        opened = opened.with_controlnets(options.controlnets)
    opened.check()
    if unknown := sorted(set(options.high or ()) - set(opened.components)):
        raise InvalidRequest(f"high: the model has {opened.components}, not {unknown}")
    size = options.size or planning.default_size(opened)
    planning.check_size(opened, size)
    opened, adapters = _fuse(opened, options.fuse)
    _check_finite(opened, report)
    targets = Targets.of(opened)
    layouts = ported.layouts(opened, targets, options.adapters, options.ports)
    plans = {
        name: planning.plan(
            opened,
            name,
            size,
            options.batch[2],
            opset=options.opset,
            precision=options.precision,
            backend=options.backend,
            high=options.high_of(name),
            layout=layouts.get(name),
            report=report,
        )
        for name in opened.components
    }
    donors, notes = find_donors(target, reuse)
    built: dict[str, components.Built] = {}
    reused = []
    with staging(target, sum(plan.disk_bytes for plan in plans.values())) as folder:
        for name, plan in plans.items():
            if taken := take_over(donors, plan, folder, options.strict):
                reused.append(name)
            built[name] = taken or components.build(opened, plan, folder, options.strict, report)
        source = _source(opened, size, plans)
        files = _copy_tokenizers(opened, source.tokenizers, folder)
        if layouts:
            name = port_table.write_table(folder, layouts, targets)
            files.append(components.artefact(folder, name))
        manifest = _manifest(options, size, built, files, source, adapters)
        manifest.write(folder)
    made = [name for name in plans if name not in reused]
    notes += [note for name, part in built.items() for note in _port_notes(name, part.ported)]
    return Report(Path(out), manifest, made, reused, [*opened.notes, *notes])


def _port_notes(name: str, part: PortedGraph | None) -> list[str]:
    """What the measurement of a graph with ports found that costs something."""
    if part is None:
        return []
    notes = []
    if not part.twin:
        notes.append(
            f"{name}: rows without adapters get other bits in the graph without ports, so all rows "
            "run in the graph with ports, which is slower"
        )
    if part.refused_counts:
        notes.append(
            f"{name}: room for {part.refused_counts} adapters a row gives other bits, so rows have "
            f"room for {part.counts}"
        )
    return notes


def _check_finite(model: Model, report: Progress) -> None:
    try:
        model.check_finite(lambda done, total: report("checking weights", done, total))
    except NumericError as error:
        raise NonFiniteWeights(str(error)) from error


def _fuse(model: Model, fuse: Sequence[tuple[Path, float]]) -> tuple[Model, list[FusedAdapter]]:
    """The model with the adapters merged into its weights, from the pristine ones."""
    adapters, merged = [], []
    for path, scale in fuse:
        deltas = read_adapter(path, model)
        merged += scaled(deltas, scale)
        digest = sha256_file(path)
        adapters.append(
            FusedAdapter(name=Path(path).stem, sha256=digest, scale=scale, keys=len(deltas))
        )
    return (fuse_model(model, merged) if merged else model), adapters


def _source(model: Model, size: tuple[int, int], plans: dict[str, planning.Plan]) -> Source:
    unet, vae = model.config("unet"), model.config("vae_decoder")
    names = [f"tokenizer_{index + 1}" for index in range(model.tokenizer_count)]
    return Source(
        name=model.path.stem if model.path.is_file() else model.path.resolve().name,
        kind=model.kind,
        digests={name: plan.source_digest for name, plan in plans.items()},
        scheduler=model.scheduler_config,
        text_encoders=[name for name in model.components if name.startswith("text_encoder")],
        tokenizers=["tokenizer", *names[1:]],
        added_conditions=["text_embeds", "time_ids"] if unet.get("addition_embed_type") else [],
        latent_channels=vae.get("latent_channels", 4),
        vae_factor=planning.vae_factor(model),
        default_size=size,
        force_zeros_for_empty_prompt=bool(model.settings.get("force_zeros_for_empty_prompt")),
    )


def _copy_tokenizers(model: Model, names: Sequence[str], folder: Path) -> list[Artefact]:
    """Copy the files of the tokenizers, which the runtime needs besides the networks."""
    files = []
    for index, name in enumerate(names):
        (folder / name).mkdir()
        for path in sorted(model.tokenizer_folder(index).iterdir()):
            if path.name in TOKENIZER_FILES:
                shutil.copyfile(path, folder / name / path.name)
                files.append(components.artefact(folder, f"{name}/{path.name}"))
    return files


def _manifest(
    options: Options,
    size: tuple[int, int],
    built: dict[str, components.Built],
    files: list[Artefact],
    source: Source,
    adapters: list[FusedAdapter],
) -> Manifest:
    low, best, high = options.batch
    return Manifest(
        heatsink_version=environment.version(),
        backend=options.chosen.name,
        libraries=environment.libraries(),
        device=environment.processor(),
        identity=environment.identity(),
        source=source,
        shapes=Shapes(
            batch=Range(min=low, opt=best, max=high),
            height=Range(min=size[0], opt=size[0], max=size[0]),
            width=Range(min=size[1], opt=size[1], max=size[1]),
        ),
        components={name: b.component for name, b in built.items()},
        files=files,
        precisions={name: b.component.precision for name, b in built.items()},
        ports=_ports(options, built),
        adapters=adapters,
        exactness=Exactness(
            mode="strict" if options.strict else "fast",
            components={name: b.known for name, b in built.items()},
        ),
        preflight={name: b.preflight for name, b in built.items()},
    )


def _ports(options: Options, built: dict[str, components.Built]) -> Ports:
    if options.adapters is None:
        return Ports(controlnet=bool(options.controlnets))
    slots, rank = options.adapters
    return Ports(
        adapter_slots=slots, adapter_rank=rank, controlnet=bool(options.controlnets),
        which=options.ports, table=port_table.TABLE,
        components={name: b.ported for name, b in built.items() if b.ported is not None},
    )  # fmt: skip
