"""The GPU suite without a GPU: what it refuses, plans, and does about stages that misbehave."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from heatsink.benchmarks import gpu_tests, stages, suite, suite_program
from heatsink.benchmarks.suite import Context, Stage

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_suite.py"
CPU = {"device": "cpu", "driver": "absent", "versions": {}, "left_out": {}}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`bench/gpu_suite.py`, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("gpu_suite_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare(**variables: str) -> dict[str, str]:
    """An environment that has the package on no path, and no GPU."""
    hidden = {"PYTHONPATH", "PYTHONSAFEPATH"}
    kept = {name: text for name, text in os.environ.items() if name not in hidden}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **variables}


def python(name: str, code: str, weight: float = 1.0, needs: tuple[str, ...] = ()) -> Stage:
    """A stage of some lines of Python; `part` is its result's path, `seconds` what it may take."""

    def command(context: Context) -> list[str]:
        head = (
            "import json, os, sys, time, pathlib\n"
            f"part, seconds = pathlib.Path({str(context.part)!r}), {context.seconds}\n"
            "def keep(result):\n"
            "    other = part.with_suffix('.new')\n"
            "    other.write_text(json.dumps(result))\n"
            "    other.replace(part)\n"
        )
        return [sys.executable, "-c", head + code]

    return Stage(name, f"the stage {name}", weight, command, needs)


def run(
    folder: Path, *chosen: Stage, seconds: float = 60.0, missing: dict[str, str] | None = None
) -> list[suite.Outcome]:
    return suite.run_stages(
        chosen,
        seconds=seconds,
        root=folder,
        folder=folder / "results",
        environment={"device": "none", "driver": "none"},
        missing=missing or {},
    )


