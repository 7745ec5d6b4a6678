"""What every importer returns, and the rules that hold for all of them.

Which lines survive a restart, and which steps are missing, stands in grid.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analysis.importers.facts import Facts
from analysis.importers.grid import (
    PART,
    SHOWN,
    Stretch,
    gaps_of,
    last_word,
    refuse_two_runs,
    restarts,
    stretches_of,
)
from analysis.runs.metrics import Array
from recipes.errors import InputError

GIGABYTES = {
    "memory_bytes": 1e-9,
    "reserved_bytes": 1e-9,
    "reserved_gib": 2**30 / 1e9,
}  # a unit in 1e9 bytes
MOST_STEPS = 2**53  # beyond it a float no longer counts


@dataclass
class Log:
    """A run as its log tells it.

    `steps`: columns of n values in the order they were written: "step" (from 1), "loss" (nats),
    where there are such "grad_norm", "lr", "step_time_s", "samples" (consumed so far),
    "global_batch", "skipped" and "nan" (iterations), "memory_gb", "tokens_per_s" and "tflops" (both
    per GPU), and "fp8_gemms" and "tokens" of our own loggers.  `heldout`: "step", "heldout_loss";
    `test`: the same of a test set.  `stretches`: the steps, once the log is settled. `loss_digits`:
    significant digits that the loss was printed with, None where it was stored whole. `averaged`:
    whether a line's loss is the mean of the steps since the line before; None where that is not
    known. `total`: the steps planned.  `facts`: what the log states about its own run.
    `memory_gb`, `reserved_gb`: the peak of memory allocated, and of what the allocator held, in 1e9
    bytes.  `said`: what a reader should know.
    """

    format: str
    steps: dict[str, Array]
    heldout: dict[str, Array] = field(default_factory=dict)
    test: dict[str, Array] = field(default_factory=dict)
    loss_digits: int | None = None
    averaged: bool | None = None
    total: int | None = None
    stretches: list[Stretch] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)
    memory_gb: float | None = None
    reserved_gb: float | None = None
    said: list[str] = field(default_factory=list)


def settle(log: Log) -> Log:
    """Return the log with one line a step, in order; InputError where the steps follow no grid."""
    steps = log.steps.get("step", np.zeros(0))
    if not steps.size:
        raise InputError(
            f"no training step found in the {log.format}; its loss is what is compared; name"
            " another source or --format"
        )
    if not all(_are_steps(part) for part in np.array_split(steps, steps.size // PART + 1)):
        raise InputError(
            f"the {log.format} counts steps that are no whole numbers from 1; it was changed or is"
            " no training log; name another"
        )
    refuse_two_runs(steps, log.total)
    _say_restarts(log, steps)
    keep_rows(log.steps, last_word(steps))
    _find_stretches(log)
    _fill_step_times(log.steps)
    end = _last_evaluated(log)
    for kept in (log.heldout, log.test):
        if kept:
            late = kept["step"][kept["step"] > end]
            if late.size:
                log.said.append(
                    f"an evaluation at step {int(late[0])} was left out: no training line is there"
                )
            keep_rows(kept, last_word(kept["step"]) & (kept["step"] <= end))
    return log


def _last_evaluated(log: Log) -> float:
    """Return the last step that an evaluation may have: planned, and before the next line."""
    last = log.stretches[-1]
    return max(last.last, min(log.total or 0, last.last + last.every - 1))


def _are_steps(steps: Array) -> bool:
    return bool(((steps >= 1) & (steps < MOST_STEPS) & (steps == np.floor(steps))).all())


def distinct(values: Array) -> Array:
    """Return the different values of a column, in order; one that was made of a single value is not
    looked through.
    """
    return values[:1] if values.strides == (0,) else np.unique(values)


def put_units(log: Log) -> None:
    """Put columns into the project's units: seconds, and GB of 1e9 bytes.

    Memory allocated is a column where every line has it, for a metric has a value a step; its peak
    is kept either way.
    """
    steps = log.steps
    if "step_time_ms" in steps:
        milliseconds = steps.pop("step_time_ms") / 1000
        steps.setdefault("step_time_s", milliseconds)
    for ours, sources in (
        ("memory_gb", ("memory_gb", "memory_bytes")),
        ("reserved_gb", ("reserved_gb", "reserved_bytes", "reserved_gib")),
    ):
        found = [steps.pop(name) * GIGABYTES.get(name, 1.0) for name in sources if name in steps]
        if not found or np.isnan(found[0]).all():
            continue
        peak = float(np.nanmax(found[0]))
        setattr(log, ours, max(peak, getattr(log, ours) or 0.0))
        if ours == "memory_gb" and np.isfinite(found[0]).all():
            steps[ours] = found[0]


def keep_rows(columns: dict[str, Array], kept: NDArray[np.bool_]) -> None:
    """Drop the other rows, a column at a time: a long log is not to stand in memory twice."""
    if not kept.all():
        for key in list(columns):
            columns[key] = columns.pop(key)[kept]


def _say_restarts(log: Log, steps: Array) -> None:
    back = restarts(steps)
    if back:
        more = " …" if len(back) > SHOWN else ""
        at = ", ".join(map(str, back[:SHOWN]))
        log.said.append(
            f"steps are repeated {len(back)} time(s), as after a restart, from step {at}{more}; the"
            " later lines were kept"
        )


def _find_stretches(log: Log) -> None:
    steps = log.steps["step"]
    log.stretches = stretches_of(steps, log.format)
    first = log.stretches[0]
    if first.first == first.last == 1 and len(log.stretches) > 1 and log.stretches[1].every > 1:
        keep_rows(log.steps, steps > 1)
        log.stretches = stretches_of(log.steps["step"], log.format)
        log.said.append("step 1, which is printed before the first interval ends, was left out")
    if len(log.stretches) > 1 and not gaps_of(log.stretches):
        parts = [f"{s.first} to {s.last} every {s.every}" for s in log.stretches[:SHOWN]]
        log.said.append(
            "steps come in stretches, as after a resume:"
            f" {'; '.join(parts)}{' …' if len(log.stretches) > SHOWN else ''}"
        )


def _fill_step_times(steps: dict[str, Array]) -> None:
    """A mean time that is logged with the last of several steps is theirs too."""
    times = steps.get("step_time_s")
    if times is None or not np.isnan(times).any():
        return
    logged = np.flatnonzero(~np.isnan(times))
    if logged.size:
        steps["step_time_s"] = times[
            logged[np.minimum(np.searchsorted(logged, np.arange(times.size)), logged.size - 1)]
        ]
    else:
        del steps["step_time_s"]


def _not_finite(values: Array) -> NDArray[np.bool_]:
    return ~np.isfinite(values)


def _not_above_0(values: Array) -> NDArray[np.bool_]:
    return ~(values > 0)


def why_unsound(log: Log, planned: int) -> str:
    """Return why no number may be taken from a settled log, or ""."""
    steps = log.steps["step"]
    for key, what in (("nan", "with NaN"), ("skipped", "skipped")):
        counted = np.nan_to_num(log.steps.get(key, np.zeros(0)))
        if counted.any():
            return (
                f"{int(counted.sum())} iteration(s) {what}, first reported at step"
                f" {int(steps[counted > 0][0])}"
            )
    losses = log.steps.get("loss", np.ones(steps.size))
    bad = steps[~np.isfinite(losses)]
    if bad.size:
        return f"the loss is no finite number in {bad.size} step(s), first at step {int(bad[0])}"
    if not (losses > 0).all():
        return (
            f"the loss is not above 0 in {int((losses <= 0).sum())} step(s), first at step"
            f" {int(steps[losses <= 0][0])}"
        )
    for key, is_bad, what in (
        ("grad_norm", _not_finite, "is no finite number"),
        ("step_time_s", _not_above_0, "is not above 0"),
    ):
        bad = steps[is_bad(log.steps[key])] if key in log.steps else steps[:0]
        if bad.size:
            return f"{key} {what} in {bad.size} step(s), first at step {int(bad[0])}"
    if log.heldout:
        bad = log.heldout["step"][~np.isfinite(log.heldout["heldout_loss"])]
        if bad.size:
            return f"the held-out loss is no finite number at step {int(bad[0])}"
    if gaps := gaps_of(log.stretches):
        return "; ".join(gaps[:SHOWN]) + (
            f"; and {len(gaps) - SHOWN} more gaps" if len(gaps) > SHOWN else ""
        )
    last = log.stretches[-1]
    return (
        "" if last.last + last.every > planned else f"the log ends at step {last.last} of {planned}"
    )


def join(logs: Sequence[Log]) -> Log:
    """Return logs of one run, in the order in which they were written, as one stream."""
    first, *rest = logs
    for log in rest:
        keys = first.steps.keys() & log.steps.keys()
        first.steps = {key: np.concatenate([first.steps[key], log.steps[key]]) for key in keys}
        for ours, theirs in ((first.heldout, log.heldout), (first.test, log.test)):
            for key, values in theirs.items():
                ours[key] = np.concatenate([ours.get(key, np.zeros(0)), values])
        first.total = log.total or first.total
        first.averaged = first.averaged if first.averaged == log.averaged else None
        first.facts.merge(log.facts)
        first.memory_gb, first.reserved_gb = (
            max((value for value in pair if value is not None), default=None)
            for pair in ((first.memory_gb, log.memory_gb), (first.reserved_gb, log.reserved_gb))
        )
        first.loss_digits = min(
            (d for d in (first.loss_digits, log.loss_digits) if d is not None), default=None
        )
        first.said += [line for line in log.said if line not in first.said]
    return first
