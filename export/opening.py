"""Opens an engine folder: checks what it says of itself, then hands it to the runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from heatsink.export import environment, exactness
from heatsink.export.backends import Native, backend
from heatsink.export.manifest import Component, KnownAnswer, Manifest, read_manifest
from heatsink.export.opening_ports import PortedComponent
from heatsink.export.plan import DTYPES
from heatsink.export.port_table import read_table
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.backends.native_ports import BankView
from heatsink.runtime.backends.session import Array, Phased, Session
from heatsink.runtime.buckets import plan, run_rows
from heatsink.runtime.components import CONTROL_PREFIX
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.engine import Engine
from heatsink.runtime.errors import EngineMismatch
from heatsink.runtime.graph.denoisers import residuals_among
from heatsink.runtime.native.workspace import Workspace, Workspaces
from heatsink.runtime.port_layout import PortLayout
from heatsink.runtime.schedule import ScheduleConfig
from heatsink.runtime.spec import EngineSpec
from heatsink.runtime.text import Tokenizer

Progress = Callable[[str, int, int], None]
REBUILD = "build it again with `heatsink build MODEL -o ENGINE`"


class OpenComponent:
    """A component that runs any number of rows in the buckets its known answer vouches for.

    A bucket is checked against the known answer before its first use; until then it is not trusted.
    """

    def __init__(
        self,
        session: Session,
        component: Component,
        known: KnownAnswer,
        planned: Callable[[int, Sequence[int]], list[int]] = plan,
        hint: str = "",
    ) -> None:
        self._planned, self._hint = planned, hint
        self._session, self._component, self._known = session, component, known
        self._checked: set[int] = set()

    @property
    def buckets(self) -> list[int]:
        """The batch sizes it runs."""
        return self._known.buckets

    def check(self, bucket: int) -> None:
        """Run the known answer in this bucket, once.

        Raises:
            EngineMismatch: the answer differs from the one at build time.
        """
        if bucket not in self._checked and self._known.answers:
            exactness.check(self._session, self._component.inputs, self._known, bucket, self._hint)
        self._checked.add(bucket)

    def check_first(self) -> None:
        """Check the smallest bucket."""
        self.check(min(self._known.buckets))

    def prepare(self, inputs: Mapping[str, Array], timesteps: Sequence[Array]) -> None:
        """Compute ahead what a request and a schedule decide, where the backend keeps it."""
        if not isinstance(self._session, Phased):
            return
        # What is checked later would forget what is prepared now.
        for bucket in self._planned(len(timesteps), self._known.buckets):
            self.check(bucket)
        self._session.prepare(inputs, timesteps)

    def forget(self) -> None:
        """Let go of what the backend keeps of earlier runs."""
        if isinstance(self._session, Phased):
            self._session.forget()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the rows of `inputs` and return the outputs' rows, in order."""
        return run_rows(self._session, inputs, self._known.buckets, self.check, self._planned)


