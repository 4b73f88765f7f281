"""Engines of the native backend: their files, what of them is damaged, their precisions."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import heatsink
from heatsink.export import backends, components, environment, exactness
from heatsink.export.build import Options, build
from heatsink.export.manifest import FILE_NAME, read_manifest
from heatsink.export.opening import open_session
from heatsink.kernels import _native
from heatsink.runtime.backends.native import NativeSession, read_graph
from heatsink.runtime.errors import EngineMismatch, InvalidRequest, NotBuilt, ResourceError
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.workspace import Workspace

BATCH = (1, 2, 4)
NAMES = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


@pytest.fixture
def folder(sd1_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sd1_folder, tmp_path / "engine"))


@pytest.fixture(scope="module")
def half(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1 engine in bfloat16."""
    out = tmp_path_factory.mktemp("half") / "engine"
    build(tiny_sd1, out, Options(backend="torch", precision="bf16", batch=BATCH))
    return out


def test_the_fastest_backend_is_chosen_at_build_and_written_down(
    monkeypatch: pytest.MonkeyPatch, sd1_folder: Path
) -> None:
    for there, chosen in ((True, "torch"), (False, "onnxruntime")):
        monkeypatch.setattr(_native, "available", lambda there=there: there)
        assert backends.choose(backends.AUTO) == Options().chosen.name == chosen
        assert Options(backend="onnxruntime").chosen.name == "onnxruntime"
    assert read_manifest(sd1_folder).backend == "torch"


def test_a_folder_holds_graphs_and_their_weights(sd1_folder: Path) -> None:
    manifest = read_manifest(sd1_folder)
    for name in NAMES:
        component = manifest.components[name]
        files = {f"{name}.graph.json", f"{name}.safetensors", f"{name}.origins.json"}
        assert {artefact.path for artefact in component.artefacts} == files
        assert (component.graph, component.opset) == (f"{name}.graph.json", None)
        graph = read_graph(sd1_folder / component.graph, sd1_folder / f"{name}.safetensors")
        origins = json.loads((sd1_folder / component.origins).read_text())
        assert set(origins) == set(graph.weights)
        for weight, parts in graph.origins.items():
            assert json.loads(json.dumps([part.as_list() for part in parts])) == origins[weight]
        with safe_open(sd1_folder / f"{name}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(graph.weights)
        # Each bucket is allowed: the ops are row-exact.
        assert manifest.exactness.components[name].refused == []


def test_every_output_is_its_own_and_float32(half: Path) -> None:
    manifest = read_manifest(half)
    session = open_session(manifest, half, "unet", threads=1)
    values = exactness.probe(manifest.components["unet"].inputs, 2, 1)
    first = session.run(values)["out"]
    kept = first.copy()
    second = session.run({name: value[::-1].copy() for name, value in values.items()})["out"]
    assert first.dtype == np.float32
    assert np.array_equal(first, kept)
    assert np.array_equal(second[::-1], first)


def test_half_precision_is_half_the_weights_and_near(half: Path, sd1_folder: Path) -> None:
    assert set(read_manifest(half).precisions.values()) == {"bf16"}
    sizes = [(folder / "unet.safetensors").stat().st_size for folder in (half, sd1_folder)]
    assert sizes[0] < 0.6 * sizes[1]
    images = [
        np.asarray(
            heatsink.load(folder, threads=1).generate("a cat", steps=4).images[0], dtype=np.float64
        )
        for folder in (half, sd1_folder)
    ]
    error = float(np.mean((images[0] - images[1]) ** 2))
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 30


def test_known_answers_refuse_another_weight(folder: Path) -> None:
    graph = read_graph(folder / "unet.graph.json", folder / "unet.safetensors")
    name = max(graph.weights, key=lambda name: int(np.prod(graph.weights[name].shape)))
    path = folder / "unet.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    data[8 + length + start + 3] ^= 1 << 6
    path.write_bytes(data)
    with pytest.raises(EngineMismatch, match="unet: batch 1 does not give the known answer"):
        heatsink.load(folder, threads=1, verify=False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet.graph.json", lambda text: text[:100], "the graph is damaged"),
        (
            "unet.graph.json",
            lambda text: text.replace("heatsink.conv2d.default", "aten.system.default", 1),
            "the graph is damaged",
        ),
        ("unet.safetensors", lambda text: None, "is missing"),
        ("unet.graph.json", lambda text: None, "can't be read"),
    ],
)
def test_damaged_files_are_refused_unverified_too(
    folder: Path, name: str, change: Callable[[str], str | None], message: str
) -> None:
    path = folder / name
    changed = change(path.read_text("latin-1"))
    if changed is None:
        path.unlink()
    else:
        path.write_text(changed, "latin-1")
    with pytest.raises(EngineMismatch, match=message):
        heatsink.load(folder, threads=1, verify=False)


