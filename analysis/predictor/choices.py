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
PRIORS = (0.9, 1.1)  # of `blackwell`, which nothing fits where the GB200 is left out
ERRORS = ("step_time_error", "step_time_error_model_left_out", "step_time_error_gpu_left_out")
ALL_ERRORS = (*ERRORS, *(name.replace("step_time", "speedup") for name in ERRORS))


def otherwise(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the errors over every row (ALL_ERRORS, fractions) as chosen and for each other choice; a minute."""
    chosen = price.KNOWN["blackwell"].value
    made = [_errors(f"as chosen: power to {price.POWER:g}, blackwell's prior {chosen:g}", found, price.POWER, chosen)]
    made += [
        _errors(f"power to {value:.2g}: {name}" if name[0].isalpha() else f"power to {name}", found, value, chosen) for name, value in POWERS.items()
    ]
    return [*made, *(_errors(f"blackwell's prior {prior:g}", found, price.POWER, prior) for prior in PRIORS)]


def _errors(what: str, found: Sequence[Row], power: float, prior: float) -> dict[str, Any]:
    with _taken(power, prior):
        last = summary(validate(found))[-1]
    return {"choice": what, **{name: round(last[name], 5) for name in ALL_ERRORS}}


@contextmanager
def _taken(power: float, prior: float) -> Iterator[None]:
    before = price.POWER, price.KNOWN["blackwell"]
    try:
        price.POWER, price.KNOWN["blackwell"] = power, replace(before[1], value=prior)
        yield
    finally:
        price.POWER, price.KNOWN["blackwell"] = before
