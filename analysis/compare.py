"""`python -m analysis.compare RUN RUN…`: does the loss of each FP8 run follow BF16?

BF16 runs are the base, whatever their place; further ones, with other seeds, give the seed noise.
A recipe with several seeds, each beside BF16 of its seed, is judged over them.  Exit code 0 if all
recipes pass, 1 if one fails, 3 if one is undecided and none fails, 2 for a wrong input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.convergence.comparison import all_notes, compare, terminal_table
from analysis.convergence.verdict import FAIL, UNDECIDED
from analysis.render.table import wide_console
from analysis.runs.load import load_runs
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT

EXIT_FAIL = 1
EXIT_UNDECIDED = 3


def exit_code(verdicts: Sequence[str]) -> int:
    """Return the exit code of a set of verdicts."""
    return EXIT_FAIL if FAIL in verdicts else EXIT_UNDECIDED if UNDECIDED in verdicts else 0


def run(folders: Sequence[Path], as_json: bool) -> int:
    """Compare the runs and print what was found; return the exit code."""
    comparison = compare(load_runs(folders))
    rows = comparison.rows
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        console = wide_console()
        console.print(terminal_table(rows))
        for note in all_notes(comparison):
            console.print(note, markup=False, highlight=False)
    return exit_code(comparison.outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(prog="python -m analysis.compare", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, at least one BF16 and one FP8",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        return run(args.runs, args.json)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


if __name__ == "__main__":
    command(main)
