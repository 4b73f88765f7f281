"""An engine with adapter ports: what is built, what is refused, and which graph runs which rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import heatsink
from heatsink.export import exactness
from heatsink.export.build import Options, build
from heatsink.export.manifest import FILE_NAME, Manifest, read_manifest
from heatsink.export.opening import open_engine
from heatsink.export.port_table import TABLE, read_table
from heatsink.export.ported import layouts
from heatsink.runtime.adapter_delta import AdapterDelta, fuse_model
from heatsink.runtime.adapter_targets import Targets
from heatsink.runtime.adapter_write import write_adapter
from heatsink.runtime.errors import AdapterError, EngineMismatch, InvalidRequest, NotBuilt
from heatsink.runtime.graph.components import wrap
from heatsink.runtime.model import Model

PARTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
PORTED = ["text_encoder", "unet"]
OPTIONS = Options(backend="onnxruntime", batch=(1, 2, 4), adapters=(3, 4))


def adapter(targets: Targets, seed: int) -> list[AdapterDelta]:
    """Rank 3 on every linear and convolution of the UNet and the text encoder."""
    draw = torch.Generator().manual_seed(seed)
    return [
        AdapterDelta(
            component,
            path,
            torch.randn(3, *shape[1:], generator=draw) / 10,
            torch.randn(shape[0], 3, generator=draw) / 10,
            0.5,
        )
        for component in PORTED
        for path, shape in targets.shapes[component].items()
    ]


@pytest.fixture
def engine(ported: Path, targets: Targets) -> Any:
    """Opened, with three adapters in slots of their own."""
    opened: Any = heatsink.load(ported, threads=1)
    for number in range(3):
        opened.add_adapter(f"style {number}", adapter(targets, number))
    opened.bank.acquire(*({f"style {n}": 1.0} for n in range(3))).wait()
    return opened


def rows_of(ported: Path, name: str, count: int) -> dict[str, Any]:
    specs = read_manifest(ported).components[name].inputs
    return exactness.probe(specs, count, 5)


def mixed(rows: dict[str, Any], mixes: list[list[tuple[int, float]]]) -> dict[str, Any]:
    width = max(map(len, mixes))
    slots = np.full((len(mixes), width), -1, np.int64)
    scales = np.zeros((len(mixes), width), np.float32)
    for row, own in enumerate(mixes):
        for column, (slot, scale) in enumerate(own):
            slots[row, column], scales[row, column] = slot, scale
    return {**rows, "adapter_slots": slots, "adapter_scales": scales}


class Counting:
    """A component's session that notes its runs."""

    def __init__(self, session: Any) -> None:
        self.session, self.name = session, session.name
        self.rows: list[int] = []

    def run(self, inputs: Any) -> Any:
        self.rows.append(len(next(iter(inputs.values()))))
        return self.session.run(inputs)


# What is built


def test_the_manifest_tells_the_ports(
    ported: Path, sd1_onnx_folder: Path, targets: Targets
) -> None:
    manifest = read_manifest(ported)
    ports = manifest.ports
    assert (ports.adapter_slots, ports.adapter_rank, ports.which) == (3, 4, "all")
    assert list(ports.components) == PORTED
    for name, part in ports.components.items():
        assert part.twin
        assert part.counts == [1, 2, 4]
        assert part.parity.max_abs <= part.parity.allowed
        assert part.known.buckets == manifest.exactness.components[name].buckets
        own = manifest.components[name]
        assert [spec.name for spec in part.inputs][: len(own.inputs)] == [
            spec.name for spec in own.inputs
        ]
        assert part.graph in {artefact.path for artefact in own.artefacts}
    table, read = read_table(ported, ports.table)
    assert ports.table == TABLE in {artefact.path for artefact in manifest.files}
    assert read == targets
    assert sorted(table["unet"].places()) == sorted(targets.shapes["unet"])
    plain = read_manifest(sd1_onnx_folder)
    assert manifest.digest != plain.digest
    assert plain.ports.components == {}


def test_the_weights_are_on_disk_once(ported: Path) -> None:
    manifest = read_manifest(ported)
    for name in PORTED:
        assert not (ported / f"{name}_ports.onnx.data").exists()
        graph = onnx.load(str(ported / f"{name}_ports.onnx"), load_external_data=False).graph
        where = {e.value for i in graph.initializer for e in i.external_data if e.key == "location"}
        assert where == {f"{name}.onnx.data"}
        cost = manifest.preflight[name]
        assert cost.disk_bytes_measured is not None
        assert cost.disk_bytes_predicted is not None
        assert cost.disk_bytes_measured <= cost.disk_bytes_predicted
        shared = (ported / f"{name}.onnx.data").stat().st_size
        assert cost.disk_bytes_measured < shared + (2 << 20)


@pytest.mark.usefixtures("no_building")
def test_building_again_takes_all_over(tiny_sd1: Path, ported: Path, tmp_path: Path) -> None:
    report = build(tiny_sd1, tmp_path / "again", OPTIONS, reuse=[ported])
    assert report.reused == PARTS
    assert report.manifest.digest == read_manifest(ported).digest
    files = {path.name: path.read_bytes() for path in ported.iterdir() if path.is_file()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir() if p.is_file()} == files


