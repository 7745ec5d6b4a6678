"""GEMM speedups by scaling granularity, alone and with the casts of training, as `python -m
recipes.measure.gemm` measured them on a GPU.

FP8 buys most where one scale serves the whole tensor, less where scales change along K, because
they must then be applied while the sum is built; and it buys more as K grows, since reading,
writing and launching are the same for both formats.  A linear layer in training gets less than its
GEMMs: input, gradient and weight are cast first, and a cast is memory traffic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from analysis.render.figure import COLOURS as PRECISIONS
from analysis.render.figure import Figure, axes
from analysis.render.table import Table
from analysis.runs.measurements import measured, of_frame
from recipes.gemm_rows import as_trained

CHANNEL = "#CC79A7"
COLOURS = {
    "tensor": PRECISIONS["fp8_current"],
    "channel": CHANNEL,
    "sub-channel 1x128, 128x128": PRECISIONS["fp8_subchannel"],
    "sub-channel 1x128, 1x128": "#56B4E9",
}
LAYER_COLOURS = {
    "tensor, delayed": PRECISIONS["fp8_delayed"],
    "tensor, current": PRECISIONS["fp8_current"],
    "channel": CHANNEL,
    "sub-channel": PRECISIONS["fp8_subchannel"],
}
COLUMNS = (
    "name",
    "m",
    "n",
    "k",
    "granularity",
    "accumulation",
    "tflops",
    "speedup_over_bf16",
    "refused",
    "label",
)
SPEEDUPS = {
    "seconds": "GEMMs alone",
    "seconds_weights_amortised": "casts, weights amortised",
    "seconds_with_casts": "all casts",
}
SHADES = (0.3, 0.6, 1.0)  # of the bars of SPEEDUPS
OPTIONAL = {
    "layers": (
        "name",
        "model",
        "layer",
        "m",
        "n",
        "k",
        "precision",
        "granularity",
        "accumulation",
        "micro_batches",
        *SPEEDUPS,
        "refused",
        "label",
    ),
    "casts": (
        "name",
        "model",
        "layer",
        "operand",
        "rows",
        "columns",
        "granularity",
        "made_by",
        "seconds",
        "bytes",
        "gb_per_s",
        "refused",
        "label",
    ),
    "bandwidth": ("bytes", "seconds", "gb_per_s", "label"),
}


def load(folder: Path) -> pd.DataFrame:
    """Return the GEMMs of a folder, a row for each kind and shape, BF16 included (granularity
    "-").
    """
    table = measured(folder / "gemm.jsonl", COLUMNS, _command(folder))
    old = {
        "model": "",
        "layer": "",
        "role": "fprop",
    }  # before linear layers were measured, every row was a forward GEMM
    return table.assign(**{column: value for column, value in old.items() if column not in table})


def load_more(folder: Path, what: str) -> pd.DataFrame:
    """Return "layers", "casts" or "bandwidth" of a folder; a table without rows where they were not
    measured.
    """
    if not (folder / f"{what}.jsonl").exists():
        return pd.DataFrame(columns=[*OPTIONAL[what], "device"])
    return measured(folder / f"{what}.jsonl", OPTIONAL[what], _command(folder))


def _command(folder: Path) -> str:
    return f"python -m recipes.measure.gemm --out {folder}, on a machine with a CUDA GPU"


def sweep(table: pd.DataFrame) -> pd.DataFrame:
    """Return the forward GEMMs of the sweep over K."""
    return table[(table["name"] == "K sweep") & (table["role"] == "fprop")]


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """Return the sweep's speedup over BF16, a row for each granularity and accumulation, a column
    for each K.
    """
    rows = sweep(table)
    fp8 = rows[(rows["granularity"] != "-") & rows["tflops"].notna()]
    wide = fp8.pivot_table(
        index=["granularity", "accumulation"], columns="k", values="speedup_over_bf16"
    )
    return wide.round(2)


def by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each model, linear layer and FP8 recipe: its speedups over BF16 in training,
    and BF16's milliseconds.
    """
    return _speedups(layers, ["model", "layer"])


