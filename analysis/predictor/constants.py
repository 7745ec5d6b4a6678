"""What predictions take from the last refit: the constants, and the residuals that intervals are
made of.

`constants.json` is written by `python -m analysis.predict --refit` and by nothing else
(calibration/store.py).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.predictor.model.cost import KNOWN, NAMES, Constants
from analysis.stats.series import Array
from recipes.errors import InputError
from recipes.plan import Gpu

STORED = Path(__file__).resolve().parent / "constants.json"
# Names of pools of residuals, and the seconds below which gaps and the fixed part of a step decide.
LEFT_OUT, OTHER_MODEL = "without ", "speedup of another model"
SHORT, SHORT_STEP = "short", 1.0
COVERAGE = 0.9  # share of the rows, or pairs, that an interval holds at least
# By which launching and the fixed part of a step may be off (cost.KNOWN) where no published step
# shows them
OVERHEAD_FACTOR = 2.0
NINE_TENTHS = 1.645  # standard deviations that hold 90 % of a normal distribution, on both sides
# By which a part of a step may be off where it is a larger share than in any row: attention within
# what was known of it before any fit.
BEYOND = {"overhead": OVERHEAD_FACTOR, "attention": KNOWN["attention"].factor ** NINE_TENTHS}


@dataclass(frozen=True)
class Interval:
    """A predicted value and the ends between which nine of ten published ones lay at least, by how
    far off predictions were (`basis`).
    """

    value: float
    low: float
    high: float


@functools.cache
def stored() -> dict[str, Any]:
    """Return the file; InputError where it is missing or damaged."""
    try:
        read: dict[str, Any] = json.loads(STORED.read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{STORED.name} is missing or damaged; make it again with python -m analysis.predict"
            " --refit"
        ) from None
    return read


@functools.cache
def constants() -> Constants:
    """Return the constants of the last fit."""
    return Constants(**{name: float(stored()["constants"][name]["value"]) for name in NAMES})


def step_time_interval(
    seconds: float, gpu: Gpu, overhead: float = 0.0, attention: float = 0.0
) -> Interval:
    """Return a predicted step time with its interval (`basis` says of which rows).

    `overhead`, `attention`: the prediction's shares; beyond what any row that chooses has, they are
    known within a factor alone (`BEYOND`).
    """
    short = [SHORT] if seconds < SHORT_STEP else []
    return _widened(
        _interval(seconds, [_residuals(name) for name in (*_pools(gpu), *short)]),
        overhead,
        attention,
    )


def _pools(gpu: Gpu) -> list[str]:
    """Return the residuals of a GPU's steps: of its generation; of every GPU left out, where it has
    few rows.
    """
    family = stored()["families"].get(gpu.name)
    return (
        [family]
        if family
        else [name for name in stored()["residuals"] if name.startswith(LEFT_OUT)]
    )


def _residuals(name: str) -> Array:
    """Return residuals, the smallest first, with their weights beside them."""
    return np.asarray(stored()["residuals"][name], dtype=float)


def basis(gpu: Gpu) -> str:
    """Return in words of which rows a step time's interval on this GPU is made."""
    families, found = stored()["families"], stored()["residuals"]
    share, family = f"{COVERAGE:.0%}", families.get(gpu.name)
    if family:
        members = ", ".join(name for name, each in families.items() if each == family)
        kept = f"{len(found[family])} published rows of its generation (with {members})"
        return (
            f"the range that held {share} of {kept}, by constants that did not know the row; wider"
            f" below {SHORT_STEP:g} s"
        )
    others = ", ".join(
        f"{name.removeprefix(LEFT_OUT)} ({len(errors)})"
        for name, errors in found.items()
        if name.startswith(LEFT_OUT)
    )
    return (
        f"{gpu.name} is in no family of GPUs whose rows are held against the fit"
        f" ({', '.join(families)}), so the range is the one that held {share} of each GPU's rows by"
        f" constants fitted without that GPU: {others}"
    )


def borrowed(precision: str) -> str:
    """Return the recipes whose pairs make a precision's speedup interval; nothing where its own are
    among them.
    """
    recipes = sorted({name.split()[0] for name in stored()["pairs"]})
    return "" if precision in recipes else ", ".join(recipes)


def speedup_basis(precision: str) -> str:
    """Return in words of which pairs a speedup's interval is made, and that they are of another
    recipe where that is so.
    """
    counts, others = stored()["pairs"], borrowed(precision)
    none = f"; none is of {precision}, so the interval is that of {others}" if others else ""
    pairs = ", ".join(f"{n} of {name.replace(' ', ' on ')}" for name, n in counts.items())
    return (
        f"the range that held {COVERAGE:.0%} of {sum(counts.values())} published pairs"
        f" ({pairs}){none}"
    )


def speedup_interval(value: float, overhead: float = 0.0) -> Interval:
    """Return a predicted speedup with its interval; `overhead` the larger of the two steps'."""
    return _widened(
        _interval(value, [_residuals(name) for name in ("speedup", OTHER_MODEL)]), overhead
    )


def _widened(found: Interval, *shares: float) -> Interval:
    """Return the interval for a step whose shares, in the order of BEYOND, may be larger than those
    of the rows.
    """
    for (name, factor), share in zip(BEYOND.items(), shares, strict=False):
        beyond = max(0.0, share - stored()["furthest"][name])
        low, high = (
            found.low * (1 - beyond * (1 - 1 / factor)),
            found.high * (1 + beyond * (factor - 1)),
        )
        found = Interval(found.value, low, high)
    return found


def ratio_interval(value: float, gpu: Gpu, base: Gpu) -> Interval:
    """Return the predicted ratio of two GPUs' speeds with its interval: the errors of both, taken
    as independent of each other.
    """
    pairs = itertools.product(map(_residuals, _pools(gpu)), map(_residuals, _pools(base)))
    return _interval(value, [_differences(ours, theirs) for ours, theirs in pairs])


def _differences(ours: Array, theirs: Array) -> Array:
    """Return each residual of one less each of the other, the smallest first, each with the product
    of their weights.
    """
    both = np.stack(
        [
            np.subtract.outer(ours[:, 0], theirs[:, 0]).ravel(),
            np.multiply.outer(ours[:, 1], theirs[:, 1]).ravel(),
        ],
        axis=1,
    )
    return np.asarray(both[np.argsort(both[:, 0])])


def _interval(value: float, pools: list[Array]) -> Interval:
    """Return a value with the ends that hold, of each pool of residuals, COVERAGE of one more group
    than it has.

    A new row is one more of them (conformal prediction, Vovk et al. 2005), so that few groups make
    wide ends.
    """
    low = min(0.0, *(_end(pool) for pool in pools))
    high = max(0.0, *(-_end(np.column_stack([-pool[::-1, 0], pool[::-1, 1]])) for pool in pools))
    return Interval(value, value * math.exp(-high), value * math.exp(-low))


def _end(pool: Array) -> float:
    """Return the residual below which lie a tail of the pool's groups and the new one, less the new
    one; else the smallest.
    """
    tail = (1 - COVERAGE) / 2 * (pool[:, 1].sum() + 1) - 1
    below = np.cumsum(pool[:, 1]) - pool[:, 1]
    return float(pool[max(0, np.searchsorted(below, tail + 1e-9, side="right") - 1), 0])
