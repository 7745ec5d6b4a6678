"""What GEMMs reach of a GPU's peak and bandwidth, fitted to those that `python -m
recipes.measure.gemm` measured.

Least squares on relative errors, with shares that are not negative.  `--refit` writes what comes
out to gemms.json, from which predictions take it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from analysis.predictor.model.gemm import OUTPUT, STORED, Efficiency, measured
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


def fitted(folder: Path = RESULTS) -> Efficiency:
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


def write(path: Path = STORED) -> None:
    """Fit anew and write what came out; predictions of this process take it from then on."""
    path.write_text(json.dumps(asdict(fitted()), indent=1) + "\n", encoding="utf-8")
    measured.cache_clear()
