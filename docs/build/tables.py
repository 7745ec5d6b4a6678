"""The tables and figures that the documentation may show, each made from the folders that a marker
names.

`docs.build.render` looks them up by name.  A maker takes folders of analysis/results and returns
Markdown or a `Figure`; it takes no number from anywhere else than these folders, reference data
with its source, and the predictor.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import throughput, tuning
from analysis.convergence import error_rates, numerics, te_parity
from analysis.convergence.comparison import all_notes, compare, headline, pair_notes, shown
from analysis.convergence.figures import figures
from analysis.convergence.numerics_figures import figures as numerics_figures
from analysis.render.figure import Figure
from analysis.render.table import Table
from analysis.runs.load import Run, folders_of, load_all
from analysis.runs.measurements import of_frame
from analysis.runs.soundness import unsound
from analysis.speed import depth, full_depth_table, gemm, layer, layouts
from docs.build import predictor_tables
from recipes.errors import InputError

if TYPE_CHECKING:
    from analysis.post.training import Page

Maker = Callable[[Sequence[Path]], str | Figure]


def runs_of(results: Sequence[Path]) -> list[Run]:
    """Return the runs below folders of results; InputError where one is not sound, for what is
    shipped must be.
    """
    runs, left_out = load_all(folders_of(results))
    if left_out:
        raise InputError(left_out[0])
    return runs


# ------------------------------------------------------------------------------------------- tables


def gemm_speedups(results: Sequence[Path]) -> str:
    """Speedup of FP8 GEMMs over BF16 by granularity, accumulation and K."""
    return gemm.speedups_table(gemm.load(_one(results))).markdown()


def gemm_by_model(results: Sequence[Path]) -> str:
    """Speedup of whole models' linear layers over BF16, GEMMs alone and with casts."""
    layers = gemm.load_more(_one(results), "layers")
    if layers.empty:
        raise InputError(
            f"{_one(results)} has no layers.jsonl; measure it with python -m recipes.measure.gemm"
            " --models"
        )
    return gemm.models_table(layers).markdown()


def identical_bits(results: Sequence[Path]) -> str:
    """Shares of bits that this project's casts have in common with Transformer Engine's, by recipe
    and operand.
    """
    return _bits(results, te_parity.table, "Casts compared with Transformer Engine's")


def identical_gemms(results: Sequence[Path]) -> str:
    """The same of the largest linear layer's outputs, with both errors over the exact product in
    BF16 steps, and both biases in millionths.
    """
    return _bits(results, _largest, "Outputs of a linear layer compared with Transformer Engine's")


def _largest(rows: pd.DataFrame) -> pd.DataFrame:
    found = te_parity.gemms(
        rows[rows["elements"] == rows.loc[rows["refused"] == "", "elements"].max()]
    )
    biases = {name: f"{name}, 1e-6" for name in ("te_bias", "our_bias")}
    return (
        found.assign(**{name: found[name] * 1e6 for name in biases})
        .round({name: 1 for name in biases} | {name: 3 for name in found if name not in biases})
        .rename(columns=biases)
    )


def _bits(results: Sequence[Path], table: Callable[[pd.DataFrame], pd.DataFrame], what: str) -> str:
    found = te_parity.load(_one(results))
    return _frame(table(found), f"{what}, measured on {found['device'].iloc[0]}.")


def _frame(table: pd.DataFrame, note: str, digits: int | None = None) -> str:
    """Return a data frame, its index as first columns, as Markdown; numbers with `digits` decimals,
    or six significant ones.
    """
    return of_frame(table, note, digits).markdown()


def _one(results: Sequence[Path]) -> Path:
    if len(results) != 1:
        raise InputError("it is made from one folder of analysis/results; name it in the marker")
    return results[0]


def layers(results: Sequence[Path]) -> str:
    """What a layer costs and gains, from runs cut in depth."""
    rows, left_out = _fig3(results)
    return full_depth_table.layers_table(rows, left_out).markdown()


