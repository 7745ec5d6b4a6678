"""From overrides to a checked plan: composition, defaults, rules, layouts that fit, remedies.

`compose_plan` is the way in.  It is imported when it is asked for, so that a job which needs the
rules alone loads no Hydra.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "compose_plan":
        from recipes.compose.tree import compose_plan

        return compose_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
