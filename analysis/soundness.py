"""Which runs can carry a number on speed: those that `analysis.runs` finds sound, whose times were measured, long and steady enough.

A step time from emulated FP8, from a few steps after the start, or from a GPU whose clock or neighbours changed meanwhile is
worse than none, for nothing in a table shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.report import load_all
from analysis.runs import Run
from analysis.speed import step_time, timed

MIN_TIMED = 8  # steps after the warm-up; fewer are no distribution
# Quartiles apart, as a share of the median, and the last third's median from the first's: beyond it clocks, neighbours or data were not stable.
MAX_SPREAD = 0.05


def unsound(run: Run) -> str | None:
    """Return why a run's step times cannot be used; None if they can."""
    if run.plan.on_cpu:
        return f"{run.folder}: it ran on a CPU; its times say nothing about a GPU"
    if run.emulated:
        return f"{run.folder}: its numerics are emulated; its times say nothing about a GPU's FP8"
    if run.label("step_time") != "measured":
        return f"{run.folder}: its step time is {run.label('step_time')}, not measured"
    count = len(timed(run))
    if count < MIN_TIMED:
        return f"{run.folder}: {count} steps after the warm-up, {MIN_TIMED} are wanted; run it longer"
    time = step_time(run)
    spread = (time.high - time.low) / time.value
    if spread > MAX_SPREAD:
        return (
            f"{run.folder}: unstable, the quartiles of its step time lie {spread:.1%} apart (limit {MAX_SPREAD:.0%}); run it again on a quiet machine"
        )
    change = drift(run)
    if abs(change) > MAX_SPREAD:
        return (
            f"{run.folder}: unstable, the last third of its timed steps takes {change:+.1%} against the first (limit {MAX_SPREAD:.0%}); "
            "run it again on a quiet machine, longer where it was still warming up"
        )
    return None


def drift(run: Run) -> float:
    """Return by how much the median of the last third of the timed steps differs from that of the first, as a share of it."""
    times = timed(run)
    third = len(times) // 3
    return float(np.median(times[-third:]) / np.median(times[:third]) - 1)


def sound(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs whose step times can be used, and for each of the others one line that says why they cannot."""
    runs, left_out = load_all(folders)
    reasons = [(run, unsound(run)) for run in runs]
    return [run for run, reason in reasons if reason is None], [*left_out, *(reason for _, reason in reasons if reason)]
