"""The time of a GEMM of any shape, from GEMMs that were measured (`python -m
recipes.measure.gemm`).

A GEMM multiplies, and it must write what it has summed: t = FLOPs / (share x peak) + traffic x
bytes of the result / bandwidth. `share`, one a kind of GEMM, is what deep ones reach of the peak;
operands are read while others are multiplied, but the result is written when the sum is done:
`traffic`, one for all kinds, is how much of it is not hidden, which is what makes shallow GEMMs
slow. Both follow from the measured medians by least squares on relative errors, so the curve is
smooth in the shape and carries over to a GPU with another peak and another bandwidth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from analysis.predictor.model.hardware import Hardware, hardware
from analysis.runs.measurements import device
from recipes.compose.tree import compose_plan
from recipes.gemm_rows import BLOCKS, TILES
from recipes.run_folder import rows_of

RESULTS = Path(__file__).resolve().parents[2] / "results" / "gemm_h200"
KINDS = {
    ("-", "precise"): "bf16",
    ("tensor", "fast"): "tensor_fast",
    ("tensor", "precise"): "tensor_precise",
    (BLOCKS, "precise"): "blocks",
    (TILES, "precise"): "tiles",
}
OUTPUT = 2  # bytes an element of a BF16 result


@dataclass(frozen=True)
class Efficiency:
    """`share` of the format's dense peak by kind of GEMM, `traffic`: unhidden share of the result's
    traffic; `error`: mean of the fit.
    """

    share: dict[str, float]
    traffic: float
    device: str
    error: float

    def seconds(
        self, hw: Hardware, kind: str, m: float, n: float, k: float, output: int = OUTPUT
    ) -> tuple[float, float]:
        """Return the seconds that multiplying takes at the measured share of the peak, and those of
        writing `output` bytes an element.
        """
        peak = hw.bf16 if kind == "bf16" else hw.fp8
        return (
            2.0 * m * n * k / (peak * self.share[kind]),
            self.traffic * m * n * output / hw.memory,
        )


@functools.cache
def measured(folder: Path = RESULTS) -> Efficiency:
    """Return the efficiency fitted to the GEMMs of a results folder."""
    rows = [
        row
        for row in rows_of(folder / "gemm.jsonl")
        if row["seconds"] and (row["granularity"], row["accumulation"]) in KINDS
    ]
    name = device(folder)
    hw = _hardware(name)
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    equations = np.zeros((len(rows), len(kinds) + 1))
    for place, row in enumerate(rows):
        kind, m, n, k, t = _kind(row), row["m"], row["n"], row["k"], row["seconds"][1]
        equations[place, kinds.index(kind)] = (
            2.0 * m * n * k / (hw.bf16 if kind == "bf16" else hw.fp8) / t
        )
        equations[place, -1] = m * n * OUTPUT / hw.memory / t
    solution, _ = nnls(equations, np.ones(len(rows)))
    error = float(np.mean(np.abs(equations @ solution - 1)))
    return Efficiency(
        {kind: 1 / x for kind, x in zip(kinds, solution, strict=False)},
        float(solution[-1]),
        name,
        error,
    )


def _kind(row: dict[str, Any]) -> str:
    return KINDS[(row["granularity"], row["accumulation"])]


def _hardware(name: str) -> Hardware:
    gpu = next(gpu for gpu in ("gb200", "b200", "h200", "h100") if gpu in name.lower())
    return hardware(compose_plan(["model=llama3_8b", f"gpu={gpu}", "experiment=throughput"]).gpu)
