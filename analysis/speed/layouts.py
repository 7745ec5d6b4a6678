"""`python -m analysis.speed.layouts RUN…`: does a recipe train alike under every parallel layout?

Runs of one model, precision and schedule are compared with the one on a single GPU, step by step,
on the same batches.  Data and context parallelism keep the initial weights, so their losses differ
by the order of sums alone.  Tensor and pipeline ranks draw other initial weights (Megatron-Core
seeds each rank apart), so their first loss already differs; the gradient norm of step 1 hardly
does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.render.table import Table, print_json, write
from analysis.runs.load import Run, load_all
from analysis.runs.pairing import (
    by_what,
    check_pair,
    platform_differences,
    records_notes,
    run_differences,
)
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT


def layout(run: Run) -> str:
    """Return the layout in words, such as "TP 2, overlap"; "1 GPU" without any parallelism."""
    m, gpus = run.plan.mapping, run.plan.num_gpus
    sizes = {"TP": m.tp, "PP": m.pp, "CP": m.cp, "DP": gpus // (m.tp * m.pp * m.cp)}
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words += ["FSDP"] * m.fsdp + ["overlap"] * bool(m.tp_overlap)
    return ", ".join(words) or "1 GPU"


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row per run beside the single-GPU run of its precision; InputError where that
    lacks.
    """
    alone: dict[str, Run] = {}
    for run in runs:
        if run.imported:
            raise InputError(
                f"{run.folder} is imported; compare layouts of this project's own runs"
            )
        if run.plan.num_gpus == 1 and alone.setdefault(run.plan.precision.name, run) is not run:
            raise InputError(
                f"{run.folder} and {alone[run.plan.precision.name].folder} both ran on one GPU;"
                " name one of each precision"
            )
    found = []
    for run in runs:
        base = alone.get(run.plan.precision.name)
        if base is None:
            raise InputError(
                f"{run.folder}: no run of {run.plan.precision.name} on one GPU to compare it with;"
                " name one"
            )
        if base.plan.seed != run.plan.seed:
            raise InputError(
                f"{run.folder} and {base.folder} have seeds {run.plan.seed} and {base.plan.seed};"
                " compare runs of one seed"
            )
        check_pair(base, run)
        found.append(_row(base, run))
    return sorted(
        found, key=lambda row: (row["precision"], row["layout"] != "1 GPU", row["layout"])
    )


def _row(base: Run, run: Run) -> dict[str, Any]:
    ours, theirs = run.steps, base.steps
    apart = np.abs(ours["loss"] - theirs["loss"])
    return {
        "precision": run.plan.precision.name,
        "layout": layout(run),
        "first_loss": float(ours["loss"][0]),
        "last_loss": float(ours["loss"][-1]),
        "largest_loss_difference": float(apart.max()),
        "first_grad_norm": float(ours["grad_norm"][0]),
        "last_grad_norm": float(ours["grad_norm"][-1]),
        "fp8_gemms": float(ours["fp8_gemms"][-1]),
        "memory_gb": float(ours["memory_gb"].max()),
        "differs": [*platform_differences(base, run), *run_differences(base, run).named],
    }


def table(runs: Sequence[Run]) -> Table:
    """Return the rows as a table; losses and differences in nats, memory per GPU in GB."""
    found = rows(runs)
    cells = [
        {
            "precision": row["precision"],
            "layout": row["layout"],
            "loss, first step": f"{row['first_loss']:.5f}",
            "last step": f"{row['last_loss']:.5f}",
            "largest difference to 1 GPU": (
                "-" if row["layout"] == "1 GPU" else f"{row['largest_loss_difference']:.5f}"
            ),
            "gradient norm, first": f"{row['first_grad_norm']:.4f}",
            "last": f"{row['last_grad_norm']:.4f}",
            "FP8 GEMMs of rank 0": f"{row['fp8_gemms']:,.0f}",
            "memory, GB": f"{row['memory_gb']:.1f}",
        }
        for row in found
    ]
    one = runs[0]
    steps, device = len(one.steps["loss"]), one.manifest.get("device", "an unknown device")
    note = (
        f"{one.plan.model.name} with {one.plan.model.num_layers} layers, {steps} steps, losses"
        f" measured on {device}; no step times."
    )
    moved = by_what((f"{row['precision']} {row['layout']}", row["differs"]) for row in found)
    beside = [
        f"Not only the layout differs from 1 GPU, but also {', '.join(what)}: {names}."
        for what, names in moved
    ]
    return Table(
        "Layouts",
        cells,
        found,
        [note, *beside, *records_notes(runs)],
        frozenset(["precision", "layout"]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(prog="python -m analysis.speed.layouts", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, one of each precision on a single GPU",
    )
    parser.add_argument("--out", type=Path, help="write .csv, .md or .html")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        runs, left_out = load_all(args.runs)
        if not runs:
            raise InputError(left_out[0])
        made = table(runs)
        for line in left_out:
            print(line, file=sys.stderr)
        if args.json:
            print_json(made.rows, made)
        elif args.out:
            write(args.out, made)
        else:
            made.print()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    command(main)
