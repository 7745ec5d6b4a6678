"""Does a plan fit its GPUs, and if not, what is the nearest one that does?

The estimate (recipes.memory) is right to a few percent, and a refusal that is wrong costs a user more than a warning:
a plan is refused when it would not fit even if the estimate were too high by its error; between the two it is tight,
which the launch says.
"""

from __future__ import annotations

from collections.abc import Iterator

from recipes.mapping_rules import MAPPING_RULES
from recipes.memory import estimate, layers_by_chunk, usable_gb
from recipes.overlap import reopened
from recipes.plan import Mapping, Plan

# The worst error on measured rows is 2.2 % (`python -m recipes.validation`; a test compares the
# two). The rest is for what was not measured: several nodes, FSDP, context parallelism, MXFP8 in
# hardware, and CUDA graphs' pools.
ESTIMATE_ERROR = 0.05


def fits(plan: Plan) -> bool:
    """Whether the estimate stays below what the GPU can give; a device of unknown memory fits everything."""
    have = usable_gb(plan)
    return have is None or estimate(plan).total_gb <= have


def is_tight(plan: Plan) -> bool:
    """Whether the plan exceeds what the GPU can give by no more than the estimate's own error."""
    have = usable_gb(plan)
    return not fits(plan) and have is not None and estimate(plan).total_gb * (1 - ESTIMATE_ERROR) <= have


def does_not_fit(plan: Plan) -> str | None:
    """Return a sentence that says what is too large and what to set instead, or None where the plan fits or is tight."""
    if plan.on_cpu or fits(plan) or is_tight(plan):
        return None
    memory, have = estimate(plan), usable_gb(plan) or 0
    largest = f"{memory.dominant} alone {memory.terms[memory.dominant] / 1e9:,.0f} GB"
    what = f"{plan.model.name} in {plan.precision.name} needs about {memory.total_gb:,.0f} GB a GPU, {largest}"
    return f"{what}; {plan.gpu.name} has {have:,.0f} GB to give; {_remedy(plan)}"


def _remedy(plan: Plan) -> str:
    """Return the first of the nearest changes under which the plan fits, as Hydra overrides."""
    for overrides, candidate in _nearest(plan):
        if fits(candidate):
            return f"use {overrides} (about {estimate(candidate).total_gb:,.0f} GB)"
    return "no recomputation, larger tp or pp, or up to 64 times the GPUs makes it fit; use a GPU with more memory or a smaller model"


def _nearest(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield changed plans in the order in which one would try them: recompute, split the model further, add GPUs."""
    for layers in range(plan.mapping.recompute_layers + 1, _layers_per_chunk(plan) + 1):
        yield _changed(plan, recompute_layers=layers)
    for more_gpus in (1, 2, 4, 8, 16, 32, 64):
        splits = list(_splits(plan, more_gpus))
        yield from splits
        for _, candidate in splits:
            m, layers = candidate.mapping, _layers_per_chunk(candidate)
            yield _changed(plan, more_gpus, tp=m.tp, pp=m.pp, vp=m.vp, recompute_layers=layers)


def _layers_per_chunk(plan: Plan) -> int:
    return max(len(chunk) for stage in range(plan.mapping.pp) for chunk in layers_by_chunk(plan, stage))


def _splits(plan: Plan, more_gpus: int) -> Iterator[tuple[str, Plan]]:
    """Yield the plan with tp and pp as they are or larger, the smallest product first, tp before pp as it stays on NVLink."""
    m = plan.mapping
    nvlink = plan.gpu.nvlink_domain or plan.gpu.devices_per_node
    tps = [tp for tp in (m.tp * 2**i for i in range(7)) if tp <= nvlink]
    pps = [pp for pp in (m.pp * 2**i for i in range(7)) if pp == 1 or not m.fsdp]
    for tp, pp in sorted(((tp, pp) for tp in tps for pp in pps), key=lambda pair: (pair[0] * pair[1], pair[1])):
        for vp in dict.fromkeys((m.vp if pp > 1 else 1, 1)):
            overrides, candidate = _changed(plan, more_gpus, tp=tp, pp=pp, vp=vp)
            if not any(rule(candidate) for rule in MAPPING_RULES):
                yield overrides, candidate


def _changed(plan: Plan, more_gpus: int = 1, **mapping: int) -> tuple[str, Plan]:
    """Return the plan with other mapping fields and more GPUs (and as many more sequences), and the overrides that do it."""
    if more_gpus > 1:
        mapping["global_batch"] = plan.mapping.global_batch * more_gpus
    changes = {key: value for key, value in mapping.items() if getattr(plan.mapping, key) != value}
    words = [f"num_gpus={plan.num_gpus * more_gpus}"] * (more_gpus > 1) + [f"mapping.{key}={value}" for key, value in changes.items()]
    changed: Mapping = reopened(plan).mapping.model_copy(update=changes)
    return " ".join(words), plan.model_copy(update={"mapping": changed, "num_gpus": plan.num_gpus * more_gpus})
