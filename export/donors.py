"""Takes components over from engines that were built of the same parts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heatsink.export.components import Built
from heatsink.export.manifest import Artefact, Manifest, Preflight, read_manifest
from heatsink.export.plan import Plan
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import EngineMismatch


@dataclass(frozen=True)
class Donor:
    """An engine folder and what its manifest says."""

    folder: Path
    manifest: Manifest


def find_donors(out: Path, reuse: Sequence[str | Path]) -> tuple[list[Donor], list[str]]:
    """The engines that can be read, and a note for each of `reuse` that can't.

    The one at `out` is about to be replaced: there, damage is no news.
    """
    donors, notes = [], []
    for folder in (out, *map(Path, reuse)):
        try:
            donors.append(Donor(folder, read_manifest(folder)))
        except EngineMismatch as error:
            if folder != out:
                notes.append(f"nothing is reused from {folder}: {error}")
    return donors, notes


def take_over(donors: Sequence[Donor], plan: Plan, folder: Path, strict: bool) -> Built | None:
    """Copy a component into `folder` from the first donor that has it whole; None if none has.

    Equal is what has the same build key: weights, shapes, options, libraries, processor.
    """
    key = plan.key(strict)
    for donor in donors:
        component = donor.manifest.components.get(plan.name)
        if component is None or component.build_key != key:
            continue
        if not all(_whole(donor.folder, artefact) for artefact in component.artefacts):
            continue
        for artefact in component.artefacts:
            shutil.copyfile(donor.folder / artefact.path, folder / artefact.path)
        known = donor.manifest.exactness.components[plan.name]
        preflight = donor.manifest.preflight.get(plan.name, Preflight())
        ported = donor.manifest.ports.components.get(plan.name)
        return Built(component, known, preflight, ported)
    return None


def _whole(folder: Path, artefact: Artefact) -> bool:
    path = folder / artefact.path
    return path.is_file() and sha256_file(path) == artefact.sha256
