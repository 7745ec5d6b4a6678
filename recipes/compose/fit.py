"""Does a plan fit its GPUs?  One function decides it for launches, remedies, layouts and searches.

The estimate (recipes.estimate.memory) has an error.  A plan is in one of three states:

- it **fits** with a margin: the estimate, were it too low by its error, stays below what the GPU
  can give.  Only such a layout is recommended, found by a search, or named as a remedy.
- it is **tight**: the GPU's memory lies within the error of the estimate.  A layout that was asked
  for by its fields, or that settings for speed take from NVIDIA, may be tight; the launch says so.
- it is **refused**: it would not fit if the estimate were too high by its error.
"""

from __future__ import annotations

from typing import Literal

from recipes.estimate.memory import estimate, usable_gb
from recipes.plan import Plan

# The worst error of the estimate on measured peaks, rounded up to half a percent (`python -m
# recipes.measure.memory`; a test compares the two).
WORST_MEASURED = 0.025
# What was not measured may be worse: several nodes, FSDP, MXFP8 in hardware, CUDA graphs' pools.
ESTIMATE_ERROR = 2 * WORST_MEASURED
# Context parallelism was not measured by this project either.  A review reported peaks of another
# stack up to 6.5 % above the estimate there: too low, never too high.
CONTEXT_PARALLEL_ERROR = 0.065

State = Literal["fits", "tight", "refused"]


def margin(plan: Plan) -> float:
    """Return the share by which the estimate may be too low, which a layout that fits leaves
    free.
    """
    return max(ESTIMATE_ERROR, CONTEXT_PARALLEL_ERROR) if plan.mapping.cp > 1 else ESTIMATE_ERROR


def state(plan: Plan) -> State:
    """Return in which of the three states a plan is; a device of unknown memory fits everything."""
    have = usable_gb(plan)
    if have is None:
        return "fits"
    need = estimate(plan).total_gb
    if need * (1 + margin(plan)) <= have:
        return "fits"
    return "tight" if need * (1 - ESTIMATE_ERROR) <= have else "refused"


def fits(plan: Plan) -> bool:
    """Whether the plan fits with a margin."""
    return state(plan) == "fits"


def is_tight(plan: Plan) -> bool:
    """Whether the GPU's memory lies within the error of the estimate."""
    return state(plan) == "tight"
