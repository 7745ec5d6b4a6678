"""Which learning rate, warm-up and global batch does a run take where its plan leaves them open?

They belong to a model and its convergence, not to the layout that is fastest:
`conf/model/<name>.yaml` holds them under `convergence`, each with its source.  What the user gives
stays; what is null is filled here, and `described` says for a composed plan where it follows the
published schedule and where not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.plan import Convergence, Plan, Train

Tree = dict[str, Any]
# For a model whose file has no schedule: the project's own, for the small models that it trains on
# one machine.
FALLBACK = Convergence(
    max_lr=3.0e-4, min_lr=3.0e-5, warmup_steps=10, source="this project, for small models"
)
WARMUP_DIVISOR = 10  # a warm-up that nobody gave takes at most a tenth of the steps


def fill_rates(tree: Tree) -> None:
    """Fill the learning rates and the warm-up that are null.

    A peak that is given takes the final rate with it, in the model's proportion.
    """
    train, own = tree["train"], _own(tree)
    if train["max_lr"] is None:
        train["max_lr"] = own["max_lr"]
    if train["min_lr"] is None:
        train["min_lr"] = _final_rate(train["max_lr"], own)
    if train["warmup_steps"] is None:
        train["warmup_steps"] = _warmup(own["warmup_steps"], train["max_steps"])


def _own(tree: Tree) -> Tree:
    return dict(tree["model"].get("convergence") or FALLBACK.model_dump())


def _final_rate(peak: Any, own: Tree) -> Any:
    numbers = all(type(value) in (int, float) for value in (peak, own["max_lr"], own["min_lr"]))
    if not numbers or peak == own["max_lr"] or own["max_lr"] <= 0:
        return own["min_lr"]
    return peak * (own["min_lr"] / own["max_lr"])


def _warmup(own: Any, max_steps: Any) -> Any:
    """Return the warm-up in steps; a value of another type is left for the plan's types to
    refuse.
    """
    numbers = type(own) is int and type(max_steps) is int
    return min(own, max_steps // WARMUP_DIVISOR) if numbers else own


def fill_batch(tree: Tree, asked: Any) -> None:
    """Set the global batch to the model's own, in place of the layout's.

    Nothing changes where the user `asked` for one, on the CPU (its layout is sized for a laptop),
    for a model without a published batch, or under settings whose `batch` is the layout's.
    """
    published, mapping = _own(tree).get("batch_tokens"), tree["mapping"]
    wants_layouts = tree["settings"].get("batch", "layout") == "layout"
    if (
        asked is not None
        or published is None
        or wants_layouts
        or not tree["gpu"]["compute_capability"]
    ):
        return
    ranks = mapping["tp"] * mapping["pp"] * mapping["cp"]
    multiple = batch_multiple(
        max(1, tree["num_gpus"] // ranks), mapping["micro_batch"], mapping["pp"], mapping["vp"]
    )
    own = nearest(published, tree["seq_length"], multiple)
    if own != mapping["global_batch"]:
        mapping["source"] += "; global batch: the model's"
    mapping["global_batch"] = own


def own_batch(plan: Plan) -> int | None:
    """Return the global batch that a plan of this layout takes where none is named.

    None where that is the layout's, as in `fill_batch`.
    """
    m, own = plan.mapping, plan.model.convergence
    published = own.batch_tokens if own else None
    if published is None or plan.settings.batch == "layout" or plan.on_cpu:
        return None
    return nearest(
        published,
        plan.seq_length,
        batch_multiple(max(1, plan.data_parallel), m.micro_batch, m.pp, m.vp),
    )


def takes_own_batch(plan: Plan) -> bool:
    """Whether the plan has the global batch that it would take where none is named."""
    return plan.mapping.global_batch == own_batch(plan)


def batch_multiple(data_parallel: int, micro_batch: int, pp: int, vp: int) -> int:
    """Return what a global batch must be a multiple of, in sequences; virtual stages need whole
    rounds of pp micro-batches.
    """
    return data_parallel * micro_batch * (pp if vp > 1 else 1)


def nearest(tokens: int, seq_length: int, multiple: int) -> int:
    """Return the multiple (of sequences) that is nearest to `tokens`, and at least one."""
    return multiple * max(1, round(tokens / (seq_length * multiple)))


def rates(train: Train, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the learning rate of each step, counted from 1, as a run's lr column has it.

    NeMo v2.3.2, core/optim/lr_scheduler.py: WarmupAnnealHoldPolicy and CosineAnnealing without
    constant steps, whose first step is number 0, and whose warm-up takes one step more than it is
    told.
    """
    past, warmup = steps - 1, train.warmup_steps
    rising = train.max_lr * (past + 1) / (warmup + 1)
    done = np.clip((past - warmup) / max(train.max_steps - warmup, 1), 0.0, 1.0)
    falling = train.min_lr + (train.max_lr - train.min_lr) * 0.5 * (1 + np.cos(math.pi * done))
    return np.asarray(np.where((past <= warmup) & (warmup > 0), rising, falling))


def described(plan: Plan) -> Tree:
    """Return the schedule of a plan as facts, with the sentences that say where it is not as
    published.
    """
    t, own = plan.train, plan.model.convergence
    return {
        "max_steps": t.max_steps,
        "tokens": t.max_steps * plan.tokens_per_step,
        "max_lr": t.max_lr,
        "min_lr": t.min_lr,
        "warmup_steps": t.warmup_steps,
        "published": own.model_dump() if own else None,
        "differs_from_published": (
            [*_rate_notes(plan, own), *_batch_notes(plan, own)] if own else []
        ),
    }


def _rate_notes(plan: Plan, own: Convergence) -> list[str]:
    t, notes = plan.train, list[str]()
    if t.max_lr != own.max_lr:
        notes.append(f"peak {t.max_lr:g}, published {own.max_lr:g}")
    if t.min_lr != _final_rate(t.max_lr, own.model_dump()):
        notes.append(f"final rate {t.min_lr:g}, published {own.min_lr:g}")
    if t.warmup_steps != own.warmup_steps:
        capped = t.warmup_steps == _warmup(own.warmup_steps, t.max_steps)
        why = " (at most a tenth of max_steps is taken)" if capped else ""
        notes.append(f"published warm-up {own.warmup_steps:,}{why}")
    return notes


def _batch_notes(plan: Plan, own: Convergence) -> list[str]:
    """The batch of settings that measure speed is the layout's on purpose, and gets no note."""
    m, published = plan.mapping, own.batch_tokens
    if published is None or plan.settings.batch == "layout" or plan.tokens_per_step == published:
        return []
    multiple = batch_multiple(plan.data_parallel, m.micro_batch, m.pp, m.vp)
    why = f" (the nearest multiple of {multiple} sequences)" if takes_own_batch(plan) else ""
    return [f"{plan.tokens_per_step:,} tokens per step{why}, published {published:,}"]
