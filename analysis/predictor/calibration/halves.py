"""Which published rows may choose the predictor's form, and which only report its error?

A form, a prior or an interval's width is chosen on one half of the rows.  The other half is
predicted once a choice is final.  Rows of one model, release and submitter err alike, so they stay
together.  Within the rows of a GPU, of the reference files and of the unseen ones apart, these
groups are sorted by the SHA-256 of their name and dealt in turn: to `choose`, to `report`, to
`choose`.  The rule was written down before a form was tried.  It depends on nothing that was
measured or predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.predictor.calibration.published_steps import Row

CHOOSE, REPORT = "choose", "report"


def halves(found: Iterable[Row]) -> dict[Row, str]:
    """Return CHOOSE or REPORT for each row of one set: the reference files, or the unseen rows."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        groups.setdefault(row.gpu, {}).setdefault(row.group, []).append(row)
    half = {}
    for of_gpu in groups.values():
        for place, group in enumerate(sorted(of_gpu, key=_digest)):
            half.update({row: REPORT if place % 2 else CHOOSE for row in of_gpu[group]})
    return half


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()
