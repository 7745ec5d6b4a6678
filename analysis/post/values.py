"""Numbers of a figure, each with its label: as a table to read, as rows for programs, and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from analysis.render.figure import Figure, axes
from analysis.render.table import Table

Label = Literal["measured", "measured parts, put together", "published", "predicted"]
SHADES: dict[Label, float] = {
    "measured": 1.0,
    "measured parts, put together": 0.75,
    "published": 0.5,
    "predicted": 0.2,
}  # of bars, by label
HATCHES = ("", "//", "..", "xx")  # of the first, second, … series of a label


@dataclass(frozen=True)
class Value:
    """A ratio of speeds with its interval, where it has one; `series` is what it is beside its
    label, `source` where it comes from.
    """

    model: str
    precision: str
    label: Label
    series: str
    value: float
    low: float | None
    high: float | None
    source: str

    @property
    def name(self) -> str:
        """Label and series, as they head a column."""
        return f"{self.label}: {self.series}" if self.series else self.label

    @property
    def shown(self) -> str:
        """The value with its interval."""
        return (
            f"{self.value:.2f}"
            if self.low is None or self.high is None
            else f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"
        )


GREY = "#222222"
PLATE = {"fc": "white", "alpha": 0.75, "lw": 0, "pad": 0.8}  # behind a number


class Look(NamedTuple):
    """How bars of a label and series are filled."""

    shade: float
    hatch: str


def looks_of(values: Sequence[Value]) -> dict[str, Look]:
    """Return how each label and series is drawn, in the order of the labels."""
    found: dict[str, Look] = {}
    for value in ordered(values):
        same = sum(name.startswith(value.label) for name in found)
        found.setdefault(value.name, Look(SHADES[value.label], HATCHES[same % len(HATCHES)]))
    return found


class Band(NamedTuple):
    """A range in which published values lie that are not printed one by one."""

    low: float
    high: float
    text: str


def table(title: str, values: Sequence[Value], notes: Sequence[str]) -> Table:
    """Return a line a model and recipe, a column a label and series; what there is more than one of
    stands in one cell.
    """
    columns = list(dict.fromkeys(value.name for value in ordered(values)))
    shown = []
    for (model, precision), group in itertools.groupby(
        values, key=lambda value: (value.model, value.precision)
    ):
        cells = list(group)
        said = {
            name: "; ".join(value.shown for value in cells if value.name == name) or "–"
            for name in columns
        }
        shown.append({"model": model, "recipe": precision, **said})
    return Table(
        title, shown, [asdict(value) for value in values], notes, frozenset(["model", "recipe"])
    )


def sources(values: Sequence[Value]) -> Table:
    """Return where each number comes from, a line a number."""
    shown = [
        {
            "model": v.model,
            "recipe": v.precision,
            "what": v.name,
            "times": v.shown,
            "from": v.source,
        }
        for v in values
    ]
    return Table(
        "Where each number comes from",
        shown,
        [asdict(v) for v in values],
        (),
        frozenset(["model", "recipe", "what", "from"]),
    )


def ordered(values: Sequence[Value]) -> list[Value]:
    """Return values by label: measured, published, predicted."""
    return sorted(values, key=lambda value: list(SHADES).index(value.label))


def chart(
    name: str,
    title: str,
    values: Sequence[Value],
    colours: dict[str, str],
    caption: str,
    band: Band | None = None,
) -> Figure:
    """Return bars by model: those of each recipe in its colour, in the order of their labels,
    intervals as whiskers.
    """
    models = list(dict.fromkeys(value.model for value in values))
    drawing, (axis,) = axes(title, "", "times as fast")
    slots = list(
        dict.fromkeys(
            (v.precision, v.name)
            for precision in colours
            for v in ordered(values)
            if v.precision == precision
        )
    )
    many, looks = len(colours) > 1, looks_of(values)
    by_model = {
        model: [
            s for s in slots if any((v.model, v.precision, v.name) == (model, *s) for v in values)
        ]
        for model in models
    }
    width = 0.86 / max(map(len, by_model.values()))
    for place, model in enumerate(models):
        for position, slot in enumerate(by_model[model]):
            found = [v for v in values if (v.model, v.precision, v.name) == (model, *slot)]
            _bar(
                axis,
                place + (position - (len(by_model[model]) - 1) / 2) * width,
                width * 0.92,
                found,
                colours[slot[0]],
                looks[slot[1]],
                numbers=not many,
            )
    axis.axhline(1, color="#222222", lw=0.8)
    if band:
        axis.axhspan(band.low, band.high, color="#CC79A7", alpha=0.3, lw=0, zorder=1)
    axis.set_xticks(range(len(models)), models)
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, max(value.high or value.value for value in values) * 1.08)
    labels = [
        Patch(fc=_pale(GREY, look.shade), ec=_edge(GREY, look), hatch=look.hatch, label=name)
        for name, look in looks.items()
    ]
    labels += [Patch(color="#CC79A7", alpha=0.3, lw=0, label=band.text)] if band else []
    recipes = (
        [Patch(color=colour, label=precision) for precision, colour in colours.items()]
        if many
        else []
    )
    drawing.legend(
        handles=[*recipes, *labels], loc="outside lower center", fontsize=8, frameon=False, ncols=3
    )
    return Figure(name, title, caption, drawing)


def _pale(colour: str, shade: float) -> tuple[float, ...]:
    """Return a colour mixed with white; not a transparent one, whose hatch an SVG would not
    show.
    """
    return tuple(1 - shade * (1 - part) for part in to_rgb(colour))


def _edge(colour: str, look: Look) -> str:
    """Return the colour of a bar's edge, which is that of its hatch: white where the bar is as dark
    as its edge.
    """
    return "white" if look.hatch and look.shade == 1 else colour


def _bar(
    axis: Axes,
    x: float,
    width: float,
    found: Sequence[Value],
    colour: str,
    look: Look,
    numbers: bool,
) -> None:
    """Draw the first of the values as a bar with its interval, and others of the same name as dots
    on it.
    """
    first = found[0]
    axis.bar(
        x,
        first.value,
        width,
        fc=_pale(colour, look.shade),
        ec=_edge(colour, look),
        hatch=look.hatch,
        zorder=2,
    )
    if first.low is not None and first.high is not None:
        reach = np.array([[first.value - first.low], [first.high - first.value]])
        axis.errorbar(
            x, first.value, yerr=reach, ecolor="#444444", lw=0, elinewidth=1, capsize=2, zorder=3
        )
    axis.plot(
        [x] * (len(found) - 1), [v.value for v in found[1:]], "o", color="#222222", ms=3, zorder=4
    )
    if numbers:
        axis.annotate(
            f"{first.value:.2f}",
            (x, 0.04),
            ha="center",
            fontsize=8,
            rotation=90,
            color=GREY,
            zorder=4,
            bbox=PLATE,
        )
