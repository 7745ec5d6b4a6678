"""What is the state of a run?  The one place where run folder, locks, Slurm and log decide it
together.

A run folder records how far training came, Slurm what became of the job, the log what it died of.
A question that one of them does not answer gives the state "unknown" with the reason.  Nothing is
submitted, written or cancelled on "unknown".

    RUN/job/submitted.jsonl   a line for each submission that Slurm answered
    RUN/job/submitting        is there from before sbatch is asked until its answer is recorded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from launch import slurm
from launch.causes import cause_of, known_cause
from launch.job import is_held
from launch.slurm import Answer, Job, JobState, Known, NotKnown
from recipes.errors import InputError, one_line
from recipes.run_folder import (
    SESSION,
    append_line,
    event,
    is_written,
    last_rows,
    read_json,
    rows_of,
    status_of,
    write_json,
)

MOST_EVENTS = 10_000  # of a session that are looked at, from the end
LOG_TAIL_BYTES = 2_000_000  # hundreds of ranks write as much after the first error

ENDS = {
    "TIMEOUT": "the time limit: the same launch command continues it",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "out of host memory",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "the deadline of the job",
}
HELD = {
    "REQUEUE_HOLD": "held after a requeue: scontrol release continues it",
    "SPECIAL_EXIT": "queued again and held: scontrol release continues it",
    "RESV_DEL_HOLD": "held, its reservation was deleted: scontrol release continues it",
    "SUSPENDED": "suspended: scontrol resume continues it",
}


# What was submitted


def submitted(folder: Path) -> list[Job]:
    """Return the jobs that are recorded as submitted for a run folder, oldest first."""
    rows = rows_of(folder / "job" / "submitted.jsonl")
    return [
        _job(row, folder) for row in rows if type(row.get("job_id")) is int and row["job_id"] > 0
    ]


def was_submitted(folder: Path) -> bool:
    """Return whether sbatch was ever asked for a run folder."""
    return bool(submitted(folder)) or _mark(folder).is_file()


def _job(row: Mapping[str, Any], folder: Path) -> Job:
    cluster, user, script = (
        value if isinstance(value := row.get(key), str) else ""
        for key in ("cluster", "user", "script")
    )
    return Job(row["job_id"], cluster, user, script or f"/{folder.resolve().name}/job/job.sbatch")


def record(folder: Path, job: Job, **facts: Any) -> None:
    """Record a job that Slurm has, in the job folder and as an event of the run."""
    known = {"job_id": job.job_id, "cluster": job.cluster, "user": job.user, "script": job.script}
    append_line(
        folder / "job" / "submitted.jsonl",
        {"time": datetime.now(UTC).isoformat(), **known, **facts},
    )
    event(folder, "submitted", job_id=job.job_id)


def begin_submission(folder: Path, script: Path, clusters: str) -> None:
    """Note that sbatch is about to be asked, so that a job whose number never arrives is looked
    for.
    """
    write_json(
        _mark(folder),
        {"time": datetime.now(UTC).isoformat(), "script": str(script), "clusters": clusters},
    )


def end_submission(folder: Path) -> None:
    """Note that sbatch's answer is recorded."""
    _mark(folder).unlink(missing_ok=True)


def is_open(folder: Path) -> bool:
    """Return whether sbatch was asked and its answer is not recorded."""
    return _mark(folder).is_file()


def _mark(folder: Path) -> Path:
    return folder / "job" / "submitting"