def result(folder: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results" / f"{name}.json").read_text())
    return document


def test_each_result_is_written_with_what_it_was_measured_on(tmp_path: Path) -> None:
    outcomes = run(tmp_path, python("a", "keep({'x': 1}); print('said')"), python("b", "keep(2)"))
    assert [(o.stage, o.state) for o in outcomes] == [("a", "done"), ("b", "done")]
    first = result(tmp_path, "a")
    assert first["result"] == {"x": 1}
    assert first["environment"] == {"device": "none", "driver": "none"}
    assert first["output_tail"] == "said\n"
    assert first["what"] == "the stage a"
    assert result(tmp_path, "b")["result"] == 2


def test_a_stage_that_crashes_leaves_the_others_alone(tmp_path: Path) -> None:
    crash = python("crash", "keep('half'); os.abort()")
    raises = python("raises", "raise RuntimeError('the reason')")
    outcomes = run(tmp_path, crash, raises, python("after", "keep('whole')"))
    assert [o.state for o in outcomes] == ["failed", "failed", "done"]
    assert result(tmp_path, "crash")["result"] == "half"
    assert result(tmp_path, "crash")["reason"] == f"exit code {-signal.SIGABRT}"
    assert "the reason" in result(tmp_path, "raises")["output_tail"]
    assert result(tmp_path, "after")["result"] == "whole"


def test_a_program_that_is_not_there_is_a_failure_of_its_stage(tmp_path: Path) -> None:
    absent = Stage("absent", "nothing", 1.0, lambda context: [str(tmp_path / "no-such-program")])
    outcomes = run(tmp_path, absent, python("after", "keep(1)"))
    assert [o.state for o in outcomes] == ["failed", "done"]
    assert "no-such-program" in outcomes[0].reason


def test_a_stage_that_overruns_its_share_is_stopped_and_says_so(tmp_path: Path) -> None:
    begun = time.monotonic()
    slow = python("slow", "keep('begun'); time.sleep(600)")
    outcomes = run(tmp_path, slow, python("after", "keep('whole')"), seconds=6)
    assert time.monotonic() - begun < 30
    assert [o.state for o in outcomes] == ["stopped", "done"]
    document = result(tmp_path, "slow")
    assert (document["state"], document["result"]) == ("stopped", "begun")
    assert document["reason"] == "its share of 3 s was up"


def test_what_a_stopped_stage_started_is_ended_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    run(tmp_path, python("parent", code), seconds=3)
    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{pid.read_text()}/cmdline").exists():
        if not Path(f"/proc/{pid.read_text()}/cmdline").read_bytes():
            break  # a zombie that nobody has waited for
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_part_is_in_the_file_while_the_stage_runs(tmp_path: Path) -> None:
    seen = tmp_path / "results" / "watched.json"
    code = f"""
keep('part')
until = time.monotonic() + 30
while time.monotonic() < until:
    text = pathlib.Path({str(seen)!r}).read_text()
    if json.loads(text)['result'] == 'part':
        keep(['seen', json.loads(text)['state']])
        break
    time.sleep(0.05)
"""
    run(tmp_path, python("watched", code))
    assert result(tmp_path, "watched")["result"] == ["seen", "running"]


def test_time_that_is_left_goes_to_later_stages(tmp_path: Path) -> None:
    quick, later = python("quick", "pass", 3.0), python("later", "keep(seconds)", 1.0)
    assert suite.shares([quick, later], 100) == [75, 25]
    run(tmp_path, quick, later, seconds=100)
    assert result(tmp_path, "quick")["limit_s"] == 75
    assert result(tmp_path, "later")["limit_s"] > 80
    assert result(tmp_path, "later")["result"] < result(tmp_path, "later")["limit_s"]


def test_what_lacks_a_module_is_left_out_with_the_reason(tmp_path: Path) -> None:
    stage = python("wants", "keep(1)", needs=("numpy", "triton"))
    outcomes = run(tmp_path, stage, missing={"triton": "No module named 'triton'"})
    assert [o.state for o in outcomes] == ["left out"]
    assert result(tmp_path, "wants")["reason"] == "triton: No module named 'triton'"
    assert result(tmp_path, "wants")["result"] is None


def test_an_interrupted_suite_ends_its_stage_and_writes_what_there_is(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from heatsink.benchmarks import suite
def command(context):
    part = str(context.part)
    code = f"import pathlib, time; pathlib.Path({{part!r}}).write_text('7'); time.sleep(600)"
    return [sys.executable, "-c", code]
suite.interruptible()
folder = pathlib.Path({str(tmp_path)!r})
suite.run_stages([suite.Stage("long", "", 1.0, command)], seconds=600, root=folder,
    folder=folder / "results", environment={{}}, missing={{}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    path = tmp_path / "results" / "long.json"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and json.loads(path.read_text())["result"] == 7:
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    document = json.loads(path.read_text())
    assert (document["state"], document["result"]) == ("stopped", 7)
    assert document["reason"] == "the suite was interrupted"


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=bare(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    message = "gpu_suite: expected a CUDA device, found none (--dry-run needs none)\n"
    assert done.stderr == message
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_what_would_be_done(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--only", "tuning", "--only", "kernels"]
    done = subprocess.run(
        command, cwd=tmp_path, env=bare(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "device: cpu, driver" in done.stdout
    assert "sm_90: " in done.stdout
    assert "silu_mul transformer-4096x5632-bf16" in done.stdout
    assert "tests: " not in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"only": ["paint"]},
            "--only: expected one of tests, tuning, kernels, lora, latency, got 'paint'",
        ),
        ({"seconds": 0.0}, "--seconds: expected more than 0, got 0"),
        ({"seconds": float("nan")}, "--seconds: expected more than 0, got nan"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {"root": ROOT, "out": tmp_path, "seconds": 10.0, **changes}
    assert suite_program.run(**fields) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_pytorch_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no PyTorch here')\n")
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")
    assert suite_program.run(root=ROOT, out=tmp_path, seconds=10.0) == 2
    assert "expected PyTorch, got: ImportError: no PyTorch here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "code"), [(["done", "left out"], 0), (["done", "failed"], 1), (["stopped"], 1)]
)
def test_the_exit_code_tells_whether_all_ended_well(
    states: list[str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def outcomes(*args: Any, **options: Any) -> list[suite.Outcome]:
        return [suite.Outcome("a", state, "", 0.0) for state in states]

    monkeypatch.setattr(suite_program, "run_stages", outcomes)
    monkeypatch.setattr(suite_program, "interruptible", lambda: None)
    report = {**CPU, "device": "NVIDIA H200", "capability": "sm_90", "left_out": {"rich": "no"}}
    monkeypatch.setattr(suite_program, "probe", lambda root: report)
    assert suite_program.run(root=ROOT, out=tmp_path, seconds=10.0) == code
    written = json.loads((tmp_path / "nvidia_h200" / "environment.json").read_text())
    assert written["left_out"] == {"rich": "no"}


def test_the_registered_stages_are_distinct_and_named_as_files() -> None:
    names = [stage.name for stage in stages.STAGES]
    assert names == ["tests", "tuning", "kernels", "lora", "latency"]
    assert set(stages.WORKERS) == set(names)
    assert all(stage.weight > 0 for stage in stages.STAGES)


def test_only_files_that_mark_a_test_are_given_to_pytest(tmp_path: Path) -> None:
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    marked = tmp_path / "tests" / "deep" / "test_a.py"
    marked.write_text("import pytest\n@pytest." + "mark.gpu\ndef test(): pass\n")
    (tmp_path / "tests" / "test_b.py").write_text("import absent\n")
    assert gpu_tests.files(tmp_path) == [marked]
    found = {path.name for path in gpu_tests.files(ROOT)}
    assert "test_silu_mul.py" in found


def test_tests_are_recorded_as_they_end(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: wants a GPU\n")
    (tmp_path / "tests" / "test_broken.py").write_text("import absent  # mark.gpu\n")
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "pytestmark = pytest." + "mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('why')\n"
    )
    stage = Stage("tests", "", 1.0, stages.worker_command("tests"))
    (outcome,) = suite.run_stages(
        [stage],
        seconds=60,
        root=tmp_path,
        folder=tmp_path / "results",
        environment={},
        missing={},
    )
    assert outcome.state == "failed"
    found = result(tmp_path, "tests")["result"]
    assert found["passed"] == 1
    assert [name.split("::")[1] for name in found["failed"]] == ["test_bad"]
    assert "assert 1 == 2" in next(iter(found["failed"].values()))
    assert "why" in next(iter(found["skipped"].values()))
    assert "absent" in next(iter(found["errors"].values()))
    assert not found["complete"]


@pytest.mark.parametrize(
    ("wheel", "usable"),
    [
        ("typer-0.15.0-py3-none-any.whl", True),
        ("six-1.16.0-py2.py3-none-any.whl", True),
        ("a-1-cp39-abi3-manylinux_2_17_x86_64.whl", True),
        (f"a-1-cp{sys.version_info[0]}{sys.version_info[1]}-cp311-linux_x86_64.whl", True),
        ("a-1-cp27-cp27m-linux_x86_64.whl", False),
        ("a-1-1build-cp27-cp27m-linux_x86_64.whl", False),
        ("a-1-py2-none-any.whl", False),
    ],
)
def test_wheels_are_used_where_they_fit(script: ModuleType, wheel: str, usable: bool) -> None:
    assert script.fits(wheel) is usable


def test_wheels_are_unpacked_and_their_modules_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, folder = tmp_path / "wheels", tmp_path / "unpacked"
    wheels.mkdir()
    folder.mkdir()
    for name in ("found_in_wheel-1-py3-none-any.whl", "old-1-cp27-cp27m-any.whl"):
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"{name.split('-')[0]}.py", "VALUE = 3\n")
    assert script.unpack(wheels, folder) == ["old-1-cp27-cp27m-any.whl"]
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "bench"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    script.use([folder])
    # Neither the checkout's `kernels` nor the script's neighbour of that name is in the way.
    assert not {str(ROOT), str(ROOT / "bench")} & set(sys.path)
    code = "import found_in_wheel, sys; print(found_in_wheel.VALUE, *sys.path, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    value, *path = done.stdout.splitlines()
    assert value == "3"
    assert {str(ROOT), ""}.isdisjoint(path)
    assert str(tmp_path) in path


def test_a_folder_of_wheels_that_is_not_there_is_refused(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--wheels", "no/such/folder"]) == 2
    assert "--wheels: expected a folder, got no/such/folder" in capsys.readouterr().err


BLOCKED = ("pydantic", "typer", "rich", "matplotlib", "PIL", "diffusers", "onnx", "pytest")


def test_the_stages_need_no_more_than_pytorch(tmp_path: Path) -> None:
    for name in BLOCKED:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    code = """
import importlib, json, sys
for name in ("suite_program", "stages", "kernels_run", "families", "environment"):
    importlib.import_module(f"heatsink.benchmarks.{name}")
import heatsink.tuning, heatsink.kernels.tune
from heatsink.benchmarks.environment import importable
print(json.dumps(importable()[1]))
"""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(tmp_path), *filter(None, before)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=bare(PYTHONPATH=path, PYTHONSAFEPATH="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left_out = json.loads(done.stdout)
    assert left_out["rich"] == "ImportError: rich is not here"
    assert {"pydantic", "typer", "matplotlib", "pytest"} <= set(left_out)
