"""`python -m launch.cancel RUN…`: cancel the Slurm jobs of runs; what was trained stays, and can be continued."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch import slurm
from launch.submit import active
from recipes.cli import ArgumentParser
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import event, read_plan


def cancel(folder: Path) -> str:
    """Cancel the jobs of a run folder that wait or run; return what was done in a sentence."""
    read_plan(folder)
    jobs = active(folder)
    if not jobs:
        return f"{folder}: no job waits or runs"
    slurm.cancel(jobs)
    event(folder, "cancelled", job_ids=jobs)
    return f"{folder}: cancelled job {', '.join(map(str, jobs))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can mend."""
    parser = ArgumentParser(prog="python -m launch.cancel", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    args = parser.parse_args(argv)
    try:
        for folder in args.runs:
            print(cancel(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
