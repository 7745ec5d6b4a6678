"""Where a layer's time goes on a GPU: the kernels of one transformer layer, forward and backward,
from a profile of training.

`recipes.measure.gpu.overhead --profile` writes `kernels.jsonl`, a folder a precision: every kernel
of a pass in the order of its launch, with its median time over layers and micro-batches.  What is
summed here by kind says why FP8 makes a layer less than twice as fast, and the predictor takes its
count of kernels, and how much longer attention's backward pass is, from the same rows
(analysis/predictor/model/work.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from analysis.render.table import Table
from recipes.errors import InputError
from recipes.run_folder import rows_of

KINDS = {
    "gemm": "GEMMs",
    "attention": "attention",
    "elementwise": "norms, activations, residuals",
    "cast": "casts",
    "memory": "memset, copies",
}
BASE, FP8 = "bf16", "fp8_current"
SHORT = 0.01  # ms, below which a ratio says nothing


def load(folder: Path) -> pd.DataFrame:
    """Return the kernels below a folder, a row each: what `layer_profile` and `harness_cost` write
    of one, and the device.
    """
    rows = []
    for path in sorted(folder.rglob("kernels.jsonl")):
        device = json.loads(path.with_name("manifest.json").read_text())["device"]
        rows += [{**row, "device": device} for row in rows_of(path)]
    if not rows:
        raise InputError(
            f"{folder} has no kernels.jsonl; make it with python -m recipes.measure.gpu.overhead"
            " --profile"
        )
    return pd.DataFrame(rows)


def table(kernels: pd.DataFrame) -> Table:
    """Return milliseconds and kernels by pass and kind in BF16 and FP8, with the speedup; sums last
    in each pass.
    """
    rows = []
    for name in kernels["pass"].unique():
        of_pass = kernels[kernels["pass"] == name]
        parts = [(label, of_pass[of_pass["kind"] == kind]) for kind, label in KINDS.items()]
        rows += [_row(name, label, part) for label, part in [*parts, ("all", of_pass)]]
    said = {
        name: ", ".join(map(str, sorted(set(kernels[name]))))
        for name in ("model", "tokens", "label", "device")
    }
    note = (
        f"One layer of {said['model']}, a micro-batch of {said['tokens']} tokens, {said['label']}"
        f" on {said['device']}."
    )
    return Table(
        "Where a layer's time goes",
        [_cells(row) for row in rows],
        rows,
        [note],
        frozenset(["pass", "what"]),
    )


def _row(name: str, label: str, part: pd.DataFrame) -> dict[str, object]:
    sums = part.groupby("precision")["microseconds"].agg(["sum", "size"])
    ms = {precision: float(sums["sum"].get(precision, 0.0)) / 1e3 for precision in (BASE, FP8)}
    number = {precision: int(sums["size"].get(precision, 0)) for precision in (BASE, FP8)}
    return {
        "pass": name,
        "what": label,
        "ms": ms,
        "kernels": number,
        "speedup": ms[BASE] / ms[FP8] if min(ms.values()) > SHORT else None,
    }


def _cells(row: dict[str, object]) -> dict[str, str]:
    ms, kernels, speedup = row["ms"], row["kernels"], row["speedup"]
    assert isinstance(ms, dict) and isinstance(kernels, dict)
    return {
        "pass": str(row["pass"]),
        "what": str(row["what"]),
        **{f"{precision}, ms": f"{ms[precision]:.2f}" for precision in (BASE, FP8)},
        "speedup": f"{speedup:.2f}x" if isinstance(speedup, float) else "–",
        **{f"{precision}, kernels": str(kernels[precision]) for precision in (BASE, FP8)},
    }
