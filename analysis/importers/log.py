"""What every importer returns, and the rules that hold for all of them.

A log is a stream: a run that was restarted writes some steps twice.  The later line is the one whose weights went on,
so a line survives only if no later line has its step or an earlier one.  Loggers also skip steps (NeMo's recipes write
every tenth): the steps that are there must then lie on one grid, k, 2k, 3k …, or nothing says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from analysis.importers.facts import Facts
from analysis.metrics import Array
from recipes.errors import InputError

MOST_STEPS = 2**53  # beyond it a float no longer counts


@dataclass
class Log:
    """A run as its log tells it.

    `steps`: columns of n values in the order they were written: "step" (from 1), "loss" (nats), where there are such
    "grad_norm", "lr", "step_time_s", "samples" (consumed so far), "global_batch", "skipped" and "nan" (iterations),
    "memory_gb", "tokens_per_s" and "tflops" (both per GPU), and "fp8_gemms" and "tokens" of our own loggers.  `heldout`: "step", "heldout_loss".
    `loss_digits`: significant digits that the loss was printed with, None where it was stored whole.
    `total`: the steps planned.  `facts`: what the log states about its own run.  `memory_gb`, `reserved_gb`: the peak of
    memory allocated, and of what the allocator held, in 1e9 bytes.  `said`: what a reader should know.
    """

    format: str
    steps: dict[str, Array]
    heldout: dict[str, Array] = field(default_factory=dict)
    loss_digits: int | None = None
    total: int | None = None
    interval: int = 1
    facts: Facts = field(default_factory=Facts)
    memory_gb: float | None = None
    reserved_gb: float | None = None
    said: list[str] = field(default_factory=list)


def settle(log: Log) -> Log:
    """Return the log with one line a step, in order and on its grid; InputError where the steps follow none."""
    steps = log.steps.get("step", np.zeros(0))
    if not steps.size:
        raise InputError(f"no training step found in the {log.format}; its loss is what is compared; name another source or --format")
    if not ((steps >= 1) & (steps < MOST_STEPS) & (steps == np.floor(steps))).all():
        raise InputError(f"the {log.format} counts steps that are no whole numbers from 1; it was changed or is no training log; name another")
    _say_resumes(log, steps)
    log.steps = _rows(log.steps, last_word(steps))
    last = log.steps["step"][-1]
    _put_on_grid(log)
    if log.heldout:
        log.heldout = _rows(log.heldout, last_word(log.heldout["step"]) & (log.heldout["step"] <= last))
    return log


def last_word(steps: Array) -> NDArray[np.bool_]:
    """Return which of n lines survive: those that no later line has the step of, or an earlier one."""
    if not steps.size:
        return np.zeros(0, dtype=bool)
    later = np.minimum.accumulate(steps[::-1])[::-1]
    return steps < np.append(later[1:], np.inf)


def _rows(columns: dict[str, Array], kept: NDArray[np.bool_]) -> dict[str, Array]:
    return {key: values[kept] for key, values in columns.items()}


def _say_resumes(log: Log, steps: Array) -> None:
    back = np.flatnonzero(np.diff(steps) <= 0) + 1
    if back.size:
        at = ", ".join(f"{int(steps[i])}" for i in back[:5])
        more = " …" if back.size > 5 else ""
        log.said.append(f"steps are repeated {back.size} time(s), as after a restart, from step {at}{more}; the later lines were kept")


def _put_on_grid(log: Log) -> None:
    steps = log.steps["step"]
    log.interval = _commonest(np.diff(steps)) if steps.size > 1 else 1
    on_grid = steps % log.interval == 0
    off = int((~on_grid).sum())
    if off * 2 > steps.size:
        raise InputError(f"the steps of the {log.format} follow no grid ({_first(steps)}); a sampled or filtered export? import the whole of it")
    if off:
        log.said.append(f"{off} line(s) between those of every {log.interval} steps were left out: step {_first(steps[~on_grid])}")
    log.steps = _rows(log.steps, on_grid)


def _commonest(gaps: Array) -> int:
    values, counts = np.unique(gaps, return_counts=True)
    return int(values[counts.argmax()])


def _first(steps: Array) -> str:
    return ", ".join(f"{int(step)}" for step in steps[:5]) + (" …" if steps.size > 5 else "")


def why_unsound(log: Log, planned: int) -> str:
    """Return why no number may be taken from a settled log, or ""."""
    steps, loss, wanted = log.steps["step"], log.steps["loss"], planned // log.interval
    for key, what in (("nan", "with NaN"), ("skipped", "skipped")):
        counted = np.nan_to_num(log.steps.get(key, np.zeros(0)))
        if counted.any():
            return f"{int(counted.sum())} iteration(s) {what}, first reported at step {int(steps[counted > 0][0])}"
    bad = steps[~np.isfinite(loss)]
    if bad.size:
        return f"the loss is no finite number in {bad.size} step(s), first at step {int(bad[0])}"
    wrong = np.flatnonzero(steps != log.interval * np.arange(1, steps.size + 1))
    if wrong.size:
        return f"step {(int(wrong[0]) + 1) * log.interval} is missing"
    return "" if steps.size == wanted else f"the log ends at step {int(steps[-1])} of {planned}"


def join(logs: Sequence[Log]) -> Log:
    """Return logs of one run, in the order in which they were written, as one stream."""
    first, *rest = logs
    for log in rest:
        keys = first.steps.keys() & log.steps.keys()
        first.steps = {key: np.concatenate([first.steps[key], log.steps[key]]) for key in keys}
        if log.heldout:
            first.heldout = {k: np.concatenate([first.heldout.get(k, np.zeros(0)), v]) for k, v in log.heldout.items()}
        first.total = log.total or first.total
        first.facts.merge(log.facts)
        first.memory_gb, first.reserved_gb = (
            max((value for value in pair if value is not None), default=None)
            for pair in ((first.memory_gb, log.memory_gb), (first.reserved_gb, log.reserved_gb))
        )
        first.said += [line for line in log.said if line not in first.said]
    return first