def check_files(folder: Path, manifest: Manifest, progress: Progress | None = None) -> None:
    """Compare every file that the manifest vouches for, by size and SHA-256.

    `progress` is called with ("checking files", bytes read, bytes in all).

    Raises:
        EngineMismatch: names the first file that is missing or differs.
    """
    total, done = sum(artefact.bytes for artefact in manifest.artefacts()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        if progress:
            progress("checking files", done, total)

    for artefact in manifest.artefacts():
        path = folder / artefact.path
        if not path.is_file():
            raise EngineMismatch(f"{folder} is incomplete: {artefact.path} is missing; {REBUILD}")
        size = path.stat().st_size
        if size != artefact.bytes:
            raise EngineMismatch(
                f"{folder} is damaged: {artefact.path} has {size} bytes, the manifest says "
                f"{artefact.bytes}; {REBUILD}"
            )
        if sha256_file(path, count) != artefact.sha256:
            raise EngineMismatch(
                f"{folder} is damaged: {artefact.path} has another SHA-256 than the manifest says; "
                f"{REBUILD}"
            )


def open_session(
    manifest: Manifest,
    folder: Path,
    name: str,
    *,
    threads: int = 0,
    ported: bool = False,
    workspace: Workspace | None = None,
    bank: BankView | None = None,
) -> Session:
    """Open one component through the manifest's backend.

    Args:
        manifest: of the engine.
        folder: of the engine.
        name: of the component.
        threads: of the CPU backend; 0 lets it choose.
        ported: its graph with adapter ports.
        workspace: memory that components share which run one after the other.
        bank: that a native graph with ports reads; none: every run brings one along.

    Raises:
        NotBuilt: this version can't run that backend.
    """
    part = manifest.ports.components[name] if ported else manifest.components[name]
    known = manifest.exactness.components[name]
    if ported and bank is None:
        bank = BankView(read_table(folder, manifest.ports.table)[0][name])
    return backend(manifest.backend).open(
        name,
        folder / part.graph,
        largest=max(known.buckets),
        threads=threads,
        workspace=workspace,
        bank=bank,
    )


def describe(folder: Path, manifest: Manifest) -> EngineSpec:
    """What the runtime must know of the engine besides its components."""
    source, shapes = manifest.source, manifest.shapes
    inputs = {spec.name: spec for spec in manifest.components["unet"].inputs}
    return EngineSpec(
        name=source.name,
        digest=manifest.digest,
        text_encoders=source.text_encoders,
        tokenizers=[Tokenizer(folder / path) for path in source.tokenizers],
        schedule=ScheduleConfig.from_diffusers(source.scheduler),
        latent_channels=source.latent_channels,
        vae_factor=source.vae_factor,
        default_size=source.default_size,
        heights=(shapes.height.min, shapes.height.max),
        widths=(shapes.width.min, shapes.width.max),
        zero_empty_negative=source.force_zeros_for_empty_prompt,
        adapters={adapter.name: adapter.scale for adapter in manifest.adapters},
        controlnets=[
            name.removeprefix(CONTROL_PREFIX)
            for name in manifest.components
            if name.startswith(CONTROL_PREFIX)
        ],
        residuals={
            name: tuple(int(size) for size in inputs[name].shape[1:])
            for name in residuals_among(inputs)
        },
        inpainting=inputs["sample"].shape[1] == 2 * source.latent_channels + 1,
        backend=manifest.backend,
    )


def open_engine(
    folder: str | Path,
    *,
    device: str = environment.CPU,
    threads: int = 0,
    verify: bool = True,
    progress: Progress | None = None,
) -> Engine:
    """Open an engine folder.

    Args:
        folder: as `heatsink build` wrote it.
        device: where it runs, which is where it was built to run.
        threads: of the CPU backend; 0 lets it choose.
        verify: compare every file with the manifest first. The known answers are always checked.
        progress: called with ("checking files", bytes, bytes in all), then with ("opening",
            components opened, components in all).

    Raises:
        EngineMismatch: no engine folder, another version, a damaged file, or other answers than
            when it was built (another library or processor).
        NotBuilt: its backend can't be opened by this version, or not on the device.
        MissingDependency: the backend's library is not installed.
    """
    environment.check_device(device)
    folder = Path(folder)
    manifest = read_manifest(folder)
    if verify:
        check_files(folder, manifest, progress)
    components: dict[str, OpenComponent | PortedComponent] = {}
    workspaces, runs = Workspaces(device), backend(manifest.backend).runs
    bank, layouts = _open_bank(folder, manifest)
    for done, (name, component) in enumerate(manifest.components.items()):
        workspace = workspaces.of(name)
        opener = functools.partial(
            open_session, manifest, folder, name, threads=threads, workspace=workspace
        )
        opened: OpenComponent | PortedComponent
        if bank is not None and name in layouts:
            opened = _open_ported(manifest, name, layouts[name], bank, opener)
        else:
            known = manifest.exactness.components[name]
            opened = OpenComponent(opener(), component, known, runs, _hint(manifest))
        opened.check_first()
        components[name] = opened
        if progress:
            progress("opening", done + 1, len(manifest.components))
    return Engine(describe(folder, manifest), components, bank)


def _open_ported(
    manifest: Manifest,
    name: str,
    layout: PortLayout,
    bank: AdapterBank,
    opener: Callable[..., Session],
) -> PortedComponent:
    """A component with ports: on the bank's memory, or with its tensors as inputs of every run."""
    component, ported = manifest.components[name], manifest.ports.components[name]
    known, runs = manifest.exactness.components[name], backend(manifest.backend).runs
    hint = _hint(manifest)
    tensors: Mapping[str, Tensor] = bank.tensors(name)
    open_ported: Callable[[], Session] = functools.partial(opener, ported=True)
    if manifest.backend == Native.name:
        view = BankView(layout, {**tensors, **bank.ranks(name)}, bank.content)
        twin = opener(ported=True, bank=view)
        tensors, open_ported = {}, lambda: twin
    else:
        twin = opener()
    return PortedComponent(
        OpenComponent(twin, component, known, runs, hint),
        component.inputs,
        ported,
        layout,
        tensors,
        open_ported,
        runs,
        hint,
    )


def _hint(manifest: Manifest) -> str:
    """What is another here than where the engine was built, for messages."""
    found = environment.differences(manifest.device, manifest.libraries, manifest.identity)
    return f" (it was built with {'; '.join(found)})" if found else ""


def _open_bank(
    folder: Path, manifest: Manifest
) -> tuple[AdapterBank | None, dict[str, PortLayout]]:
    """An empty bank for the engine's ports, and their layouts by component."""
    if not manifest.ports.components:
        return None, {}
    try:
        layouts, targets = read_table(folder, manifest.ports.table)
    # Only unverified files get here damaged.
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineMismatch(f"{folder}: {manifest.ports.table}: {error!r}; {REBUILD}") from error
    most = {name: max(part.counts) for name, part in manifest.ports.components.items()}
    # What ONNX Runtime takes is float32; a native graph reads the bank in its own dtype.
    (dtype,) = {DTYPES[manifest.precisions[name]] for name in layouts}
    bank = AdapterBank(list(layouts.values()), targets=targets, most=most, dtype=dtype)
    return bank, layouts
