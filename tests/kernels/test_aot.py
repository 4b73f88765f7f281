"""Every kernel compiled for every architecture, and what it uses of a processor; no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heatsink.kernels import _config, _workers, aot, catalog
from heatsink.kernels._compile import Binary, Job, source_of, triton_version
from heatsink.kernels._launch import ARCHS
from heatsink.kernels._op import Op
from heatsink.kernels._resources import Row, Table, over_limits, used
from heatsink.kernels._workers import Failure, compile_jobs
from heatsink.kernels.check import Report, check, identity, uses_of_all
from heatsink.kernels.errors import KernelError, MissingConfig

OPS = list(catalog.ops().values())
SILU = catalog.ops()["silu_mul"]
PEER = Path(__file__).parent / "triton_peer.py"


def smoke_jobs(arch: int = 90) -> list[Job]:
    """The jobs of one op's smoke cases."""
    return [job for job, _ in aot.jobs([SILU], [arch]).values()]


@pytest.fixture(scope="module")
def report() -> Report:
    """What CI compiles: for each architecture, cases that together reach every kernel."""
    return check(OPS, ARCHS)


def test_every_kernel_compiles_for_every_architecture(report: Report) -> None:
    assert report.problems == ()
    reached = {(verdict.job.kernel, verdict.job.arch) for verdict in report.verdicts}
    declared = {(k.name, arch) for op in OPS for k in op.kernels for arch in k.archs}
    assert reached == declared
    assert report.compiled == len(report.verdicts) >= len(declared)


def test_table_is_of_the_cases_there_are() -> None:
    table = Table.read()
    assert set(table.rows) == uses_of_all(OPS, ARCHS, table)


def test_what_spills_says_why() -> None:
    rows = Table.read().rows
    assert [name for name, row in rows.items() if row.spill_bytes and not row.reason] == []


