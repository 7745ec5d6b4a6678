"""What the documentation says of the predictor's own numbers, as tables: every constant that it is
made of, and what its intervals hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from analysis.predictor.calibration.fit import PAIR_ERROR, ROW_ERROR, from_prior
from analysis.predictor.calibration.halves import REPORT, halves
from analysis.predictor.calibration.sensitivity import ERRORS
from analysis.predictor.calibration.store import choices, fits, fitted_to
from analysis.predictor.calibration.validation import GOALS, Fits, validate
from analysis.predictor.constants import (
    OVERHEAD_FACTOR,
    Interval,
    speedup_interval,
    step_time_interval,
)
from analysis.predictor.model import work
from analysis.predictor.model.cost import (
    FITTED,
    GRAPHED_FIXED,
    GRAPHED_GAP,
    HIDDEN_EXPOSED,
    KNOWN,
    LATENCY,
    NCCL_BANDWIDTH,
    POWER,
    SHARPNESS,
)
from analysis.predictor.model.gemm import measured
from analysis.render.table import Table

PUBLISHED, BY_HAND, GEMMS, PROFILE = (
    "fitted to published steps",
    "by hand",
    "fitted to measured GEMMs",
    "read off a profiled layer",
)
WEIGHTS, GRAPHED = (ROW_ERROR, PAIR_ERROR), (GRAPHED_GAP, GRAPHED_FIXED)
PROFILED = {"current": PROFILE}  # recipes whose kernels are counted in a profile
BOUND = 1e-3  # relative distance at which a constant counts as at its bound


def constants_table() -> Table:
    """Return every constant with its meaning, value, unit, standard error or prior, and where it
    comes from; the counts as notes.
    """
    found = fits()
    rows = [*_fitted(found), *_gemms(), *_by_hand()]
    counts = {
        where: sum(row["numbers"] for row in rows if row["where"] == where)
        for where in (PUBLISHED, GEMMS, PROFILE, BY_HAND)
    }
    shown = [
        {
            key: row[key]
            for key in ("constant", "meaning", "value", "unit", "error or prior", "where")
        }
        for row in rows
    ]
    notes = [
        (
            f"{'; '.join(f'{n} numbers {where}' for where, n in counts.items())}. Published steps:"
            f" the {fitted_to()} rows of the set fit."
        ),
        (
            "Error: the fit's standard error, what was known before included. Prior: the value"
            " before the fit; one standard deviation as a factor."
        ),
        (
            "Peaks and bandwidths are the GPU's (conf/gpu), sizes the plan's; other counts follow"
            " from the model (analysis/predictor/model/work.py)."
        ),
        _furthest(found),
    ]
    return Table(
        "",
        shown,
        rows,
        notes,
        frozenset(["constant", "meaning", "unit", "error or prior", "where"]),
    )


def choices_table() -> Table:
    """Return the errors of the rows that choose, as chosen, and with single choices made
    otherwise.
    """
    rows = choices()
    names = {name: name.replace("_error", "").replace("_", " ") for name in ERRORS}
    shown = [
        {"choice": row["choice"], **{said: f"{row[name]:.2%}" for name, said in names.items()}}
        for row in rows
    ]
    step, speedup = (f"{goal:.0%}" for goal in GOALS.values())
    note = (
        "Mean absolute errors of the half of the rows that chooses; what is fitted is fitted anew"
        f" for each choice. Goals: step time {step}, speedup {speedup}."
    )
    return Table("", shown, rows, [note], frozenset(["choice"]))


def _fitted(found: Fits) -> list[dict[str, Any]]:
    values, errors = found.everything.constants, found.everything.errors
    return [
        {
            **_row(
                name,
                prior.meaning,
                [getattr(values, name)],
                prior.unit,
                PUBLISHED if name in FITTED else BY_HAND,
            ),
            "error or prior": (
                f"{_error(errors.get(name))}prior {prior.value:g}, factor {prior.factor:g}"
            ),
        }
        for name, prior in KNOWN.items()
    ]


def _error(error: float | None) -> str:
    return "not fitted; " if error is None else f"±{error:.2g}; "


def _gemms() -> list[dict[str, Any]]:
    found = measured()
    error = f"mean error of a GEMM {found.error:.1%}, on {found.device}"
    shares = _row(
        f"share ({', '.join(found.share)})",
        "share of the peak that deep GEMMs of a kind reach",
        list(found.share.values()),
        "1",
        GEMMS,
    )
    traffic = _row(
        "traffic",
        "share of writing a GEMM's result that is not hidden",
        [found.traffic],
        "1",
        GEMMS,
    )
    return [{**row, "error or prior": error} for row in (shares, traffic)]


def _by_hand() -> list[dict[str, Any]]:
    kernels = "kernels, forward and backward"
    rows = [
        _row(
            "SHARPNESS",
            "norm in which the times of host and GPU are joined",
            [SHARPNESS],
            "1",
            BY_HAND,
        ),
        _row(
            "POWER",
            "how much of its GEMMs' speed a GPU keeps with the power for its peak: share to this"
            " power",
            [POWER],
            "1",
            BY_HAND,
        ),
        _row(
            "BACKWARD_ATTENTION",
            "time of attention's backward pass over its forward pass",
            [work.BACKWARD_ATTENTION],
            "1",
            PROFILE,
        ),
        _row("KERNELS", "of a layer in BF16", work.KERNELS, kernels, PROFILE),
        _row("KERNELS_TP", "added where tp > 1", work.KERNELS_TP, kernels, BY_HAND),
        _row(
            "KERNELS_CP",
            "added by each further rank of a context-parallel ring",
            work.KERNELS_CP,
            kernels,
            BY_HAND,
        ),
        *(
            _row(f"KERNELS_FP8, {name}", "added by FP8", each, kernels, PROFILED.get(name, BY_HAND))
            for name, each in work.KERNELS_FP8.items()
        ),
        _row(
            "KERNELS_VOCABULARY",
            "of the output layer and the loss",
            work.KERNELS_VOCABULARY,
            kernels,
            BY_HAND,
        ),
        _row(
            "SLOWER_CAST",
            "time of a sub-channel cast over a per-tensor one, a byte",
            list(work.SLOWER_CAST.values()),
            "1",
            BY_HAND,
        ),
        *(
            _row(
                f"WRITTEN_FP8, Transformer Engine {version}",
                "writing FP8 parameters, beyond what is counted",
                [value],
                "bytes a parameter",
                BY_HAND,
            )
            for version, value in work.WRITTEN_FP8.items()
        ),
        _row(
            "ROW_ERROR, PAIR_ERROR",
            "how well a published step time, and a ratio of two, can be known (weights of the fit)",
            WEIGHTS,
            "1",
            BY_HAND,
        ),
        _row(
            "GRAPHED_GAP, GRAPHED_FIXED",
            "share of a gap, and of the fixed part, that CUDA graphs leave",
            GRAPHED,
            "1",
            BY_HAND,
        ),
        _row(
            "LATENCY",
            "time until a small message inside a NVLink domain has arrived",
            [LATENCY],
            "s",
            BY_HAND,
        ),
        _row(
            "NCCL_BANDWIDTH",
            "share of a link's peak that data-parallel messages reach",
            [NCCL_BANDWIDTH],
            "1",
            BY_HAND,
        ),
        _row(
            "HIDDEN_EXPOSED",
            "share of a hidden data-parallel message that is waited for",
            [HIDDEN_EXPOSED],
            "1",
            BY_HAND,
        ),
        _row(
            "ULTRA_ATTENTION",
            "speed of attention on Blackwell Ultra, forward and backward",
            work.ULTRA_ATTENTION,
            "1",
            BY_HAND,
        ),
        _row(
            "OVERHEAD_FACTOR",
            "by which launches may be off where no published row shows them (intervals)",
            [OVERHEAD_FACTOR],
            "1",
            BY_HAND,
        ),
    ]
    return [
        {
            **row,
            "error or prior": (
                "Llama 3 8B on one H200" if row["where"] == PROFILE else _reason(row["constant"])
            ),
        }
        for row in rows
    ]


def _reason(name: str) -> str:
    reasons = {
        "KERNELS": "none: estimated from what the modules do, not profiled",
        "SHARPNESS": "none: chosen",
        "POWER": "1/3 to 1 for dynamic power alone; chosen, not fitted",
        "GRAPHED": "0.29 where a profile's idle gaps are all that stays; chosen, not fitted",
        "LATENCY": "none: a usual value of NCCL's tests, not measured here",
        "NCCL_BANDWIDTH": "none: a usual value of NCCL's tests, not measured here",
        "HIDDEN_EXPOSED": "0.1 to 0.5; chosen, not fitted",
        "ULTRA_ATTENTION": "from twice the exponentials, and NVIDIA's 1.35 forward",
        "ROW_ERROR": "none: releases of one layout differ by as much",
        "OVERHEAD_FACTOR": "none: chosen",
        "SLOWER_CAST": "read off casts measured on one H200",
        "WRITTEN_FP8": "read off this project's steps on one H100",
    }
    return next(text for key, text in reasons.items() if name.startswith(key))


def _row(name: str, meaning: str, values: Any, unit: str, where: str) -> dict[str, Any]:
    return {
        "constant": name,
        "meaning": meaning,
        "value": ", ".join(f"{float(value):.4g}" for value in values),
        "unit": unit,
        "where": where,
        "numbers": len(values),
    }


def _furthest(found: Fits) -> str:
    """Return the constant that published rows pulled furthest from what was known of it, and which
    reach a bound in any fit.
    """
    values = found.everything.constants
    distances = dict(
        zip(FITTED, from_prior(np.array([getattr(values, name) for name in FITTED])), strict=True)
    )
    name = max(distances, key=lambda name: abs(distances[name]))
    every = [values, *found.without_model.values(), *found.without_gpu.values()]
    at_bound = [
        name
        for name, prior in ((name, KNOWN[name]) for name in FITTED)
        if any(
            math.isclose(getattr(c, name), end, rel_tol=BOUND)
            for c in every
            for end in (prior.low, prior.high)
        )
    ]
    return (
        f"Furthest from what was known before lies {name}, {abs(distances[name]):.1f} standard"
        f" deviations; at a bound, in any of the {len(every)} fits with everything, without a model"
        f" and without a GPU: {', '.join(at_bound) or 'none'}."
    )


def intervals_table() -> Table:
    """Return the ends of each interval and the share of rows that only report which they hold: by
    GPU, by precision.
    """
    found = validate(fits=fits())
    half = halves([line.row for line in found.lines])
    held: dict[str, list[tuple[object, bool]]] = defaultdict(list)
    ends: dict[str, str] = {}
    for line in (line for line in found.lines if half[line.row] == REPORT):
        interval = step_time_interval(
            line.seconds, line.row.plan.gpu, line.overhead, line.attention
        )
        inside = interval.low <= line.row.step_time_s <= interval.high
        ends[f"step time, {line.row.gpu}"] = _ends(step_time_interval(1.0, line.row.plan.gpu))
        held[f"step time, {line.row.gpu}"].append((line.row.cell, inside))
        held[f"step time, {line.row.gpu} {line.row.plan.precision.name}"].append(
            (line.row.cell, inside)
        )
    for pair in (pair for pair in found.pairs if half[pair.fp8.row] == REPORT):
        interval = speedup_interval(pair.bf16.seconds / pair.fp8.seconds)
        ends["speedup"] = _ends(interval)
        held["speedup"].append((pair.fp8.row.cell, interval.low <= pair.published <= interval.high))
    rows = [_held(what, each, ends.get(what, "")) for what, each in sorted(held.items())]
    notes = [
        (
            "Interval: published over predicted, of the half of the rows that chooses. Held: the"
            " share of the other half's rows (pairs) in it."
        ),
        (
            "Each layout once: rows that differ in scale, batch or release alone are averaged"
            " first; they err alike, and over rows they weigh more."
        ),
    ]
    return Table(
        "",
        [{key: str(value) for key, value in row.items()} for row in rows],
        rows,
        notes,
        frozenset(["what"]),
    )


def _ends(interval: Interval) -> str:
    return f"{interval.low / interval.value - 1:+.1%} to {interval.high / interval.value - 1:+.1%}"


def _held(what: str, each: list[tuple[object, bool]], ends: str) -> dict[str, Any]:
    layouts: dict[object, list[bool]] = defaultdict(list)
    for cell, inside in each:
        layouts[cell].append(inside)
    once = sum(sum(inside) / len(inside) for inside in layouts.values()) / len(layouts)
    share = sum(inside for _, inside in each) / len(each)
    return {
        "what": what,
        "interval": ends,
        "rows": len(each),
        "held": f"{share:.0%}",
        "layouts": len(layouts),
        "each layout once": f"{once:.0%}",
    }
