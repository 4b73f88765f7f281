"""Everything that wants a GPU, in one command, from a bare checkout: nothing is installed.

    python bench/gpu_suite.py --seconds 1500
    python bench/gpu_suite.py --seconds 500 --wheels DIR --out DIR

Environment, tests marked gpu, tuning, the kernels' benchmark, and what `heatsink.benchmarks.stages`
lists besides. Results go to bench/results/<device>/<stage>.json. Wants PyTorch with CUDA; what else
is not importable is listed as left out. Wheels in `--wheels` are unpacked beside the package.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fits(wheel: str) -> bool:
    """Whether a wheel's file name says that this Python can load it."""
    python, abi, _ = wheel.removesuffix(".whl").split("-")[-3:]
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tags = python.split(".")
    return abi == "abi3" or ours in tags or (abi == "none" and "py3" in tags)


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Unpack the wheels that fit into `folder`; the others' names."""
    left_out = []
    for path in sorted(wheels.glob("*.whl")):
        if not fits(path.name):
            left_out.append(path.name)
            continue
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    return left_out


def use(paths: list[Path]) -> None:
    """Put folders on the path, here and in processes started from here, and the checkout off it.

    The checkout's root holds a folder `kernels`, and this script's folder a module of that name:
    both would hide another package.
    """
    hidden = {ROOT, ROOT / "bench"}
    kept = [p for p in sys.path if p and Path(p).resolve() not in hidden]
    sys.path[:] = [*map(str, paths), *kept]
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    outside = [p for p in before if Path(p).resolve() not in hidden]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *outside])
    os.environ["PYTHONSAFEPATH"] = "1"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1500.0, help="for all of it")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results",
        help="results go to a folder named after the device in it",
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use")
    parser.add_argument("--only", action="append", default=[], help="a stage; repeatable")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done; needs no GPU"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the suite; the exit code is 2 for a caller's mistake, 1 if a stage did not end well."""
    given = parse(arguments)
    if given.wheels is not None and not given.wheels.is_dir():
        print(f"gpu_suite: --wheels: expected a folder, got {given.wheels}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="heatsink-suite-") as work:
        package, unpacked = Path(work) / "package", Path(work) / "wheels"
        package.mkdir()
        unpacked.mkdir()
        (package / "heatsink").symlink_to(ROOT / "heatsink")
        left_out = unpack(given.wheels, unpacked) if given.wheels else []
        use([package, unpacked])

        from heatsink.benchmarks.suite_program import run

        return run(
            root=ROOT,
            out=given.out,
            seconds=given.seconds,
            only=given.only,
            dry_run=given.dry_run,
            wheels_left_out=[f"{name}: not for this Python" for name in left_out],
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
