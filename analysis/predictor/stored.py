"""What a validation leaves behind for predictions: the constants with their errors, and the residuals that intervals are made of.

`constants.json` is written by `python -m analysis.predict --refit` and by nothing else; a test holds it to the published rows.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.predictor.fitting import Fit
from analysis.predictor.gemm import RESULTS
from analysis.predictor.hardware import generation
from analysis.predictor.price import KNOWN, NAMES, Constants
from analysis.predictor.validation import Fits, Validation, residuals
from recipes.errors import InputError
from recipes.plan import Gpu

STORED = Path(__file__).resolve().parent / "constants.json"
COVERAGE = 0.9  # share of the residuals that an interval holds
OVERHEAD_FACTOR = 2.0  # by which launching and the fixed part of a step may be off (price.KNOWN) where no published step shows them


@dataclass(frozen=True)
class Interval:
    """A predicted value and the ends between which nine of ten published ones lay, by how far off predictions were; wider where none was like it."""

    value: float
    low: float
    high: float


@functools.cache
def _stored() -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(STORED.read_text())
    except (OSError, ValueError):
        raise InputError(f"{STORED.name} is missing or damaged; make it again with python -m analysis.predict --refit") from None
    return read


@functools.cache
def constants() -> Constants:
    """Return the constants of the last fit."""
    return Constants(**{name: float(_stored()["constants"][name]["value"]) for name in NAMES})


def fits() -> Fits:
    """Return the fits of the last refit, with which tables of the validation come out the same on every machine."""
    stored = _stored()
    errors = {name: float(stored["constants"][name]["error"]) for name in NAMES}
    left_out = ({name: Constants(**each) for name, each in stored[what].items()} for what in ("without_model", "without_gpu"))
    return Fits(Fit(constants(), errors), *left_out)


def write(found: Validation, path: Path = STORED) -> None:
    """Write the constants and residuals of a validation."""
    fitted = asdict(found.fit.constants)
    values = {
        name: {
            "value": round(fitted[name], 6),
            "error": round(found.fit.errors[name], 6),
            "unit": prior.unit,
            "before": prior.value,
            "why": prior.why,
        }
        for name, prior in KNOWN.items()
    }
    rows = [line.row for line in found.lines if line.row.held == "fit"]
    written = {
        "constants": values,
        "fitted_to": {"rows": len(rows), "nemo": sorted({row.release for row in rows}), "gpus": sorted({row.gpu for row in rows})},
        "gemms": RESULTS.name,
        "overhead": round(max(line.overhead for line in found.lines), 4),
        "residuals": residuals(found),
        "without_model": {name: _rounded(each) for name, each in found.fits.without_model.items()},
        "without_gpu": {name: _rounded(each) for name, each in found.fits.without_gpu.items()},
    }
    path.write_text(json.dumps(written, indent=1) + "\n")


def _rounded(found: Constants) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(found).items()}


def step_time_interval(seconds: float, gpu: Gpu, overhead: float = 0.0) -> Interval:
    """Return a predicted step time with its interval: residuals of the GPU's generation, or of GPUs left out where it has no fitted row.

    `overhead`: the prediction's; beyond what any published row has, it is known within a factor of OVERHEAD_FACTOR alone.
    """
    return _widened(_interval(seconds, _stored()["residuals"][generation(gpu)]), overhead)


def speedup_interval(value: float, overhead: float = 0.0) -> Interval:
    """Return a predicted speedup with its interval; `overhead` the larger of the two steps'."""
    return _widened(_interval(value, _stored()["residuals"]["speedup"]), overhead)


def _widened(found: Interval, overhead: float) -> Interval:
    beyond = max(0.0, overhead - _stored()["overhead"])
    return Interval(found.value, found.low * (1 - beyond * (1 - 1 / OVERHEAD_FACTOR)), found.high * (1 + beyond * (OVERHEAD_FACTOR - 1)))


def ratio_interval(value: float, gpu: Gpu, base: Gpu) -> Interval:
    """Return the predicted ratio of two GPUs' speeds with its interval: the errors of both, taken as independent of each other."""
    ours, theirs = (np.asarray(_stored()["residuals"][generation(each)]) for each in (gpu, base))
    return _interval(value, list(np.subtract.outer(ours, theirs).ravel()))


def _interval(value: float, errors: list[float]) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.asarray(errors), (tail, 1 - tail))
    return Interval(value, value * math.exp(-max(float(high), 0.0)), value * math.exp(-min(float(low), 0.0)))
