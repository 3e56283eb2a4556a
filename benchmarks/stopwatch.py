"""Times several ways of doing the same work so that their ratios hold on a machine whose speed drifts."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.tables import titled


@dataclass(frozen=True)
class Race:
    """What was measured; the first way is ours, which the others are held against."""

    seconds: pd.DataFrame  # a row a round, a column a way
    results: dict[str, Any]  # what each way returned last

    def table(self, title: str, notes: dict[str, str]) -> str:
        """Markdown: a row a way with its median seconds, the median over the rounds of its ratio to ours, its note."""
        ratios = self.seconds.div(self.seconds.iloc[:, 0], axis=0).median()
        seconds = self.seconds.median()
        rows = pd.DataFrame({"seconds": seconds.map(_figures), "times ours": ratios.map(_figures), "result": notes})
        return titled(f"**{title}** (median of {len(self.seconds)} rounds)", rows.rename_axis("way"))


def race(ways: dict[str, Callable[[], Any]], rounds: int = 3) -> Race:
    """Does the work in every way, one after the other, and all of that `rounds` times.

    Ways measured minutes apart would be compared on two different machines; within a round they are not.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for way, work in ways.items():
            results.pop(way, None)
            gc.collect()  # no way pays for another's garbage
            start = time.perf_counter()
            results[way] = work()
            seconds[way].append(time.perf_counter() - start)
    return Race(pd.DataFrame(seconds), results)


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
