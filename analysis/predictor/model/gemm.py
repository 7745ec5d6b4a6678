"""The time of a GEMM of any shape, from GEMMs that were measured (`python -m
recipes.measure.gemm`).

A GEMM multiplies, and it must write what it has summed: t = FLOPs / (share x peak) + traffic x
bytes of the result / bandwidth. `share`, one a kind of GEMM, is what deep ones reach of the peak;
operands are read while others are multiplied, but the result is written when the sum is done:
`traffic`, one for all kinds, is how much of it is not hidden, which is what makes shallow GEMMs
slow. Both are fitted to measured medians (calibration/gemm_efficiency.py) and stored in gemms.json,
so the curve is smooth in the shape and carries over to a GPU with another peak and bandwidth.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from analysis.predictor.model.hardware import Hardware
from recipes.errors import InputError

STORED = Path(__file__).resolve().parents[1] / "gemms.json"
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
def measured() -> Efficiency:
    """Return the efficiency of the measured GEMMs, as the last refit stored it."""
    try:
        return Efficiency(**json.loads(STORED.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{STORED.name} is missing or damaged; make it again with python -m analysis.predict"
            " --refit"
        ) from None