def lost(folder: Path) -> Known[list[Job]] | NotKnown:
    """Return the jobs of a submission whose answer was lost that Slurm has and the folder does not
    record; [] where none was lost.
    """
    if not _mark(folder).is_file():
        return Known([])
    try:
        mark = read_json(_mark(folder))
        since, script, clusters = (
            datetime.fromisoformat(mark["time"]),
            str(mark["script"]),
            str(mark["clusters"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return NotKnown(
            f"{_mark(folder)} was changed or cut; remove it when squeue shows no job of this run"
        )
    found = slurm.find(script, since, clusters)
    recorded = {job.job_id for job in submitted(folder)}
    return (
        Known([job for job in found.value if job.job_id not in recorded])
        if isinstance(found, Known)
        else found
    )


def settle(folder: Path) -> None:
    """Record what became of a submission whose answer was lost; InputError where Slurm does not
    tell.  The caller holds the folder.
    """
    found = lost(folder)
    if isinstance(found, NotKnown):
        raise InputError(
            f"{folder}: an earlier sbatch did not answer, and whether it left a job is not known:"
            f" {found.reason}; try again"
        )
    for job in found.value:
        record(folder, job, found=True)
    end_submission(folder)


# What is active


def active(folder: Path) -> list[Job]:
    """Return a run's jobs that wait or run; InputError where Slurm does not tell."""
    answers = slurm.look(submitted(folder))
    unknown = next((answer for answer in answers.values() if isinstance(answer, NotKnown)), None)
    if unknown:
        remedy = (
            f"try again, or remove {folder / 'job' / 'submitted.jsonl'} if you know that none does"
        )
        raise InputError(
            f"{folder}: whether its job waits or runs is not known, and nothing was done:"
            f" {unknown.reason}; {remedy}"
        )
    return [
        job
        for job, answer in answers.items()
        if isinstance(answer, Known) and not answer.value.ended
    ]


def check_idle(folder: Path) -> None:
    """Raise InputError where a job or a process still has the run, or where that is not known.

    The caller holds the folder.
    """
    settle(folder)
    if jobs := active(folder):
        raise InputError(
            f"{folder}: job {jobs[0]} is queued or running; `python -m launch.cancel {folder}`"
            " ends it"
        )
    check_unwritten(folder)


def check_unwritten(folder: Path) -> None:
    """Raise InputError where a process trains the run."""
    if is_written(folder):
        end = f"end it with `touch {folder / 'stop'}`"
        raise InputError(
            f"{folder}: a process of an earlier launch still trains it; wait for it, or {end}"
        )


def is_alive(folder: Path) -> bool | None:
    """Return whether a process trains a run, by the locks that it holds; None where that cannot be
    told.
    """
    held, written = is_held(folder), is_written(folder)
    if held or written:
        return True
    nothing_to_ask = held is None and not (folder / "lock").exists()
    return None if written is None or nothing_to_ask else False


# What became of it


def asked(folders: Sequence[Path]) -> dict[Path, list[Answer]]:
    """Return Slurm's answers about the jobs of each run folder, oldest first; it is asked once for
    all.
    """
    late = {folder: _lost(folder) for folder in folders}
    jobs = {
        folder: (
            [*submitted(folder), *found.value] if isinstance(found, Known) else _readable(folder)
        )
        for folder, found in late.items()
    }
    answers = slurm.look(job for some in jobs.values() for job in some)
    unknown = {
        folder: [found] if isinstance(found, NotKnown) else [] for folder, found in late.items()
    }
    return {
        folder: [*(answers[job] for job in some), *unknown[folder]] for folder, some in jobs.items()
    }


def _lost(folder: Path) -> Known[list[Job]] | NotKnown:
    try:
        return lost(folder)
    except OSError as error:  # a job folder is its owner's alone
        return NotKnown(one_line(f"{error.filename}: {error.strerror}"))


def _readable(folder: Path) -> list[Job]:
    try:
        return submitted(folder)
    except (OSError, InputError):
        return []


def judged(folder: Path, answers: Sequence[Answer]) -> tuple[str, str, JobState | None]:
    """Return a run's status, why, and the job that decides it; `answers` are Slurm's of its jobs,
    oldest first.
    """
    recorded = status_of(folder)
    known = [answer.value for answer in answers if isinstance(answer, Known)]
    job = next((state for state in known if not state.ended), known[-1] if known else None)
    if recorded == "done":
        return "done", "", job
    unknown = next((answer for answer in answers if isinstance(answer, NotKnown)), None)
    if unknown and (job is None or job.ended):
        return "unknown", unknown.reason, job
    return (*_of_job(folder, recorded, job), job) if job else (*_of_folder(folder, recorded), None)


def _of_folder(folder: Path, recorded: str) -> tuple[str, str]:
    """Judge a run without a job."""
    if recorded != "running":
        return recorded, cause(folder) if recorded == "failed" else ""
    alive = is_alive(folder)
    if alive is None:
        return (
            "running",
            (
                "by its folder; whether its process lives cannot be told here (its locks cannot be"
                " read)"
            ),
        )
    if alive:
        return "running", ""
    gone = "its process is gone, killed or with its machine: the same launch command continues it"
    return "failed", known_cause(log_tail(folder)) or gone


def _of_job(folder: Path, recorded: str, job: JobState) -> tuple[str, str]:
    if job.waits:
        return "queued", HELD.get(job.state, job.reason)
    if not job.ended:
        stopped = "stopped by SIGSTOP" if job.state == "STOPPED" else ""
        return ("running" if recorded in ("running", "paused") else "starting"), stopped
    if job.state == "CANCELLED":
        return "cancelled", "by a user or an administrator"
    if job.state == "COMPLETED" and recorded != "running":
        return recorded, cause(folder) if recorded == "failed" else ""
    if job.state == slurm.GONE and recorded in ("paused", "failed"):
        return recorded, cause(folder) if recorded == "failed" else ""
    if job.state in (slurm.GONE, "COMPLETED"):
        return _of_lost_job(folder, recorded, job)
    return "failed", ENDS.get(job.state) or cause(folder)


def _of_lost_job(folder: Path, recorded: str, job: JobState) -> tuple[str, str]:
    """Judge a run whose job has ended, or is forgotten, without a last word in the folder."""
    if is_alive(folder):
        return "running", ""
    how = "has ended" if job.state == "COMPLETED" else "is no longer known to Slurm"
    begun = "" if recorded == "running" else ", and training did not start"
    return (
        "failed",
        known_cause(log_tail(folder))
        or f"job {job.job_id} {how}{begun}: the same launch command continues it",
    )


def cause(folder: Path) -> str:
    """Return what a failed run died of, by its log and by what its rank 0 recorded in its newest
    session.
    """
    of_session = takewhile(
        lambda e: e.get("event") not in ("submitted", "start", "resume"),
        last_rows(folder / "events.jsonl"),
    )
    last = next(
        (
            e
            for e in islice(of_session, MOST_EVENTS)
            if e.get("event") in ("failed", "non_finite_loss")
        ),
        None,
    )
    reason = str(last.get("reason", "NaN or Inf in loss or gradients")) if last else None
    return cause_of(log_tail(folder), reason) or f"see {folder / 'log.txt'}"


def log_tail(folder: Path) -> str:
    """Return the end of what the newest session wrote to the log."""
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read(LOG_TAIL_BYTES).decode(errors="replace").rpartition(SESSION)[2]
