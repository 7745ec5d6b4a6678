"""Which steps does a log hold, in order?  Restarts, logging intervals that change, and gaps.

A log is a stream: a run that was restarted writes some steps twice.  The later line is the one
whose weights went on, so a line survives only if no later line has its step or an earlier one.
Loggers skip steps, and leave their grid at a resume: NeMo 2 with log_every_n_steps=10 writes 10,
20, 30, 40 and, resumed at 40, 41, 51.  So steps are read as stretches, each with its own interval.
Between two of them lie fewer steps than their intervals together; where there are more, or a
stretch lacks one of its own, steps are missing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.runs.metrics import Array
from recipes.errors import InputError

PART = 1 << 18  # steps looked at at a time
SHOWN = 5  # steps or gaps that a message names


@dataclass(frozen=True)
class Stretch:
    """Steps `first`, `first + every`, … `last`."""

    first: int
    last: int
    every: int

    @property
    def count(self) -> int:
        """The number of its steps."""
        return (self.last - self.first) // self.every + 1


def last_word(steps: Array) -> NDArray[np.bool_]:
    """Return which of n lines survive: those that no later line has the step of, or an earlier
    one.
    """
    if not _falls(steps).size:
        return np.ones(steps.size, dtype=bool)
    later = np.minimum.accumulate(steps[::-1])[::-1]
    return steps < np.append(later[1:], np.inf)


def restarts(steps: Array) -> list[int]:
    """Return the steps from which a log goes on after it went back."""
    return [int(steps[i]) for i in _falls(steps)]


def _falls(steps: Array) -> NDArray[np.intp]:
    """Return the places of the steps that do not lie beyond the one before."""
    return np.flatnonzero(steps[1:] <= steps[:-1]) + 1


def _turns(steps: Array) -> NDArray[np.intp]:
    """Return the places i > 0 where the gap from step i to the next is not the one before; in
    parts, for millions of steps.
    """
    found = []
    for start in range(0, max(steps.size - 2, 1), PART):
        found.append(np.flatnonzero(np.diff(steps[start : start + PART + 2], 2)) + start + 1)
    return np.concatenate(found)


def refuse_two_runs(steps: Array, total: int | None) -> None:
    """Raise InputError where a run had reached its end before another began at the same step.

    Where nothing states the end, it is the last step of all.
    """
    ends_at = total or int(steps.max())
    for i in _falls(steps):
        if steps[i] == steps[0] < steps[i - 1] and steps[i - 1] >= ends_at:
            ends = f"one ends at step {int(steps[i - 1])} of {ends_at}"
            anew = f"steps begin anew at {int(steps[i])}"
            raise InputError(
                f"the log holds two runs: {ends}, and {anew}; split it, and import each"
            )


def stretches_of(steps: Array, what: str) -> list[Stretch]:
    """Return the stretches of steps in rising order; InputError where they follow no interval."""
    if steps.size < 3:
        every = int(steps[1] - steps[0]) if steps.size == 2 else 1
        return [Stretch(int(steps[0]), int(steps[-1]), every)]
    starts = np.append(0, _turns(steps))
    counts = np.diff(np.append(starts, steps.size - 1))
    if int((counts[counts > 1] + 1).sum()) * 2 < steps.size:
        raise InputError(
            f"the steps of the {what} follow no grid ({first_of(steps)}); a sampled or filtered"
            " export? import the whole of it"
        )
    found = list[Stretch]()
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        every, begin, end = (
            int(steps[start + 1] - steps[start]),
            int(steps[start]),
            int(steps[start + count]),
        )
        if (
            count == 1
        ):  # from the end of one stretch to the beginning of the next, or to a step between them
            found += [] if found else [Stretch(begin, begin, every)]
            found.append(Stretch(end, end, every))
        elif found and found[-1].first == found[-1].last == begin:
            found[-1] = Stretch(begin, end, every)
        else:
            found.append(Stretch(begin + every if found else begin, end, every))
    return _joined(found)


def _joined(found: list[Stretch]) -> list[Stretch]:
    """Return stretches, one that goes on in another's steps joined with it."""
    joined = found[:1]
    for stretch in found[1:]:
        before = joined[-1]
        if stretch.every == before.every and stretch.first == before.last + before.every:
            joined[-1] = Stretch(before.first, stretch.last, before.every)
        else:
            joined.append(stretch)
    return joined


def gaps_of(stretches: list[Stretch]) -> list[str]:
    """Return in words which steps are missing between and before stretches."""
    found = []
    first = stretches[0]
    if first.first > first.every:
        found.append(_missing(first.every, first.first - first.every, first.every))
    for before, after in itertools.pairwise(stretches):
        every = before.every if before.count > 1 else after.every
        if after.first - before.last > every + (after.every if after.count > 1 else every) - 1:
            found.append(_missing(before.last + every, after.first - every, every))
    return found


def _missing(first: int, last: int, every: int) -> str:
    last = max(first, last - (last - first) % every)
    return f"step {first} is missing" if first == last else f"steps {first} to {last} are missing"


def first_of(steps: Array) -> str:
    """Return the first steps in words."""
    return ", ".join(f"{int(step)}" for step in steps[:SHOWN]) + (
        " …" if steps.size > SHOWN else ""
    )
