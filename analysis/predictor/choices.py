"""What other choices would have given: the errors of the predictor with a number set by hand, or a prior, taken otherwise.

A validation says how far off a model is, not how much of that was luck in making it.  The choices that rows with a GPU left out
depend on most are taken otherwise here, one at a time, and everything is fitted and validated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from analysis.predictor import price
from analysis.predictor.rows import Row
from analysis.predictor.validation import summary, validate

POWERS = {"no such term": 0.0, "the cube root": 1 / 3, "0.4": 0.4, "0.6": 0.6, "the share itself": 1.0}
PRIORS: dict[str, tuple[str, dict[str, float]]] = {
    "blackwell's prior 0.9": ("blackwell", {"value": 0.9}),  # which nothing fits where the GB200 is left out
    "blackwell's prior 1.1": ("blackwell", {"value": 1.1}),
    "gap's prior half as wide: factor 1.5": ("gap", {"factor": 1.5}),
    "gap's prior as before: 2, factor 1.5, at most 10": ("gap", {"value": 2.0, "factor": 1.5, "high": 10.0}),
    "gap's prior the idle gaps of a profile: 1.6, factor 1.5": ("gap", {"value": 1.6, "factor": 1.5}),
}
ERRORS = ("step_time_error", "step_time_error_model_left_out", "step_time_error_gpu_left_out")
ALL_ERRORS = (*ERRORS, *(name.replace("step_time", "speedup") for name in ERRORS))


def otherwise(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the errors over every row (ALL_ERRORS, fractions) as chosen and for each other choice; a minute."""
    made = [_errors(f"as chosen: power to {price.POWER:g}", found, price.POWER)]
    made += [_errors(f"power to {value:.2g}: {name}" if name[0].isalpha() else f"power to {name}", found, value) for name, value in POWERS.items()]
    return [*made, *(_errors(what, found, price.POWER, prior) for what, prior in PRIORS.items())]


def _errors(what: str, found: Sequence[Row], power: float, prior: tuple[str, dict[str, float]] | None = None) -> dict[str, Any]:
    with _taken(power, *(prior or ("gap", {}))):
        last = summary(validate(found))[-1]
    return {"choice": what, **{name: round(last[name], 5) for name in ALL_ERRORS}}


@contextmanager
def _taken(power: float, name: str, changed: dict[str, float]) -> Iterator[None]:
    before = price.POWER, price.KNOWN[name]
    try:
        price.POWER, price.KNOWN[name] = power, replace(before[1], **changed)  # type: ignore[arg-type]
        yield
    finally:
        price.POWER, price.KNOWN[name] = before
