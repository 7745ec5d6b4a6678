"""What a validation leaves behind: the constants with their errors, the residuals, and the errors
with other choices.

A test compares the file with the published rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.predictor.calibration.fit import Fit
from analysis.predictor.calibration.gemm_efficiency import RESULTS
from analysis.predictor.calibration.validation import (
    Fits,
    Validation,
    choosing_pairs,
    families,
    furthest,
    residuals,
)
from analysis.predictor.constants import STORED, constants, stored
from analysis.predictor.model.cost import FITTED, KNOWN, Constants

PAIR = re.compile(
    r"\[\s+(-?[\d.e-]+),\s+(-?[\d.e-]+)\s+\]"
)  # two numbers that JSON writes on four lines


def fitted_to() -> int:
    """Return the number of rows that the constants were fitted to."""
    return int(stored()["fitted_to"]["rows"])


def fits() -> Fits:
    """Return the fits of the last refit, with which tables of the validation come out the same on
    every machine.
    """
    found = stored()
    errors = {name: float(found["constants"][name]["error"]) for name in FITTED}
    left_out = (
        {name: Constants(**each) for name, each in found[what].items()}
        for what in ("without_model", "without_gpu")
    )
    return Fits(Fit(constants(), errors), *left_out)


def choices() -> list[dict[str, Any]]:
    """Return the errors with other choices than those made by hand, of the last refit."""
    return list(stored()["choices"])


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
