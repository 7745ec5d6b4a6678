"""Several processes in one log: which one speaks for the run.

The reduced loss is the same on every rank that prints it, so one rank is enough.  Ranks that print
the same steps stand side by side and one of them is kept; ranks that print different ones followed
each other, as after a restart on other nodes, and all are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.importers.lines import Rank
from analysis.runs.metrics import Array

SIDE_BY_SIDE = 0.75  # distinct steps over printed ones, below which ranks printed the same steps


def one_stream(
    names: Sequence[Rank], who: NDArray[np.int32], steps: Array, loss: Array, said: list[str]
) -> NDArray[np.bool_]:
    """Return which of n training lines make up the run; what was chosen is added to `said`.

    `names`: the ranks; `who`: which of them printed each line.
    """
    whole: NDArray[np.bool_] = np.isfinite(steps)
    if len(names) == 1:
        return whole
    printed = [np.unique(steps[whole & (who == i)]) for i in range(len(names))]
    if np.unique(np.concatenate(printed)).size > SIDE_BY_SIDE * sum(part.size for part in printed):
        return whole
    chosen = max(range(len(names)), key=lambda i: (printed[i].size, -i))
    label = ".".join(map(str, names[chosen])) or "unlabelled"
    differ = _differ(steps, loss, who, chosen, whole)
    said.append(
        f"{len(names)} ranks print the same steps; rank {label} was kept"
        + (", although their losses differ" if differ else "")
    )
    kept: NDArray[np.bool_] = whole & (who == chosen)
    return kept


def _differ(
    steps: Array, loss: Array, who: NDArray[np.int32], chosen: int, whole: NDArray[np.bool_]
) -> bool:
    """Whether any rank's loss differs from the chosen one's at a step that both printed."""
    ours, others = whole & (who == chosen), whole & (who != chosen)
    known, last = np.unique(steps[ours][::-1], return_index=True)
    place = np.searchsorted(known, steps[others]).clip(max=known.size - 1)
    both = known[place] == steps[others]
    return bool((loss[ours][::-1][last[place[both]]] != loss[others][both]).any())
