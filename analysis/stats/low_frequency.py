"""Over a window of an autocorrelated series: its mean, with an interval that allows for slow drift.

The gap between two loss curves on the same batches is white noise plus, in real runs, a slow
wander. A wander that is about as slow as the window is long moves the mean and hardly shows within
the window, so intervals from blocks or from a fixed bandwidth are too narrow: with an
autoregression of 0.999 over 2,000 steps the block bootstrap of the last quarter missed a true mean
in 12 % of runs.

The interval here is the low-frequency one of Müller and Watson (Econometrica 76, 2008; Handbook of
Econometrics 2020, "Low-frequency analysis of economic time series").  The series enters through its
mean and COSINES weighted averages alone, the lowest cosine frequencies of the window.  By the
central limit theorem they are nearly Gaussian, whatever a single step's distribution.  Their
covariance is that of white noise plus an Ornstein-Uhlenbeck process, an autoregression in
continuous time.  Neither its correlation length nor its size is known: a grid of both is weighted
by the likelihood of the cosines (prior 1/s on the scale).  For each grid point the distance of the
mean from the truth is Student's t, and the reach of the interval is read off the weighted sum of
those distributions. Unlike theirs, the interval is centred at the mean itself, not at what the
cosines predict of it: that costs little width, and a reader finds the mean in the middle.

`python -m analysis.convergence.error_rates` measures how often a verdict made with it is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
COSINES = 24  # frequencies 1/2 to 12 cycles per window
BINS = 512  # a longer series is averaged to this many bins, 43 per cycle of the highest frequency
LONGEST = 2.0  # the longest correlation length of the grid, in windows: longer than the run
SHORTEST = 1 / 128  # the shortest, in windows; a shorter one is white at these frequencies
LENGTHS = 10  # grid points of the correlation length
SIZES = np.geomspace(0.3, 1e4, 9)  # power of the wander over that of white noise, first frequency
NO_WANDER = 0.9  # prior probability that there is white noise alone
SLOW = 1 / 16  # a wander with a correlation length above this share of the window is called slow


@dataclass(frozen=True)
class Model:
    """Grid points of the covariance.

    `rows`: (1 + q, bins) weights of the mean and of the q cosines.  By grid point: `precision` of
    the cosines (q, q), `log_det` of their covariance, `variance` of the mean, `log_prior`, and
    whether its wander is `slow`.  All in units of the variance of a bin's white noise.
    """

    rows: Array
    precision: Array
    log_det: Array
    variance: Array
    log_prior: Array
    slow: NDArray[np.bool_]


@dataclass(frozen=True)
class Spread:
    """How far the mean lies from the truth: Student's t with `freedom`, one for each grid point.

    `scale` in the unit of the series; `weight` adds up to 1; `slow` is the weight of slow wanders.
    """

    scale: Array
    weight: Array
    freedom: int
    slow: float

    def reach(self, confidence: float) -> float:
        """Return the distance that is exceeded with probability 1 - `confidence` (both sides)."""
        from scipy.optimize import brentq
        from scipy.stats import t

        ends = self.scale * t.ppf((1 + confidence) / 2, self.freedom)
        low, high = float(ends.min()), float(ends.max())
        if low == high:
            return low

        def excess(distance: float) -> float:
            return (
                float(self.weight @ t.sf(distance / self.scale, self.freedom)) * 2 - 1 + confidence
            )

        return float(brentq(excess, low, high, rtol=1e-6))


def spread_of_mean(series: Array, first: int, known: int) -> Spread | None:
    """Return how far the mean of `series[first:]` lies from the truth, seen from `series[:known]`.

    Args:
        series: n values in order, the window.
        first: where the values begin whose mean is asked about.
        known: how many values of the window, from its start, show how the series moves.

    Returns:
        None where the known part holds fewer than six values; a spread of zero where it does not
        vary.
    """
    bins = min(len(series), BINS)
    begin, end = (round(place * bins / len(series)) for place in (first, known))
    cosines = min(COSINES, end // 3)
    if cosines < 2:
        return None
    binned = np.array([part.mean() for part in np.array_split(series, bins)])
    model = _model(bins, min(begin, bins - 1), end, cosines)
    averages = model.rows[1:] @ binned
    if np.abs(averages).max() <= 1e-12 * np.abs(series).max():
        return Spread(np.zeros(1), np.ones(1), cosines, 0.0)
    squares = np.einsum("i,kij,j->k", averages, model.precision, averages)
    log_weight = model.log_prior - model.log_det / 2 - cosines / 2 * np.log(squares)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    scale = np.sqrt(squares / cosines * model.variance)
    slow = float(weight[model.slow].sum())
    return Spread(scale, weight, cosines, slow)


@cache
def _model(bins: int, begin: int, end: int, cosines: int) -> Model:
    """Return the grid for the mean over bins from `begin`, seen from the bins before `end`."""
    rows = _rows(bins, begin, end, cosines)
    places = np.arange(bins) / end  # in windows
    apart = np.abs(places[:, None] - places[None, :])
    white = rows @ rows.T
    lengths = np.geomspace(SHORTEST, LONGEST, LENGTHS)
    points = [(white, np.log(NO_WANDER), False)]
    for length in lengths:
        wander = rows @ np.exp(-apart / length) @ rows.T
        prior = np.log((1 - NO_WANDER) / (LENGTHS * len(SIZES)))
        scaled = wander * (white[1, 1] / wander[1, 1])
        points += [(white + size * scaled, prior, bool(length > SLOW)) for size in SIZES]
    inside = [np.linalg.inv(covariance[1:, 1:]) for covariance, _, _ in points]
    return Model(
        rows=rows,
        precision=np.array(inside),
        log_det=np.array([-np.linalg.slogdet(inverse)[1] for inverse in inside]),
        variance=np.array([covariance[0, 0] for covariance, _, _ in points]),
        log_prior=np.array([prior for _, prior, _ in points]),
        slow=np.array([slow for _, _, slow in points]),
    )


def _rows(bins: int, begin: int, end: int, cosines: int) -> Array:
    """Return the weights of the mean from `begin` on, and of each cosine over the bins to `end`."""
    mean = np.zeros(bins)
    mean[begin:] = 1 / (bins - begin)
    phase = np.pi * (np.arange(end) + 0.5) / end
    waves = np.zeros((cosines, bins))
    waves[:, :end] = np.sqrt(2) * np.cos(np.outer(np.arange(1, cosines + 1), phase)) / end
    return np.vstack([mean, waves])