def test_another_machine_builds_anew(
    tiny_sd1: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(backend="torch", batch=BATCH)
    assert build(tiny_sd1, folder, options).reused == NAMES
    monkeypatch.setattr(environment, "processor", lambda: "another")

    def refuse(model: Any, plan: Any, *rest: Any) -> Any:
        raise LookupError(plan.name)

    monkeypatch.setattr(components, "build", refuse)
    with pytest.raises(LookupError, match="text_encoder"):
        build(tiny_sd1, folder, options)


def test_building_again_gives_the_same_bytes(
    tiny_sd1: Path, sd1_folder: Path, tmp_path: Path
) -> None:
    build(tiny_sd1, tmp_path / "again", Options(backend="torch", batch=BATCH))
    assert (tmp_path / "again" / FILE_NAME).read_bytes() == (sd1_folder / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (Options(backend="torch", precision="fp8"), NotBuilt, "'fp8' is not built yet for torch"),
        (Options(backend="torch", opset=23), InvalidRequest, "torch hold no ONNX files"),
        (Options(backend="onnxruntime", precision="bf16"), NotBuilt, "builds fp32"),
    ],
)
def test_what_can_t_be_built_is_refused(
    tiny_sd1: Path, tmp_path: Path, options: Options, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        build(tiny_sd1, tmp_path / "engine", options)
    assert list(tmp_path.iterdir()) == []


def test_a_session_refuses_other_inputs(sd1_folder: Path) -> None:
    session = open_session(read_manifest(sd1_folder), sd1_folder, "vae_decoder", threads=1)
    good = np.zeros((1, 4, 8, 8), np.float32)
    for given, message in (
        ({}, r"takes the inputs \['latents'\], got \[\]"),
        ({"latents": good, "more": good}, "more"),
        ({"latents": good[:, :3]}, "'latents' wants shape"),
        ({"latents": good.astype(np.int64)}, "wants torch.float32, got torch.int64"),
        ({"latents": good[:0]}, "at least 1 row"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            session.run(given)


def test_memory_that_does_not_suffice_is_told(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = read_graph(sd1_folder / "unet.graph.json", sd1_folder / "unet.safetensors")

    def fail(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setattr(PhasedComponent, "reserve", fail)
    with pytest.raises(ResourceError, match="to open unet for 4 rows; an engine with a smaller"):
        NativeSession("unet", graph, Workspace(), largest=4)


def test_threads_hold_while_a_component_runs(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = PhasedComponent.run

    def watch(self: PhasedComponent, *inputs: Any) -> Any:
        seen.append(torch.get_num_threads())
        return run(self, *inputs)

    monkeypatch.setattr(PhasedComponent, "run", watch)
    before = torch.get_num_threads()
    wanted = 2 if before == 1 else 1
    session = open_session(read_manifest(sd1_folder), sd1_folder, "vae_decoder", threads=wanted)
    session.run({"latents": np.zeros((1, 4, 8, 8), np.float32)})
    assert (seen, torch.get_num_threads()) == ([wanted], before)


def test_threads_are_set_while_no_other_call_runs(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace()
    told: list[int] = []
    session = open_session(
        read_manifest(sd1_folder), sd1_folder, "vae_decoder", threads=3, workspace=workspace
    )
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    latents = np.zeros((1, 4, 8, 8), np.float32)
    worker = threading.Thread(target=session.run, args=({"latents": latents},))
    with workspace.lock:
        worker.start()
        worker.join(0.3)
        assert worker.is_alive()
        assert told == []
    worker.join()
    assert told == [3, torch.get_num_threads()]


def test_a_refusal_says_what_is_another_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = read_manifest(folder).identity
    assert set(there) == {"instruction_set", "threads", "ops"}
    found = environment.differences("this", {"torch": "0"}, {**there, "threads": "77"})
    assert [text.split(":")[0] for text in found] == ["processor", "threads", "torch"]
    monkeypatch.setattr(environment, "identity", lambda: {**there, "threads": "3"})
    monkeypatch.setattr(exactness, "row_answers", lambda outputs: ["0" * 16] * 8)
    with pytest.raises(EngineMismatch, match=r"built with threads: \d+, here 3\)"):
        heatsink.load(folder, threads=1)
