"""Several processes in one log: which one speaks for the run.

The reduced loss is the same on every rank that prints it, so one rank is enough.  Ranks that print the same steps stand
side by side and one of them is kept; ranks that print different ones followed each other, as after a restart on other
nodes, and all are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.importers.lines import Rank
from analysis.metrics import Array

SIDE_BY_SIDE = 0.75  # distinct steps over printed ones, below which ranks printed the same steps


def one_stream(ranks: Sequence[Rank], steps: Array, loss: Array, said: list[str]) -> NDArray[np.bool_]:
    """Return which of n training lines make up the run; what was chosen is added to `said`."""
    whole: NDArray[np.bool_] = np.isfinite(steps)
    names = sorted(set(ranks))
    if len(names) == 1:
        return whole
    who = _indices(ranks, names)
    printed = [set(steps[whole & (who == i)].tolist()) for i in range(len(names))]
    if len(set().union(*printed)) > SIDE_BY_SIDE * sum(map(len, printed)):
        return whole
    chosen = max(range(len(names)), key=lambda i: (len(printed[i]), -i))
    label = ".".join(map(str, names[chosen])) or "unlabelled"
    differ = _differ(steps, loss, who, chosen, whole)
    said.append(f"{len(names)} ranks print the same steps; rank {label} was kept" + (", although their losses differ" if differ else ""))
    kept: NDArray[np.bool_] = whole & (who == chosen)
    return kept


def _indices(ranks: Sequence[Rank], names: Sequence[Rank]) -> NDArray[np.int64]:
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[rank] for rank in ranks])


def _differ(steps: Array, loss: Array, who: NDArray[np.int64], chosen: int, whole: NDArray[np.bool_]) -> bool:
    """Whether any rank's loss differs from the chosen one's at a step that both printed."""
    kept = dict(zip(steps[who == chosen].tolist(), loss[who == chosen].tolist(), strict=True))
    others = whole & (who != chosen)
    return any(kept.get(step, value) != value for step, value in zip(steps[others].tolist(), loss[others].tolist(), strict=True))
