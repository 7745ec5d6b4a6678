"""`python -m launch.status [RUN…]`: what is queued, running, done or failed, and why.

A run folder knows how far training came, Slurm knows what became of the job, the log knows what it
died of; none of them knows all.  This command reads the three and says it in one line a run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import slurm
from launch.state import asked, judged, submitted
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import last_step, read_plan

WIDTH = 170  # columns where it is not printed on a terminal


@dataclass(frozen=True)
class Row:
    """One run.

    `status` is queued, starting, running, done, paused, failed, cancelled, new, unknown or
    unreadable; `why` is empty where nothing is to be told.
    """

    run: str
    status: str
    step: int
    max_steps: int
    loss: float | None
    job_id: int | None
    restarts: int
    why: str


def runs_under(folder: Path) -> list[Path]:
    """Return the run folders in `folder`, at any depth but not inside one another; links are
    followed, each folder once.
    """
    found, seen = list[Path](), set[tuple[int, int]]()
    for place, inside, files in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen or "plan.json" in files:
            inside.clear()
        if (here.st_dev, here.st_ino) not in seen and "plan.json" in files:
            found.append(Path(place))
        seen.add((here.st_dev, here.st_ino))
    return sorted(found)


def row(folder: Path, answers: Sequence[slurm.Answer]) -> Row:
    """Return what is known of a run, with Slurm's answers about its jobs."""
    plan, newest, jobs = read_plan(folder), last_step(folder), submitted(folder)
    status, why, job = judged(folder, answers)
    step, loss = (
        value if isinstance(value, int | float) else None
        for value in (newest.get("step"), newest.get("loss"))
    )
    return Row(
        run=one_line(str(folder)),
        status=one_line(status),
        step=int(step) if step is not None and math.isfinite(step) else 0,
        max_steps=plan.train.max_steps,
        loss=loss,
        job_id=job.job_id if job else jobs[-1].job_id if jobs else None,
        restarts=job.restarts if job else 0,
        why=one_line(why),
    )


def rows(folders: Sequence[Path]) -> list[Row]:
    """Return a row for each run folder; Slurm is asked once for all of their jobs."""
    answers = asked(folders)
    return [_row(folder, answers[folder]) for folder in folders]


def _row(folder: Path, answers: Sequence[slurm.Answer]) -> Row:
    try:
        return row(folder, answers)
    except InputError as error:
        return Row(one_line(str(folder)), "unreadable", 0, 0, None, None, 0, str(error))
    except OSError as error:
        return Row(
            one_line(str(folder)),
            "unreadable",
            0,
            0,
            None,
            None,
            0,
            one_line(f"{error.filename}: {error.strerror}"),
        )


def shown(found: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("run", "status", "step", "loss", "job", "restarts", "why"):
        table.add_column(name, overflow="fold")
    for r in found:
        cells = (
            f"{r.step}/{r.max_steps}",
            "-" if r.loss is None else f"{r.loss:.3f}",
            str(r.job_id or "-"),
            str(r.restarts),
        )
        table.add_row(escape(r.run), r.status, *cells, escape(r.why))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m launch.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders, or folders of them (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        folders = [run for given in args.runs or [Path("runs")] for run in _runs(given)]
        found = rows(folders)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps([asdict(r) for r in found], indent=1))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else WIDTH
        console.print(shown(found))
    return _unknown(found)


def _unknown(found: Sequence[Row]) -> int:
    """Report runs that could not be read, or whose state is not known, on one line; return the exit
    code.
    """
    open_rows = [r for r in found if r.status in ("unknown", "unreadable")]
    if not open_rows:
        return 0
    first = open_rows[0]
    several = f" (and of {len(open_rows) - 1} more)" if len(open_rows) > 1 else ""
    what = "is not known" if first.status == "unknown" else "cannot be read"
    print(f"error: the state of {first.run}{several} {what}: {first.why}", file=sys.stderr)
    return EXIT_WRONG_INPUT


def _runs(given: Path) -> list[Path]:
    found = runs_under(given)
    if not found:
        raise InputError(
            f"{given}: no run folder there (none has a plan.json); launch one, or name another"
            " folder"
        )
    return found


if __name__ == "__main__":
    command(main)
