"""How far off the predictor is: every published row beside its prediction, by constants that did
not know it.

Every row is predicted three times: by all constants, by constants fitted without its model, and by
constants fitted without its GPU.  For rows that were fitted the first is in sample; every other row
is out of sample as it is.  Speedups are ratios of a BF16 and an FP8 row published side by side.
Beside them stand steps that this project measured: no constant is fitted to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from analysis.predictor.calibration.fit import Fit, fit, step_time
from analysis.predictor.calibration.halves import CHOOSE, halves
from analysis.predictor.calibration.published_steps import Row, own_rows, pairs, rows
from analysis.predictor.calibration.unseen import unseen_rows
from analysis.predictor.constants import LEFT_OUT, OTHER_MODEL, SHORT, SHORT_STEP
from analysis.predictor.model.cost import Constants
from analysis.predictor.model.hardware import generation
from analysis.predictor.model.step import predict
from analysis.runs.published import post_speedups
from recipes.compose.tree import compose_plan

SETS = {
    "fit": "fitted: NeMo 25.02 to 25.07, recipe stated, or inferred from the scripts' default",
    "other half": "tested: the same releases, the half of the rows that only reports",
    "other release": "tested: NeMo 24.09, 24.12, 25.09 to 26.06",
    "further rows": "tested: further rows, a file that is not fitted",
    "fewer layers": "tested: the same model cut in depth",
    "recipe not stated": "tested: recipe neither stated nor inferred, taken as delayed",
    "other GPU": "tested: GB300, a GPU without a fitted row, NeMo 25.11 to 26.06",
}
EVERYTHING = "all, out of sample"
EVERY_ROW = (
    "every row by constants that did not know it (out of sample: fitted rows without their model)"
)
ENOUGH = 5  # rows that choose, from which a GPU's interval is that of its generation
GOALS = {"step time": 0.07, "speedup": 0.03}  # out of sample, mean of absolute errors


@dataclass(frozen=True, eq=False)
class Line:
    """A published row and its predicted seconds: by all constants, by those without its model, and
    by those without its GPU.

    `overhead`, `attention`: as of `step.Prediction`, by all constants.
    """

    row: Row
    seconds: float
    without_model: float
    without_gpu: float
    overhead: float
    attention: float

    @property
    def out_of_sample(self) -> float:
        """Seconds by constants that did not know the row."""
        return self.without_model if self.row.held == "fit" else self.seconds


# What a row is predicted by, under the ends of the names of its errors.
WAYS: dict[str, Callable[[Line], float]] = {
    "_in_sample": lambda line: line.seconds,
    "": lambda line: line.out_of_sample,
    "_model_left_out": lambda line: line.without_model,
    "_gpu_left_out": lambda line: line.without_gpu,
}


@dataclass(frozen=True)
class Pair:
    """A BF16 and an FP8 line published side by side."""

    bf16: Line
    fp8: Line

    @property
    def published(self) -> float:
        """The published speedup."""
        return self.bf16.row.step_time_s / self.fp8.row.step_time_s

    @property
    def iso(self) -> bool:
        """Whether both have one layout."""
        return self.bf16.row.plan.mapping == self.fp8.row.plan.mapping


@dataclass(frozen=True)
class Fits:
    """Constants fitted to all rows that may be, without each model, and without each GPU, by its
    name.
    """

    everything: Fit
    without_model: dict[str, Constants]
    without_gpu: dict[str, Constants]


@dataclass(frozen=True)
class Validation:
    """The fits, every line, and the pairs."""

    fits: Fits
    lines: tuple[Line, ...]
    pairs: tuple[Pair, ...]

    @property
    def fit(self) -> Fit:
        """The fit on all fitted rows."""
        return self.fits.everything


def validate(found: Sequence[Row] | None = None, fits: Fits | None = None) -> Validation:
    """Return every published row beside its predictions: by `fits`, or fitted now."""
    found = rows() if found is None else found
    fits = fits or refit(found)
    lines = {row: _line_of(row, fits) for row in found}
    return Validation(
        fits,
        tuple(lines.values()),
        tuple(Pair(lines[base], lines[fp8]) for base, fp8 in pairs(found)),
    )


def refit(found: Sequence[Row]) -> Fits:
    """Return constants fitted to all rows that may be fitted, and without each of their models and
    GPUs.
    """
    fitted = [row for row in found if row.held == "fit"]
    models, gpus = {row.model for row in fitted}, {row.gpu for row in fitted}
    return Fits(
        fit(fitted),
        {
            name: fit([row for row in fitted if row.model != name]).constants
            for name in sorted(models)
        },
        {name: fit([row for row in fitted if row.gpu != name]).constants for name in sorted(gpus)},
    )


def _line_of(row: Row, fits: Fits) -> Line:
    prediction = predict(row.plan, fits.everything.constants)
    without_model = step_time(row, fits.without_model.get(row.model, fits.everything.constants))
    without_gpu = step_time(row, fits.without_gpu.get(row.gpu, fits.everything.constants))
    return Line(
        row,
        prediction.step_time_s,
        without_model,
        without_gpu,
        prediction.overhead,
        prediction.attention,
    )


def error(predicted: float, published: float) -> float:
    """Return the relative error of a prediction."""
    return predicted / published - 1


def mean_size(errors: Iterable[float]) -> float | None:
    """Return the mean of absolute errors; None of none."""
    sizes = [abs(e) for e in errors]
    return sum(sizes) / len(sizes) if sizes else None


def post(found: Validation) -> list[dict[str, Any]]:
    """Return the speedups that NVIDIA's post prints (figure 3: H100, current scaling, recommended
    layouts) beside predicted ones.

    No current-scaling row on an H100 is fitted.
    """
    made = []
    for (model, precision), published in post_speedups().items():
        cells = [
            compose_plan([f"model={model}", f"precision={p}", "gpu=h100", "experiment=throughput"])
            for p in ("bf16", precision)
        ]
        bf16, fp8 = (predict(plan, found.fit.constants).tokens_per_s_per_gpu for plan in cells)
        pair = "iso-mapping" if cells[0].mapping == cells[1].mapping else "best-mapping"
        place = {
            "set": "post",
            "nemo": "25.04",
            "model": model,
            "num_layers": cells[1].model.num_layers,
            "precision": precision,
            "gpu": "h100",
        }
        sizes = {"num_gpus": cells[1].num_gpus, "layout": "recommended", "pair": pair}
        made.append(
            {
                **place,
                **sizes,
                "published_speedup": published,
                "predicted_speedup": fp8 / bf16,
                "error": error(fp8 / bf16, published),
            }
        )
    return made


def summary(found: Validation) -> list[dict[str, Any]]:
    """Return the mean absolute errors of step time and speedup, a row a set, and one for all that
    is out of sample.
    """
    made = [
        _summary(name, [line for line in found.lines if line.row.held == name], found.pairs)
        for name in SETS
    ]
    return [*made, _summary(EVERYTHING, list(found.lines), found.pairs)]


def _summary(name: str, lines: Sequence[Line], every_pair: Sequence[Pair]) -> dict[str, Any]:
    own = [pair for pair in every_pair if pair.fp8 in lines]
    made: dict[str, Any] = {
        "set": name,
        "what": SETS.get(name, EVERY_ROW),
        "rows": len(lines),
        "pairs": len(own),
    }
    for way, seconds in WAYS.items():
        known = name == "fit" or way != "_in_sample"
        steps = [(line, error(seconds(line), line.row.step_time_s)) for line in lines if known]
        ratios = [
            (pair.fp8, error(seconds(pair.bf16) / seconds(pair.fp8), pair.published))
            for pair in own
            if known
        ]
        made |= {
            f"step_time_error{way}": mean_size(e for _, e in steps),
            f"speedup_error{way}": mean_size(e for _, e in ratios),
        }
        if way == "":
            made |= {
                "step_time_error_layouts": _by_layout(steps),
                "speedup_error_layouts": _by_layout(ratios),
            }
    return made


def post_summary(printed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of the speedups that the post prints."""
    what = "tested: the speedups that the post prints (figure 3)"
    return {
        **_summary("post", [], []),
        "what": what,
        "pairs": len(printed),
        "speedup_error": mean_size(row["error"] for row in printed),
    }