def wholes(results: Sequence[Path]) -> str:
    """Whole models put together, beside what was published."""
    return full_depth_table.whole_table(_fig3(results)[0]).markdown()


def _fig3(results: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of figure 3, and why runs are left out whose times cannot be used."""
    reasons = [(run, unsound(run)) for run in runs_of(results)]
    lines = depth.fit([run for run, reason in reasons if reason is None])
    if not lines:
        raise InputError("no precision was measured at two depths or more")
    return full_depth_table.rows(lines), [reason for _, reason in reasons if reason]


def throughputs(results: Sequence[Path]) -> str:
    """The throughput table of runs, those that cannot stand in it listed with the reason."""
    return throughput.table(folders_of(results)).markdown()


def verdicts(results: Sequence[Path]) -> str:
    """The verdict on each FP8 run's loss."""
    found = compare(runs_of(results))
    rows = found.rows
    return Table(
        "",
        shown(rows),
        rows,
        [headline(rows), *pair_notes(found)],
        frozenset(["precision", "verdict"]),
    ).markdown()


def rates_of_errors(results: Sequence[Path]) -> str:
    """How often a verdict is wrong, by kind of noise and evidence (python -m
    analysis.convergence.error_rates).
    """
    return error_rates.load(_one(results) / "rates.csv").markdown()


def layouts_alike(results: Sequence[Path]) -> str:
    """Losses of each layout beside one GPU's (python -m analysis.speed.layouts)."""
    return layouts.table(runs_of(results)).markdown()


def notes(results: Sequence[Path]) -> str:
    """What a reader should know of each verdict beside its row."""
    return "\n".join(f"- {note}" for note in all_notes(compare(runs_of(results))))


def operands(results: Sequence[Path]) -> str:
    """What each recipe did to the operands of its GEMMs after the first step, and how much of them
    became zero in that.
    """
    rows = [
        {str(key): value for key, value in row.items()}
        for row in numerics.summary(numerics.load_all(runs_of(results))).to_dict("records")
    ]
    note = (
        "Over all linear layers and diagnosed steps after the first: SQNR the median; elements that"
        " became zero or saturated, in % of a tensor's, mean and largest of a linear layer and"
        " step."
    )
    return Table(
        "", [_operand(row) for row in rows], rows, [note], frozenset(["precision", "role"])
    ).markdown()


def _operand(row: dict[str, Any]) -> dict[str, str]:
    shares = {
        "became zero, %": "underflow",
        "at most, %": "underflow_worst",
        "saturated at most, %": "saturated_worst",
        "became zero in step 1, %": "underflow_step_1",
    }
    names = {key: str(row[key]) for key in ("precision", "role")}
    return {
        **names,
        "SQNR, dB": f"{row['sqnr_db']:.1f}",
        **{name: f"{row[key] * 100:.2g}" for name, key in shares.items()},
    }


def layer_time(results: Sequence[Path]) -> str:
    """Where the time of a profiled layer goes, by pass and kind of kernel."""
    return layer.table(layer.load(_one(results))).markdown()


def tunings(results: Sequence[Path]) -> str:
    """What single changes of settings buy."""
    return tuning.table(folders_of(results)).markdown()


def harness_cost(results: Sequence[Path]) -> str:
    """What the harness adds to a bare Megatron-Core step (recipes.measure.gpu.overhead), a row a
    measurement.
    """
    costs = [
        json.loads(path.read_text())
        for folder in results
        for path in sorted(folder.rglob("cost.json"))
    ]
    if not costs:
        raise InputError(
            "there is no cost.json; measure it with python -m recipes.measure.gpu.overhead --out"
        )
    what = (
        f"{', '.join(sorted({cost['labels']['step_time'] for cost in costs}))} on"
        f" {', '.join(sorted({cost['device'] for cost in costs}))}"
    )
    loggers = "without loggers, evaluation and checkpoints"
    note = (
        f"Over a bare Megatron-Core step in the same run, {what}, {loggers}; mean over blocks of"
        " steps with Student's 95 % interval."
    )
    return Table(
        "", [_cost(cost) for cost in costs], costs, [note], frozenset(["model", "precision"])
    ).markdown()


def _cost(cost: dict[str, Any]) -> dict[str, str]:
    low, high = cost["cost_interval_95"]
    return {
        "model": f"{cost['model']}, {cost['layers']} layers",
        "precision": cost["precision"],
        "bare step, ms": f"{cost['bare_step_s'] * 1e3:.1f}",
        "added, ms": f"{cost['added_ms']:.1f}",
        "callback's hooks, on the host, ms": f"{cost['hooks_ms']:.1f}",
        "cost": f"{cost['cost']:.2%} ({low:.2%} to {high:.2%})",
        "with garbage collection": f"{cost['with_garbage']:.2%}",
        f"goal {cost['goal']:.1%}": cost["verdict"],
    }


@functools.cache
def post(figure: str) -> Page:
    """Return the page of a figure of the post from the shipped results."""
    from analysis.post.make import make  # which takes tables from here

    return make(figure)


def post_table(figure: str, place: int = 0) -> Maker:
    """Return a maker of a table of a figure of the post: the first is the figure's own."""

    def maker(_: Sequence[Path]) -> str:
        return post(figure).tables[place].markdown()

    maker.__doc__ = (
        f"Table {place} of the page of {figure} (python -m analysis.post {figure}), from the"
        " shipped results."
    )
    return maker


# ------------------------------------------------------------------------------------------ figures


def of_comparison(name: str) -> Maker:
    """Return a maker of a figure of a comparison (`analysis.convergence.figures`,
    `analysis.convergence.numerics_figures`).
    """

    def maker(results: Sequence[Path]) -> Figure:
        found = compare(runs_of(results))
        drawn = {figure.name: figure for figure in [*figures(found), *numerics_figures(found.runs)]}
        if name not in drawn:
            raise InputError(f"the runs give {', '.join(drawn)}")
        return replace(drawn[name], name=f"{name}_{_one(results).name}")

    return maker


def gemm_models_figure(results: Sequence[Path]) -> Figure:
    """Speedup of each model's linear layers in training."""
    figure = gemm.models_figure(gemm.load_more(_one(results), "layers"))
    if figure is None:
        raise InputError(
            f"{_one(results)} has no layers.jsonl of models; measure it with python -m"
            " recipes.measure.gemm --models"
        )
    return figure


def post_figure(figure: str) -> Maker:
    """Return a maker of the image of a figure of the post."""
    return lambda _: post(figure).figures[0]


TABLES: dict[str, Maker] = {
    **predictor_tables.TABLES,
    "gemm": gemm_speedups,
    "gemm-models": gemm_by_model,
    "bits": identical_bits,
    "bits-gemms": identical_gemms,
    "layer": layer_time,
    "fig3-layers": layers,
    "fig3-wholes": wholes,
    "throughput": throughputs,
    "verdicts": verdicts,
    "verdict-notes": notes,
    "error-rates": rates_of_errors,
    "layouts": layouts_alike,
    "operands": operands,
    "tuning": tunings,
    "harness-cost": harness_cost,
    **{f"post-{figure}": post_table(figure) for figure in ("fig3", "fig4", "fig5")},
    "post-fig4-terms": post_table("fig4", 1),
    "post-fig4-assumptions": post_table("fig4", 2),
}
FIGURES: dict[str, Maker] = {
    **{
        name: of_comparison(name)
        for name in ("loss", "gap", "heldout", "step_time", "sqnr", "underflow", "saturation")
    },
    "gemm": lambda results: gemm.figure(gemm.load(_one(results))),
    "gemm-models": gemm_models_figure,
    "fig3": lambda results: full_depth_table.figure(_fig3(results)[0]),
    **{f"post-{figure}": post_figure(figure) for figure in ("fig3", "fig4", "fig5")},
}
PARTS: dict[str, dict[str, Maker]] = {"table": TABLES, "figure": FIGURES}