@pytest.mark.parametrize(
    ("options", "built"),
    [
        (Options(backend="onnxruntime", batch=(1, 2, 4)), "text_encoder"),
        (Options(backend="onnxruntime", batch=(1, 2, 4), adapters=(3, 5)), "text_encoder"),
        (Options(backend="onnxruntime", batch=(1, 2, 4), adapters=(2, 4)), "text_encoder"),
        # A text encoder has linears only, so its ports are the same.
        (Options(backend="onnxruntime", batch=(1, 2, 4), adapters=(3, 4), ports="linear"), "unet"),
    ],
)
@pytest.mark.usefixtures("no_building")
def test_other_ports_are_built_anew(
    tiny_sd1: Path, ported: Path, tmp_path: Path, options: Options, built: str
) -> None:
    with pytest.raises(AssertionError, match=f"^{built}$"):
        build(tiny_sd1, tmp_path / "engine", options, reuse=[ported])


def test_which_layers_get_ports(tiny_sd1: Path, targets: Targets) -> None:
    model = Model.open(tiny_sd1)
    found = {
        which: layouts(model, targets, (2, 3), which) for which in ("all", "linear", "attention")
    }
    assert layouts(model, targets, None, "all") == {}
    for name in PORTED:
        paths = {which: set(table[name].places()) for which, table in found.items()}
        shapes = targets.shapes[name]
        assert paths["all"] == set(shapes)
        assert paths["linear"] == {path for path, shape in shapes.items() if len(shape) == 2}
        assert paths["attention"] < paths["linear"]
        ends = {path.rsplit(".", 1)[1] for path in paths["attention"]}
        unet = {"to_q", "to_k", "to_v", "0"}
        assert ends == (unet if name == "unet" else {"q_proj", "k_proj", "v_proj", "out_proj"})


# Which graph runs which rows

MIXES: list[list[tuple[int, float]]] = [
    [(0, 1.0)], [], [(2, 0.5), (1, -0.75)], [(1, 1.0)], [], [(0, 0.25), (1, 0.5), (2, 2.0)], [],
]  # fmt: skip


@pytest.mark.parametrize("name", PORTED)
def test_one_batch_is_as_many_batches_of_one(name: str, engine: Any, ported: Path) -> None:
    component = engine._components[name]
    rows = rows_of(ported, name, len(MIXES))
    together = component(mixed(rows, MIXES))
    plain = component(rows)
    for row, mix in enumerate(MIXES):
        one = {key: value[row : row + 1] for key, value in rows.items()}
        alone = component(mixed(one, [mix]) if mix else one)
        for output, values in together.items():
            assert values[row].tobytes() == alone[output][0].tobytes()
            assert (values[row].tobytes() == plain[output][row].tobytes()) == (not mix)


@pytest.mark.parametrize("name", PORTED)
def test_rows_are_those_of_merged_weights(
    name: str, engine: Any, ported: Path, tiny_sd1: Path, targets: Targets
) -> None:
    rows = rows_of(ported, name, 1)
    numbers = {int(info.slot): int(key.split()[1]) for key, info in engine.adapters.items()}
    deltas = [
        AdapterDelta(d.component, d.module_path, d.a, d.b, d.scale * weight)
        for slot, weight in MIXES[2]
        for d in adapter(targets, numbers[slot])
    ]
    model = fuse_model(Model.open(tiny_sd1), deltas)
    module = wrap(name, model.load_module(name, torch.float64), "last").eval()
    given = [torch.from_numpy(value) for value in rows.values()]
    with torch.inference_mode():
        (wanted,) = module(*(x.double() if x.is_floating_point() else x for x in given))
    (found,) = engine._components[name](mixed(rows, MIXES[2:3])).values()
    (plain,) = engine._components[name](rows).values()
    assert np.abs(found - wanted.numpy()).max() < 1e-4 * np.abs(plain - found).max()


def test_runs_without_adapters_have_no_ports(ported: Path, engine: Any) -> None:
    component = engine._components["unet"]
    assert component._session is None
    rows = rows_of(ported, "unet", 7)
    component(rows)
    # Rows without adapters open nothing.
    assert component._session is None
    one = [[], [], [], [(1, 1.0)], [], [], []]
    # What is run for the first time is checked first.
    for mixes in (MIXES, one):
        component(mixed(rows, mixes))
    component._session = with_ports = Counting(component._session)
    component._twin._session = without = Counting(component._twin._session)
    component(mixed(rows, one))
    # Seven rows: the one with an adapter is among the first four.
    assert with_ports.rows == [4]
    assert without.rows == [2, 1]
    component(mixed(rows, MIXES))
    assert with_ports.rows == [4, 4]
    assert without.rows == [2, 1, 2, 1]


