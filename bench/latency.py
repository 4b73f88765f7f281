"""Whole systems at equal precision, in one run: `heatsink bench latency` as a script.

python bench/latency.py --model models/emoji -o bench/results/cpu
python bench/latency.py --config sd15 -o out/bench
"""

from __future__ import annotations

import typer

from heatsink.bench_command import latency

if __name__ == "__main__":
    typer.run(latency)
