"""Can the numbers of an imported run be true together?  Rates, utilisation and memory are checked
before it is written.

A wrong number of GPUs, batch or sequence length makes every rate wrong and leaves no other trace,
so a log that prints a rate of its own is compared with ours, and one whose utilisation is above 100
% is refused.
"""

from __future__ import annotations

import numpy as np

from analysis.importers.log import Log
from analysis.importers.planning import SCALE, Planned
from recipes.errors import InputError
from recipes.estimate.flops import flops_per_token, peak_tflops
from recipes.estimate.possible import most_memory_gb, utilisation

# By how much a printed rate may differ from ours: rounding, evaluations in the time, another count
# of FLOPs
FAR = 1.25
COUNTS = {
    "step_time_s": "step time",
    "tokens_per_s": "tokens/s per GPU",
    "tflops": "TFLOP/s per GPU",
}
LOW_MFU = 0.002  # a share of the peak; a thousandth of what is usual is a step time in another unit


def refuse_impossible(log: Log, planned: Planned) -> None:
    """Raise InputError, with the likely cause, for numbers that cannot be true together."""
    plan = planned.plan
    if plan.on_cpu:
        return
    _refuse_memory(log, planned)
    unknown = [key for key in SCALE if key in planned.assumed]
    printed = {name: median for name in COUNTS if (median := _median(log, name)) is not None}
    if unknown:
        if {"tokens_per_s", "tflops"} & printed.keys():
            what = " and ".join(COUNTS[name] for name in printed if name != "step_time_s")
            ask = " ".join(f"{key}=…" for key in unknown)
            raise InputError(
                f"the log prints {what}, and nothing states {' and '.join(unknown)}, on which they"
                f" depend; add --set {ask}"
            )
        return
    if "step_time_s" in printed:
        rate = plan.tokens_per_step / plan.num_gpus / printed["step_time_s"]
        _refuse_rates(log, planned, rate, printed)
        _note_unit(log, planned, rate, printed["step_time_s"])
    elif "tokens_per_s" in printed:
        _refuse_rates(log, planned, printed["tokens_per_s"], printed)


def _median(log: Log, name: str) -> float | None:
    """Return the median of a column after the first tenth of it, which is warm-up; None where it
    has no value above 0.
    """
    values = log.steps.get(name, np.zeros(0))
    values = values[values.size // 10 :]
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.median(values)) if values.size else None


def _refuse_rates(log: Log, planned: Planned, rate: float, printed: dict[str, float]) -> None:
    plan = planned.plan
    theirs = printed.get("tokens_per_s")
    if theirs is not None and not rate / FAR <= theirs <= rate * FAR:
        total = abs(theirs / rate / plan.num_gpus - 1) < FAR - 1 and plan.num_gpus > 1
        cause = f"that is the rate of all {plan.num_gpus} GPUs together, or " if total else ""
        raise InputError(
            f"the log prints {theirs:,.0f} tokens/s per GPU, and its step time gives {rate:,.0f}:"
            f" {cause}{_cause(planned, theirs / rate)}"
        )
    low, high = (
        rate * flops_per_token(plan.model, plan.seq_length, causal) / 1e12
        for causal in (True, False)
    )
    theirs = printed.get("tflops")
    if theirs is not None and not low / FAR <= theirs <= high * FAR:
        share = theirs / (
            high if log.format.startswith("NeMo") else low
        )  # NeMo counts full attention
        raise InputError(
            f"the log prints {theirs:,.0f} TFLOP/s per GPU, and its step time gives {low:,.0f} to"
            f" {high:,.0f}: {_cause(planned, share)}"
        )
    share = utilisation(plan, plan.tokens_per_step / plan.num_gpus / rate)
    if share > 1:
        above = (
            f"an MFU of {share:.0%} of {plan.gpu.name}'s {peak_tflops(plan.gpu, plan.precision):g}"
            " TFLOP/s"
        )
        raise InputError(
            f"the step time gives {above}, which is impossible:"
            f" {_cause(planned, 1 / share, 'at least')}"
        )


def _note_unit(log: Log, planned: Planned, rate: float, seconds: float) -> None:
    """Say where a step time would be a usual one in milliseconds and is none in seconds."""
    plan = planned.plan
    peak = peak_tflops(plan.gpu, plan.precision)
    share = utilisation(plan, plan.tokens_per_step / plan.num_gpus / rate) if peak else 1.0
    if share < LOW_MFU and LOW_MFU < 1000 * share < 1:
        log.said.append(
            f"step times of {seconds:,.0f} s give an MFU of {share:.2g} of {plan.gpu.name}'s peak,"
            f" milliseconds {1000 * share:.0%}; if the source has milliseconds, name its column"
            " step_time_ms"
        )


def _cause(planned: Planned, share: float, about: str = "about") -> str:
    """Return what is likely to be wrong where a rate should be `share` times ours."""
    plan = planned.plan
    fitting = {  # key of the plan: what it is, and what it would have to be
        "num_gpus": (plan.num_gpus, plan.num_gpus / share),
        "mapping.global_batch": (plan.mapping.global_batch, plan.mapping.global_batch * share),
        "seq_length": (plan.seq_length, plan.seq_length * share),
    }
    doubtful = {key: values for key, values in fitting.items() if key not in planned.stated}
    if not doubtful:
        others = f"model={plan.model.name}, gpu={plan.gpu.name} or precision={plan.precision.name}"
        return f"the log states number of GPUs, batch and sequence, so {others} is not what ran"
    bound = {
        "num_gpus": about,
        "mapping.global_batch": about.replace("least", "most"),
        "seq_length": about.replace("least", "most"),
    }
    named = ", ".join(
        f"{key}={now} ({bound[key]} {fits:,.0f} would fit)" for key, (now, fits) in doubtful.items()
    )
    return f"the log does not state {named}; set what ran, or name the model and GPU that did"


def _refuse_memory(log: Log, planned: Planned) -> None:
    most = most_memory_gb(planned.plan.gpu)
    peak = max(
        (value for value in (log.memory_gb, log.reserved_gb) if value is not None), default=0.0
    )
    if most and peak > most:
        gpu = planned.plan.gpu
        raise InputError(
            f"the log's memory peaks at {peak:,.0f} GB, and {gpu.name} has {gpu.memory_gb:g}; name"
            " the GPU that ran"
        )
