"""Where the numbers of a training figure come from: runs, NVIDIA's published tables, and the
predictor.

Every function returns `Value`s of one cell; what cannot be had is no value, and what was refused is
said to the caller.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from analysis.post.values import Label, Value
from analysis.predictor.calibration.published_steps import Row, pairs, rows
from analysis.predictor.constants import Interval, constants, ratio_interval
from analysis.predictor.forecast import compose, forecast
from analysis.predictor.model.step import predict
from analysis.runs.load import Run
from analysis.runs.published import REFERENCE, months_apart, post_speedups
from analysis.runs.timing import Interval as Spread
from analysis.speed import depth, full_depth_table
from analysis.speed.depth import device
from analysis.speed.full_depth import reference_of
from analysis.throughput import faster, own_base
from recipes.compose.rules import check
from recipes.errors import InputError
from recipes.plan import Plan

PARTS: Label = "measured parts, put together"
ON = "on "  # begins the series of what was measured on another GPU


def of_the_post(figure: int) -> list[dict[str, str]]:
    """Return what the post says of a figure, its lines of post_figures.csv."""
    with (REFERENCE / "post_figures.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["figure"] == str(figure)]


def in_words(row: dict[str, str]) -> str:
    """Return what a line of post_figures.csv says: what is shown, the value where one is printed,
    and the remark.
    """
    value = "" if row["value"] == "-" else f"{row['value']}{row['unit']}"
    return ": ".join(
        part
        for part in (f"{row['what']}", "; ".join(part for part in (value, row["note"]) if part))
        if part
    )


def layout(plan: Plan) -> str:
    """Return a plan's layout in short."""
    m = plan.mapping
    sizes = [
        f"tp{m.tp}",
        f"pp{m.pp}",
        f"cp{m.cp}",
        *([f"vp{m.vp}"] if m.vp > 1 else []),
        *(["fsdp"] if m.fsdp else []),
    ]
    return f"{plan.num_gpus} {plan.gpu.name}, {' '.join(sizes)} mbs{m.micro_batch}"


def whole_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs of whole models, not cut in depth or vocabulary, whose GPU was the one that
    the plan names.
    """
    whole = []
    for run in runs:
        reference, name = reference_of(run.plan), device(run)
        own_gpu = not name.startswith("NVIDIA") or run.plan.gpu.name in name.lower()
        if reference and reference.model.is_built_as(run.plan.model) and own_gpu:
            whole.append(run)
    return whole


def serves(plan: Plan, gpu: str) -> bool:
    """Whether a run of this plan may stand in a figure of a GPU: it is that GPU, or one mapped like
    it (H200: H100).
    """
    return gpu in (plan.gpu.name, plan.gpu.mapped_like)


# --------------------------------------------------------------------- speedup over BF16 on one GPU


def measured_speedups(plan: Plan, runs: Sequence[Run]) -> list[Value]:
    """Return the speedups over their own BF16 of the whole models that ran, of a plan's cell."""
    of_cell = [
        run
        for run in whole_runs(runs)
        if (run.plan.model.name, run.plan.precision.name) == _cell(plan)
        and serves(run.plan, plan.gpu.name)
    ]
    pairs = [(base, run) for run in of_cell if (base := own_base(run, runs))]
    several = len({run.plan.mapping.global_batch for _, run in pairs}) > 1
    found = []
    for base, run in pairs:
        batch = f"{run.plan.mapping.global_batch} sequences a step"
        series = ", ".join(
            part for part in (_elsewhere(plan, run.plan.gpu.name), batch if several else "") if part
        )
        what = f"{layout(run.plan)}, {batch}; {device(run)}, runs {base.name} and {run.name}"
        found.append(_value(plan, "measured", series, faster(base, run), what))
    return found


def _elsewhere(plan: Plan, gpu: str) -> str:
    """Return on which GPU a plan's cell was measured, where that is another one."""
    return "" if gpu == plan.gpu.name else f"{ON}{gpu.upper()}"


def assembled_speedups(plan: Plan, runs: Sequence[Run]) -> list[Value]:
    """Return the speedups of whole models put together from runs cut in depth
    (analysis.speed.full_depth), of a plan's cell.

    Whole models that ran stand for themselves (`measured_speedups`): what makes them fit may be
    other settings.
    """
    whole = {run.folder for run in whole_runs(runs)}
    own = [
        run
        for run in runs
        if run.plan.model.name == plan.model.name
        and serves(run.plan, plan.gpu.name)
        and run.folder not in whole
    ]
    found = []
    for row in full_depth_table.rows(depth.fit(own)):
        if row["precision"] == plan.precision.name and row["speedup_whole"]:
            spread = Spread(
                row["speedup_whole"], row["speedup_whole_low"], row["speedup_whole_high"]
            )
            what = (
                f"{row['layout']}, compute alone; parts measured on {row['device']}, depths"
                f" {', '.join(map(str, row['layers']))}"
            )
            found.append(_value(plan, PARTS, _elsewhere(plan, row["gpu"]), spread, what))
    return found


def published_speedups(plan: Plan) -> list[Value]:
    """Return what the post prints, and the speedup in NVIDIA's tables, BF16 and FP8 side by side,
    of the nearest release and number of GPUs.
    """
    printed = post_speedups().get(_cell(plan)) if plan.gpu.name == "h100" else None
    own = (
        [
            _value(
                plan,
                "published",
                "the post",
                printed,
                "the post's figure 3; it does not say with which layouts",
            )
        ]
        if printed
        else []
    )
    return [
        *own,
        *(
            _side_by_side(plan, plan.precision.name)
            or (_side_by_side(plan, "fp8_delayed") if plan.precision.name == "fp8_current" else [])
        ),
    ]


