"""`python -m launch.cancel RUN…`: cancel the Slurm jobs of runs; what was trained stays, and can be
continued.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch import slurm
from launch.job import reserved
from launch.state import active, check_unwritten, settle, was_submitted
from launch.submit import PATIENCE_S
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import event, read_plan


def cancel(folder: Path) -> str:
    """Cancel the jobs of a run folder that wait or run; return what was done in a sentence.

    InputError where Slurm does not tell which these are, or does not take the order, and for a run
    on this machine.
    """
    read_plan(folder)
    if not was_submitted(folder):
        check_unwritten(folder)
        return f"{folder}: no job waits or runs"
    with reserved(folder, PATIENCE_S):  # a launch that submits a chain is waited for
        settle(folder)
        jobs = active(folder)
        if not jobs:
            check_unwritten(folder)
            return f"{folder}: no job waits or runs"
        slurm.cancel(jobs)
        event(folder, "cancelled", job_ids=[job.job_id for job in jobs])
    return f"{folder}: cancelled job {', '.join(map(str, jobs))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: each folder is tried; a line and exit code 2 where one could not be
    cancelled.
    """
    parser = ArgumentParser(prog="python -m launch.cancel", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    args = parser.parse_args(argv)
    code = 0
    for folder in args.runs:
        try:
            print(cancel(folder))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_WRONG_INPUT
    return code


if __name__ == "__main__":
    command(main)
