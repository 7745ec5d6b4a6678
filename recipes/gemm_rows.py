"""The rows that `python -m recipes.measure.gemm` writes, and what a linear layer costs in training,
added up from them.

Training multiplies three times for each linear layer: forward (fprop), and backward for the
gradients of the input (dgrad) and of the weight (wgrad).  FP8 also casts: input and gradient once a
micro-batch, the weight once a micro-batch or, since Transformer Engine keeps the cast weight
between the micro-batches of a step, once a step.  A GEMM that is twice as fast buys less than two.

gemm.jsonl       a row for each GEMM and kind
casts.jsonl      a row for each operand and granularity
layers.jsonl     a row for each linear layer and recipe
bandwidth.jsonl  a row for each size of a copy on the device
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ROLES = ("fprop", "dgrad", "wgrad")
OPERANDS = ("input", "weight", "gradient")
BLOCKS, TILES = "sub-channel 1x128, 128x128", "sub-channel 1x128, 1x128"
# Both operands of wgrad are activations, so both have 1x128 tiles (Transformer Engine's
# Float8BlockScaling, DeepSeek-V3).
GEMM_OF = {
    "tensor, delayed": ("tensor", "tensor", "tensor"),
    "tensor, current": ("tensor", "tensor", "tensor"),
    "channel": ("channel", "channel", "channel"),
    "sub-channel": (BLOCKS, BLOCKS, TILES),
}
# The last is Transformer Engine's own choice for scales by tensor: module/base.py, _2X_ACC_FPROP
# false, _2X_ACC_DGRAD and _2X_ACC_WGRAD true.
TE_ACCUMULATION = "fast fprop, precise backward"
ACCUMULATION_OF = {
    "fast": ("fast",) * 3,
    "precise": ("precise",) * 3,
    TE_ACCUMULATION: ("fast", "precise", "precise"),
}

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Gemm:
    """One kind of GEMM at one shape: seconds and TFLOP/s (2 m n k operations) as quartiles;
    `refused` says why there is no time.
    """

    name: str
    m: int
    n: int
    k: int
    precision: str
    granularity: str
    accumulation: str
    seconds: Quartiles | None = None
    tflops: float | None = None
    speedup_over_bf16: float | None = None
    refused: str = ""
    label: str = "measured"
    model: str = ""
    layer: str = ""
    role: str = "fprop"


@dataclass(frozen=True)
class Cast:
    """The cast of one operand, (rows, columns) in BF16, to its FP8 copies: seconds as quartiles,
    bytes read and written.

    An operand is read once, and twice where its scale waits for the largest |x| of the whole
    tensor, row or column.
    """

    name: str
    operand: str
    rows: int
    columns: int
    granularity: str
    made_by: str
    seconds: Quartiles | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    refused: str = ""
    label: str = "measured"
    model: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Layer:
    """A linear layer (forward m, n, k) under a recipe, a micro-batch: sums of measured medians, in
    seconds.

    `seconds` are its three GEMMs alone, `seconds_with_casts` with every cast,
    `seconds_weights_amortised` with the weight's cast shared among `micro_batches`; None where
    something is missing, which `refused` names.  Speedups are over BF16's three GEMMs.
    """

    name: str
    m: int
    n: int
    k: int
    precision: str
    granularity: str
    accumulation: str
    micro_batches: int
    gemm_seconds: Mapping[str, float]
    cast_seconds: Mapping[str, float]
    cast_bytes: Mapping[str, int]
    seconds: float | None = None
    seconds_with_casts: float | None = None
    seconds_weights_amortised: float | None = None
    speedup: float | None = None
    speedup_with_casts: float | None = None
    speedup_weights_amortised: float | None = None
    refused: str = ""
    label: str = "measured"
    model: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Copy:
    """A copy on the device: bytes of the source, seconds as quartiles, GB/s (1e9) read and written
    together.
    """

    bytes: int
    seconds: Quartiles
    gb_per_s: float
    label: str = "measured"


@dataclass
class Results:
    """Everything that was measured, and the settings that it was measured with."""

    settings: dict[str, Any]
    gemms: list[Gemm] = field(default_factory=list)
    casts: list[Cast] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def files(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows by the name of their file."""
        files: dict[str, Sequence[Gemm | Cast | Layer | Copy]]
        files = {
            "gemm": self.gemms,
            "casts": self.casts,
            "layers": self.layers,
            "bandwidth": self.copies,
        }
        return {name: [asdict(row) for row in rows] for name, rows in files.items()}


