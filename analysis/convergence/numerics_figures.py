"""Figures of what a recipe does to tensors (analysis.convergence.numerics), for the report and the
notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

from analysis.convergence.numerics import ROLES, after_first, by_layer, load_all, over_training
from analysis.render.figure import COLOURS, Figure, axes
from analysis.runs.load import Run

MARKERS = {"fp8_delayed": "o", "fp8_current": "s", "fp8_subchannel": "^", "mxfp8": "x"}
NAMES = {"input": "activations", "weight": "weights", "grad": "gradients"}


def _lines(
    title: str, x: str, y: str, values: pd.DataFrame, column: str, scale: float = 1.0
) -> tuple[Drawing, list[Axes]]:
    """Draw a column over x: a panel for each role, a line for each precision."""
    drawing, panels = axes(title, x, "", panels=len(ROLES))
    for axis, role in zip(panels, ROLES, strict=True):
        for precision, rows in values[values["role"] == role].groupby("precision"):
            look: Any = {
                "color": COLOURS.get(str(precision)),
                "marker": MARKERS.get(str(precision), "D"),
                "ms": 4,
                "lw": 1.2,
                "alpha": 0.75,
            }
            axis.plot(rows[x], rows[column] * scale, label=precision, **look)
        axis.set_title(NAMES[role], fontsize=9)
    panels[0].set_ylabel(y)
    drawing.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        fontsize=8,
        frameon=False,
        ncols=4,
    )
    return drawing, panels


def noise_over_training(table: pd.DataFrame) -> Figure | None:
    """SQNR of each operand over training, median over layers with quartiles; None where nothing was
    looked at after step 1.
    """
    title, later = "Signal over quantisation noise, over training", after_first(table)
    if later.empty:
        return None
    values = over_training(later, "sqnr_db")
    drawing, panels = _lines(title, "step", "SQNR, dB", values, "median")
    for axis, role in zip(panels, ROLES, strict=True):
        for precision, rows in values[values["role"] == role].groupby("precision"):
            axis.fill_between(
                rows["step"],
                rows["low"],
                rows["high"],
                color=COLOURS.get(str(precision)),
                alpha=0.12,
                lw=0,
            )
    caption = (
        "Median over all FP8 layers, with quartiles. Higher is better: 6 dB are one bit of"
        " mantissa. Gradients lie lower where they are in E5M2 (two bits of mantissa). A curve that"
        " falls or jumps shows a scale that no longer fits. Step 1 is left out: delayed scaling has"
        " no history there."
    )
    return Figure("sqnr", title, caption, drawing)


def underflow_by_layer(table: pd.DataFrame) -> Figure | None:
    """Share of non-zero elements that became zero, by layer; None where nothing was looked at after
    step 1.
    """
    title, later = "Underflow by layer", after_first(table)
    if later.empty:
        return None
    drawing, panels = _lines(
        title,
        "layer",
        "elements that became zero, %",
        by_layer(later, "underflow"),
        "underflow",
        100,
    )
    for axis in panels:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    caption = (
        "Mean over training, without step 1, in which delayed scaling has no history. Per-tensor"
        " scales lose the small elements of a tensor to its largest one; scales by tile or block"
        " lose only those beside a large neighbour. E5M2 reaches lower than E4M3 and so loses"
        " fewer."
    )
    return Figure("underflow", title, caption, drawing)


def saturation_over_training(table: pd.DataFrame) -> Figure:
    """Largest share of saturated elements in any layer, over training."""
    title = "Saturation, the worst layer"
    worst = table.groupby(["precision", "role", "step"])["saturated"].max().reset_index()
    drawing, _ = _lines(
        title, "step", "elements too large for the scale, %", worst, "saturated", 100
    )
    caption = (
        "Only delayed scaling can saturate: its scale comes from past steps, and a tensor that"
        " grows faster than its history says is cut off. The other recipes see the tensor first."
    )
    return Figure("saturation", title, caption, drawing)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Return the figures of the runs that kept diagnostics; none where no run did."""
    if not any((run.folder / "fp8.jsonl").exists() for run in runs):
        return []
    table = load_all(runs)
    drawn = [noise_over_training(table), underflow_by_layer(table), saturation_over_training(table)]
    return [figure for figure in drawn if figure]