def own_summary(fits: Fits) -> dict[str, Any]:
    """Return the summary of the steps that this project measured."""
    own = validate(own_rows(), fits)
    return {
        **_summary("own", list(own.lines), own.pairs),
        "what": "tested: measured by this project on one H200, whole and cut in depth",
    }


def speedup_error(pair: Pair) -> float:
    """Return the relative error of a predicted speedup, out of sample."""
    return error(pair.bf16.out_of_sample / pair.fp8.out_of_sample, pair.published)


def _by_layout(errors: Iterable[tuple[Line, float]]) -> float | None:
    """Return the mean over layouts of the mean absolute error of each: a layout published at eight
    scales counts once.
    """
    cells: dict[object, list[float]] = {}
    for line, each in errors:
        cells.setdefault(line.row.cell, []).append(each)
    return mean_size(mean_size(each) or 0.0 for each in cells.values())


def families(found: Validation) -> dict[str, str]:
    """Return the GPUs with enough rows for an interval of their own family, each with its
    generation.
    """
    counted = Counter(line.row.gpu for line in _choosing(found))
    gpus = {line.row.gpu: generation(line.row.plan.gpu) for line in found.lines}
    return {gpu: family for gpu, family in gpus.items() if counted[gpu] >= ENOUGH}


def residuals(found: Validation) -> dict[str, list[tuple[float, float]]]:
    """Return what intervals are made of: logarithms of predicted over published, each with its
    weight.

    By constants that did not know the row, of the half of the rows that chooses, the unseen ones
    too: by generation of the GPU, SHORT for predicted steps below SHORT_STEP, "speedup" for pairs.
    For each GPU by constants fitted without it (LEFT_OUT and its name).  A group of rows that err
    alike weighs one.
    """
    pools: dict[str, dict[Line, float]] = {}
    for line in _choosing(found):
        published = line.row.step_time_s
        pools.setdefault(generation(line.row.plan.gpu), {})[line] = math.log(
            line.out_of_sample / published
        )
        pools.setdefault(f"{LEFT_OUT}{line.row.gpu}", {})[line] = math.log(
            line.without_gpu / published
        )
        if line.out_of_sample < SHORT_STEP:
            pools.setdefault(SHORT, {})[line] = math.log(line.out_of_sample / published)
    pools["speedup"] = {pair.fp8: math.log1p(speedup_error(pair)) for pair in choosing_pairs(found)}
    made = {name: _weighted(pool) for name, pool in sorted(pools.items())}
    return {**made, OTHER_MODEL: _other_model(pools["speedup"])}


