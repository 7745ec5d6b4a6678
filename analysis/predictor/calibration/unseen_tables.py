"""The unseen rows as tables: each beside its prediction, and the errors of the predictor and of its
rivals.

`half` names which half of the rows a line is of (see `halves`): forms are chosen on one, errors
reported on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from analysis.predictor.calibration.halves import CHOOSE, REPORT, halves
from analysis.predictor.calibration.published_steps import Row, rows
from analysis.predictor.calibration.rivals import rivals
from analysis.predictor.calibration.tables import layout_text
from analysis.predictor.calibration.unseen import unseen_rows
from analysis.predictor.calibration.validation import error
from analysis.predictor.constants import constants, step_time_interval
from analysis.predictor.model.step import predict
from analysis.render.table import Table, percent

SHORT = 1.0  # seconds: goals name steps below a second apart
TEXT = frozenset(
    ["family", "NeMo", "model", "precision", "layout", "who", "half", "what", "source"]
)


@dataclass(frozen=True)
class Line:
    """A published row beside its predicted seconds, its interval and its half; `rivals`: theirs, by
    name.
    """

    row: Row
    half: str
    seconds: float
    low: float
    high: float
    rivals: dict[str, float]

    @property
    def error(self) -> float:
        """The relative error of the predicted step time."""
        return error(self.seconds, self.row.step_time_s)

    @property
    def held(self) -> bool:
        """Whether the published step lies in the interval."""
        return self.low <= self.row.step_time_s <= self.high


def lines(found: Sequence[Row]) -> list[Line]:
    """Return the rows of one set beside what the shipped constants and the rivals predict."""
    half = halves(found)
    made = []
    for row in found:
        prediction = predict(row.plan, constants())
        interval = step_time_interval(
            prediction.step_time_s, row.plan.gpu, prediction.overhead, prediction.attention
        )
        others = {name: seconds(row.plan) for name, seconds in rivals().items()}
        made.append(Line(row, half[row], interval.value, interval.low, interval.high, others))
    return made


def tables(half: str) -> tuple[Table, Table]:
    """Return the unseen rows, and the errors of them and of the reference rows: of one half, or of
    "both".
    """
    wanted = (CHOOSE, REPORT) if half == "both" else (half,)
    unseen = [line for line in lines(unseen_rows()) if line.half in wanted]
    reference = [line for line in lines(rows()) if line.half in wanted]
    every = [_values(line) for line in unseen]
    sums = _sums(unseen, reference)
    return (
        Table(
            "Unseen published step times and predictions",
            [_shown(row) for row in every],
            every,
            _notes(),
            TEXT,
        ),
        Table(
            "Errors of unseen and of reference rows",
            [_shown_sum(row) for row in sums],
            sums,
            _rows_notes(),
            TEXT,
        ),
    )


def _values(line: Line) -> dict[str, Any]:
    row, plan = line.row, line.row.plan
    return {
        "label": "published",
        "family": row.held,
        "nemo": row.release,
        "submitter": row.submitter,
        "model": row.model,
        "precision": plan.precision.name,
        "gpu": row.gpu,
        "num_gpus": plan.num_gpus,
        "layout": layout_text(plan),
        "seq_length": plan.seq_length,
        "half": line.half,
        "published_step_time_s": row.step_time_s,
        "predicted_step_time_s": line.seconds,
        "step_time_low_s": line.low,
        "step_time_high_s": line.high,
        "error": line.error,
        "in_interval": line.held,
        "source": row.source,
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "family": row["family"],
        "who": row["submitter"],
        "NeMo": row["nemo"],
        "model": row["model"],
        "precision": row["precision"],
        "GPUs": f"{row['num_gpus']} {row['gpu']}",
        "layout": f"{row['layout']} seq{row['seq_length']}",
        "half": row["half"],
        "published, s": f"{row['published_step_time_s']:.3f}",
        "predicted, s": f"{row['predicted_step_time_s']:.3f}",
        "error": percent(row["error"]),
        "in interval": "yes" if row["in_interval"] else "no",
    }


def _sums(unseen: Sequence[Line], reference: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the errors of both sets, of their halves, and of the unseen rows by family, GPU,
    precision and length.
    """
    parts: dict[str, list[Line]] = {"unseen": list(unseen), "reference": list(reference)}
    for name, found in (("unseen", unseen), ("reference", reference)):
        for half in (CHOOSE, REPORT):
            parts[f"{name}, {half}"] = [line for line in found if line.half == half]
        parts[f"{name}, below {SHORT:g} s"] = [
            line for line in found if line.row.step_time_s < SHORT
        ]
        parts |= _by(name, found, lambda line: line.row.gpu)
    parts |= _by("unseen", unseen, lambda line: line.row.held)
    parts |= _by("unseen", unseen, lambda line: line.row.plan.precision.name)
    return [_sum(name, found) for name, found in parts.items() if found]


def _by(name: str, found: Sequence[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    return {
        f"{name}, {value}": [line for line in found if key(line) == value]
        for value in sorted({key(line) for line in found})
    }


def _sum(name: str, found: Sequence[Line]) -> dict[str, Any]:
    errors = [line.error for line in found]
    made: dict[str, Any] = {
        "what": name,
        "rows": len(found),
        "mean_error": mean(map(abs, errors)),
        "median_error": median(map(abs, errors)),
        "bias": mean(errors),
        "in_interval": mean(line.held for line in found),
    }
    for rival in found[0].rivals:
        sizes = [abs(error(line.rivals[rival], line.row.step_time_s)) for line in found]
        made |= {f"{rival}_mean_error": mean(sizes), f"{rival}_median_error": median(sizes)}
    return made


def _shown_sum(row: dict[str, Any]) -> dict[str, str]:
    shares = {
        name: percent(value, signed=name == "bias")
        for name, value in row.items()
        if name not in ("what", "rows")
    }
    return {
        "what": row["what"],
        "rows": str(row["rows"]),
        **{name.replace("_", " "): text for name, text in shares.items()},
    }


def _notes() -> list[str]:
    return [
        (
            "Published: analysis/reference/unseen_rows.csv, with sources; no row is fitted."
            " Predicted: by the shipped constants."
        ),
        (
            "Layouts are those of the configuration files; where a source leaves something out, the"
            " file's note names what was taken."
        ),
    ]


def _rows_notes() -> list[str]:
    return [
        (
            "Mean and median of absolute errors of step times; bias: their mean with its sign; in"
            " interval: the share in the 90% interval."
        ),
        (
            "Reference: by constants that were fitted to some of these rows; out of sample: python"
            " -m analysis.predict --validate."
        ),
        (
            "Rivals, with numbers taken from the same fitted rows:"
            " analysis/predictor/calibration/rivals.py."
        ),
    ]