def by_model(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the same for whole models: the time of all their linear layers in BF16 over that under
    the recipe.
    """
    return _speedups(layers, ["model"])


def _speedups(layers: pd.DataFrame, groups: list[str]) -> pd.DataFrame:
    """Return speedups of summed times; none where a time of the group is missing."""
    rows = layers[layers["model"] != ""].astype(dict.fromkeys(SPEEDUPS, float))
    recipe = ["granularity", "accumulation"]
    times = rows.groupby([*groups, *recipe], sort=False)[list(SPEEDUPS)].sum(min_count=0)
    missing = (
        rows[list(SPEEDUPS)].isna().groupby([rows[g] for g in (*groups, *recipe)], sort=False).any()
    )
    times = times.mask(missing).reset_index()
    bf16 = times.loc[times["granularity"] == "-", [*groups, "seconds"]].rename(
        columns={"seconds": "bf16"}
    )
    fp8 = (
        times[times["granularity"] != "-"]
        .merge(bf16, on=groups, how="left")
        .set_index([*groups, *recipe])
    )
    found = pd.DataFrame({title: fp8["bf16"] / fp8[column] for column, title in SPEEDUPS.items()})
    return found.round(3).assign(**{"BF16 ms": (fp8["bf16"] * 1e3).round(3)})


def cast_speeds(casts: pd.DataFrame) -> pd.DataFrame:
    """Return the median GB/s that casts read and write, a row for each granularity, a column for
    each operand.
    """
    rows = casts[casts["gb_per_s"].notna()].astype({"gb_per_s": float})
    return (
        rows.groupby(["granularity", "made_by", "operand"], sort=False)["gb_per_s"]
        .median()
        .round(0)
        .unstack()
    )


def refusals(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return what was refused and why, each reason once."""
    rows = pd.concat([table[["granularity", "name", "refused"]] for table in tables])
    return rows[rows["refused"] != ""].drop_duplicates(["granularity", "refused"])


def figure(table: pd.DataFrame) -> Figure:
    """Speedup of an FP8 GEMM over BF16 by K: a line for each granularity, dashed where it
    accumulates precisely.
    """
    table = sweep(table)
    title = (
        f"FP8 GEMM over BF16, M = N = {int(table['m'].iloc[0])}, {table['device'].iloc[0]}"
        f" ({table['label'].iloc[0]})"
    )
    drawing, (axis,) = axes(title, "K, the dimension that is summed over", "speedup over BF16")
    for (granularity, accumulation), rows in table[table["granularity"] != "-"].groupby(
        ["granularity", "accumulation"]
    ):
        style = "-" if accumulation == "fast" else "--"
        axis.plot(
            rows["k"],
            rows["speedup_over_bf16"],
            style,
            marker="o",
            ms=4,
            color=COLOURS.get(granularity),
            label=f"{granularity}, {accumulation}",
        )
    axis.axhline(1, color="#222222", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(
        sorted(table["k"].unique()), [f"{k:,}" for k in sorted(table["k"].unique())], fontsize=8
    )
    drawing.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=3)
    caption = (
        "Median time of a BF16 GEMM over that of FP8 at the same shape, measured in turns on random"
        " data; the casts to FP8 are not in it. Solid lines sum in the tensor core's own precision"
        " (fast), dashed ones in FP32 (precise). Finer scales buy less; larger K buys more."
    )
    return Figure("gemm", title, caption, drawing)


def trained(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the models' layers, BF16 and the recipes as training runs them (which accumulation in
    which GEMM).
    """
    recipes = zip(layers["granularity"], layers["accumulation"], strict=True)
    return layers[
        (layers["model"] != "") & np.array([g == "-" or as_trained(g, a) for g, a in recipes], bool)
    ]


def models_figure(layers: pd.DataFrame) -> Figure | None:
    """Speedup of each model's linear layers in training, GEMMs alone and with casts; None where no
    model was measured.
    """
    rows = trained(layers)
    if rows.empty:
        return None
    found, models = by_model(rows), list(dict.fromkeys(rows["model"]))
    title = (
        f"FP8 over BF16 in the linear layers' three GEMMs, {rows['device'].iloc[0]}"
        f" ({rows['label'].iloc[0]})"
    )
    drawing, (axis,) = axes(title, "", "speedup over BF16")
    width = 0.8 / len(LAYER_COLOURS)
    for place, (granularity, colour) in enumerate(LAYER_COLOURS.items()):
        mine = (
            found[found.index.get_level_values("granularity") == granularity]
            .droplevel(["granularity", "accumulation"])
            .reindex(models)
        )
        for column, shade in zip(SPEEDUPS.values(), SHADES, strict=True):
            axis.bar(
                np.arange(len(models)) + (place - 1.5) * width,
                mine[column],
                width * 0.9,
                color="white",
                zorder=2,
            )
            axis.bar(
                np.arange(len(models)) + (place - 1.5) * width,
                mine[column],
                width * 0.9,
                color=colour,
                alpha=shade,
                zorder=2,
            )
    axis.axhline(1, color="#222222", lw=0.8, zorder=3)
    axis.set_xticks(range(len(models)), models, fontsize=8)
    shades = [
        Patch(color="#222222", alpha=shade, label=title)
        for title, shade in zip(SPEEDUPS.values(), SHADES, strict=True)
    ]
    axis.legend(
        handles=[*(Patch(color=c, label=g) for g, c in LAYER_COLOURS.items()), *shades],
        fontsize=8,
        frameon=False,
        ncols=2,
    )
    axis.set_ylim(0, axis.get_ylim()[1] * 1.3)
    caption = (
        "Time of fprop, dgrad and wgrad of a model's four linear layers in BF16 over that in FP8:"
        " the pale bar has no casts, the middle one those of input and gradient and the weight's"
        f" shared by {int(rows['micro_batches'].iloc[0])} micro-batches, the full one all casts in"
        " every micro-batch. Sums of medians, measured one by one; scales by row and column are"
        " cast by compiled PyTorch, the others by Transformer Engine."
    )
    return Figure("gemm_models", title, caption, drawing)


def speedups_table(table: pd.DataFrame) -> Table:
    """Return the table of GEMMs over K."""
    wide = speedups(table)
    wide.columns = [f"K = {k}" for k in wide.columns]
    note = (
        f"Speedup over BF16, {', '.join(sorted(set(table['label'])))} on {table['device'].iloc[0]};"
        " GEMMs alone, without casts."
    )
    return of_frame(wide, note, 2, "GEMMs by granularity and K")


def models_table(layers: pd.DataFrame) -> Table:
    """Return the table of whole models' linear layers."""
    what = f"{', '.join(sorted(set(layers['label'])))} on {layers['device'].iloc[0]}"
    note = f"Speedup over BF16 in the linear layers' three GEMMs, {what}."
    return of_frame(by_model(trained(layers)), note, 2, "Linear layers of whole models")
