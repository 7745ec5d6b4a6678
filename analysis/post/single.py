"""Figures 1 and 2, whose data are no step times: GEMMs measured one by one, and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.convergence.comparison import compare, headline, shown
from analysis.convergence.figures import figures
from analysis.convergence.numerics_figures import figures as numerics_figures
from analysis.post import sources
from analysis.post.training import Page
from analysis.render.table import Table
from analysis.runs.load import load_all
from analysis.speed import gemm

TITLES = {
    1: "Figure 1: GEMM speedup of FP8 over BF16 by scaling granularity and K",
    2: "Figure 2: training loss of FP8 recipes beside BF16",
}


def gemms(folders: Sequence[Path]) -> Page:
    """Return the page of figure 1 from folders of `python -m recipes.measure.gemm`: the first one's
    figure and table, then the others'.
    """
    made = Page(TITLES[1], [_post(1)])
    for place, folder in enumerate(folders):
        table = gemm.load(folder)
        device, layers = str(table["device"].iloc[0]), gemm.load_more(folder, "layers")
        made.tables.append(gemm.speedups_table(table))
        drawn = [gemm.figure(table), gemm.models_figure(layers)]
        made.figures += [
            replace(figure, name=f"{figure.name}{place or ''}") for figure in drawn if figure
        ]
        if not layers.empty:
            made.tables.append(gemm.models_table(layers))
        else:
            made.said.append(
                f"{device}: the linear layers of the five models are not measured yet."
            )
    if not folders:
        made.said.append(
            "Measured: not yet. Measure with python -m recipes.measure.gemm --models all --out DIR"
            " on a CUDA GPU."
        )
    return made


def losses(folders: Sequence[Path], stand_in: Sequence[Path]) -> Page:
    """Return the page of figure 2 from run folders; where there is none, the demo stands in, and
    the page says that it is emulated.
    """
    made = Page(TITLES[2], [_post(2)])
    if not folders:
        made.said.append(
            "Measured: not yet. Below: the runs of make demo, a model of 1.2 M parameters, FP8"
            " emulated on a CPU."
        )
    runs, made.left_out = load_all(folders or stand_in)
    found = compare(runs)
    rows = found.rows
    by_label: dict[str, list[str]] = {}
    for run in found.runs:
        by_label.setdefault(
            f"{run.label('loss')} on {run.manifest.get('device', 'an unknown device')}", []
        ).append(run.plan.precision.name)
    label = "; ".join(
        f"{', '.join(dict.fromkeys(names))} {where}" for where, names in by_label.items()
    )
    text = frozenset(["precision", "verdict"])
    made.tables.append(
        Table("Verdicts", shown(rows), rows, [f"{headline(rows)}. Losses: {label}."], text)
    )
    made.figures += [*figures(found), *numerics_figures(found.runs)]
    return made


def _post(number: int) -> str:
    return (
        "The post (published):"
        f" {'; '.join(sources.in_words(row) for row in sources.of_the_post(number))}."
    )
