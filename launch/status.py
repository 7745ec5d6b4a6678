"""`python -m launch.status [RUN…]`: what is queued, running, done or failed, and why.

A run folder knows how far training came, Slurm knows what became of the job, the log knows what it died of; none of
them knows all.  This command reads the three and says it in one line a run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import slurm
from launch.causes import cause_of, known_cause
from launch.job import is_held
from launch.submit import ENDED, submissions
from recipes.cli import ArgumentParser
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.run_folder import SESSION, is_written, last_step, read_plan, rows_of, status_of

LOG_TAIL_BYTES = 2_000_000  # hundreds of ranks write as much after the first error

STATES = {
    "TIMEOUT": "the time limit: the same launch command continues it",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "out of host memory",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "the deadline of the job",
}


@dataclass(frozen=True)
class Row:
    """One run: `status` is queued, running, done, paused, failed, cancelled or new; `why` is empty where there is nothing to say."""

    run: str
    status: str
    step: int
    max_steps: int
    loss: float | None
    job_id: int | None
    restarts: int
    why: str


def runs_under(folder: Path) -> list[Path]:
    """Return the run folders in `folder`, at any depth but not inside one another."""
    found = sorted(path.parent for path in folder.rglob("plan.json"))
    return [path for path in found if not any(other in path.parents for other in found)]


def row(folder: Path, states: dict[int, slurm.JobState]) -> Row:
    """Return what is known of a run."""
    plan, newest, jobs = read_plan(folder), last_step(folder), submissions(folder)
    known = [states[job] for job in jobs if job in states]
    job = next((j for j in known if not j.state.startswith(ENDED)), known[-1] if known else None)
    status, why = judged(folder, job)
    step, loss = (value if isinstance(value, int | float) else None for value in (newest.get("step"), newest.get("loss")))
    return Row(
        run=str(folder),
        status=status,
        step=int(step) if step is not None and math.isfinite(step) else 0,
        max_steps=plan.train.max_steps,
        loss=loss,
        job_id=job.job_id if job else jobs[-1] if jobs else None,
        restarts=job.restarts if job else 0,
        why=why,
    )


def judged(folder: Path, job: slurm.JobState | None) -> tuple[str, str]:
    """Return a run's status and why, from its folder and its job."""
    said = status_of(folder)
    if said == "done":
        return "done", ""
    if job is None and said == "running" and not is_alive(folder):
        gone = "its process is gone, killed or with its machine: the same launch command continues it"
        return "failed", known_cause(_tail(folder / "log.txt")) or gone
    if job is None or job.state.startswith("COMPLETED"):
        return said, cause(folder) if said == "failed" else ""
    if job.state.startswith(("PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED", "SPECIAL_EXIT")):
        return "queued", job.reason
    if not job.state.startswith(ENDED):
        return ("running" if said in ("running", "paused") else "starting"), ""
    if job.state.startswith("CANCELLED"):
        return "cancelled", "by a user or an administrator"
    return "failed", next((why for state, why in STATES.items() if job.state.startswith(state)), "") or cause(folder)


def is_alive(folder: Path) -> bool:
    """Return whether a run on this machine lives, as far as can be told: it holds its folder, or there is nothing to hold."""
    return is_held(folder) is not False or is_written(folder)


def cause(folder: Path) -> str:
    """Return what a failed run died of, by its log and by what its rank 0 recorded in its newest session."""
    events = rows_of(folder / "events.jsonl")
    begins = [n for n, e in enumerate(events) if e.get("event") in ("submitted", "start", "resume")]
    ends = ("failed", "non_finite_loss")
    newest = [e for e in events[begins[-1] if begins else 0 :] if e.get("event") in ends]
    reason = str(newest[-1].get("reason", "NaN or Inf in loss or gradients")) if newest else None
    return cause_of(_tail(folder / "log.txt"), reason) or f"see {folder / 'log.txt'}"


def _tail(log: Path) -> str:
    """Return the end of what the newest session wrote."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace").rpartition(SESSION)[2]


def rows(folders: Sequence[Path]) -> list[Row]:
    """Return a row for each run folder; Slurm is asked once for all."""
    jobs = [job for folder in folders for job in submissions(folder)]
    states = slurm.states(jobs) if jobs else {}
    return [row(folder, states) for folder in folders]


def shown(found: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("run", "status", "step", "loss", "job", "restarts", "why"):
        table.add_column(name, overflow="fold")
    for r in found:
        cells = (f"{r.step}/{r.max_steps}", "-" if r.loss is None else f"{r.loss:.3f}", str(r.job_id or "-"), str(r.restarts))
        table.add_row(escape(r.run), r.status, *cells, escape(r.why))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can mend."""
    parser = ArgumentParser(prog="python -m launch.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        folders = [run for given in args.runs or [Path("runs")] for run in _runs(given)]
        found: list[Any] = rows(folders)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(json.dumps([asdict(r) for r in found], indent=1))
    else:
        Console().print(shown(found))
    return 0


def _runs(given: Path) -> list[Path]:
    found = runs_under(given)
    if not found:
        raise InputError(f"{given}: no run folder there (none has a plan.json); launch one, or name another folder")
    return found


if __name__ == "__main__":
    sys.exit(main())