def test_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    table = Table.read()
    assert table.rows
    table.write(tmp_path / "table.json")
    assert Table.read(tmp_path / "table.json") == table
    assert Table.read(tmp_path / "none.json") == Table("", {})


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `triton_peer.py` prints."""
    folder = tmp_path_factory.mktemp("peer")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    done = subprocess.run(
        [sys.executable, str(PEER), str(folder)],
        env={**environment, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_binaries_are_those_of_tritons_own_jit(peer: Any) -> None:
    compared = peer["compared"]
    assert {name: pair["ours"] for name, pair in compared.items()} == {
        name: pair["triton"] for name, pair in compared.items()
    }
    # Each launch asks for another binary: what is compared is not one and the same.
    assert len({pair["ours"] for pair in compared.values()}) == len(compared) == 9


def test_parameters_lie_where_the_binary_reads_them(peer: Any) -> None:
    for pair in peer["compared"].values():
        assert pair["planned"] == pair["found"]
    # float and int before pointers: the padding is there.
    assert [0, 8] in peer["compared"]["mixed sm_90"]["found"]
    assert [16, 8] in peer["compared"]["mixed sm_90"]["found"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", r"mixed: expected its plain parameters to be .*\['rows'\], got \[\]"),
        ("unknown", r"mixed: the launch gives \['WIDTH'\], not its parameters"),
        ("absent", "mixed: expected a value of few in the launch, got none"),
        ("constant", "mixed: expected a value of BLOCK in the launch, got none"),
    ],
)
def test_launches_that_the_function_does_not_take(peer: Any, name: str, text: str) -> None:
    with pytest.raises(KernelError, match=text):
        raise KernelError(peer["refused"][name])


def test_nothing_is_compiled_under_the_interpreter() -> None:
    with pytest.raises(KernelError, match=r"silu_mul: .* unset TRITON_INTERPRET"):
        source_of(smoke_jobs()[0])


def test_a_failure_names_op_case_and_architecture() -> None:
    def plan(config: Any, **inputs: Any) -> Any:
        out, (launch,) = SILU.plan(config, **inputs)
        return out, [dataclasses.replace(launch, constants={"BLOCK_R": 1, "BLOCK_W": 1000})]

    broken: Op = dataclasses.replace(SILU, plan=plan)
    (problem,) = check([broken], [90]).problems
    assert problem.startswith("silu_mul/transformer-4096x5632-bf16/silu_mul sm_90: ")
    assert "power of 2" in problem


def test_a_case_without_configuration_is_a_problem_of_its_own() -> None:
    nameless = dataclasses.replace(SILU, name="nameless")
    report = check([nameless, SILU], [90])
    assert [verdict.uses[0].op for verdict in report.verdicts] == ["silu_mul"]
    first, second = report.problems
    assert first.startswith(f"nameless/{SILU.cases[0].name} sm_90: nameless: expected a config")
    assert second == "nameless: silu_mul on sm_90: no smoke case reaches it"
    with pytest.raises(MissingConfig, match="nameless: expected a configuration"):
        aot.jobs([nameless], [90])


def test_a_kernel_that_no_smoke_case_reaches_is_told() -> None:
    other = dataclasses.replace(SILU.kernels[0], name="other", archs=(80,))
    wider = dataclasses.replace(SILU, kernels=(*SILU.kernels, other))
    assert aot.unreached([wider], [80, 90]) == ["silu_mul: other on sm_80"]
    assert aot.unreached(OPS, ARCHS) == []


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_workers, "_MAIN", "import sys; sys.exit('no such luck')")
    jobs = smoke_jobs()
    results = compile_jobs(jobs * 2, tmp_path)
    assert results == [Failure("the compiling process ended with 1: no such luck")] * 2


def test_bytes_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (compile_jobs(smoke_jobs(), folder)[0] for folder in folders)
    assert isinstance(first, Binary)
    assert first == second
    assert str(Path(aot.__file__).parent).encode() not in (folders[0] / first.file).read_bytes()


def test_what_is_recorded_is_not_compiled_again(tmp_path: Path) -> None:
    record = tmp_path / "deep" / "record.json"
    first = check([SILU], [80, 90], record=record)
    again = check([SILU], [80, 90], record=record)
    assert (first.compiled, again.compiled) == (2, 0)
    assert again.verdicts == first.verdicts
    # A problem is found in the record as well.
    low = Table(triton_version(), {name: Row(1, 0, 0) for name in first.table.rows})
    told = check([SILU], [80, 90], record=record, table=low)
    assert told.compiled == 0
    assert sum("registers: at most 1, got" in problem for problem in told.problems) == 2


def test_identity_follows_sources_launch_and_version() -> None:
    job = smoke_jobs()[0]
    changes: list[dict[str, Any]] = [{"arch": 80}, {"key": "x"}, {"fusion": False}]
    others = [identity(dataclasses.replace(job, **change), "3.9.0") for change in changes]
    assert len({identity(job, "3.9.0"), identity(job, "3.6.0"), *others}) == 5


def binary(**changes: Any) -> Binary:
    """A binary that fits everywhere."""
    fields: dict[str, Any] = {
        "file": "x.cubin", "sha256": "", "symbol": "_x_kernel", "shared": 0, "static_shared": 0,
        "warps": 4, "cooperative": False, "scratch": (0, 1), "registers": 32, "spill_bytes": 0,
        "triton": "3.9.0",
    }  # fmt: skip
    return Binary(**{**fields, **changes})


@pytest.mark.parametrize(
    ("arch", "changes", "problem"),
    [
        (80, {"shared": 163 * 1024}, ""),
        (80, {"shared": 163 * 1024 + 1}, "shared_bytes: at most 166912, got 166913"),
        (89, {"shared": 100 * 1024}, "shared_bytes: at most 101376, got 102400"),
        (90, {"shared": 227 * 1024, "static_shared": 1024}, ""),
        (90, {"shared": 227 * 1024, "static_shared": 1040}, "shared_bytes"),
        (120, {"shared": 227 * 1024}, "shared_bytes: at most 101376"),
        (90, {"registers": 255, "warps": 8}, ""),
        (90, {"registers": 129, "warps": 16}, "registers of a block: at most 65536, got 69632"),
        (90, {"registers": 256}, "registers: at most 255, got 256"),
    ],
)
def test_hard_limits(arch: int, changes: dict[str, Any], problem: str) -> None:
    told = over_limits(binary(**changes), arch)
    assert bool(told) == bool(problem)
    assert not problem or told[0].startswith(problem)


def test_worse_than_the_table_is_a_problem_and_better_is_none() -> None:
    table = Table("3.9.0", {"a": Row(40, 0, 1024), "b": Row(40, 16, 0, "measured faster so")})
    assert table.problems("a", Row(39, 0, 0)) == []
    assert table.problems("a", Row(41, 0, 2048)) == [
        "registers: at most 40, got 41",
        "shared_bytes: at most 1024, got 2048",
    ]
    assert table.problems("a", Row(40, 8, 0)) == [
        "spill_bytes: at most 0, got 8",
        "8 bytes are spilled and the table gives no reason",
    ]
    assert table.problems("b", Row(40, 16, 0)) == []
    assert table.problems("c", Row(1, 0, 0)) == ["expected a row in the table, got none"]


def test_another_version_of_triton_knows_hard_limits_alone() -> None:
    table = Table("0.0", dict.fromkeys(Table.read().rows, Row(1, 0, 0)))
    report = check([SILU], [90], table=table)
    assert report.problems == ()
    assert not report.compared


def test_update_keeps_reasons_and_drops_what_is_gone() -> None:
    table = Table("1", {"a": Row(9, 8, 0, "why"), "b": Row(1, 0, 0), "gone": Row(1, 0, 0)})
    new = table.updated("1", {"a": Row(8, 4, 0)}, known=["a", "b"])
    assert new == Table("1", {"b": Row(1, 0, 0), "a": Row(8, 4, 0, "why")})
    assert table.updated("2", {"a": Row(8, 0, 0)}, known=["a", "b"]).rows == {"a": Row(8, 0, 0)}


def test_used_counts_what_a_launch_asks_for() -> None:
    assert used(binary(shared=2048, static_shared=1024), 90) == Row(32, 0, 2048)
    assert used(binary(shared=2048, static_shared=1024), 80) == Row(32, 0, 3072)


def test_each_tuned_device_of_an_architecture_is_a_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = json.loads((_config.FOLDER / "default.json").read_text())["ops"]["silu_mul"]
    config = {"BLOCK_R": 4, "BLOCK_W": 2048, "warps": 8}
    for device, arch in (("a_device", 90), ("b_device", [80, 89])):
        entry = {"key": {"width": 5632, "arch": arch}, "config": config}
        text = json.dumps({"ops": {"silu_mul": [entry]}})
        (tmp_path / f"{device}.json").write_text(text)
    (tmp_path / "default.json").write_text(json.dumps({"ops": {"silu_mul": default}}))
    (tmp_path / "resources.json").write_text('{"triton": "", "rows": {}}')
    monkeypatch.setattr(_config, "FOLDER", tmp_path)
    # What was read from the real folder stays as it is.
    monkeypatch.setattr(_config, "_entries", _config._entries.__wrapped__)
    assert _config.targets(90) == [_config.Target("", 90), _config.Target("a_device", 90)]
    assert _config.targets(89) == [_config.Target("", 89), _config.Target("b_device", 89)]
    assert _config.targets(120) == [_config.Target("", 120)]
    launches = aot.launches_of(SILU, SILU.cases[0], 90)
    assert [launch.constants["BLOCK_W"] for launch in launches] == [
        default[0]["config"]["BLOCK_W"],
        2048,
    ]
    # Another form of the same kernel is a use of its own; a case without it has one.
    found = aot.jobs([SILU], [90], lambda op: op.cases)
    names = [str(use) for _, uses in found.values() for use in uses]
    assert [name for name in names if name.endswith("#2")] == [
        f"silu_mul/{SILU.cases[0].name}/silu_mul#2"
    ]


def test_architectures_are_named_as_nvidia_does() -> None:
    assert aot.parse_arch("sm_120") == 120
    with pytest.raises(ValueError, match=r"arch: expected one of sm_80, .* got 'sm_70'"):
        aot.parse_arch("sm_70")
