"""The constants, fitted: least squares on the logarithm of predicted over published step time, held
by what is known beforehand.

Rows that differ in the number of GPUs or the release alone share one weight, so that a model
published at eight scales counts no more than one published once.  A BF16 and an FP8 row published
side by side share their release and their cluster, so that their ratio is known better than either:
it is fitted too.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from analysis.predictor.calibration.published_steps import Row, pairs
from analysis.predictor.model.cost import FITTED, KNOWN, Constants
from analysis.predictor.model.step import Counted, count, price
from analysis.stats.series import Array

# How well a published step time, and a ratio of two, can be known: releases of one layout differ by
# as much
ROW_ERROR, PAIR_ERROR = 0.05, 0.025
LOG_SCALED = tuple(KNOWN[name].low > 0 for name in FITTED)


@dataclass(frozen=True)
class Fit:
    """All constants, and the standard error of each fitted one (of the value; what was known
    beforehand is in it).
    """

    constants: Constants
    errors: dict[str, float]


@functools.cache
def counted(row: Row) -> Counted:
    """Return the counted work of a row, once."""
    return count(row.plan)


def step_time(row: Row, constants: Constants) -> float:
    """Return the predicted step time of a row."""
    return sum(price(counted(row), constants).values())


def fit(found: Sequence[Row]) -> Fit:
    """Return the constants fitted to rows; what they do not tell stays at what was known before."""
    weights = _weights(found)
    both = pairs(found)
    place = {id(row): i for i, row in enumerate(found)}

    def residuals(x: Array) -> Array:
        constants = _with(x)
        errors = np.array([math.log(step_time(row, constants) / row.step_time_s) for row in found])
        ratios = np.array([errors[place[id(base)]] - errors[place[id(fp8)]] for base, fp8 in both])
        share = np.array([weights[place[id(fp8)]] for _, fp8 in both])
        return np.concatenate(
            [errors * weights / ROW_ERROR, ratios * share / PAIR_ERROR, from_prior(x)]
        )

    bounds = ([KNOWN[name].low for name in FITTED], [KNOWN[name].high for name in FITTED])
    start = np.array([KNOWN[name].value for name in FITTED])
    solution = least_squares(
        residuals, start, bounds=bounds, x_scale=start, diff_step=1e-4, loss="soft_l1"
    )
    errors = np.sqrt(np.diag(np.linalg.pinv(solution.jac.T @ solution.jac)))
    return Fit(_with(solution.x), dict(zip(FITTED, map(float, errors), strict=True)))


def _with(x: Array) -> Constants:
    """Return the constants with the fitted ones at `x`, the held ones at what is known of them."""
    held = {name: prior.value for name, prior in KNOWN.items()}
    return Constants(**{**held, **dict(zip(FITTED, map(float, x), strict=True))})


def from_prior(x: Array) -> Array:
    """Return how far each fitted constant is from what was known, in standard deviations (of its
    logarithm, or of its value where it may be 0).
    """
    away = []
    for value, prior, logarithmic in zip(
        x, (KNOWN[name] for name in FITTED), LOG_SCALED, strict=True
    ):
        width = math.log(prior.factor)
        away.append(
            math.log(value / prior.value) / width
            if logarithmic
            else (value - prior.value) / (prior.value * (prior.factor - 1))
        )
    return np.array(away)


def _weights(found: Sequence[Row]) -> Array:
    sizes = Counter(row.cell for row in found)
    return np.array([1 / math.sqrt(sizes[row.cell]) for row in found])
