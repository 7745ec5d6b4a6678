"""How many FP8 GEMMs does a plan imply per step, and is a counted number that one?

NeMo, Megatron-Core and Transformer Engine train on in BF16 without a message where FP8 is missing.
The evidence of an FP8 step is therefore the number of FP8 GEMMs that a process ran in it
(recipes/training/te_layers.py and recipes/training/fp8/linear.py count them).  Some is not enough:
one layer in FP8 would be some.
"""

from __future__ import annotations

from recipes.estimate.memory import layers_by_chunk
from recipes.plan import Plan

LINEAR_LAYERS = 4  # linear_qkv, linear_proj, linear_fc1, linear_fc2, with a gated MLP too
GEMMS = 3  # output, input gradient, weight gradient
# Passes through a layer that record one CUDA graph of it, each forward and backward: Megatron-Core
# 0.12.3 and 0.13 transformer_config.py, cuda_graph_warmup_steps = 3, and the capture itself.
CAPTURE_PASSES = 3 + 1


def fp8_gemms(plan: Plan, stage: int = 0) -> int:
    """Return the FP8 GEMMs that a process of a pipeline stage runs per step; 0 for BF16.

    A run folder holds those of rank 0, in stage 0.  Layers kept in BF16 run none.  A recomputed
    layer runs its output's GEMM once more; each chunk of a stage recomputes its first
    `recompute_layers` (Megatron-Core 0.12.3 transformer_block.py, _checkpointed_forward, block).
    """
    again = plan.mapping.recompute_layers
    gemms = 0
    for chunk in layers_by_chunk(plan, stage):
        gemms += sum(in_fp8 * (GEMMS + (number < again)) for number, in_fp8 in enumerate(chunk))
    return LINEAR_LAYERS * gemms * _micro_batches(plan)


def refusal(plan: Plan, counted: float, stage: int = 0) -> str | None:
    """Return what is wrong with the FP8 GEMMs counted in a step; None where the plan implies
    them.
    """
    planned = fp8_gemms(plan, stage)
    if counted == planned or counted - planned in _captures(plan, stage):
        return None
    found = f"{counted:,.0f}" if counted == counted else "no number of"
    return f"{found} FP8 GEMMs where the plan implies {planned:,} ({_in_words(plan, stage)})"


def _micro_batches(plan: Plan) -> int:
    """Return the micro-batches of a step that one data-parallel rank runs."""
    return plan.mapping.global_batch // (plan.mapping.micro_batch * plan.data_parallel)


def _captures(plan: Plan, stage: int) -> range:
    """Return by how many GEMMs a step exceeds the plan's number in which CUDA graphs are recorded.

    That is the first step of a process.  It runs as without graphs.  At its end Megatron-Core
    0.12.3 (transformer/cuda_graphs.py, create_cudagraphs) records a graph of each layer and
    micro-batch in flight.  Without a pipeline one micro-batch is in flight.  With one the schedule
    decides how many, at most all of a step.
    """
    layers = _layers_in_fp8(plan, stage)
    if not plan.mapping.cuda_graphs or layers == 0:
        return range(0)
    of_one = LINEAR_LAYERS * GEMMS * CAPTURE_PASSES
    most = layers * (_micro_batches(plan) if plan.mapping.pp > 1 else 1)
    return range(of_one * layers, of_one * most + 1, of_one)


def _layers_in_fp8(plan: Plan, stage: int) -> int:
    return sum(map(sum, layers_by_chunk(plan, stage)))


def _in_words(plan: Plan, stage: int) -> str:
    if plan.precision.fp8 is None:
        return "BF16"
    micro_batches, again = _micro_batches(plan), plan.mapping.recompute_layers
    words = [
        f"{LINEAR_LAYERS} linear layers",
        f"{_layers_in_fp8(plan, stage)} layers in FP8",
        f"{micro_batches} micro-batches",
        f"{GEMMS} GEMMs",
    ]
    more = f", and those of {again} recomputed layers per model chunk" if again else ""
    return " x ".join(words) + more
