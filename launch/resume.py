"""`python -m launch.resume RUN…`: continue runs from their last checkpoint, with the plan in their
folder.

The same as the launch command that made them, for whoever no longer has it.  The code is that of
today: its commit goes into the job folder, the manifest and the events again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.__main__ import launch
from recipes.cli import ArgumentParser, command
from recipes.compose.rules import check
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import folder_of, read_plan


def resume(folders: Sequence[Path]) -> int:
    """Launch the plans of run folders again; return the exit code."""
    plans = [check(read_plan(folder)) for folder in folders]
    for plan, folder in zip(plans, folders, strict=True):
        if folder_of(plan).resolve() != folder.resolve():
            raise InputError(
                f"{folder} was moved: its plan writes to {folder_of(plan)}; move it back, or start"
                " from that folder"
            )
    return launch(plans)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(prog="python -m launch.resume", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    args = parser.parse_args(argv)
    try:
        return resume(args.runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


if __name__ == "__main__":
    command(main)
