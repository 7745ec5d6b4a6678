"""Submission: the job folder is written, Slurm is asked, and the job id is kept beside the script.

A run whose job still waits or runs is not submitted twice.  A chain is submitted at once; each of its jobs waits for
the one before it, of the same name (`--dependency=singleton`), so a job that fails does not break the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from launch import slurm
from launch.job import code, reserved, write_job
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import append_line, event, folder_of, rows_of

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")


def submissions(folder: Path) -> list[int]:
    """Return the ids of the jobs that were submitted for a run folder, oldest first."""
    return [row["job_id"] for row in rows_of(folder / "job" / "submitted.jsonl") if isinstance(row.get("job_id"), int)]


def active(folder: Path) -> list[int]:
    """Return the ids of a run's jobs that wait or run."""
    known = slurm.states(submissions(folder))
    return [job_id for job_id, job in known.items() if not job.state.startswith(ENDED)]


def submit_all(plans: Sequence[Plan]) -> None:
    """Submit the plans' jobs; what was submitted before one that Slurm refuses stays submitted, and is said."""
    if plans:
        slurm.run("sbatch", "--version")  # before anything is written: is there a Slurm?
    for plan in plans:
        folder = folder_of(plan)
        with reserved(plan, wait=True):  # or two launches at once would both find nothing queued
            waiting = active(folder) if submissions(folder) else []
            if waiting:
                print(f"{folder}: job {waiting[0]} is queued or running already; python -m launch.status {folder}")
                continue
            ids = submit(plan)
        print(f"{folder}: submitted as job {', '.join(map(str, ids))}")


def submit(plan: Plan) -> list[int]:
    """Write the plan's job folder and submit it, `executor.chain` times; return the job ids."""
    script, folder = write_job(plan), folder_of(plan)
    flags = ["--dependency=singleton"] if plan.executor.chain > 1 else []
    ids: list[int] = []
    for _ in range(plan.executor.chain):
        try:
            job_id = slurm.submit(script, *flags)  # hands this process's umask on to the job
        except InputError:
            if not ids:
                event(folder, "refused")
            raise
        append_line(folder / "job" / "submitted.jsonl", {"time": datetime.now(UTC).isoformat(), "job_id": job_id, **code()})
        event(folder, "submitted", job_id=job_id)
        ids.append(job_id)
    return ids
