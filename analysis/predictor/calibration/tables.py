"""The validation as tables: every published row and pair beside its prediction, the mean errors of
each set, and whether goals are met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.predictor.calibration.published_steps import own_rows
from analysis.predictor.calibration.validation import (
    EVERYTHING,
    GOALS,
    SETS,
    Fits,
    Line,
    Pair,
    Validation,
    error,
    mean_size,
    own_summary,
    post,
    post_summary,
    speedup_error,
    summary,
    validate,
)
from analysis.render.table import Table, percent
from recipes.plan import Plan

LEFT_OUT_WAYS = {  # what the goals are held to, under the ends of the names of the errors
    "": "out of sample",
    "_model_left_out": "model left out",
    "_layouts": "out of sample, each layout once",
    "_gpu_left_out": "GPU left out",
}


def tables(found: Validation) -> tuple[Table, Table, Table]:
    """Return the table of rows, that of speedups, and the summary."""
    lines = [_line(line) for line in found.lines]
    printed = post(found)
    both = [*(_pair(pair) for pair in found.pairs), *printed]
    sums = [*summary(found), post_summary(printed), own_summary(found.fits)]
    text = frozenset(
        ["set", "what", "NeMo", "model", "precision", "layout", "label", "source", "FP8 layout"]
    )
    return (
        Table(
            "Published step times and predictions",
            [_shown_line(row) for row in lines],
            lines,
            _notes(),
            text,
        ),
        Table(
            "Published speedups over BF16 and predictions",
            [_shown_pair(row) for row in both],
            both,
            text=text,
        ),
        Table(
            "Mean absolute error",
            [_shown_summary(row) for row in sums],
            sums,
            [*_goals(sums), *_biases(found), *_known_layouts(found)],
            text,
        ),
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
    notes = ["Measured on one H200; no constant is fitted to any of these rows."]
    return Table(
        "Measured step times and predictions",
        shown,
        lines,
        notes,
        frozenset(["model", "precision", "layout"]),
    )


def layout_text(plan: Plan) -> str:
    """Return a plan's layout in a few words."""
    m = plan.mapping
    flags = "".join(f" {name}" for name in ("fsdp", "cuda_graphs") if getattr(m, name))
    return f"tp{m.tp} pp{m.pp} cp{m.cp} vp{m.vp} mbs{m.micro_batch} gbs{m.global_batch}{flags}"


def _line(line: Line) -> dict[str, Any]:
    plan, published = line.row.plan, line.row.step_time_s
    return {
        "set": line.row.held,
        "nemo": line.row.release,
        "model": plan.model.name,
        "num_layers": plan.model.num_layers,
        "precision": plan.precision.name,
        "gpu": plan.gpu.name,
        "num_gpus": plan.num_gpus,
        "layout": layout_text(plan),
        "published_step_time_s": published,
        "predicted_step_time_s": line.seconds,
        "error": error(line.seconds, published),
        "in_sample": line.row.held == "fit",
        "error_model_left_out": error(line.without_model, published),
        "error_gpu_left_out": error(line.without_gpu, published),
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


def _shown_line(row: dict[str, Any]) -> dict[str, str]:
    return {
        "set": row["set"],
        "NeMo": row["nemo"],
        "model": (
            f"{row['model']}, {row['num_layers']} layers"
            if row["set"] == "fewer layers"
            else row["model"]
        ),
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
    columns = {"in sample": "_in_sample", "out of sample": "", "each layout once": "_layouts"} | {
        "model left out": "_model_left_out",
        "GPU left out": "_gpu_left_out",
    }
    steps, ratios = (
        {
            f"{'speedup' if what == 'speedup' else 'step time'}, {name}": percent(
                row[f"{what}_error{way}"], signed=False
            )
            for name, way in columns.items()
        }
        for what in ("step_time", "speedup")
    )
    return {
        "what": row["what"],
        "rows": str(row["rows"]),
        **steps,
        "pairs": str(row["pairs"]),
        **ratios,
    }


def _notes() -> list[str]:
    return [
        (
            "Published: NVIDIA's tables in analysis/reference. Predicted: by constants fitted to"
            " the rows of the set fit alone."
        ),
        (
            "Model (GPU) left out: by constants fitted without any row of that model (GPU); every"
            " set but fit is out of sample as it stands."
        ),
    ]


def _goals(sums: Sequence[dict[str, Any]]) -> list[str]:
    """Return whether the goals are met over every row in each way of leaving out, and each set that
    misses one.
    """
    last = next(row for row in sums if row["set"] == EVERYTHING)
    missed = {row["what"]: _missed(row) for row in sums if row["set"] != EVERYTHING}
    return [
        *(
            f"Goals over every row, {name}: {_met(last, 'step time', way)};"
            f" {_met(last, 'speedup', way)}."
            for way, name in LEFT_OUT_WAYS.items()
        ),
        *(f"Missed by a set: {what}: {'; '.join(each)}." for what, each in missed.items() if each),
    ]


def _met(row: dict[str, Any], goal: str, way: str) -> str:
    value = row[f"{goal.replace(' ', '_')}_error{way}"]
    return (
        f"{goal} within {GOALS[goal]:.0%}: {'met' if value <= GOALS[goal] else 'missed'}"
        f" ({value:.2%})"
    )


def _missed(row: dict[str, Any]) -> list[str]:
    errors = {
        f"{goal} {name}": (row[f"{goal.replace(' ', '_')}_error{way}"], GOALS[goal])
        for goal in GOALS
        for way, name in LEFT_OUT_WAYS.items()
    }
    return [
        f"{name} {value:.2%}"
        for name, (value, goal) in errors.items()
        if value is not None and value > goal
    ]


def _biases(found: Validation) -> list[str]:
    """Return the mean error of each GPU's rows by constants that knew none of them: it has a
    sign.
    """
    errors: dict[str, list[float]] = {}
    for line in found.lines:
        errors.setdefault(line.row.gpu, []).append(error(line.without_gpu, line.row.step_time_s))
    said = [
        f"{gpu} {sum(each) / len(each):+.1%} ({len(each)} rows)"
        for gpu, each in sorted(errors.items())
    ]
    return [
        "With its GPU left out, predicted steps of a GPU are off to one side, on average:"
        f" {', '.join(said)}."
    ]


def _known_layouts(found: Validation) -> list[str]:
    """Return how many tested rows have the model, precision, GPU and layout of a fitted one, and
    how far off they and the others are.
    """
    fitted = {line.row.cell for line in found.lines if line.row.held == "fit"}
    said = []
    for name in ("other release", "further rows"):
        lines = [line for line in found.lines if line.row.held == name]
        errors = {
            known: [
                error(x.out_of_sample, x.row.step_time_s)
                for x in lines
                if (x.row.cell in fitted) == known
            ]
            for known in (True, False)
        }
        known, new = (
            f"{len(each)} ({percent(mean_size(each), signed=False)})" for each in errors.values()
        )
        said.append(
            f"{SETS[name].removeprefix('tested: ')}: {known} have a fitted row's layout, {new}"
            " do not"
        )
    return [
        "Tested rows that differ from a fitted one in release, scale or batch alone, with the mean"
        f" error of their steps: {'; '.join(said)}."
    ]
