"""The mean of an autocorrelated series, with an interval that respects the autocorrelation.

The gap between two loss curves on the same batches is a noisy series whose neighbours resemble each other, so the
usual standard error, which counts every step as independent news, is too small.  The circular block bootstrap (Politis
and Romano 1992) resamples whole stretches of the series instead.  For a mean its variance is known in closed form, the
spread of the means of all stretches of one length, so nothing is drawn and nothing depends on a seed.

The length is a tenth of the series.  Shorter stretches, such as the length that minimises the error of the variance
(Politis and White 2004, 2009; arch library), give narrower intervals that miss the truth too often: on autoregressive
noise (0.9) over 500 steps a 99 % interval misses in 4 % of the cases, against 2 % with a tenth.  The optimal length still
serves: a series that would need longer stretches than that is too short to be judged, and gets no interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.995  # of an interval, both sides together; a verdict looks at two of them and is wrong in less than 1 %
BLOCKS = 10  # stretches that a series is cut into
FREEDOM = 11.5  # degrees of freedom of the variance of overlapping stretches: 1.25 times that of separate ones (Meketon and Schmeiser 1984)
MAX_BINS = 4096  # longer series are averaged to so many bins first: the mean is the same, the cost is bounded


@dataclass(frozen=True)
class Mean:
    """A mean over `count` values and the ends of its interval, infinite where the series is too short for one."""

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> Mean:
        """Return the mean of the series times a positive `factor`."""
        return Mean(self.value * factor, self.low * factor, self.high * factor, self.count)


def mean_with_interval(series: Array, confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of `series` (n values in order) with its interval."""
    from scipy.stats import t

    value, binned = float(series.mean()), _binned(series)
    length = len(binned) // BLOCKS
    if length < 1 or _optimal_length(binned) > length:
        return Mean(value, -np.inf, np.inf, len(series))
    reach = float(t.ppf(0.5 + confidence / 2, FREEDOM) * np.sqrt(_block_bootstrap_variance(binned, length)))
    return Mean(value, value - reach, value + reach, len(series))


def last_block_with_interval(series: Array, length: int, before: int = 10, confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of the last `length` values, with an interval from how the `before` stretches ahead of them spread.

    For a stretch that may be unlike the rest, such as an end at which a run diverges: its own spread says nothing about
    noise then, but that of the stretches before it does.
    """
    from scipy.stats import t

    last = float(series[-length:].mean())
    ahead = series[-length * (before + 1) : -length]
    if len(ahead) < 2 * length:
        return Mean(last, -np.inf, np.inf, length)
    means = ahead[len(ahead) % length :].reshape(-1, length).mean(axis=1)
    reach = float(t.ppf(0.5 + confidence / 2, len(means) - 1) * means.std(ddof=1) * np.sqrt(1 + 1 / len(means)))
    return Mean(last, last - reach, last + reach, length)


def _binned(series: Array) -> Array:
    if len(series) <= MAX_BINS:
        return series
    return np.array([part.mean() for part in np.array_split(series, MAX_BINS)])


def _optimal_length(series: Array) -> float:
    from arch.bootstrap import optimal_block_length

    if np.ptp(series) == 0:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):  # a stretch without any spread
        return float(optimal_block_length(series)["circular"].iloc[0])


def _block_bootstrap_variance(series: Array, length: int) -> float:
    """Return the variance of the bootstrap mean, corrected for the loss of freedom in blocks of a finite number."""
    circle = np.concatenate([[0.0], np.cumsum(np.concatenate([series, series[: length - 1]]) - series.mean())])
    block_means = (circle[length:] - circle[:-length]) / length
    blocks = len(series) / length
    return float((block_means**2).mean()) / (blocks - 1)


def smooth(series: Array, window: int) -> Array:
    """Return the centred moving average over `window` values, shorter at the ends."""
    import pandas as pd

    averaged: Array = pd.Series(series).rolling(window, center=True, min_periods=1).mean().to_numpy()
    return averaged


def spikes(loss: Array, window: int = 51, sigmas: float = 8.0) -> int:
    """Return how many times the loss leaves its running median upwards by `sigmas` robust standard deviations.

    Neighbouring steps are one spike; the first and last half window, which have no median, hold none.  The deviation is
    1.4826 times the median absolute one; eight of them are out of reach of the noise between batches, also of its heavy tail.
    """
    import pandas as pd

    residual = loss - pd.Series(loss).rolling(window, center=True).median().to_numpy()
    if np.isnan(residual).all():
        return 0
    deviation = 1.4826 * float(np.nanmedian(np.abs(residual)))
    high = residual > sigmas * max(deviation, float(np.finfo(float).eps))
    return int((high & ~np.concatenate([[False], high[:-1]])).sum())
