"""`python -m launch.matrix`: every cell (model x precision x GPU) of a stack: does it run, why not,
what instead.

The answer is that of the plan's rules, which a launch obeys too: a cell that is listed as running
composes.  Shown are the models, precisions and GPUs of NVIDIA's post and the user's own; `model=…
precision=… gpu=…` choose others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.cli import ArgumentParser, command
from recipes.compose.fit import state
from recipes.compose.fitting import changes
from recipes.compose.tree import CONF, compose_plan, compose_tree, sweep
from recipes.errors import InputError
from recipes.estimate.sizes import MODELS
from recipes.exit_codes import EXIT_WRONG_INPUT

PRECISIONS = ("bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
GPUS = ("h100", "b200", "gb200")
AXES = ("model", "precision", "gpu")
PUBLISHED = {"model": MODELS, "precision": PRECISIONS, "gpu": GPUS}  # of NVIDIA's post
# Shipped beside them, and shown where they are named.  All other files are the user's own, and
# always shown.
SMALLER = ("llama3_tiny", "llama3_130m", "llama32_1b", "llama32_3b", "llama2_7b", "mistral_7b")
WHERE_NAMED = {
    "model": (*SMALLER, "qwen25_7b", "qwen3_8b", "gemma2_9b"),
    "precision": (),
    "gpu": ("cpu", "h20", "h800", "h200", "gh200", "b300", "gb300", "rtx_pro_6000"),
}


def options(group: str) -> list[str]:
    """Return the options of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def shown_options(group: str) -> list[str]:
    """Return the options of an axis that are shown where none is named: those of NVIDIA's post, and
    the user's own.
    """
    known = (*PUBLISHED[group], *WHERE_NAMED[group])
    return [*PUBLISHED[group], *(name for name in options(group) if name not in known)]


def named_options(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the options of axes and stack that overrides name (`model=a,b`), and the overrides
    that remain for each cell.

    InputError for an option that there is none of, and for an axis that is not chosen by its name.
    """
    named, rest = dict[str, list[str]](), list[str]()
    for override in overrides:
        key = override.partition("=")[0]
        if key not in (*AXES, "stack"):
            rest.append(override)
            continue
        named[key] = list(dict.fromkeys(one[0].partition("=")[2] for one in sweep([override])))
        for value in named[key]:
            if value not in options(key):
                compose_tree([f"{key}={value}"])  # says what is wrong with it
                raise InputError(
                    f"{override}: name options of conf/{key} here: {', '.join(options(key))}"
                )
    return named, rest


def cell(
    stack: str, model: str, precision: str, gpu: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a cell as a row.

    `why` and `instead` are the two halves of a refusal.  `memory` is the state of a plan that runs
    (recipes.compose.fit), and `changed` says where its layout is not the recommended one, and why.
    """
    names = {"stack": stack, "model": model, "precision": precision, "gpu": gpu}
    try:
        plan = compose_plan([*(f"{axis}={name}" for axis, name in names.items()), *overrides])
    except InputError as error:
        why, _, instead = str(error).rpartition("; ")
        refusal = {"why": why or str(error), "instead": instead}
        return {**names, "runs": False, "num_gpus": None, **refusal, "memory": None, "changed": []}
    facts = {"memory": state(plan), "changed": changes(plan)}
    return {**names, "runs": True, "num_gpus": plan.num_gpus, "why": "", "instead": "", **facts}


def matrix(
    stacks: Iterable[str],
    overrides: Sequence[str] = (),
    axes: Mapping[str, Sequence[str]] = PUBLISHED,
) -> Iterator[dict[str, Any]]:
    """Yield the cells of each stack: the product of the options of each axis."""
    for stack in stacks:
        for model, precision, gpu in itertools.product(*(axes[axis] for axis in AXES)):
            yield cell(stack, model, precision, gpu, overrides)


def grid(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the cells of one stack as a grid: the GPUs that a cell is mapped to, or the number of
    its refusal.
    """
    refusals, gpus = _refusals(rows), list(dict.fromkeys(row["gpu"] for row in rows))
    table = Table("model", "precision", *gpus)
    for model, of_model in itertools.groupby(rows, key=lambda row: row["model"]):
        for precision, cells in itertools.groupby(of_model, key=lambda row: row["precision"]):
            table.add_row(
                model,
                precision,
                *(
                    str(r["num_gpus"]) if r["runs"] else f"refused [{refusals[_key(r)]}]"
                    for r in cells
                ),
            )
        table.add_section()
    return table


def _key(row: dict[str, Any]) -> tuple[str, str]:
    why = str(row["why"]).partition(": ")[2] or str(row["why"])
    return why, str(row["instead"])


def _refusals(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    keys = dict.fromkeys(_key(row) for row in rows if not row["runs"])
    return {key: number for number, key in enumerate(keys, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m launch.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    how = (
        "model=, precision=, gpu= and stack= choose cells (a,b for several); others hold for every"
        " cell, e.g. experiment=throughput"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=how)
    every = options("stack")
    parser.add_argument(
        "--stack",
        action="append",
        choices=[*every, "all"],
        help="a stack; may be given again (default: nemo_25_04, or stack=…)",
    )
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    args = parser.parse_intermixed_args(argv)
    try:
        rows = _rows(args.overrides, every if "all" in (args.stack or []) else args.stack)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for stack in dict.fromkeys(row["stack"] for row in rows):
        _print([row for row in rows if row["stack"] == stack])
    return 0


def _rows(overrides: Sequence[str], stacks: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the cells of a command line; `stacks` are those of --stack."""
    named, rest = named_options(overrides)
    if stacks and "stack" in named:
        raise InputError(
            f"--stack and stack={','.join(named['stack'])} both choose stacks; give one of them"
        )
    default = str(compose_tree(rest)["stack"]["name"])  # an experiment may choose one
    axes = {axis: named.get(axis) or shown_options(axis) for axis in AXES}
    return list(matrix(dict.fromkeys(stacks or named.get("stack") or [default]), rest, axes))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    console = Console()
    console.print(
        f"{rows[0]['stack']}: GPUs of the recommended mapping, or why the cell is refused",
        style="bold",
    )
    console.print(grid(rows))
    for (why, instead), number in _refusals(rows).items():
        console.print(escape(f"[{number}] {why}; {instead}"), highlight=False)
    changed = [row for row in rows if row["changed"]]
    if changed:
        console.print("\nWhere the layout is not the recommended one, and why", style="bold")
    for row in changed:
        cell_name = f"{row['model']} {row['precision']} {row['gpu']}"
        console.print(escape(f"{cell_name}: {'; '.join(row['changed'])}"), highlight=False)


if __name__ == "__main__":
    command(main)
