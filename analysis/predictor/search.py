"""The best layout: every split of a model over its GPUs that Megatron-Core takes and that fits in
memory, by predicted speed.

Tried are powers of two for tp, cp and the micro-batch, divisors of the layers for pp and vp, with
and without FSDP, and recomputing no layer or all of them; GPUs, global batch, sequence and
everything else stay as the plan has them.  The rules of `recipes.compose.layout_rules` refuse what
cannot run, and memory is asked from the fastest down until enough are found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from analysis.predictor.constants import constants
from analysis.predictor.model.step import Prediction, predict
from recipes.compose.fit import fits
from recipes.compose.layout_rules import MAPPING_RULES
from recipes.errors import InputError
from recipes.overlap import reopened, resolved
from recipes.plan import Mapping, Plan

MICRO_BATCHES = (1, 2, 4, 8)
CONTEXT = (1, 2, 4, 8)


def search(plan: Plan, wanted: int = 10) -> list[tuple[Plan, Prediction]]:
    """Return the fastest layouts that fit, the fastest first; InputError where none does."""
    tried = sorted(
        ((candidate, predict(candidate, constants())) for candidate in candidates(plan)),
        key=lambda pair: pair[1].step_time_s,
    )
    if not tried:
        asked = f"{plan.num_gpus} GPUs and {plan.mapping.global_batch} sequences"
        raise InputError(
            f"no layout of {plan.model.name} divides {asked}; change num_gpus or"
            " mapping.global_batch"
        )
    found = list(itertools.islice((pair for pair in tried if fits(pair[0])), wanted))
    if not found:
        cell = f"{plan.model.name} in {plan.precision.name} on {plan.num_gpus} {plan.gpu.name}"
        raise InputError(
            f"none of {len(tried)} layouts of {cell} fits in memory with a margin; use more GPUs"
            " (num_gpus=…) or a GPU with more memory"
        )
    return found


def candidates(plan: Plan) -> Iterator[Plan]:
    """Yield the plan in every layout that the rules take."""
    layers = plan.model.num_layers + 2 * plan.model.embedding_and_loss_count_as_layers
    domain = plan.gpu.nvlink_domain or plan.gpu.devices_per_node
    for tp, cp, pp in itertools.product(
        _powers(min(domain, plan.num_gpus)), CONTEXT, _divisors(layers)
    ):
        if plan.num_gpus % (tp * cp * pp):
            continue
        chunks = [vp for vp in _divisors(layers // pp) if pp > 1 or vp == 1]
        for vp, micro_batch, fsdp in itertools.product(
            chunks, MICRO_BATCHES, (False, True) if pp == 1 else (False,)
        ):
            for recompute in (0, layers // (pp * vp)):
                yield from _allowed(
                    plan,
                    tp=tp,
                    cp=cp,
                    pp=pp,
                    vp=vp,
                    micro_batch=micro_batch,
                    fsdp=fsdp,
                    recompute_layers=recompute,
                )


def _allowed(plan: Plan, **layout: int | bool) -> Iterator[Plan]:
    """Yield the plan in a layout, unless a rule refuses it; CUDA graphs where the plan has them and
    the layout can.
    """
    graphs = plan.mapping.cuda_graphs and not layout["fsdp"] and not layout["recompute_layers"]
    mapping: Mapping = reopened(plan).mapping.model_copy(
        update={**layout, "cuda_graphs": graphs, "offload_layers": 0, "source": "search"}
    )
    overlap = plan.settings.overlap_param_gather_with_optimizer_step and mapping.vp > 1
    settings = plan.settings.model_copy(
        update={"overlap_param_gather_with_optimizer_step": overlap}
    )
    candidate = resolved(plan.model_copy(update={"mapping": mapping, "settings": settings}))
    if not any(rule(candidate) for rule in MAPPING_RULES):
        yield candidate


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
