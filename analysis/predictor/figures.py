"""Where the time goes: a stacked bar a plan, in the colours of the project's other figures."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.predictor.model.step import TERMS
from analysis.render.figure import Figure, axes

# Colours of Okabe and Ito, each family of terms in one hue: computing, casting, talking, waiting.
COLOURS = {
    "gemm": "#0072B2",
    "vocabulary": "#56B4E9",
    "attention": "#009E73",
    "recompute": "#88CCAA",
    "elementwise": "#999933",
    "casts": "#D55E00",
    "optimizer": "#E69F00",
    "tp_comm": "#CC79A7",
    "cp_comm": "#AA5588",
    "pp_comm": "#882255",
    "dp_comm": "#661144",
    "bubble": "#BBBBBB",
    "launch": "#888888",
    "fixed": "#666666",
    "stragglers": "#444444",
}


def stacked(title: str, bars: Sequence[tuple[str, dict[str, float]]]) -> Figure:
    """Return one bar for each name, its terms (seconds) stacked from left to right."""
    title = f"{title} (predicted)"
    drawing, (axis,) = axes(title, "seconds a step, predicted", "")
    for place, (_, terms) in enumerate(reversed(bars)):
        left = 0.0
        for term, colour in COLOURS.items():
            axis.barh(place, terms[term], left=left, color=colour, height=0.6)
            left += terms[term]
        axis.annotate(f" {left:.3g} s", (left, place), va="center", fontsize=9)
    named = [term for term in COLOURS if any(terms[term] for _, terms in bars)]
    handles = [axis.barh(0, 0, color=COLOURS[term], label=TERMS[term]) for term in named]
    axis.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)])
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.12)
    axis.legend(
        handles=handles,
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
    )
    caption = (
        "What the slowest pipeline stage spends a step on. Communication and launches count only"
        " where they are waited for; what hides behind computation is in no bar."
    )
    return Figure("prediction", title, caption, drawing)
