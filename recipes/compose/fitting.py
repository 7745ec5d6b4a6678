"""Which layout does a cell get under settings that train?  NVIDIA's, or the nearest that fits with
a margin.

NVIDIA's recommended layouts were made for speed: gradients in BF16, no BF16 layers, a fused loss.
With settings for convergence some leave no room, or need more than there is.  `fitted` then takes
the nearest layout (recipes.compose.nearest) and `mapping.source` says what changed and why.  A
field that was given stays as it is; one that differs from NVIDIA's makes the layout the user's own,
which nothing changes.  Nor is one changed under settings that measure speed (`settings.layout`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from recipes.compose.defaults import FLAGS, FOR_BF16, LOOKED_UP, SIZES, fill, recommended_layout
from recipes.compose.fit import fits, margin
from recipes.compose.hydra_loader import values_of
from recipes.compose.nearest import differing, nearest
from recipes.compose.rules import BEFORE_MEMORY
from recipes.estimate.memory import estimate, usable_gb
from recipes.plan import Plan

Tree = dict[str, Any]
# Fields of the layout that memory depends on: who changes one has chosen the layout.
CHOSEN = (
    "tp",
    "pp",
    "cp",
    "vp",
    "micro_batch",
    "fsdp",
    "recompute_layers",
    "offload_layers",
)
FOR_MEMORY = "for memory"


def fitted(plan: Plan, tree: Tree, conf: Path) -> Plan:
    """Return the plan in the nearest layout that fits with a margin, where its own is only
    recommended.

    `tree` is what the plan was filled from.  With mapping=iso every precision of the cell gets the
    same layout, so it must fit for all of them.
    """
    looked_up = plan.mapping.source.split(":")[0] in LOOKED_UP
    if plan.on_cpu or plan.settings.layout == "recommended" or not looked_up:
        return plan
    sharing = _sharing(plan, tree, conf)
    plan = _without_graphs(plan, tree, sharing)
    given = {
        key: tree["mapping"].get(key)
        for key in (*SIZES, *FLAGS)
        if tree["mapping"].get(key) is not None
    }
    row = recommended_layout(tree)
    chosen = any(given.get(key, row[key]) != row[key] for key in CHOSEN)
    deciding = sharing or [plan]
    if chosen or not _passes(plan) or all(map(fits, deciding)):
        return plan
    found = nearest(plan, BEFORE_MEMORY, deciding, kept=given)
    return plan if found is None else _with_reason(plan, found, deciding)


def changes(plan: Plan) -> list[str]:
    """Return the notes of the plan's mapping: in what it is not the recommended layout, and why."""
    source, *notes = plan.mapping.source.split("; ")
    return notes if source.split(":")[0] in LOOKED_UP else []


def _without_graphs(plan: Plan, tree: Tree, sharing: list[Plan]) -> Plan:
    """Return the plan without CUDA graphs where one that shares its layout cannot have them."""
    cannot = [each.precision.name for each in sharing if not each.mapping.cuda_graphs]
    if not (plan.mapping.cuda_graphs and cannot and tree["mapping"].get("cuda_graphs") is None):
        return plan
    source = f"{plan.mapping.source}; CUDA graphs off, as {', '.join(cannot)} cannot have them"
    mapping = plan.mapping.model_copy(update={"cuda_graphs": False, "source": source})
    return plan.model_copy(update={"mapping": mapping})


def _passes(plan: Plan) -> bool:
    return not any(rule(plan) for rule in BEFORE_MEMORY)


def _sharing(plan: Plan, tree: Tree, conf: Path) -> list[Plan]:
    """Return the cell's plan in each precision that shares its layout: all, with mapping=iso.

    They are those of conf/precision, so that overrides of one precision leave the shared layout
    alone.
    """
    if not plan.mapping.source.startswith(FOR_BF16):
        return []
    found = []
    for path in sorted((conf / "precision").glob("*.yaml")):
        try:
            precision = values_of(path)
            other = Plan.model_validate(fill({**tree, "precision": precision}))
        except (OmegaConfBaseException, ValidationError, OSError, ValueError):
            continue  # a file that makes no plan is refused where it is asked for
        if _passes(other):
            found.append(other)
    return found


def _with_reason(plan: Plan, found: Plan, deciding: list[Plan]) -> Plan:
    """Return the plan that was found, with what changed and why in its mapping's source."""
    worst = max(deciding, key=lambda each: estimate(each).total_gb)
    whose = "" if worst.precision == plan.precision else f" in {worst.precision.name}"
    needs = (
        f"{estimate(worst).total_gb:.0f} of {usable_gb(plan) or 0:.0f} GB{whose},"
        f" {margin(worst):.1%} are kept free"
    )
    changed = ", ".join(
        f"{key} {old} → {new}" for key, (old, new) in differing(plan, found).items()
    )
    source = f"{plan.mapping.source}; {FOR_MEMORY} ({needs}): {changed}"
    return found.model_copy(update={"mapping": found.mapping.model_copy(update={"source": source})})
