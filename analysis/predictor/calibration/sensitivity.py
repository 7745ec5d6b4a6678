"""What other choices would have given: the errors of the predictor with a number set by hand, or a
prior, taken otherwise.

The choices that steps depend on most are taken otherwise here, one at a time, and what is fitted is
fitted again.  All errors are of the half of the rows that chooses (`halves`): the other half is no
judge of choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from analysis.predictor.calibration.fit import fit, step_time
from analysis.predictor.calibration.halves import CHOOSE, halves
from analysis.predictor.calibration.published_steps import Row, pairs
from analysis.predictor.calibration.validation import error, mean_size
from analysis.predictor.model import cost
from analysis.predictor.model.cost import Constants

OTHER_NUMBERS: dict[str, dict[str, float]] = {
    "POWER": {"power to 0: no such term": 0.0, "power to 1/2": 0.5, "power to 2/3": 2 / 3},
    "GRAPHED_GAP": {"CUDA graphs leave all of a gap": 1.0, "CUDA graphs leave 0.29 of a gap": 0.29},
    "GRAPHED_FIXED": {"CUDA graphs leave all of the fixed part": 1.0},
    "LATENCY": {"no latency of messages": 0.0},
    "HIDDEN_EXPOSED": {
        "0.1 of a hidden message is waited for": 0.1,
        "half of a hidden message is waited for": 0.5,
    },
}
PRIORS: dict[str, tuple[str, dict[str, float]]] = {
    "blackwell 1.0": ("blackwell", {"value": 1.0}),
    "blackwell 1.25": ("blackwell", {"value": 1.25}),
    "mxfp8 0.9": ("mxfp8", {"value": 0.9}),
    "gap the idle gaps of a profile: 1.6": ("gap", {"value": 1.6}),
    "gap 8": ("gap", {"value": 8.0}),
    "fixed part twice as long": ("fixed", {"value": 0.06}),
}
ERRORS = ("step_time_error", "unseen_step_time_error", "speedup_error")


def otherwise(reference: Sequence[Row], unseen: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the errors (ERRORS, fractions) of the rows that choose, as chosen and for each other
    choice.
    """
    found, new = _choosing(reference), _choosing(unseen)
    made = [_errors("as chosen", found, new)]
    for number, values in OTHER_NUMBERS.items():
        for what, value in values.items():
            with _number(number, value):
                made.append(_errors(what, found, new))
    for what, (name, changed) in PRIORS.items():
        with _prior(name, changed):
            made.append(_errors(what, found, new))
    return made


def _choosing(found: Sequence[Row]) -> list[Row]:
    half = halves(found)
    return [row for row in found if half[row] == CHOOSE]


def _errors(what: str, found: Sequence[Row], unseen: Sequence[Row]) -> dict[str, Any]:
    constants = fit([row for row in found if row.held == "fit"]).constants
    ratios = [
        error(_speedup(*pair, constants), pair[0].step_time_s / pair[1].step_time_s)
        for pair in pairs(found)
    ]
    errors = (_sizes(found, constants), _sizes(unseen, constants), mean_size(ratios))
    return {
        "choice": what,
        **{name: round(value or 0.0, 5) for name, value in zip(ERRORS, errors, strict=True)},
    }


def _sizes(found: Sequence[Row], constants: Constants) -> float | None:
    return mean_size(error(step_time(row, constants), row.step_time_s) for row in found)


def _speedup(bf16: Row, fp8: Row, constants: Constants) -> float:
    return step_time(bf16, constants) / step_time(fp8, constants)


@contextmanager
def _number(name: str, value: float) -> Iterator[None]:
    """Set a number of `price` that is taken by hand, for a while; `step` reads them there too."""
    before = getattr(cost, name)
    try:
        setattr(cost, name, value)
        yield
    finally:
        setattr(cost, name, before)


@contextmanager
def _prior(name: str, changed: dict[str, float]) -> Iterator[None]:
    before = cost.KNOWN[name]
    try:
        cost.KNOWN[name] = replace(before, **changed)  # type: ignore[arg-type]
        yield
    finally:
        cost.KNOWN[name] = before