def as_trained(granularity: str, accumulation: str) -> bool:
    """Whether a recipe accumulates as training with it does: as Transformer Engine by tensor,
    precisely in sub-channels.
    """
    return granularity == "sub-channel" or accumulation == TE_ACCUMULATION


def recipes_of_layers() -> list[tuple[str, str, str]]:
    """Return precision, granularity and accumulation of every recipe, BF16 first; block scales are
    always accumulated precisely.
    """
    fp8 = [
        ("fp8", granularity, accumulation)
        for granularity in GEMM_OF
        for accumulation in ACCUMULATION_OF
    ]
    return [
        ("bf16", "-", "precise"),
        *(r for r in fp8 if r[1] != "sub-channel" or r[2] == "precise"),
    ]


def layer_rows(gemms: Sequence[Gemm], casts: Sequence[Cast], micro_batches: int) -> list[Layer]:
    """Return the rows of one linear layer, from the rows of its three GEMMs and of its casts."""
    by_kind = {(g.role, g.granularity, g.accumulation): g for g in gemms}
    base = _sum([_median(by_kind[(role, "-", "precise")]) for role in ROLES])
    return [_layer(by_kind, casts, recipe, micro_batches, base) for recipe in recipes_of_layers()]


def _layer(
    by_kind: Mapping[tuple[str, str, str], Gemm],
    casts: Sequence[Cast],
    recipe: tuple[str, str, str],
    micro_batches: int,
    base: float | None,
) -> Layer:
    precision, granularity, accumulation = recipe
    kinds = zip(
        ROLES, GEMM_OF.get(granularity, ("-",) * 3), ACCUMULATION_OF[accumulation], strict=True
    )
    found = {kind[0]: by_kind[kind] for kind in kinds}
    mine = {c.operand: c for c in casts if c.granularity == granularity}
    alone = _sum([_median(row) for row in found.values()])
    with_casts, amortised = (
        (_with_casts(alone, mine, share) for share in (1, micro_batches))
        if precision == "fp8"
        else (alone, alone)
    )
    reasons = [*(row.refused for row in found.values()), *(row.refused for row in mine.values())]
    first = found["fprop"]
    return Layer(
        first.name,
        first.m,
        first.n,
        first.k,
        precision,
        granularity,
        accumulation,
        micro_batches,
        gemm_seconds={role: t for role, row in found.items() if (t := _median(row)) is not None},
        cast_seconds={
            operand: t for operand, row in mine.items() if (t := _median(row)) is not None
        },
        cast_bytes={operand: row.bytes for operand, row in mine.items() if row.bytes is not None},
        seconds=alone,
        seconds_with_casts=with_casts,
        seconds_weights_amortised=amortised,
        speedup=_ratio(base, alone),
        speedup_with_casts=_ratio(base, with_casts),
        speedup_weights_amortised=_ratio(base, amortised),
        refused="; ".join(dict.fromkeys(why for why in reasons if why)),
        model=first.model,
        layer=first.layer,
    )


def _with_casts(alone: float | None, casts: Mapping[str, Cast], micro_batches: int) -> float | None:
    """Return the seconds of a micro-batch with its casts, the weight's shared among
    `micro_batches`.
    """
    times = [_median(casts[operand]) if operand in casts else None for operand in OPERANDS]
    shared = [
        t if t is None or operand != "weight" else t / micro_batches
        for operand, t in zip(OPERANDS, times, strict=True)
    ]
    return _sum([alone, *shared])


def _median(row: Gemm | Cast) -> float | None:
    return row.seconds[1] if row.seconds else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _ratio(base: float | None, value: float | None) -> float | None:
    return base / value if base and value else None
