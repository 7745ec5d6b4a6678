"""The mean of a stretch of a loss gap with its interval; smoothing; spikes.

`mean_with_interval` and `end_with_interval` look at more than the stretch itself: how a gap moved
before it shows how far its mean can lie from the truth (analysis/stats/low_frequency.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from analysis.stats.low_frequency import Array as Array
from analysis.stats.low_frequency import Spread, spread_of_mean

CONFIDENCE = 0.995  # of an interval, both sides together
WINDOW = 3  # the window that shows how a gap moves is so many tails long, or the run
AROUND = 51  # steps of the running median that a spike leaves
SPIKE = 8.0  # robust standard deviations: beyond the noise between batches, and its heavy tail


@dataclass(frozen=True)
class Mean:
    """A mean over `count` values and the ends of its interval, infinite where there are too few.

    `slow`: probability (0 to 1) that something as slow as the window moves the series.
    """

    value: float
    low: float
    high: float
    count: int
    slow: float = 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> Mean:
        """Return the mean of the series times a positive `factor`."""
        return replace(
            self, value=self.value * factor, low=self.low * factor, high=self.high * factor
        )

    def widened(self, by: float) -> Mean:
        """Return the mean with an interval that is wider by `by` on either side."""
        return replace(self, low=self.low - by, high=self.high + by)


def mean_with_interval(series: Array, tail: int | None = None) -> Mean:
    """Return the mean of the last `tail` values (all, if None) with its interval."""
    length = tail or len(series)
    window = _window(series, length)
    return _mean(window[-length:], spread_of_mean(window, len(window) - length, len(window)))


def end_with_interval(series: Array, tail: int, end: int) -> Mean:
    """Return the mean of the last `end` values, its interval from how the values before them move.

    An end at which a run diverges shows nothing about noise; what came before does.  `tail`: length
    of the tail that the end closes; the window is the one of `mean_with_interval`.
    """
    window = _window(series, tail)
    known = len(window) - end
    return _mean(window[known:], spread_of_mean(window, known, known))


def _window(series: Array, tail: int) -> Array:
    """Return the last WINDOW tails, without the spikes before the tail: its mean does not hold
    them.
    """
    window = series[-min(len(series), WINDOW * tail) :].copy()
    before = window[: len(window) - tail]
    middle = _running_median(window)[: len(before)]
    residual = np.abs(before - middle)
    spiky = residual > SPIKE * _deviation(before - middle)
    if np.count_nonzero(residual) > len(before) / 2:  # else nothing measures the noise
        before[spiky] = middle[spiky]
    return window


def _running_median(series: Array) -> Array:
    """Return the centred median over AROUND values, shorter at the ends."""
    import pandas as pd

    return np.asarray(pd.Series(series).rolling(AROUND, center=True, min_periods=1).median())


def _deviation(residual: Array) -> float:
    """Return 1.4826 times the median of |residual|, the standard deviation of Gaussian noise."""
    return 1.4826 * float(np.median(np.abs(residual))) if len(residual) else 0.0


def _mean(values: Array, spread: Spread | None) -> Mean:
    value = float(values.mean())
    reach, slow = (np.inf, 0.0) if spread is None else (spread.reach(CONFIDENCE), spread.slow)
    return Mean(value, value - reach, value + reach, len(values), slow)


def smooth(series: Array, window: int) -> Array:
    """Return the centred moving average over `window` values, shorter at the ends."""
    import pandas as pd

    averaged: Array = (
        pd.Series(series).rolling(window, center=True, min_periods=1).mean().to_numpy()
    )
    return averaged


def spikes(loss: Array) -> int:
    """Return how many times the loss leaves its running median upwards by SPIKE standard
    deviations.

    Neighbouring steps are one spike.  The first and last half window, whose medians are of fewer
    values, hold none.  The standard deviation is the robust one of the residuals.
    """
    half = AROUND // 2
    residual = (loss - _running_median(loss))[half:-half]
    if not len(residual):
        return 0
    high = residual > SPIKE * max(_deviation(residual), float(np.finfo(float).eps))
    return int((high & ~np.concatenate([[False], high[:-1]])).sum())