def furthest(found: Validation) -> dict[str, float]:
    """Return the largest shares of a step that launches and the fixed part, and attention, have in
    a row that chooses.
    """
    lines = _choosing(found)
    return {
        name: round(max(getattr(line, name) for line in lines), 4)
        for name in ("overhead", "attention")
    }


def choosing_pairs(found: Validation) -> list[Pair]:
    """Return the pairs of the half that chooses."""
    half = halves([line.row for line in found.lines])
    return [pair for pair in found.pairs if half[pair.fp8.row] == CHOOSE]


def _other_model(pool: Mapping[Line, float]) -> list[tuple[float, float]]:
    """Return the ends that hold 90 % of the speedup errors of a model that is none of the pool's.

    Speedups of one model err alike whatever the release.  Models are few, so that the ends are
    Student's, for one more model with the mean and the spread of theirs.
    """
    by_model: dict[str, list[float]] = {}
    for line, each in pool.items():
        by_model.setdefault(line.row.model, []).append(each)
    means = [mean(errors) for errors in by_model.values()]
    width = float(stdtrit(len(means) - 1, 0.95)) * stdev(means) * math.sqrt(1 + 1 / len(means))
    return [(round(mean(means) - width, 4), 1.0), (round(mean(means) + width, 4), 1.0)]


def _weighted(pool: Mapping[Line, float]) -> list[tuple[float, float]]:
    sizes = Counter(line.row.group for line in pool)
    return sorted(
        (round(error, 4), round(1 / sizes[line.row.group], 4)) for line, error in pool.items()
    )


def _choosing(found: Validation) -> list[Line]:
    """Return the lines of the half that chooses, of the reference rows and of the unseen ones."""
    unseen = [_line_of(row, found.fits) for row in unseen_rows()]
    every = [
        *zip(found.lines, _halves(found.lines), strict=True),
        *zip(unseen, _halves(unseen), strict=True),
    ]
    return [line for line, half in every if half == CHOOSE]


def _halves(lines: Sequence[Line]) -> list[str]:
    half = halves([line.row for line in lines])
    return [half[line.row] for line in lines]
