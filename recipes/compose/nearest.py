"""Which layouts are near a plan's, in the order in which one would try them?

A remedy names the first that fits, and a recommended layout without a margin gives way to it.
First comes a smaller micro-batch, then recomputation of up to half of a stage's layers, then a
further split of the model, then both with all layers recomputed; and only then more GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from recipes.compose.fit import fits
from recipes.compose.layout_rules import OFF, Rule, excluded
from recipes.estimate.memory import layers_by_chunk
from recipes.estimate.schedule import own_batch, takes_own_batch
from recipes.overlap import overlaps_tp, reopened
from recipes.plan import Mapping, Plan

DOUBLINGS = tuple(2**i for i in range(7))
MORE_GPUS = (1, 2, 4, 8, 16, 32, 64)
RESOLVED = {"source", "tp_overlap"}  # what a layout does not hold, or holds only as far as it can
Others = Sequence[Plan]


def nearest(
    plan: Plan,
    rules: Sequence[Rule],
    others: Others = (),
    times: Sequence[int] = (1,),
    kept: Collection[str] = (),
) -> Plan | None:
    """Return the plan in the nearest layout that the rules take and that fits; None where none
    does.

    `others` are plans that share the layout and decide in place of the plan.  `times`: how many
    times the GPUs.  `kept`: fields of the layout that stay as they are.
    """
    for candidate in itertools.chain.from_iterable(_layouts(plan, factor) for factor in times):
        if any(getattr(candidate.mapping, key) != getattr(plan.mapping, key) for key in kept):
            continue
        sharing = [_in_layout_of(candidate, other) for other in others or (plan,)]
        possible = not any(rule(each) for each in sharing for rule in rules)
        if possible and all(map(fits, sharing)):
            return candidate
    return None


def overrides(plan: Plan, changed: Plan) -> str:
    """Return the overrides that make one plan the other, which differ in layout and GPUs alone.

    A batch that nobody named follows the layout and is not among them.
    """
    follows = {"global_batch"} if takes_own_batch(plan) and takes_own_batch(changed) else set[str]()
    found = [
        f"mapping.{key}={_text(new)}"
        for key, (_, new) in differing(plan, changed).items()
        if key not in follows
    ]
    more = [f"num_gpus={changed.num_gpus}"] if changed.num_gpus != plan.num_gpus else []
    return " ".join([*more, *found])


def differing(plan: Plan, changed: Plan) -> dict[str, tuple[object, object]]:
    """Return the fields of the layout in which two plans differ, with the values of both."""
    before, after = (each.mapping.model_dump(exclude=RESOLVED) for each in (plan, changed))
    found = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    if plan.mapping.tp_overlap and changed.mapping.tp > 1 and not overlaps_tp(changed):
        found["tp_overlap"] = (True, False)
    return found


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_layout_of(candidate: Plan, other: Plan) -> Plan:
    update = {"mapping": candidate.mapping, "num_gpus": candidate.num_gpus}
    return other.model_copy(update=update)


def _layouts(plan: Plan, factor: int) -> Iterator[Plan]:
    """Yield the plan in other layouts on `factor` times its GPUs."""
    m = plan.mapping
    micro_batches = [m.micro_batch // i for i in DOUBLINGS if m.micro_batch % i == 0]
    splits = list(_splits(plan))
    for micro_batch in micro_batches:
        yield from _changed(plan, factor, micro_batch=micro_batch)
    yield from _recomputing(plan, factor, {"micro_batch": micro_batches[-1]}, half=True)
    for split in splits:
        yield from _changed(plan, factor, micro_batch=micro_batches[-1], **split)
    for split in ({}, *splits):
        yield from _recomputing(plan, factor, {"micro_batch": micro_batches[-1], **split})


def _splits(plan: Plan) -> Iterator[dict[str, int]]:
    """Yield larger tp, cp and pp, the smallest product first, tp before the others as it stays on
    NVLink.

    Megatron-Core's FSDP is not combined with pipeline stages (NVIDIA's scripts never do).
    """
    m, model = plan.mapping, plan.model
    nvlink = plan.gpu.nvlink_domain or plan.gpu.devices_per_node
    chosen = [
        (tp, cp, pp)
        for tp, cp, pp in itertools.product(DOUBLINGS, DOUBLINGS[:4], DOUBLINGS)
        if 1 < tp * cp * pp <= DOUBLINGS[-1] and m.tp * tp <= max(nvlink, m.tp)
    ]
    for tp, cp, pp in sorted(
        chosen, key=lambda factors: (factors[0] * factors[1] * factors[2], factors[2], factors[1])
    ):
        if (m.fsdp and m.pp * pp > 1) or m.pp * pp > model.num_layers:
            continue
        for vp in dict.fromkeys((m.vp if m.pp * pp > 1 else 1, 1)):
            yield {"tp": m.tp * tp, "cp": m.cp * cp, "pp": m.pp * pp, "vp": vp}


def _recomputing(
    plan: Plan, factor: int, layout: dict[str, int], half: bool = False
) -> Iterator[Plan]:
    """Yield a layout with one more layer recomputed at a time, up to half of a chunk's; or all at
    once.
    """
    split = plan.model_copy(update={"mapping": plan.mapping.model_copy(update=layout)})
    chunks = [chunk for stage in range(split.mapping.pp) for chunk in layers_by_chunk(split, stage)]
    most, before = max(map(len, chunks)), plan.mapping.recompute_layers
    for layers in range(before + 1, most // 2 + 1) if half else [most] * (most > before):
        yield from _changed(plan, factor, **layout, recompute_layers=layers)


def _changed(plan: Plan, factor: int, **layout: int) -> Iterator[Plan]:
    """Yield the plan in a layout, without what the layout excludes; with more GPUs also with more
    sequences.

    Nothing is yielded where the layout cuts the layers unevenly, or is the plan's own.
    """
    m = plan.mapping
    update: dict[str, object] = dict(layout)
    fields = m.model_dump() | layout
    update |= {other: OFF[other] for key in layout for other in excluded(fields, key)}
    mapping: Mapping = reopened(plan).mapping.model_copy(update=update)
    lent = 2 * plan.model.embedding_and_loss_count_as_layers
    uneven = (plan.model.num_layers + lent) % (mapping.pp * mapping.vp)
    same = all(getattr(m, key) == value for key, value in update.items())
    if (same and factor == 1) or (uneven and mapping.pp > 1):
        return
    gpus = plan.num_gpus * factor
    own = (
        own_batch(plan.model_copy(update={"mapping": mapping, "num_gpus": gpus}))
        if takes_own_batch(plan)
        else None
    )
    for batch in [own] if own else dict.fromkeys((m.global_batch, m.global_batch * factor)):
        replicas = max(1, gpus // (mapping.tp * mapping.cp * mapping.pp))
        if batch % (mapping.micro_batch * replicas) == 0:
            final = mapping.model_copy(update={"global_batch": batch})
            yield plan.model_copy(update={"mapping": final, "num_gpus": gpus})
            return
