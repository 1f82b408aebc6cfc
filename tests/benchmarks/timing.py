"""Contenders timed in turn, and their times beside each other.

A time in milliseconds says little: it differs between machines, and between minutes of a busy one. So every
contender runs once within each repeat, which meets them all with the same disturbances, and what counts is
the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
Contender = Callable[[], Any]
Rows = dict[str, dict[str, Any]]


class Milliseconds(float):
    """What a contender returns that measured itself, such as one that runs in another process."""


def measure(runs: Mapping[Name, Contender], repeats: int, warm_up: int = 2) -> dict[Name, list[float]]:
    """Milliseconds of each contender in each repeat; every repeat starts with another one."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            result = runs[name]()
            elapsed = 1000 * (time.perf_counter() - start)
            if repeat >= 0:
                times[name].append(float(result) if isinstance(result, Milliseconds) else elapsed)
            del result
    return times


def summary(times: Mapping[str, list[float]], beside: Mapping[str, str]) -> Rows:
    """Of each contender: median, best run, spread (middle half, in medians), ratio of medians, of bests.

    On a machine that others use too, the ratio of the best runs is what noise disturbs least.

    Args:
        times: milliseconds, as from `measure`.
        beside: of each contender, the one whose time its own is divided by.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = {name: min(values) for name, values in times.items()}
    rows: Rows = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {
            "ms": round(medians[name], 3),
            "best": round(best[name], 3),
            "spread": round((high - low) / medians[name], 3),
            "ratio": round(medians[name] / medians[beside[name]], 3),
            "best_ratio": round(best[name] / best[beside[name]], 3),
            "beside": beside[name],
        }
    return rows


def table(title: str, rows: Rows, digits: int = 1) -> str:
    """The numbers for people, the times to ``digits`` decimals."""
    width = max(24, *(len(name) for name in rows))
    lines = [title, f"  {'':{width}}{'ms':>9}{'best':>9}{'spread':>9}   ratio  of bests"]
    for name, row in rows.items():
        ratios = f"{row['ratio']:8.2f}{row['best_ratio']:10.2f} x {row['beside']}"
        line = f"  {name:{width}}{row['ms']:9.{digits}f}{row['best']:9.{digits}f}{row['spread']:9.0%}"
        lines.append(line + ratios * (row["beside"] != name))
    return "\n".join(lines)
