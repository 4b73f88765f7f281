"""Bakes adapters into a copy of a model folder: the weights change in place, nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from heatsink.runtime.adapter_delta import AdapterDelta, fuse
from heatsink.runtime.errors import ModelError, NonFiniteWeights
from heatsink.runtime.model import Model
from heatsink.runtime.model_folder import read_json
from heatsink.runtime.weights import PICKLE_SUFFIXES, Weights

Progress = Callable[[str, int, int], None]
_LENGTH_BYTES = 8
_WEIGHTS = (".safetensors", ".bin.index.json", ".msgpack", ".h5", ".onnx", *PICKLE_SUFFIXES)


def bake(
    model: Model,
    deltas: Iterable[AdapterDelta],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Copy a model's folder into `folder` with the deltas of all adapters in its weights.

    A changed tensor is computed from the pristine one in fp32, rounded once to its stored dtype and
    written over the copy of its file, one tensor at a time; every other byte of the file stays.
    Of a changed component only the weight files that the model uses are copied: its other variants
    and formats would be the old weights. Hidden files are left out.

    Args:
        model: opened from a folder, pristine.
        deltas: of all adapters, scaled.
        folder: exists and is empty.
        progress: called with (what is being done, done, total).

    Raises:
        ModelError: the model is a single file.
        AdapterError: a delta doesn't fit.
        NonFiniteWeights: a weight would be NaN or infinite in its dtype.
        OSError: the folder can't be written.
    """
    report = progress or (lambda what, done, total: None)
    if not model.path.is_dir():
        raise ModelError(f"{model.path} is a single file; merging takes a model folder")
    deltas = list(deltas)
    touched = sorted({delta.component for delta in deltas})
    fused = {name: fuse(model.weights(name), deltas) for name in touched}
    used = {name: _files(model.weights(name)) for name in touched}
    _copy(model.path, folder, list(_copies(model.path, used)), report)
    changed = [
        (weights, name)
        for component, weights in fused.items()
        for name, entry in weights.entries.items()
        if entry is not model.weights(component).entries[name]
    ]
    for done, (weights, name) in enumerate(changed, 1):
        file, key = _place(model.weights(weights.component), name)
        _overwrite(folder / weights.component / file, key, weights, name)
        report("merging", done, len(changed))


def _copy(source: Path, folder: Path, paths: Sequence[Path], report: Progress) -> None:
    for done, path in enumerate(paths, 1):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # Links, as a download cache has, become files.
        shutil.copyfile(source / path, target)
        report("copying", done, len(paths))


def _files(weights: Weights) -> set[str]:
    return {_place(weights, name)[0] for name in weights}


def _place(weights: Weights, name: str) -> tuple[str, str]:
    """The file in the component's folder, and the key in it, that a tensor comes from."""
    file, _, key = weights.source(name).partition(".safetensors:")
    return f"{Path(file).name}.safetensors", key


def _copies(root: Path, used: Mapping[str, set[str]]) -> Iterator[Path]:
    """The files to copy, relative to `root`."""
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            relative = path.relative_to(root)
            component = relative.parts[0] if len(relative.parts) > 1 else ""
            old = component in used and _is_other_weights(path, used[component])
            if not file.startswith(".") and not old:
                yield relative


def _is_other_weights(path: Path, used: set[str]) -> bool:
    """Whether a changed component's file holds, or lists, weights that the model doesn't use."""
    if ".safetensors.index." in path.name:
        return set(read_json(path).get("weight_map", {}).values()) != used
    return path.name.endswith(_WEIGHTS) and path.name not in used


def _overwrite(file: Path, key: str, weights: Weights, name: str) -> None:
    value = weights[name].contiguous()
    wide = value.float() if value.dtype.itemsize == 1 else value
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteWeights(
            f"{weights.component}: merged, the weight {name} would hold NaN or infinity in"
            f" {value.dtype} ({weights.source(name)})"
        )
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
        start, end = json.loads(handle.read(length))[key]["data_offsets"]
        data = value.reshape(-1).view(torch.uint8).numpy().data
        # A copy of the file the tensor was read from: same dtype, same shape, same place.
        assert end - start == len(data)
        handle.seek(_LENGTH_BYTES + length + start)
        handle.write(data)
