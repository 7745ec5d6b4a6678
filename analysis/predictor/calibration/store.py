"""What a validation leaves behind for predictions: the constants with their errors, and the
residuals that intervals are made of.

`constants.json` is written by `python -m analysis.predict --refit` and by nothing else; a test
holds it to the published rows.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.predictor.calibration.fit import Fit
from analysis.predictor.calibration.validation import (
    LEFT_OUT,
    OTHER_MODEL,
    SHORT,
    SHORT_STEP,
    Fits,
    Validation,
    choosing_pairs,
    families,
    furthest,
    residuals,
)
from analysis.predictor.model.cost import FITTED, KNOWN, NAMES, Constants
from analysis.predictor.model.gemm import RESULTS
from analysis.stats.series import Array
from recipes.errors import InputError
from recipes.plan import Gpu

STORED = Path(__file__).resolve().parents[1] / "constants.json"
PAIR = re.compile(
    r"\[\s+(-?[\d.e-]+),\s+(-?[\d.e-]+)\s+\]"
)  # two numbers that JSON writes on four lines
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
def _stored() -> dict[str, Any]:
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
    return Constants(**{name: float(_stored()["constants"][name]["value"]) for name in NAMES})


def fitted_to() -> int:
    """Return the number of rows that the constants were fitted to."""
    return int(_stored()["fitted_to"]["rows"])


def fits() -> Fits:
    """Return the fits of the last refit, with which tables of the validation come out the same on
    every machine.
    """
    stored = _stored()
    errors = {name: float(stored["constants"][name]["error"]) for name in FITTED}
    left_out = (
        {name: Constants(**each) for name, each in stored[what].items()}
        for what in ("without_model", "without_gpu")
    )
    return Fits(Fit(constants(), errors), *left_out)


def choices() -> list[dict[str, Any]]:
    """Return the errors with other choices than those made by hand, of the last refit."""
    return list(_stored()["choices"])


def write(found: Validation, path: Path = STORED, choices: Sequence[dict[str, Any]] = ()) -> None:
    """Write the constants and residuals of a validation, and the errors with other choices
    (`choices.otherwise`).
    """
    fitted = asdict(found.fit.constants)
    values = {
        name: {
            "value": round(fitted[name], 6),
            "error": round(found.fit.errors[name], 6) if name in FITTED else None,
            "unit": prior.unit,
            "before": prior.value,
            "why": prior.why,
        }
        for name, prior in KNOWN.items()
    }
    rows = [line.row for line in found.lines if line.row.held == "fit"]
    written = {
        "constants": values,
        "fitted_to": {
            "rows": len(rows),
            "nemo": sorted({row.release for row in rows}),
            "gpus": sorted({row.gpu for row in rows}),
        },
        "gemms": RESULTS.name,
        "furthest": furthest(found),
        "families": families(found),
        "pairs": dict(
            Counter(
                f"{pair.fp8.row.plan.precision.name} {pair.fp8.row.gpu}"
                for pair in choosing_pairs(found)
            )
        ),
        "residuals": residuals(found),
        "without_model": {name: _rounded(each) for name, each in found.fits.without_model.items()},
        "without_gpu": {name: _rounded(each) for name, each in found.fits.without_gpu.items()},
        "choices": list(choices),
    }
    path.write_text(PAIR.sub(r"[\1, \2]", json.dumps(written, indent=1)) + "\n")


def _rounded(found: Constants) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(found).items()}


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
    family = _stored()["families"].get(gpu.name)
    return (
        [family]
        if family
        else [name for name in _stored()["residuals"] if name.startswith(LEFT_OUT)]
    )


def _residuals(name: str) -> Array:
    """Return residuals, the smallest first, with their weights beside them."""
    return np.asarray(_stored()["residuals"][name], dtype=float)


def basis(gpu: Gpu) -> str:
    """Return in words of which rows a step time's interval on this GPU is made."""
    families, found = _stored()["families"], _stored()["residuals"]
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
    recipes = sorted({name.split()[0] for name in _stored()["pairs"]})
    return "" if precision in recipes else ", ".join(recipes)


def speedup_basis(precision: str) -> str:
    """Return in words of which pairs a speedup's interval is made, and that they are of another
    recipe where that is so.
    """
    counts, others = _stored()["pairs"], borrowed(precision)
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
        beyond = max(0.0, share - _stored()["furthest"][name])
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
