"""Which runs can carry a number on speed: those that `analysis.runs.load` finds sound, whose times
were measured, long and steady enough.

A step time from emulated FP8, from a few steps after the start, or from a GPU whose clock or
neighbours changed meanwhile is worse than none, for nothing in a table shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.runs.load import Run, load_all
from analysis.runs.timing import timed, unsteady

MIN_TIMED = 8  # steps after the warm-up; fewer are no distribution


def unsound(run: Run) -> str | None:
    """Return why a run's step times cannot be used; None if they can."""
    if run.plan.on_cpu:
        return f"{run.folder}: it ran on a CPU; its times say nothing about a GPU"
    if run.emulated:
        return f"{run.folder}: its numerics are emulated; its times say nothing about a GPU's FP8"
    if run.label("step_time") != "measured":
        return f"{run.folder}: its step time is {run.label('step_time')}, not measured"
    if "step_time_s" not in run.steps:
        return (
            f"{run.folder}: its log holds no step time; import one that does (train_step_timing in"
            " s, iteration-time)"
        )
    count = len(timed(run))
    if count < MIN_TIMED:
        return (
            f"{run.folder}: {count} steps after the warm-up, {MIN_TIMED} are wanted; run it longer"
        )
    moved = unsteady(run)
    return (
        f"{run.folder}: unstable, {moved}; run it again on a quiet machine, longer where it was"
        " still warming up"
        if moved
        else None
    )


def sound(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs whose step times can be used, and for each of the others one line that says
    why they cannot.
    """
    runs, left_out = load_all(folders)
    reasons = [(run, unsound(run)) for run in runs]
    return [run for run, reason in reasons if reason is None], [
        *left_out,
        *(reason for _, reason in reasons if reason),
    ]
