"""Every op against what a user would run otherwise: `heatsink bench kernels` as a script.

python bench/kernels.py --device cpu -o out/bench
"""

from __future__ import annotations

import typer

from heatsink.bench_command import kernels

if __name__ == "__main__":
    typer.run(kernels)
