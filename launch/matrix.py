"""`python -m launch.matrix`: every cell (model x precision x GPU) of a stack: does it run, why not, what instead.

The answer is that of the plan's rules, the ones that a launch is held to: a cell that is listed as running composes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.cli import ArgumentParser
from recipes.compose import CONF, compose_plan, compose_tree
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.sizes import MODELS

PRECISIONS = ("bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
GPUS = ("h100", "b200", "gb200")


def options(group: str) -> list[str]:
    """Return the options of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def cell(stack: str, model: str, precision: str, gpu: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a cell as a row; `why` and `instead` are the two halves of a refusal."""
    names = {"stack": stack, "model": model, "precision": precision, "gpu": gpu}
    try:
        plan = compose_plan([*(f"{axis}={name}" for axis, name in names.items()), *overrides])
    except InputError as error:
        why, _, instead = str(error).rpartition("; ")
        return {**names, "runs": False, "num_gpus": None, "why": why or str(error), "instead": instead}
    return {**names, "runs": True, "num_gpus": plan.num_gpus, "why": "", "instead": ""}


def matrix(stacks: Iterable[str], overrides: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the cells of each stack."""
    for stack in stacks:
        for model in MODELS:
            for precision in PRECISIONS:
                for gpu in GPUS:
                    yield cell(stack, model, precision, gpu, overrides)


def grid(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the cells of one stack as a grid: the GPUs that a cell is mapped to, or the number of its refusal."""
    refusals = _refusals(rows)
    table = Table("model", "precision", *GPUS)
    for model in MODELS:
        for precision in PRECISIONS:
            cells = [next(r for r in rows if (r["model"], r["precision"], r["gpu"]) == (model, precision, gpu)) for gpu in GPUS]
            table.add_row(model, precision, *(str(r["num_gpus"]) if r["runs"] else f"refused [{refusals[_key(r)]}]" for r in cells))
        table.add_section()
    return table


def _key(row: dict[str, Any]) -> tuple[str, str]:
    why = str(row["why"]).partition(": ")[2] or str(row["why"])
    return why, str(row["instead"])


def _refusals(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    keys = dict.fromkeys(_key(row) for row in rows if not row["runs"])
    return {key: number for number, key in enumerate(keys, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can mend."""
    parser = ArgumentParser(prog="python -m launch.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further overrides for every cell, e.g. experiment=throughput")
    every = options("stack")
    parser.add_argument("--stack", action="append", choices=[*every, "all"], help="a stack; may be given again (default: nemo_25_04, or stack=…)")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON")
    args = parser.parse_intermixed_args(argv)
    try:
        default = str(compose_tree(args.overrides)["stack"]["name"])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    asked = args.stack or [default]
    rows = list(matrix(every if "all" in asked else dict.fromkeys(asked), args.overrides))
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for stack in dict.fromkeys(row["stack"] for row in rows):
        _print([row for row in rows if row["stack"] == stack])
    return 0


def _print(rows: Sequence[dict[str, Any]]) -> None:
    console = Console()
    console.print(f"{rows[0]['stack']}: GPUs of the recommended mapping, or why the cell is refused", style="bold")
    console.print(grid(rows))
    for (why, instead), number in _refusals(rows).items():
        console.print(escape(f"[{number}] {why}; {instead}"), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
