"""`python -m analysis.tuning RUN…`: what single changes to a run's settings buy in step time and
cost in memory.

A tuning list is worth what was measured with everything else kept.  Of runs that do the same work a
step (model, depth, tokens, GPUs) the first of each precision is the base; every other stands in a
row with what its plan and environment differ in, and the speedup over the base with its interval: a
change is worth keeping where the interval lies above 1.  The optimizer's share of a step is shown
apart, because it weighs less in a real job, where a step has more micro-batches and the optimizer
is shared out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.render.table import Table, number, print_json, write
from analysis.runs import devices
from analysis.runs.load import Run
from analysis.runs.pairing import by_what, plan_differences, recorded_differences, records_notes
from analysis.runs.soundness import sound
from analysis.runs.timing import Interval, speedup, step_time, timed
from analysis.speed.depth import OPTIMIZER, changes, device
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT

AGAIN = "none, run again"
ENVIRONMENT = "environment."
CHOSEN = (ENVIRONMENT, "attention ")  # of what manifests record, what a change is meant to change
TEXT = frozenset(["precision", "change", "is"])


def change(base: Run, run: Run) -> str:
    """Return what a run's plan, its environment and its attention differ in from its base's; what
    else does is noted below the table.
    """
    keys = [key for key in plan_differences(base, run) if not key.startswith(("seed", "train."))]
    chosen = [_variable(text) for text in _recorded(base, run) if text.startswith(CHOSEN)]
    return ", ".join([*changes(base, run, keys), *chosen]) or AGAIN


def _recorded(base: Run, run: Run) -> list[str]:
    found = recorded_differences(base, run)
    return [*found.named, *found.speed]


def _variable(text: str) -> str:
    """Return "environment.X a → b" as "X=b", and other text as it is."""
    name, _, values = text.partition(" ")
    return (
        f"{name.removeprefix(ENVIRONMENT)}={values.partition(' → ')[2]}"
        if name.startswith(ENVIRONMENT)
        else text
    )


def row(base: Run, run: Run) -> dict[str, Any]:
    """Return a run's row; times in milliseconds, memory in GB of 1e9 bytes."""
    ratio = (
        speedup(base, run).wider(devices.apart(base, run))
        if run is not base
        else Interval(1.0, 1.0, 1.0)
    )
    return {
        "precision": run.plan.precision.name,
        "change": change(base, run) if run is not base else "base",
        "step_time_s": step_time(run).value,
        "optimizer_time_s": (
            float(np.median(timed(run, OPTIMIZER))) if OPTIMIZER in run.steps else None
        ),
        "speedup_over_base": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "memory_gb": float(run.steps["memory_gb"].max()),
        "also_differs": [text for text in _recorded(base, run) if not text.startswith(CHOSEN)],
        "pair_gpu": devices.together(base, run) if run is not base else None,
        **devices.facts(run),
        "run": run.name,
        "label": run.label("step_time"),
    }


def cells(values: dict[str, Any]) -> dict[str, str]:
    """Return a row as people read it."""
    is_base = values["change"] == "base"
    ratio = (
        f"{values['speedup_over_base']:.3f}x ({values['speedup_low']:.3f} to"
        f" {values['speedup_high']:.3f})"
    )
    faster = (
        "faster"
        if values["speedup_low"] > 1
        else "slower"
        if values["speedup_high"] < 1
        else "no difference"
    )
    return {
        "precision": values["precision"],
        "change": values["change"],
        "step, ms": number(values["step_time_s"] * 1e3, 1) + devices.mark(values),
        "of it optimizer, ms": number(
            values["optimizer_time_s"] and values["optimizer_time_s"] * 1e3, 1
        ),
        "step over base": "–" if is_base else ratio,
        "is": "–" if is_base else faster,
        "peak GB": number(values["memory_gb"], 1),
    }


def _work(run: Run) -> tuple[object, ...]:
    plan = run.plan
    return (
        plan.model,
        plan.precision.name,
        plan.seq_length,
        plan.mapping.global_batch,
        plan.num_gpus,
        plan.gpu.name,
    )


def table(folders: Sequence[Path]) -> Table:
    """Return the table; InputError where no run can be compared with a base."""
    runs, left_out = sound(folders)
    bases: dict[object, Run] = {}
    for run in runs:
        bases.setdefault(_work(run), run)
    if len(runs) == len(bases):
        why = f"; left out: {'; '.join(left_out)}" if left_out else ""
        raise InputError(
            "no two runs of one precision and the same work a step: nothing to compare; name a"
            f" base and changed runs of it{why}"
        )
    ordered = sorted(runs, key=lambda run: list(bases).index(_work(run)))
    rows = [row(bases[_work(run)], run) for run in ordered]
    first = runs[0]
    said = (
        f"Step time {first.label('step_time')} on {device(first)}: {first.plan.model.name},"
        f" {first.plan.model.num_layers} layers, "
    )
    said += (
        f"{first.plan.mapping.global_batch} sequences of {first.plan.seq_length} tokens a step. In"
        " brackets: 95 % intervals."
    )
    pairs = devices.notes(
        (f"{values['precision']}, {values['change']}", values["pair_gpu"])
        for values in rows
        if values["pair_gpu"]
    )
    moved = by_what(
        (f"{values['precision']}, {values['change']}", values["also_differs"]) for values in rows
    )
    beside = [
        f"Not only the change differs from the base, but also {', '.join(what)}: {names}."
        for what, names in moved
    ]
    said_last = [
        *beside,
        *records_notes(ordered),
        *pairs,
        *devices.shared_notes(ordered),
        *(f"Left out: {reason}" for reason in left_out),
    ]
    return Table(
        "What changes buy", [cells(values) for values in rows], rows, [said, *said_last], TEXT
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m analysis.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders; the first of each precision is its base",
    )
    parser.add_argument("--out", type=Path, help="write the table there: .csv, .md or .html")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        made = table(args.runs)
        if args.out:
            write(args.out, made)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print_json(made.rows, made)
    else:
        made.print()
    return 0


if __name__ == "__main__":
    command(main)
