"""The rows that `python -m recipes.measure.te_parity` writes: how many bits of this project's
numerics are Transformer Engine's, and why not all.

A row holds one comparison: a cast's copy of an operand (bytes and scales), the state of delayed
scaling after some steps, or the output of one of a linear layer's three GEMMs.  What differs is put
into classes by code that looks at the elements; what fits in no class is `unexplained`.

bits.jsonl    a row for each comparison
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from recipes.errors import one_line

ROLES = ("input", "weight", "grad")
GEMMS = ("fprop", "dgrad", "wgrad")
ROW_WISE, COLUMN_WISE, STATE, OUTPUT = "row-wise copy", "column-wise copy", "amax history", "output"
AS_CHOSEN, PRECISE = "as Transformer Engine chooses", "split accumulator in all three GEMMs"


@dataclass(frozen=True)
class Difference:
    """Two arrays side by side.

    `explained` and `scales_explained` count the differing elements and scales by cause,
    `unexplained` those without one, of both. `largest` is the largest difference between elements
    in `unit`.
    """

    elements: int
    identical: int
    scales: int = 0
    scales_identical: int = 0
    largest: float = 0.0
    unit: str = "FP8 steps"
    explained: Mapping[str, int] = field(default_factory=dict)
    scales_explained: Mapping[str, int] = field(default_factory=dict)
    unexplained: int = 0


@dataclass(frozen=True)
class Row:
    """One comparison.

    case: the tensor or layer.  operand: a role of ROLES or GEMMS.  what: what of it was compared.
    shape: of the tensor, or tokens, inputs, outputs of a layer.  share, scales_identical: of
    identical elements and scales.  te_error, our_error: of a GEMM's two outputs, the median
    distance from the exact product in steps of BF16 there (0.25 is rounding alone).  te_bias,
    our_bias: by how much an output is larger than the exact one, as a share of it, over all: 0
    where sums are rounded to nearest, below it where bits are cut off. largest_over_rms: of a GEMM,
    the largest difference over the root mean square of the output.
    """

    case: str
    recipe: str
    operand: str
    what: str
    format: str
    shape: tuple[int, ...]
    accumulation: str = ""
    elements: int = 0
    identical: int = 0
    share: float | None = None
    scales: int = 0
    scales_identical: float | None = None
    largest: float | None = None
    unit: str = ""
    largest_over_rms: float | None = None
    te_error: float | None = None
    our_error: float | None = None
    te_bias: float | None = None
    our_bias: float | None = None
    explained: Mapping[str, int] = field(default_factory=dict)
    scales_explained: Mapping[str, int] = field(default_factory=dict)
    unexplained: int = 0
    refused: str = ""
    label: str = "measured"

    def refuse(self, why: str) -> Row:
        """Return the row with the reason, in its first line, that it has no numbers."""
        lines = why.strip().splitlines()
        return replace(self, refused=one_line(lines[0])[:200] if lines else "no reason given")


def facts(found: Difference) -> dict[str, object]:
    """Return a difference as the fields of a row."""
    return {
        "elements": found.elements,
        "identical": found.identical,
        "share": found.identical / found.elements if found.elements else None,
        "scales": found.scales,
        "scales_identical": found.scales_identical / found.scales if found.scales else None,
        "largest": found.largest,
        "unit": found.unit,
        "explained": dict(found.explained),
        "scales_explained": dict(found.scales_explained),
        "unexplained": found.unexplained,
    }
