"""A refusal of a plan with the changes that may lift it.

A rule lists changes, the nearest first.  `recipes.compose.rules.check` names the first that all
rules accept, so that who follows a message does not meet the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes.estimate.schedule import own_batch, takes_own_batch
from recipes.overlap import reopened, resolved
from recipes.plan import Plan

Change = dict[str, Any]  # keys of the plan, as on a command line, and their new values


class Refusal(str):
    """What is refused and why, with advice in words.

    `changes`: what to name in place of the advice where the rules accept it, the first or
    (`any_of`) all.
    """

    what: str
    changes: tuple[Change, ...]
    any_of: bool

    def __new__(cls, what: str, advice: str, *changes: Change, any_of: bool = False) -> Refusal:
        """Return "what; advice"."""
        self = super().__new__(cls, f"{what}; {advice}")
        self.what, self.changes, self.any_of = what, changes, any_of
        return self


def overrides(change: Change) -> str:
    """Return a change as Hydra overrides."""
    values = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in change.items()
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def changed(plan: Plan, change: Change) -> Plan:
    """Return the plan with other values; whether tensor-parallel communication overlaps is decided
    anew.
    """
    plan = reopened(plan)
    for key, value in change.items():
        *path, name = key.split(".")
        parts: list[Any] = [plan]
        for part in path:
            parts.append(getattr(parts[-1], part))
        for part, holder in zip([name, *reversed(path)], reversed(parts), strict=True):
            value = holder.model_copy(update={part: value})
        plan = value
    return resolved(plan)


def with_batches(plan: Plan, change: Change) -> Iterator[tuple[Change, Plan]]:
    """Yield the changed plan, and with the next global batch that its layout divides.

    A batch that nobody named follows the layout, so that the change alone is enough.
    """
    candidate = changed(plan, change)
    batch = (
        own_batch(candidate)
        if takes_own_batch(plan) and "mapping.global_batch" not in change
        else None
    )
    yield change, changed(plan, {**change, "mapping.global_batch": batch}) if batch else candidate
    m, replicas = candidate.mapping, candidate.data_parallel
    of = m.micro_batch * max(1, replicas) * (m.pp if m.vp > 1 else 1)
    if m.global_batch % of:
        more = {**change, "mapping.global_batch": next_multiple(m.global_batch, of)}
        yield more, changed(plan, more)


def next_multiple(value: int, of: int) -> int:
    """Return the smallest multiple of `of` that is no less than `value`."""
    return -(-value // of) * of


def divisors(value: int) -> list[int]:
    """Return all divisors in ascending order."""
    return [n for n in range(1, value + 1) if value % n == 0]


def nearest(values: list[int], to: int) -> list[int]:
    """Return values by their ratio to `to`, the nearest first, of two the smaller."""
    return sorted(values, key=lambda value: (max(value / to, to / value), value))
