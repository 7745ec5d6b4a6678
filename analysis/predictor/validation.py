"""How far off the predictor is: every published row beside its prediction, by constants that did not know it.

Rows that were fitted are predicted three times: by all constants (in sample), by constants fitted without their model, and by constants
fitted without their GPU.  Every other row is out of sample as it is.  Speedups are ratios of a BF16 and an FP8 row published side by side.
Beside them stand steps that this project measured: they came after the model and its constants, and neither knows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.predictor.fitting import Fit, fit, step_time
from analysis.predictor.hardware import generation
from analysis.predictor.price import Constants
from analysis.predictor.rows import Row, own_rows, pairs, rows
from analysis.predictor.step import predict
from analysis.published import post_speedups
from analysis.tabular import Table
from recipes.compose import compose_plan

SETS = {
    "fit": "fitted: NeMo 25.02 to 25.07, recipe stated",
    "other release": "tested: NeMo 24.09, 24.12, 25.09 to 26.06",
    "set aside": "tested: set aside until the form of the model was chosen",
    "fewer layers": "tested: the same model cut in depth",
    "recipe not stated": "tested: recipe not stated, taken as delayed",
}
EVERYTHING = "all, out of sample"
GOALS = {"step time": 0.07, "speedup": 0.03}  # out of sample, mean of absolute errors


@dataclass(frozen=True)
class Line:
    """A published row and its predicted seconds: by all constants, and for fitted rows by those without its model and without its GPU.

    `overhead`: as of `step.Prediction`, by all constants.
    """

    row: Row
    seconds: float
    without_model: float | None
    without_gpu: float | None
    overhead: float

    @property
    def out_of_sample(self) -> float:
        """Seconds by constants that did not know the row."""
        return self.seconds if self.without_model is None else self.without_model


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
    """Constants fitted to all rows that may be, without each model, and without each GPU, by its name."""

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
    return Validation(fits, tuple(lines.values()), tuple(Pair(lines[base], lines[fp8]) for base, fp8 in pairs(found)))


def refit(found: Sequence[Row]) -> Fits:
    """Return constants fitted to all rows that may be fitted, and without each of their models and GPUs."""
    fitted = [row for row in found if row.held == "fit"]
    models, gpus = {row.model for row in fitted}, {row.gpu for row in fitted}
    return Fits(
        fit(fitted),
        {name: fit([row for row in fitted if row.model != name]).constants for name in sorted(models)},
        {name: fit([row for row in fitted if row.gpu != name]).constants for name in sorted(gpus)},
    )


def _line_of(row: Row, fits: Fits) -> Line:
    prediction = predict(row.plan, fits.everything.constants)
    fitted = row.held == "fit"
    without_model = step_time(row, fits.without_model[row.model]) if fitted else None
    without_gpu = step_time(row, fits.without_gpu[row.gpu]) if fitted else None
    return Line(row, prediction.step_time_s, without_model, without_gpu, prediction.overhead)


def error(predicted: float, published: float) -> float:
    """Return the relative error of a prediction."""
    return predicted / published - 1


def mean_size(errors: Iterable[float]) -> float | None:
    """Return the mean of absolute errors; None of none."""
    sizes = [abs(e) for e in errors]
    return sum(sizes) / len(sizes) if sizes else None


def post(found: Validation) -> list[dict[str, Any]]:
    """Return the speedups that NVIDIA's post prints (figure 3: H100, current scaling, recommended layouts) beside predicted ones.

    No current-scaling row on an H100 is fitted.
    """
    made = []
    for (model, precision), published in post_speedups().items():
        cells = [compose_plan([f"model={model}", f"precision={p}", "gpu=h100", "experiment=throughput"]) for p in ("bf16", precision)]
        bf16, fp8 = (predict(plan, found.fit.constants).tokens_per_s_per_gpu for plan in cells)
        pair = "iso-mapping" if cells[0].mapping == cells[1].mapping else "best-mapping"
        place = {"set": "post", "nemo": "25.04", "model": model, "num_layers": cells[1].model.num_layers, "precision": precision, "gpu": "h100"}
        sizes = {"num_gpus": cells[1].num_gpus, "layout": "recommended", "pair": pair}
        made.append({**place, **sizes, "published_speedup": published, "predicted_speedup": fp8 / bf16, "error": error(fp8 / bf16, published)})
    return made


def summary(found: Validation) -> list[dict[str, Any]]:
    """Return the mean absolute errors of step time and speedup, a row a set, and one for all that is out of sample."""
    made = [_summary(name, [line for line in found.lines if line.row.held == name], found.pairs) for name in SETS]
    return [*made, _summary(EVERYTHING, list(found.lines), found.pairs)]


def _summary(name: str, lines: Sequence[Line], every_pair: Sequence[Pair]) -> dict[str, Any]:
    own = [pair for pair in every_pair if pair.fp8 in lines]
    known = [line for line in lines if line.without_gpu is not None] if name == "fit" else []
    return {
        "set": name,
        "what": SETS.get(name, "every row by constants that did not know it (fitted rows: their model left out)"),
        "rows": len(lines),
        "step_time_error_in_sample": mean_size(error(x.seconds, x.row.step_time_s) for x in lines) if name == "fit" else None,
        "step_time_error": mean_size(error(x.out_of_sample, x.row.step_time_s) for x in lines),
        "step_time_error_layouts": _by_layout(lines),
        "step_time_error_gpu_left_out": mean_size(error(x.without_gpu or math.nan, x.row.step_time_s) for x in known),
        "pairs": len(own),
        "speedup_error_in_sample": mean_size(error(p.bf16.seconds / p.fp8.seconds, p.published) for p in own) if name == "fit" else None,
        "speedup_error": mean_size(speedup_error(p) for p in own),
    }


def _post_summary(printed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    nothing = dict.fromkeys(("step_time_error_in_sample", "step_time_error", "step_time_error_layouts", "step_time_error_gpu_left_out"))
    name = {"set": "post", "what": "tested: the speedups that the post prints (figure 3)", "rows": 0}
    return {**name, **nothing, "pairs": len(printed), "speedup_error_in_sample": None, "speedup_error": mean_size(row["error"] for row in printed)}


def _own_summary(fits: Fits) -> dict[str, Any]:
    own = validate(own_rows(), fits)
    return {**_summary("own", list(own.lines), own.pairs), "what": "tested: measured by this project on one H200, whole and cut in depth"}


def speedup_error(pair: Pair) -> float:
    """Return the relative error of a predicted speedup, out of sample."""
    return error(pair.bf16.out_of_sample / pair.fp8.out_of_sample, pair.published)


def _by_layout(lines: Sequence[Line]) -> float | None:
    """Return the mean over layouts of the mean absolute error of each: a layout published at eight scales counts once."""
    cells: dict[object, list[float]] = {}
    for line in lines:
        cells.setdefault(line.row.cell, []).append(error(line.out_of_sample, line.row.step_time_s))
    return mean_size(mean_size(errors) or 0.0 for errors in cells.values())


def residuals(found: Validation) -> dict[str, list[float]]:
    """Return what intervals are made of: logarithms of predicted over published, out of sample, one a layout.

    By generation, for GPUs of a generation that was fitted; "unknown" for others (from GPUs left out); "speedup" for ratios.
    """
    made: dict[str, dict[object, list[float]]] = {"hopper": {}, "blackwell": {}, "unknown": {}, "speedup": {}}
    for line in found.lines:
        published = line.row.step_time_s
        made[generation(line.row.plan.gpu)].setdefault(line.row.cell, []).append(math.log(line.out_of_sample / published))
        if line.without_gpu:
            made["unknown"].setdefault(line.row.cell, []).append(math.log(line.without_gpu / published))
    for pair in found.pairs:
        made["speedup"].setdefault(pair.fp8.row.cell, []).append(math.log1p(speedup_error(pair)))
    return {name: sorted(round(sum(errors) / len(errors), 4) for errors in cells.values()) for name, cells in made.items()}


def tables(found: Validation) -> tuple[Table, Table, Table]:
    """Return the table of rows, that of speedups, and the summary."""
    lines = [_line(line) for line in found.lines]
    printed = post(found)
    both = [*(_pair(pair) for pair in found.pairs), *printed]
    sums = [*summary(found), _post_summary(printed), _own_summary(found.fits)]
    text = frozenset(["set", "what", "NeMo", "model", "precision", "layout", "label", "source", "FP8 layout"])
    return (
        Table("Published step times and predictions", [_shown_line(row) for row in lines], lines, _notes(), text),
        Table("Published speedups over BF16 and predictions", [_shown_pair(row) for row in both], both, text=text),
        Table("Mean absolute error", [_shown_summary(row) for row in sums], sums, _goals(sums), text),
    )


def own_table(fits: Fits) -> Table:
    """Return the steps that this project measured beside what was predicted of them."""
    lines = [_line(line) for line in validate(own_rows(), fits).lines]
    for line in lines:
        line["measured_step_time_s"] = line.pop("published_step_time_s")
    shown = [
        {
            "model": row["model"],
            "layers": str(row["num_layers"]),
            "precision": row["precision"],
            "layout": row["layout"],
            "measured, s": f"{row['measured_step_time_s']:.3f}",
            "predicted, s": f"{row['predicted_step_time_s']:.3f}",
            "error": percent(row["error"]),
        }
        for row in lines
    ]
    notes = ["Measured on one H200 after the constants were fitted, to none of these rows."]
    return Table("Measured step times and predictions", shown, lines, notes, frozenset(["model", "precision", "layout"]))


def _line(line: Line) -> dict[str, Any]:
    plan, published = line.row.plan, line.row.step_time_s
    m = plan.mapping
    flags = "".join(f" {name}" for name in ("fsdp", "cuda_graphs") if getattr(m, name))
    return {
        "set": line.row.held,
        "nemo": line.row.release,
        "model": plan.model.name,
        "num_layers": plan.model.num_layers,
        "precision": plan.precision.name,
        "gpu": plan.gpu.name,
        "num_gpus": plan.num_gpus,
        "layout": f"tp{m.tp} pp{m.pp} cp{m.cp} vp{m.vp} mbs{m.micro_batch} gbs{m.global_batch}{flags}",
        "published_step_time_s": published,
        "predicted_step_time_s": line.seconds,
        "error": error(line.seconds, published),
        "in_sample": line.without_model is not None,
        "error_model_left_out": None if line.without_model is None else error(line.without_model, published),
        "error_gpu_left_out": None if line.without_gpu is None else error(line.without_gpu, published),
        "source": line.row.source,
    }


def _pair(pair: Pair) -> dict[str, Any]:
    fp8 = _line(pair.fp8)
    kept = ("set", "nemo", "model", "num_layers", "precision", "gpu", "num_gpus", "layout")
    return {
        **{key: fp8[key] for key in kept},
        "pair": "iso-mapping" if pair.iso else "best-mapping",
        "published_speedup": pair.published,
        "predicted_speedup": pair.bf16.out_of_sample / pair.fp8.out_of_sample,
        "error": speedup_error(pair),
    }


def percent(value: float | None, signed: bool = True) -> str:
    """Return a share in per cent; a dash for none."""
    return "–" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"


def _shown_line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "set": row["set"],
        "NeMo": row["nemo"],
        "model": f"{row['model']}, {row['num_layers']} layers" if row["set"] == "fewer layers" else row["model"],
        "precision": row["precision"],
        "GPUs": f"{row['num_gpus']} {row['gpu']}",
        "layout": row["layout"],
        "published, s": f"{row['published_step_time_s']:.3f}",
        "predicted, s": f"{row['predicted_step_time_s']:.3f}",
        "error": percent(row["error"]),
        "model left out": percent(row["error_model_left_out"]),
        "GPU left out": percent(row["error_gpu_left_out"]),
    }


def _shown_pair(row: dict[str, Any]) -> dict[str, str]:
    return {
        "set": row["set"],
        "NeMo": row["nemo"],
        "model": row["model"],
        "precision": row["precision"],
        "GPUs": f"{row['num_gpus']} {row['gpu']}",
        "FP8 layout": f"{row['layout']}, {row['pair']}",
        "published": f"{row['published_speedup']:.3f}",
        "predicted": f"{row['predicted_speedup']:.3f}",
        "error": percent(row["error"]),
    }


def _shown_summary(row: dict[str, Any]) -> dict[str, str]:
    return {
        "what": row["what"],
        "rows": str(row["rows"]),
        "step time, in sample": percent(row["step_time_error_in_sample"], signed=False),
        "out of sample": percent(row["step_time_error"], signed=False),
        "each layout once": percent(row["step_time_error_layouts"], signed=False),
        "GPU left out": percent(row["step_time_error_gpu_left_out"], signed=False),
        "pairs": str(row["pairs"]),
        "speedup, in sample": percent(row["speedup_error_in_sample"], signed=False),
        "speedup, out of sample": percent(row["speedup_error"], signed=False),
    }


def _notes() -> list[str]:
    return [
        "Published: NVIDIA's tables in analysis/reference. Predicted: by constants fitted to the rows of the set fit alone.",
        "Model (GPU) left out: by constants fitted without any row of that model (GPU); every set but fit is out of sample as it stands.",
    ]


def _goals(sums: Sequence[dict[str, Any]]) -> list[str]:
    """Return whether the goals are met by all that is out of sample, and each set that misses one."""
    limits = {"step_time_error": "step time", "speedup_error": "speedup", "step_time_error_gpu_left_out": "step time"}
    last = next(row for row in sums if row["set"] == EVERYTHING)
    verdicts = [f"{limits[key]} within {GOALS[limits[key]]:.0%}: {_met(last[key], limits[key])}" for key in ("step_time_error", "speedup_error")]
    missed = [
        f"{row['what']}: {limits[key]}{' with its GPU left out' if 'gpu' in key else ''} {percent(row[key], signed=False)}"
        for row in sums
        for key in limits
        if row[key] is not None and row[key] > GOALS[limits[key]]
    ]
    return [f"Goals, mean over all rows out of sample: {'; '.join(verdicts)}.", *(f"Missed by a set: {text}" for text in missed)]


def _met(value: float, goal: str) -> str:
    return f"{'met' if value <= GOALS[goal] else 'missed'} ({value:.1%})"
