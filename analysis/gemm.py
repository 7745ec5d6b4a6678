"""GEMM speedups by scaling granularity, as `python -m recipes.gemm` measured them on a GPU.

FP8 buys most where one scale serves the whole tensor, less where scales change along K, because they must then be applied
while the sum is built; and it buys more as K grows, since reading, writing and launching are the same for both formats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.figures import Figure, axes
from recipes.errors import InputError
from recipes.run_folder import rows_of

COLOURS = {"tensor": "#0072B2", "channel": "#E69F00", "sub-channel 1x128, 128x128": "#009E73", "sub-channel 1x128, 1x128": "#56B4E9"}
COLUMNS = ("name", "m", "n", "k", "granularity", "accumulation", "tflops", "speedup_over_bf16", "refused", "label")


def load(folder: Path) -> pd.DataFrame:
    """Return the measurements of a folder, a row for each kind and shape, BF16 included (granularity "-")."""
    if not (folder / "gemm.jsonl").exists():
        raise InputError(f"{folder}: no gemm.jsonl; make one with python -m recipes.gemm --out {folder}, on a machine with a CUDA GPU")
    table = pd.DataFrame(rows_of(folder / "gemm.jsonl"))
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(f"{folder / 'gemm.jsonl'} has no {missing[0]}; measure it again with this version")
    return table.assign(device=device(folder))


def device(folder: Path) -> str:
    """Return the GPU that the measurements are from."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return str(manifest["device"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder / 'manifest.json'} does not name a device: the numbers cannot be traced; measure them again") from None


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """Return the speedup over BF16, a row for each granularity and accumulation, a column for each K."""
    fp8 = table[(table["granularity"] != "-") & table["tflops"].notna()]
    wide = fp8.pivot_table(index=["granularity", "accumulation"], columns="k", values="speedup_over_bf16")
    return wide.round(2)


def figure(table: pd.DataFrame) -> Figure:
    """Speedup of an FP8 GEMM over BF16 by K: a line for each granularity, dashed where it accumulates precisely."""
    title = f"FP8 GEMM over BF16, M = N = {int(table['m'].iloc[0])}, {table['device'].iloc[0]} ({table['label'].iloc[0]})"
    drawing, (axis,) = axes(title, "K, the dimension that is summed over", "speedup over BF16")
    for (granularity, accumulation), rows in table[table["granularity"] != "-"].groupby(["granularity", "accumulation"]):
        style = "-" if accumulation == "fast" else "--"
        axis.plot(
            rows["k"], rows["speedup_over_bf16"], style, marker="o", ms=4, color=COLOURS.get(granularity), label=f"{granularity}, {accumulation}"
        )
    axis.axhline(1, color="#222222", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(table["k"].unique()), [f"{k:,}" for k in sorted(table["k"].unique())], fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    caption = (
        "Median time of a BF16 GEMM over that of FP8 at the same shape, measured in turns on random data; the casts to FP8 are not in it. "
        "Solid lines sum in the tensor core's own precision (fast), dashed ones in FP32 (precise). Finer scales buy less; larger K buys more."
    )
    return Figure("gemm", title, caption, drawing)
