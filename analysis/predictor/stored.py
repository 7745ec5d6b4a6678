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

from analysis.predictor.gemm import RESULTS
from analysis.predictor.hardware import generation
from analysis.predictor.price import KNOWN, NAMES, Constants
from analysis.predictor.validation import Validation, residuals
from recipes.errors import InputError
from recipes.plan import Gpu

STORED = Path(__file__).resolve().parent / "constants.json"
COVERAGE = 0.9  # share of the residuals that an interval holds


@dataclass(frozen=True)
class Interval:
    """A predicted value and the ends between which nine of ten published ones lay, by how far off predictions were."""

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
        "residuals": residuals(found),
    }
    path.write_text(json.dumps(written, indent=1) + "\n")


def step_time_interval(seconds: float, gpu: Gpu) -> Interval:
    """Return a predicted step time with its interval: residuals of the GPU's generation, or of GPUs left out where it has no fitted row."""
    return _interval(seconds, _stored()["residuals"][generation(gpu)])


def speedup_interval(value: float) -> Interval:
    """Return a predicted speedup with its interval."""
    return _interval(value, _stored()["residuals"]["speedup"])


def _interval(value: float, errors: list[float]) -> Interval:
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(np.asarray(errors), (tail, 1 - tail))
    return Interval(value, value * math.exp(-max(float(high), 0.0)), value * math.exp(-min(float(low), 0.0)))
