"""What a run of the latency benchmark found; JSON values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from heatsink.benchmarks.latency_check import Quality
from heatsink.benchmarks.latency_process import Cost
from heatsink.benchmarks.latency_work import UNITS, Level
from heatsink.kernels.timing import Spread


@dataclass(frozen=True)
class Samples:
    """Seconds of a call.

    Attributes:
        seconds: median and range.
        each: of every round, in order.
    """

    seconds: Spread
    each: tuple[float, ...]

    @classmethod
    def of(cls, each: Iterable[float]) -> Samples:
        """Of at least one round."""
        taken = tuple(each)
        return cls(Spread.of(taken), taken)


@dataclass(frozen=True)
class Row:
    """One system at one count.

    Attributes:
        system: its name.
        precision: what it computed in.
        count: rows or images of a call.
        includes: `whole`, or `step`: without what depends on text and time.
        base: the system whose whole its time is compared with, in the same round.
        ratio: its time over that; None without one.
        samples: seconds of a call.
        per_unit: seconds of the median call for one row or image.
        joules: for one row or image, idle power included; None where nothing meters it.
        quality: how right it is.
    """

    system: str
    precision: str
    count: int
    includes: str
    base: str
    ratio: Spread | None
    samples: Samples
    per_unit: float
    joules: float | None
    quality: Quality


@dataclass
class Table:
    """All systems at one level in one precision."""

    level: Level
    precision: str
    rows: list[Row] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What is counted."""
        return UNITS[self.level]

    def add(self, row: Row) -> None:
        """Append a row; to what is there already (the first of several groups) add its rounds.

        Raises:
            ValueError: it was computed in another precision.
        """
        if row.precision != self.precision:
            raise ValueError(
                f"a table of {self.precision} takes no row of {row.precision} ({row.system})"
            )
        key = (row.system, row.count, row.includes)
        for place, old in enumerate(self.rows):
            if (old.system, old.count, old.includes) == key:
                samples = Samples.of([*old.samples.each, *row.samples.each])
                per_unit = samples.seconds.median / row.count
                self.rows[place] = replace(old, samples=samples, per_unit=per_unit)
                return
        self.rows.append(row)


@dataclass(frozen=True)
class LeftOut:
    """A system without a time, and why; `level` and `count` where it was about to get one."""

    system: str
    precision: str
    reason: str
    level: str | None = None
    count: int | None = None


@dataclass
class Results:
    """What was found so far.

    Attributes:
        environment: of the machine.
        settings: of the run.
        tables: one a level and precision.
        costs: of fresh processes.
        left_out: systems that can't be had here.
        refused: times that were not taken: wrong results, and what failed.
        unreached: what the time did not suffice for.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    refused: list[LeftOut] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def table(self, level: Level, precision: str) -> Table:
        """The table of a level and precision."""
        for table in self.tables:
            if (table.level, table.precision) == (level, precision):
                return table
        self.tables.append(Table(level, precision))
        return self.tables[-1]

    def leave_out(self, one: LeftOut) -> None:
        """Note once what can't be had."""
        if one not in self.left_out:
            self.left_out.append(one)

    def refuse(self, one: LeftOut) -> None:
        """Note once what got no time."""
        if one not in self.refused:
            self.refused.append(one)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self)
        for table, values in zip(self.tables, found["tables"], strict=True):
            values["unit"] = table.unit
        return found
