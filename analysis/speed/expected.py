"""I get X; is that right?  What is published and predicted for an imported run, and where its rate
lies.

Published: rows of analysis/reference with the run's cell, GPUs, batch and layout, as wide as
releases of one cell lie apart.  Predicted: the predictor's step time with its interval.  Where a
rate lies outside, the causes are those of docs/throughput.md ("What usually differs"), the
likeliest for this run first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from analysis.predictor.forecast import forecast
from analysis.runs import published
from analysis.runs.load import Run
from analysis.runs.published import layout_of
from analysis.runs.timing import Interval, timed
from analysis.speed.full_depth import reference_of
from recipes.errors import InputError

APART = 0.07  # releases of one cell lie up to so far apart (docs/throughput.md, container)
RANGES = (
    f"Beside imported runs, in tokens/s/GPU: published, as wide as its releases, and {APART:.0%}"
    " more, by which releases of one cell differ; predicted, with its interval (python -m"
    " analysis.predict)."
)
FEW_STEPS = 20  # fewer timed steps than NVIDIA averages
SHOWN = 3  # causes that are named
PLAIN = frozenset(
    {"mapping.cuda_graphs", "mapping.fsdp", "mapping.offload_layers", "mapping.recompute_layers"}
)


@dataclass(frozen=True)
class Expected:
    """What is published and predicted, in tokens/s/GPU; None where nothing is.

    `causes`: why a rate lies outside.
    """

    published: Interval | None
    predicted: Interval | None
    within: str
    causes: list[str]


def expected(run: Run, rate: float) -> Expected:
    """Return what a run's rate in tokens/s/GPU is compared with, and where it lies."""
    known = _published(run), _predicted(run)
    sides = [_side(rate, interval) for interval in known if interval]
    outside = [side for side in sides if side != "inside"]
    within = (outside[0] if outside else "inside") if sides else "unknown"
    return Expected(*known, within, causes(run, slow=within == "below") if outside else [])


def _side(rate: float, interval: Interval) -> str:
    return "below" if rate < interval.low else "above" if rate > interval.high else "inside"


def _published(run: Run) -> Interval | None:
    """Return the published rate of the nearest release, between the lowest and the highest of the
    cell's rows.
    """
    plan, layout, whole = run.plan, layout_of(run.plan), reference_of(run.plan)
    if whole is None or not whole.model.is_built_as(plan.model):
        return None  # a model that was cut is none that was published
    cell = (
        plan.model.name,
        plan.gpu.name,
        plan.precision.name,
        plan.seq_length,
        layout.num_gpus,
        layout.global_batch,
    )
    rows = [
        row
        for row in published.rows()
        if (
            row.model,
            row.gpu,
            row.precision,
            row.seq_length,
            row.layout.num_gpus,
            row.layout.global_batch,
        )
        == cell
        and (published.fits(row, layout) or "mapping.tp" in run.imported.get("assumed", []))
    ]
    nearest = published.closest(rows, plan.stack.recommended, plan.num_gpus)
    if nearest is None:
        return None
    rates = [row.tokens_per_s_per_gpu for row in rows]
    return Interval(
        nearest.tokens_per_s_per_gpu, min(rates) / (1 + APART), max(rates) * (1 + APART)
    )


def _predicted(run: Run) -> Interval | None:
    plan = run.plan
    try:
        time = forecast(plan).step_time
    except InputError:
        return None  # a GPU, or a layout, that the predictor does not know
    tokens = plan.tokens_per_step / plan.num_gpus
    return Interval(tokens / time.value, tokens / time.high, tokens / time.low)


def causes(run: Run, slow: bool) -> list[str]:
    """Return the likeliest causes of a rate outside, as rows of docs/throughput.md with what speaks
    for each.
    """
    plan, said = run.plan, run.imported
    open_keys = [
        key for key in said.get("assumed", []) if key.startswith("mapping.") and key not in PLAIN
    ]
    unstated = [
        key.removeprefix("mapping.")
        for key in open_keys
        if key != "mapping.vp" or plan.mapping.pp > 1
    ]
    few = len(timed(run)) < FEW_STEPS
    found = [  # weight, row, evidence
        (
            9 if unstated else 1,
            "layout",
            (
                f"the log does not state {', '.join(unstated)}"
                if unstated
                else "what the log states may differ from the published layout"
            ),
        ),
        (
            8 if plan.precision.fp8 and "precision" not in said.get("stated", []) else 0,
            "FP8 recipe",
            "the log does not state its recipe",
        ),
        (7 if few else 2, "steps", f"{len(timed(run))} steps were timed"),
        (
            7 if slow and plan.num_gpus > plan.gpu.devices_per_node else 0,
            "network",
            f"{plan.num_gpus} GPUs span nodes of {plan.gpu.devices_per_node}",
        ),
        (6 if slow else 4, "clocks", "a power cap lowers them" if slow else "vboost raises them"),
        (5 if slow else 0, "data", "reading real text can be slower than random tokens"),
        (
            6 if slow and plan.gpu.name in ("gb200", "gb300") else 0,
            "NUMA",
            "NeMo 2.3 binds all ranks of a node to one processor",
        ),
        (
            4 if slow else 6,
            "settings",
            "NVIDIA's scripts reduce gradients in BF16, and drop BF16 layers",
        ),
        (3 if slow else 5, "container", "another release may have run"),
    ]
    likely = sorted((cause for cause in found if cause[0]), key=lambda cause: -cause[0])[:SHOWN]
    return [f"{row} ({evidence})" for _, row, evidence in likely]


def sentence(name: str, rate: float, found: Expected) -> str:
    """Return in one sentence whether a rate lies inside what is published and predicted, and if
    not, why likely not.
    """
    parts = [
        _part(rate, what, interval)
        for what, interval in (("published", found.published), ("predicted", found.predicted))
        if interval
    ]
    if not parts:
        return f"{name}: {rate:,.0f} tokens/s/GPU; nothing is published or predicted for it"
    why = (
        f"; likeliest causes (docs/throughput.md, What usually differs): {', '.join(found.causes)}"
        if found.causes
        else ""
    )
    return f"{name}: {rate:,.0f} tokens/s/GPU (measured) lies {' and '.join(parts)}{why}"


def _part(rate: float, what: str, interval: Interval) -> str:
    return f"{_side(rate, interval)} the {what} range, {interval.low:,.0f} to {interval.high:,.0f}"


def columns(run: Run, rate: float | None) -> dict[str, Any]:
    """Return the columns of a table's row; None where a run is this project's own, or its rate is
    not known.
    """
    found = expected(run, rate) if run.imported and rate else None
    row: dict[str, Any] = {}
    for what in ("published", "predicted"):
        interval: Interval | None = getattr(found, what, None)
        row[f"{what}_value"] = interval and interval.value
        row |= {
            f"{what}_low": interval and interval.low,
            f"{what}_high": interval and interval.high,
        }
    said = sentence(run.name, rate, found) if found and rate else None
    return {
        **row,
        "within": found and found.within,
        "causes": found.causes if found else [],
        "expected": said,
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's columns as people read them: tokens/s/GPU with their ranges; none in a table
    without imported runs.
    """
    if "within" not in row:
        return {}
    shown = {}
    for what in ("published", "predicted"):
        value, low, high = (row[f"{what}_{end}"] for end in ("value", "low", "high"))
        shown[what] = "–" if value is None else f"{value:,.0f} ({low:,.0f} to {high:,.0f})"
    return shown