def _side_by_side(plan: Plan, precision: str) -> list[Value]:
    """Return the published speedup of a plan's cell, or of another recipe in its place, which the
    series then names.
    """
    found = [
        pair
        for pair in pairs(rows())
        if _of_cell(pair[1], plan, precision) and pair[1].held != "recipe not stated"
    ]
    if not found:
        return []
    base, fp8 = min(found, key=lambda pair: _distance(pair[1], plan))
    kind = (
        "iso-mapping"
        if base.plan.mapping == fp8.plan.mapping
        else f"best-mapping (BF16 {layout(base.plan)})"
    )
    what = f"{layout(fp8.plan)}, {kind}; NeMo {fp8.release}, {fp8.source}"
    series = (
        "NVIDIA's tables" if precision == plan.precision.name else f"NVIDIA's tables, {precision}"
    )
    return [_value(plan, "published", series, base.step_time_s / fp8.step_time_s, what)]


def predicted_speedups(overrides: Sequence[str]) -> list[Value]:
    """Return the predicted speedup of a cell over BF16 in its layout, and over BF16 in its own
    where that is another.

    InputError where the plan is refused.
    """
    found = forecast(compose(overrides), overrides)
    made = []
    if found.speedup_iso:
        made.append(
            _value(
                found.plan,
                "predicted",
                "iso-mapping",
                found.speedup_iso,
                f"both {layout(found.plan)}",
            )
        )
    if found.speedup_best and found.best and not _one_layout(found.best.plan, found.plan):
        made.append(
            _value(
                found.plan,
                "predicted",
                "best-mapping",
                found.speedup_best,
                f"{layout(found.plan)}; BF16 {layout(found.best.plan)}",
            )
        )
    return made


# ----------------------------------------------------------------------------- one GPU over another


def measured_gain(plan: Plan, base: Plan, runs: Sequence[Run]) -> list[Value]:
    """Return the tokens/s/GPU of a cell's whole run over those of the same cell on the base's
    GPU.
    """
    own = [
        run
        for run in whole_runs(runs)
        if (run.plan.model.name, run.plan.precision.name) == _cell(plan)
    ]
    newer, older = (
        [run for run in own if run.plan.gpu.name == gpu] for gpu in (plan.gpu.name, base.gpu.name)
    )
    return [
        _value(
            plan,
            "measured",
            "",
            faster(a, b),
            f"{layout(b.plan)} over {layout(a.plan)}, runs {b.name} and {a.name}",
        )
        for a in older
        for b in newer
    ]


def published_gain(plan: Plan, base: Plan) -> list[Value]:
    """Return the published tokens/s/GPU of a cell over those on the base's GPU, of one release and
    table form, the nearest release.
    """
    of = {
        gpu: [row for row in rows() if _of_cell(row, each) and row.held != "recipe not stated"]
        for gpu, each in (("new", plan), ("old", base))
    }
    both = [(a, b) for a in of["old"] for b in of["new"] if a.release == b.release]
    if not both:
        return []
    a, b = min(
        both,
        key=lambda pair: (_distance(pair[1], plan), pair[0].plan.mapping != pair[1].plan.mapping),
    )
    what = f"{layout(b.plan)} over {layout(a.plan)}; NeMo {b.release}, {b.source}"
    return [_value(plan, "published", "NVIDIA's tables", _rate(b) / _rate(a), what)]


def predicted_gain(plan: Plan, base: Plan) -> list[Value]:
    """Return the predicted tokens/s/GPU over those on the base's GPU: each in its own layout, and
    both in the base's where that is another.
    """
    moved = base.model_copy(update={"gpu": plan.gpu})
    series = {"own layouts": plan}
    if not _one_layout(plan, base) and _runs(moved):
        series["one layout"] = moved
    made = []
    for name, new in series.items():
        ratio = (
            predict(new, constants()).tokens_per_s_per_gpu
            / predict(base, constants()).tokens_per_s_per_gpu
        )
        made.append(
            _value(
                plan,
                "predicted",
                name,
                ratio_interval(ratio, new.gpu, base.gpu),
                f"{layout(new)} over {layout(base)}",
            )
        )
    return made


def _one_layout(a: Plan, b: Plan) -> bool:
    ours, theirs = (
        (plan.num_gpus, plan.mapping.model_copy(update={"source": ""})) for plan in (a, b)
    )
    return ours == theirs


def _runs(plan: Plan) -> bool:
    try:
        check(plan)
    except InputError:
        return False
    return True


# ------------------------------------------------------------------------------------------- shared


def _cell(plan: Plan) -> tuple[str, str]:
    return plan.model.name, plan.precision.name


def _of_cell(row: Row, plan: Plan, precision: str | None = None) -> bool:
    whole = (
        row.plan.model.num_layers == plan.model.num_layers
        and row.plan.seq_length == plan.seq_length
    )
    return whole and (row.model, row.plan.precision.name, row.gpu) == (
        plan.model.name,
        precision or plan.precision.name,
        plan.gpu.name,
    )


def _distance(row: Row, plan: Plan) -> tuple[int, int]:
    return months_apart(row.release, plan.stack.recommended), abs(row.plan.num_gpus - plan.num_gpus)


def _rate(row: Row) -> float:
    return row.plan.tokens_per_step / row.plan.num_gpus / row.step_time_s


def _value(
    plan: Plan, label: Label, series: str, found: float | Interval | Spread, source: str
) -> Value:
    value, low, high = (
        (found, None, None)
        if isinstance(found, int | float)
        else (found.value, found.low, found.high)
    )
    return Value(*_cell(plan), label, series, float(value), low, high, source)
