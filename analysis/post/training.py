"""Figures 3, 4 and 5: what a recipe, and what a GPU, buys in training, for every model of the
experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.post import hypotheses, sources
from analysis.post.values import Band, Value, chart, table
from analysis.post.values import sources as table_of_sources
from analysis.predictor.constants import COVERAGE, speedup_basis
from analysis.predictor.forecast import compose
from analysis.render.figure import COLOURS, Figure
from analysis.render.table import Table
from analysis.runs.load import Run
from recipes.compose.axes import with_axes
from recipes.compose.tree import CONF, compose_tree, sweep
from recipes.errors import InputError
from recipes.plan import Plan

FIXED = ("gpu", "experiment")  # what makes a figure that figure: no override changes it
RECIPE = {3: "fp8_current", 4: "mxfp8"}  # the post's, in whose name the titles stand
TITLES = {
    3: "Figure 3: step-time speedup of FP8 over BF16 on H100, current scaling",
    4: "Figure 4: step-time speedup of MXFP8 over BF16 on B200",
    5: "Figure 5: tokens/s/GPU of GB200 over B200",
}
OF_PRECISIONS = (
    "iso-mapping: BF16 in the FP8 layout, so that only precision differs; best-mapping, where that"
    " is another layout: BF16 in NVIDIA's own for it."
)
OF_GPUS = (
    "own layouts: each GPU in NVIDIA's layout for it; one layout, where those differ: both in the"
    " B200's, so that only the GPU differs."
)
GPUS = {3: "H100", 4: "B200"}
OLDER, NEWER = "b200", "gb200"  # of figure 5


@dataclass
class Page:
    """A figure's page: `tables`, the first of which is the figure's own, figures, and sentences
    that stand above them.
    """

    title: str
    said: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def page(number: int, overrides: Sequence[str], runs: Sequence[Run]) -> Page:
    """Return the page of figure 3, 4 or 5 for the cells of its experiment; InputError where none of
    them can be shown.
    """
    _refuse(number, overrides)
    asked, left_out = cells(number, overrides), list[str]()
    _options_exist(asked)
    values = [value for cell in asked for value in _values(number, cell, runs, left_out)]
    made = Page(_title(number, values), left_out=left_out)
    if not values:
        raise InputError(
            f"experiment=fig{number} has no cell to show:"
            f" {'; '.join(dict.fromkeys(made.left_out)) or 'it names no FP8 recipe'}"
        )
    colours = {
        precision: COLOURS.get(precision, "#777777")
        for precision in dict.fromkeys(value.precision for value in values)
    }
    made.tables += [
        table("Times as fast", values, _notes(number, values)),
        table_of_sources(values),
    ]
    made.figures.append(
        chart(f"fig{number}_post", made.title, values, colours, _caption(number), _band(number))
    )
    if number == 4 and RECIPE[4] in colours:
        made.tables[1:1] = hypotheses.tables()
    return made


def _refuse(number: int, overrides: Sequence[str]) -> None:
    """InputError for an override that would make another figure under this one's title."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in FIXED:
            raise InputError(
                f"{override}: the {key} of figure {number} is fixed, for its title and the post's"
                " numbers are of it; leave it out, and predict other cells with python -m"
                " analysis.predict"
            )


def _options_exist(asked: Sequence[Sequence[str]]) -> None:
    """InputError for a name that no file of conf/ has; a cell that is refused for what it is stands
    under "left out" instead.
    """
    for part in dict.fromkeys(part for cell in asked for part in cell):
        group, _, option = part.partition("=")
        if (CONF / group).is_dir() and not (CONF / group / f"{option}.yaml").exists():
            compose_tree([part])  # says which there are


def _title(number: int, values: Sequence[Value]) -> str:
    """Return the figure's title, with the recipes where they are not the post's, and the GPUs of
    measurements where they are others.
    """
    recipes = list(dict.fromkeys(value.precision for value in values))
    own = number not in RECIPE or recipes == [RECIPE[number]]
    title = (
        TITLES[number]
        if own
        else (
            f"After figure {number}: step-time speedup of {', '.join(recipes)} over BF16 on"
            f" {GPUS[number]}"
        )
    )
    found = {
        value.series.partition(",")[0]
        for value in values
        if value.label in ("measured", sources.PARTS) and value.series.startswith(sources.ON)
    }
    return "; measured ".join([title, *([", ".join(sorted(found))] if found else [])])


def cells(number: int, overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each cell of a figure: every FP8 recipe of figures 3 and 4, every
    recipe on the newer GPU of figure 5.
    """
    asked = sweep(with_axes([f"experiment=fig{number}", *overrides]))
    wanted = f"gpu={NEWER}" if number == 5 else None
    return [cell for cell in asked if (wanted in cell if wanted else "precision=bf16" not in cell)]


def _values(
    number: int, cell: Sequence[str], runs: Sequence[Run], left_out: list[str]
) -> list[Value]:
    """Return the numbers of a cell; a plan that is refused, and runs that cannot be used, are named
    in `left_out`.
    """
    found: list[Value] = []
    try:
        plan = compose(cell)
        if number == 5:
            return _gain(
                plan,
                compose([f"gpu={OLDER}" if part == f"gpu={NEWER}" else part for part in cell]),
                runs,
            )
        found += sources.measured_speedups(plan, runs)
        found += sources.published_speedups(plan)
        found += sources.predicted_speedups(cell)
        found += sources.assembled_speedups(plan, runs)
    except InputError as error:
        left_out.append(str(error))
    return found


def _gain(plan: Plan, base: Plan, runs: Sequence[Run]) -> list[Value]:
    return [
        *sources.measured_gain(plan, base, runs),
        *sources.published_gain(plan, base),
        *sources.predicted_gain(plan, base),
    ]


def _notes(number: int, values: Sequence[Value]) -> list[str]:
    labels = {value.label for value in values}
    of_both = (
        f"the range that held {COVERAGE:.0%} of published rows which the constants did not know"
        " (here of both GPUs, taken as independent)"
    )
    bases = (
        [of_both]
        if number == 5
        else [
            speedup_basis(name)
            for name in dict.fromkeys(v.precision for v in values if v.label == "predicted")
        ]
    )
    said = [
        *(f"Predicted, with {base}." for base in bases),
        OF_GPUS if number == 5 else OF_PRECISIONS,
    ]
    if not labels & {"measured", sources.PARTS}:
        said.append("Measured: not yet.")
    if "published" in labels:
        said.append(
            "Published: NVIDIA's rows side by side, of the release nearest to NeMo 25.04; each is"
            " named below with its layout and source."
        )
    return [
        *said,
        *(
            f"The post: {sources.in_words(row)}."
            for row in sources.of_the_post(number)
            if row["model"] != "-" and row["note"] != "NeMo 25.04"
        ),
    ]


def _band(number: int) -> Band | None:
    """Return the range in which the post says that its bars lie, where it prints no more."""
    for row in sources.of_the_post(number):
        low, to, high = row["value"].partition(" to ")
        if to and low[0].isdigit():
            return Band(float(low), float(high), "published: the post's bars lie here")
    return None


def _caption(number: int) -> str:
    what = "GB200 over B200, tokens/s/GPU" if number == 5 else "Speedup over BF16"
    return (
        f"{what}. Bars by label, in the order of the table's columns; whiskers are intervals."
        " Predicted bars are pale: they are no measurement."
    )
