"""The documentation's tables of what is predicted beside what was published or measured: the
predictor's, and the memory estimate's.

`docs.build.tables` offers them under their names; each maker takes folders of analysis/results and
returns Markdown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.predictor.calibration.as_ran import plan_as_ran
from analysis.predictor.calibration.published_steps import Row
from analysis.predictor.calibration.published_steps import rows as published_rows
from analysis.predictor.calibration.store import fits
from analysis.predictor.calibration.tables import own_table, tables
from analysis.predictor.calibration.validation import validate
from analysis.render.table import Table
from analysis.runs.load import folders_of
from docs.build.predictor_constants import choices_table, constants_table, intervals_table
from recipes.compose.defaults import recommended
from recipes.compose.fit import state
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.estimate.memory import estimate, usable_gb
from recipes.measure.memory import validation

Maker = Callable[[Sequence[Path]], str]
RELEASE = "25.04"  # of NeMo: what this project is for
PEAKS = {
    "measured": "measured: whole steps of NeMo with Transformer Engine",
    "measured without step": (
        "measured: forward and backward pass with Megatron-Core, no optimizer step"
    ),
    "published": "published: another stack's peaks (torchtitan, FP8 with FSDP)",
}


def memory(results: Sequence[Path]) -> str:
    """The memory estimate held against peaks, by kind of peak and number format
    (`recipes.measure.memory`), and against NVIDIA's layouts.
    """
    found = pd.DataFrame(validation(folders_of(results)))
    found["format"] = np.where(found["precision"] == "bf16", "BF16", "FP8")
    shown = [
        _peaks(str(kind), str(format), rows)
        for (kind, format), rows in found.groupby(["kind", "format"])
    ]
    fit, layouts = nvidias_layouts()
    verdict = "all fit" if fit == layouts else f"{layouts - fit} do not fit"
    nvidia = (
        "published: what NVIDIA ran, its layouts for NeMo 25.04 and 25.07, under throughput"
        " settings"
    )
    shown.append(
        {
            "held against": nvidia,
            "rows": str(layouts),
            "median size of the error": verdict,
            "range": "–",
        }
    )
    tables = published_rows()
    other = (
        "published: the rows of NVIDIA's tables that the predictor is compared with"
        " (docs/throughput.md names those that do not fit)"
    )
    refused = f"{sum(map(_refused, tables))} do not fit"
    shown.append(
        {
            "held against": other,
            "rows": str(len(tables)),
            "median size of the error": refused,
            "range": "–",
        }
    )
    return Table("", shown, found.to_dict("records"), text=frozenset(["held against"])).markdown()


def _refused(each: Row) -> bool:
    return state(plan_as_ran(each)) == "refused"


def _peaks(kind: str, format: str, rows: pd.DataFrame) -> dict[str, str]:
    error, models, gpus = (
        rows["error"],
        ", ".join(sorted(set(rows["model"]))),
        sorted(set(rows["num_gpus"].astype(int))),
    )
    on = (
        f"{gpus[0]} GPU{'s' if gpus[0] > 1 else ''}"
        if len(gpus) == 1
        else f"{gpus[0]} to {gpus[-1]} GPUs"
    )
    return {
        "held against": f"{PEAKS.get(kind, kind)}; {format}, {models}, {on}",
        "rows": str(len(rows)),
        "median size of the error": f"{error.abs().median():.1%}",
        "range": f"{error.min():+.1%} to {error.max():+.1%}",
    }


def refused_rows(_: Sequence[Path]) -> str:
    """The published rows whose estimate exceeds what the GPU gives, a line a layout: within the
    estimate's error, or refused.
    """
    beyond: dict[tuple[str, ...], list[str]] = {}
    for each in published_rows():
        plan = plan_as_ran(each)
        need, have, m = estimate(plan).total_gb, usable_gb(plan) or math.inf, plan.mapping
        if need > have:
            layout = (
                f"tp{m.tp} pp{m.pp} cp{m.cp} vp{m.vp} mbs{m.micro_batch}"
                f" gbs{m.global_batch}{' fsdp' if m.fsdp else ''}"
            )
            cell = (
                each.held,
                each.model,
                plan.precision.name,
                f"{plan.num_gpus} {each.gpu}",
                layout,
            )
            beyond.setdefault((*cell, f"{need:.0f} of {have:.0f}", state(plan)), []).append(
                each.release
            )
    columns = ("set", "model", "precision", "GPUs", "layout", "GB needed", "state")
    shown = [
        {**dict(zip(columns, key, strict=True)), "NeMo": ", ".join(releases)}
        for key, releases in beyond.items()
    ]
    every = published_rows()
    note = (
        f"{sum(map(_refused, every))} of {len(every)} published rows are refused,"
        f" {sum(map(len, beyond.values()))} exceed what the GPU gives."
    )
    return Table(
        "", shown, [{"rows": 0}], [note], frozenset([*columns[:3], "layout", "state", "NeMo"])
    ).markdown()


@functools.cache
def nvidias_layouts() -> tuple[int, int]:
    """Return how many of NVIDIA's recommended layouts, as their scripts run them, the memory rule
    lets pass, and how many there are.
    """
    stacks, precisions = (
        {"v2.3.0": "nemo_25_04", "v2.4.0": "nemo_25_07"},
        {
            "bf16": ("bf16",),
            "fp8": ("fp8_delayed", "fp8_current"),
        },
    )
    layouts = [
        each for each in recommended() if each["nemo_ref"] in stacks and each["dtype"] in precisions
    ]
    passes = [
        all(
            _runs(each, stacks[each["nemo_ref"]], precision)
            for precision in precisions[each["dtype"]]
        )
        for each in layouts
    ]
    return sum(passes), len(layouts)


def _runs(layout: dict[str, str], stack: str, precision: str) -> bool:
    axes = [
        f"model={layout['model']}",
        f"gpu={layout['gpu']}",
        f"precision={precision}",
        f"stack={stack}",
    ]
    try:
        compose_plan([*axes, "experiment=throughput", "mapping=recommended"])
    except InputError:
        return False
    return True


def validations(place: int) -> Maker:
    """Return a maker of a table of the predictor's validation: 0 step times, 1 speedups, 2 the
    summary.
    """

    def maker(_: Sequence[Path]) -> str:
        return validation_tables()[place].markdown()

    maker.__doc__ = ("Published step times", "Published speedups", "The mean errors")[
        place
    ] + " beside what the predictor says."
    return maker


def steps_of_this_release(_: Sequence[Path]) -> str:
    """Published step times of the NeMo release that this project is for beside what the predictor
    says.
    """
    every = validation_tables()[0]
    return replace(
        every, shown=[line for line in every.shown if line["NeMo"].startswith(RELEASE)]
    ).markdown()


def constants(_: Sequence[Path]) -> str:
    """Every constant of the predictor, with its value, error and origin."""
    return constants_table().markdown()


def choices(results: Sequence[Path]) -> str:
    """The predictor's errors with choices made otherwise."""
    return choices_table().markdown()


def intervals(_: Sequence[Path]) -> str:
    """What share of published rows the predictor's intervals hold."""
    return intervals_table().markdown()


def own_steps(_: Sequence[Path]) -> str:
    """The steps that this project measured beside what the predictor says."""
    return own_table(fits()).markdown()


@functools.cache
def validation_tables() -> tuple[Table, ...]:
    """Return the tables of the predictor's validation."""
    return tables(validate(fits=fits()))


TABLES: dict[str, Maker] = {
    "memory": memory,
    "refused-rows": refused_rows,
    "validation": validations(2),
    "validation-steps": validations(0),
    "validation-steps-of-this-release": steps_of_this_release,
    "validation-speedups": validations(1),
    "validation-own": own_steps,
    "constants": constants,
    "choices": choices,
    "intervals": intervals,
}