def test_a_graph_whose_twin_differs_runs_all_rows(ported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ported, tmp_path / "engine"))

    def change(raw: dict[str, Any]) -> None:
        raw["ports"]["components"]["unet"]["twin"] = False

    edit(folder, change)
    rows = rows_of(folder, "unet", 3)
    component: Any = heatsink.load(folder, threads=1)._components["unet"]
    # It was checked when it was opened.
    assert component._session is not None
    component._session = with_ports = Counting(component._session)
    found = component(rows)["out"]
    assert with_ports.rows[-2:] == [2, 1]
    wanted = heatsink.load(ported, threads=1)._components["unet"](rows)["out"]
    assert found.tobytes() == wanted.tobytes()


# What is refused


def edit(folder: Path, change: Any) -> None:
    raw = json.loads((folder / FILE_NAME).read_text())
    change(raw)
    del raw["digest"]
    raw["digest"] = Manifest.model_validate(raw).digest
    (folder / FILE_NAME).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"adapter_slots": np.zeros((2, 1), np.int64)}, InvalidRequest, "go together"),
        (
            {
                "adapter_slots": np.zeros((2, 1), np.int64),
                "adapter_scales": np.zeros((2, 2), np.float32),
            },
            InvalidRequest,
            r"of shape \(2, n\), got \(2, 1\) and \(2, 2\)",
        ),
        (
            {
                "adapter_slots": np.full((2, 1), 3, np.int64),
                "adapter_scales": np.zeros((2, 1), np.float32),
            },
            InvalidRequest,
            "slots below 3, got 3",
        ),
        (
            {
                "adapter_slots": np.zeros((2, 5), np.int64),
                "adapter_scales": np.zeros((2, 5), np.float32),
            },
            NotBuilt,
            "a row has 5 adapters, this engine has room for 4",
        ),
    ],
)
def test_inputs_that_don_t_fit_are_refused(
    engine: Any, ported: Path, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine._components["unet"]({**rows_of(ported, "unet", 2), **inputs})


def test_another_answer_with_adapters_refuses_the_bucket(
    ported: Path, tmp_path: Path, targets: Targets
) -> None:
    folder = Path(shutil.copytree(ported, tmp_path / "engine"))

    def change(raw: dict[str, Any]) -> None:
        raw["ports"]["components"]["unet"]["known"]["answers"][3] = "0" * 16

    edit(folder, change)
    component = open_engine(folder, threads=1)._components["unet"]
    component(mixed(rows_of(folder, "unet", 1), [[(0, 1.0)]]))
    # Row 3 of the probe has two adapters.
    component(mixed(rows_of(folder, "unet", 4), [[(0, 1.0)]] * 4))
    with pytest.raises(EngineMismatch, match=r"unet with adapters: batch 4 .*rows \[3\]"):
        component(mixed(rows_of(folder, "unet", 4), [[(0, 1.0), (1, 1.0)]] * 4))


@pytest.mark.parametrize("room", [1, 2, 4])
def test_every_room_is_checked_before_its_first_use(ported: Path, room: int) -> None:
    class Spoiled(Counting):
        def run(self, inputs: Any) -> Any:
            found = super().run(inputs)
            if inputs["adapter_slots"].shape[1] == room:
                found["out"] = np.nextafter(found["out"], np.float32(np.inf))
            return found

    component: Any = open_engine(ported, threads=1)._components["unet"]
    component._session = Spoiled(component._open())
    rows = rows_of(ported, "unet", 2)
    for width in (4, 1, 2):
        mix = [(slot % 3, 1.0) for slot in range(width)]
        if width == room:
            match = f"unet with adapters: batch 2 with room for {room} a row"
            with pytest.raises(EngineMismatch, match=match):
                component(mixed(rows, [mix] * 2))
        else:
            component(mixed(rows, [mix] * 2))
            component._session.rows.clear()
            component(mixed(rows, [mix] * 2))
            # Once is enough.
            assert component._session.rows == [2]


def test_a_damaged_table_is_refused(ported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ported, tmp_path / "engine"))
    (folder / TABLE).write_text("{}")
    with pytest.raises(EngineMismatch, match=TABLE):
        heatsink.load(folder)
    with pytest.raises(EngineMismatch, match=TABLE):
        heatsink.load(folder, verify=False)


def test_weights_of_both_graphs_are_checked(ported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ported, tmp_path / "engine"))
    path = folder / "unet_ports.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineMismatch, match=r"unet_ports\.onnx"):
        heatsink.load(folder)


def test_a_file_is_read_with_the_engines_own_table(
    ported: Path, tmp_path: Path, targets: Targets
) -> None:
    write_adapter(tmp_path / "style.safetensors", adapter(targets, 1))
    engine = heatsink.load(ported, threads=1)
    info = engine.add_adapter("style", tmp_path / "style.safetensors")
    assert len(info.modules) == sum(len(targets.shapes[name]) for name in PORTED)
    tensors = load_file(tmp_path / "style.safetensors")
    tensors["unet.nowhere.lora_A.weight"] = torch.zeros(2, 4)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match="nowhere"):
        engine.add_adapter("bad", tmp_path / "bad.safetensors")
