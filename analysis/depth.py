"""The step time of a deep model from shallow ones: what a layer costs, and what does not depend on the depth.

A model that is too large for the GPU at hand is measured at its true width and two depths or more.  Step time is a straight
line over the depth: its slope is a layer's time, its start the embedding, the output layer and what is done once a step.  A
speedup that is read off a shallow model mixes the two; the slope's is that of the layers, the part that FP8 speeds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.figures import COLOURS, Figure, axes
from analysis.runs import Run
from analysis.speed import step_time


@dataclass(frozen=True)
class Depth:
    """The line of one precision: seconds a layer, seconds that do not depend on the depth, the largest distance from it, and its points."""

    precision: str
    per_layer_s: float
    fixed_s: float
    residual_s: float
    layers: tuple[int, ...]
    step_time_s: tuple[float, ...]


def fit(runs: Sequence[Run]) -> list[Depth]:
    """Return a line for each precision that was measured at two depths or more, BF16 first."""
    names = sorted({run.plan.precision.name for run in runs}, key=lambda name: (name != "bf16", name))
    return [line for name in names if (line := _line(name, [run for run in runs if run.plan.precision.name == name]))]


def _line(name: str, runs: Sequence[Run]) -> Depth | None:
    points = sorted((run.plan.model.num_layers, step_time(run).value) for run in runs)
    layers, times = np.array([n for n, _ in points]), np.array([t for _, t in points])
    if len(set(layers.tolist())) < 2:
        return None
    slope, start = np.polyfit(layers, times, 1)
    residual = float(np.abs(slope * layers + start - times).max())
    return Depth(name, float(slope), float(start), residual, tuple(int(n) for n in layers), tuple(float(t) for t in times))


def rows(lines: Sequence[Depth]) -> list[dict[str, float | str]]:
    """Return the lines as rows, with the layers' speedup over BF16 where BF16 was measured."""
    base = next((line for line in lines if line.precision == "bf16"), None)
    return [
        {
            "precision": line.precision,
            "per_layer_ms": round(line.per_layer_s * 1e3, 2),
            "fixed_ms": round(line.fixed_s * 1e3, 1),
            "residual_ms": round(line.residual_s * 1e3, 2),
            "speedup_per_layer": round(base.per_layer_s / line.per_layer_s, 3) if base else float("nan"),
        }
        for line in lines
    ]


def figure(lines: Sequence[Depth], what: str) -> Figure:
    """Step time over depth with the fitted lines."""
    title = f"Step time over depth, {what}"
    drawing, (axis,) = axes(title, "layers", "seconds a step")
    for line in lines:
        reach = np.array([0, max(line.layers)])
        axis.plot(reach, line.fixed_s + line.per_layer_s * reach, color=COLOURS.get(line.precision), lw=1.2, label=line.precision)
        axis.plot(line.layers, line.step_time_s, "o", color=COLOURS.get(line.precision), ms=5)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    caption = "Points: medians of runs at true width. The slope is a layer's time; where the line starts is what a step costs without any layer."
    return Figure("depth", title, caption, drawing)
