"""`python -m recipes.measure.memory [RUN…]`: the memory estimate held against peaks that were
measured or published.

A prediction is worth what its error is known to be.  Each row of reference/peak_memory.csv is
composed as a plan, predicted and compared, and so is each run folder that is named, yours for one;
the README's table of errors is read off what this prints.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from recipes.cli import ArgumentParser, command
from recipes.compose.fit import ESTIMATE_ERROR
from recipes.compose.tree import compose_plan
from recipes.errors import InputError, one_line
from recipes.estimate.memory import OUTSIDE_PYTORCH, estimate
from recipes.estimate.possible import refuse_impossible
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.paths import REFERENCE
from recipes.plan import Plan
from recipes.run_folder import read_json, read_plan, rows_of

PEAKS = REFERENCE / "peak_memory.csv"
WIDTH = 180  # columns
Row = dict[str, str | float]


def validation(runs: Sequence[Path] = ()) -> list[Row]:
    """Return the rows of peak_memory.csv and of run folders, with `predicted_gb` and `error`
    (predicted over peak, minus one).
    """
    own = [_of_run(folder) for folder in runs]
    with PEAKS.open(newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        with_step = (
            row["kind"] != "measured without step"
        )  # some runs stopped before the optimizer's step
        peak, predicted = (
            float(row["peak_gb"]),
            estimate(compose_plan(_overrides(row)), with_step).total_gb,
        )
        row.update(_compared(peak, predicted))
    return [*rows, *own]


def _compared(peak_gb: float, predicted_gb: float) -> Row:
    return {
        "peak_gb": round(peak_gb, 2),
        "predicted_gb": round(predicted_gb, 1),
        "error": round(predicted_gb / peak_gb - 1, 3),
    }


def _of_run(folder: Path) -> Row:
    """Return the row of a run folder; InputError where no GPU's memory stands in it."""
    plan = read_plan(folder)
    rows = rows_of(folder / "metrics.jsonl")
    held = [row["memory_gb"] for row in rows if "memory_gb" in row]
    if plan.on_cpu or not held:
        raise InputError(
            f"{folder} has no peak of a GPU's memory in metrics.jsonl; name runs that trained on"
            " GPUs"
        )
    _refuse_impossible(folder, plan, rows)
    layout = {
        key: str(getattr(plan.mapping, key))
        for key in ("tp", "pp", "cp", "vp", "fsdp", "micro_batch", "recompute_layers")
    }
    axes = {
        "model": plan.model.name,
        "gpu": plan.gpu.name,
        "precision": plan.precision.name,
        "num_gpus": str(plan.num_gpus),
    }
    # PyTorch counts a block of a graph's private pool as free as soon as its capture ends, and a
    # replay still writes into it
    kind = "measured, without CUDA graphs' pools" if plan.mapping.cuda_graphs else "measured"
    note = (
        f"{plan.model.num_layers} layers, vocabulary"
        f" {plan.model.vocab_size}{', operands diagnosed' if (folder / 'fp8.jsonl').exists() else ''}"  # noqa: E501
    )
    return {
        **axes,
        **layout,
        "seq_length": str(plan.seq_length),
        "kind": kind,
        "source": folder.name,
        "note": note,
        **_compared(max(held) + OUTSIDE_PYTORCH / 1e9, estimate(plan).total_gb),
    }


def _refuse_impossible(folder: Path, plan: Plan, rows: Sequence[dict[str, Any]]) -> None:
    """Raise InputError where the run folder's numbers cannot be true."""
    trained = [row for row in rows if "loss" in row]
    try:
        steps = {
            key: np.array([row[key] for row in trained], dtype=np.float64) for key in trained[0]
        }
        manifest = read_json(folder / "manifest.json")
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{folder}: its manifest.json or metrics.jsonl is not what a run writes; run it again"
        ) from None
    refuse_impossible(folder, plan, manifest, steps, {})


def _overrides(row: Row) -> list[str]:
    axes = [f"{key}={row[key]}" for key in ("model", "precision", "gpu", "num_gpus", "seq_length")]
    layout = [
        f"mapping.{key}={row[key]}"
        for key in ("tp", "pp", "cp", "vp", "fsdp", "micro_batch", "recompute_layers")
    ]
    return [*axes, *layout, "executor=local", *str(row["overrides"]).split()]


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a sentence a kind of peak: mean size of the error, the largest error, and how many lie
    within what a launch allows for.
    """
    said = []
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        errors = [float(row["error"]) for row in rows if row["kind"] == kind]
        within = sum(abs(error) <= ESTIMATE_ERROR for error in errors)
        mean, largest = statistics.fmean(map(abs, errors)), max(errors, key=abs)
        said.append(
            f"{kind}: mean size of the error {mean:.1%}, largest {largest:+.1%}, {within} of"
            f" {len(errors)} within {ESTIMATE_ERROR:.0%}"
        )
    return said


def shown(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(
        "model",
        "precision",
        "gpu",
        "layout",
        "peak GB",
        "kind",
        "predicted",
        "error",
        "note",
        box=None,
    )
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        layout = (
            f"{row['num_gpus']} GPU{'' if str(row['num_gpus']) == '1' else 's'} tp{row['tp']}"
            f" pp{row['pp']} cp{row['cp']}"
        )
        numbers = (
            f"{row['peak_gb']:.1f}",
            str(row["kind"]),
            f"{row['predicted_gb']:.1f}",
            f"{float(row['error']):+.1%}",
        )
        table.add_row(
            str(row["model"]),
            str(row["precision"]),
            str(row["gpu"]),
            layout,
            *numbers,
            str(row["note"]),
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and its summary; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m recipes.measure.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folders of runs on GPUs, to be held against too",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        rows = validation(args.runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    Console(width=WIDTH).print(shown(rows))
    for line in summary(rows):
        print(one_line(line))
    return 0


if __name__ == "__main__":
    command(main)
