"""How far off are simpler predictors on the same rows?

Each rival has numbers of its own, taken from the fitted rows of the reference files as ours are:

- constant: one TFLOP/s for each number format, as a share of the GPU's dense peak.  FLOPs are the
  model's, with the causal half of attention.
- roofline, after llm-analysis: a layer's linear maps at a share of their peak, attention at the
  same share of the BF16 peak, norms and activations at 90 % of the memory bandwidth,
  tensor-parallel messages at 80 % of NVLink's and not hidden, the pipeline's bubble.  No kernels,
  casts, optimizer or data parallelism.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median

from analysis.predictor.calibration.published_steps import Row, rows
from analysis.predictor.model.hardware import hardware
from analysis.predictor.model.work import BF16, activation_bytes, tokens
from recipes.estimate.flops import (
    PASSES,
    attention_flops_per_token,
    flops_per_token,
    layer_flops_per_token,
)
from recipes.plan import Plan

MEMORY, NVLINK = 0.9, 0.8  # shares that are reached, as llm-analysis takes by default
Seconds = Callable[[Plan], float]


def constant_peak(plan: Plan) -> float:
    """Return the seconds of a step's model FLOPs at the dense peak of its number format."""
    hw = hardware(plan.gpu)
    peak = hw.fp8 if plan.precision.fp8 else hw.bf16
    flops = flops_per_token(plan.model, plan.seq_length, causal=True)
    return plan.tokens_per_step * flops / plan.num_gpus / peak


@functools.cache
def rivals() -> dict[str, Seconds]:
    """Return each rival by its name."""
    return {"constant TFLOP/s": _scaled(constant_peak), "roofline": _roofline_scaled()}


def _scaled(at_peak: Seconds) -> Seconds:
    """Return a predictor that reaches the median share of the peak of each number format's fitted
    rows.
    """
    shares: dict[bool, float] = {}
    for fp8 in (False, True):
        fitted = [row for row in _fitted() if (row.plan.precision.fp8 is not None) == fp8]
        shares[fp8] = median(at_peak(row.plan) / row.step_time_s for row in fitted)
    return lambda plan: at_peak(plan) / shares[plan.precision.fp8 is not None]


def _roofline_scaled() -> Seconds:
    """Return the roofline with the share of the peak, in steps of 1 %, whose fitted rows are off
    least.
    """
    shares = {}
    for fp8 in (False, True):
        fitted = [row for row in _fitted() if (row.plan.precision.fp8 is not None) == fp8]
        shares[fp8] = min(
            (share / 100 for share in range(20, 100)), key=lambda share: _off(fitted, share)
        )
    return lambda plan: _roofline(plan, shares[plan.precision.fp8 is not None])


def _off(found: list[Row], share: float) -> float:
    return sum(abs(_roofline(row.plan, share) / row.step_time_s - 1) for row in found)


def _roofline(plan: Plan, share: float) -> float:
    """Return the seconds of a step with linear maps and attention at a share of their peaks."""
    m, model, hw, each = plan.mapping, plan.model, hardware(plan.gpu), tokens(plan)
    peak = hw.fp8 if plan.precision.fp8 else hw.bf16
    linear = PASSES * layer_flops_per_token(model) * each / m.tp / (peak * share)
    scores = attention_flops_per_token(model, plan.seq_length, causal=True)
    attention = PASSES * scores * each / m.tp / (hw.bf16 * share)
    memory = sum(activation_bytes(plan, backward) for backward in (False, True)) / (
        hw.memory * MEMORY
    )
    message = each * model.hidden_size * BF16 * (m.tp - 1) / m.tp / (hw.nvlink * NVLINK)
    layers = model.num_layers / m.pp * (linear + attention + memory + 8 * message)
    vocabulary = (
        PASSES * 2.0 * model.vocab_size * model.hidden_size * each / m.tp / (hw.bf16 * share)
    )
    micro_batches = m.global_batch / (m.micro_batch * plan.data_parallel)
    return (micro_batches + (m.pp - 1) / m.vp) * layers + micro_batches * vocabulary / m.pp


def _fitted() -> list[Row]:
    return [row for row in rows() if row.held == "fit"]
