"""Submission: the job folder is written, Slurm is asked, and the job id is kept beside the script.

A run whose job still waits or runs is not submitted twice, nor is one of which Slurm does not tell.
A chain is submitted at once; each of its jobs waits for the one before it, of the same name
(`--dependency=singleton`), so a job that fails does not break the chain.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from launch import slurm
from launch.job import reserved, write_job
from launch.slurm import Job, Known
from launch.state import (
    active,
    begin_submission,
    check_unwritten,
    end_submission,
    is_open,
    lost,
    record,
    settle,
)
from recipes.code import code
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import check_folder, event, folder_of

PATIENCE_S = (
    60  # another launch holds a folder for one submission, a run on this machine until it ends
)
LOOKS_S = (0, 1, 3, 6)  # after an answer that was lost: a busy slurmctld may still take the job
CLUSTERS = re.compile(r"(?:--clusters?=|-M ?)(\S+)")  # of sbatch


def submit_all(plans: Sequence[Plan]) -> None:
    """Submit the plans' jobs; what was submitted before one that Slurm refuses stays submitted, and
    is reported.
    """
    if plans:
        slurm.check_present()  # before anything is written
    for plan in plans:
        folder = folder_of(plan)
        with reserved(
            check_folder(plan), PATIENCE_S
        ):  # or two launches at once would both find nothing queued
            settle(folder)
            if waiting := active(folder):
                print(_queued_already(folder, waiting))
                continue
            check_unwritten(folder)
            jobs = submit(plan)
        print(f"{folder}: submitted as job {', '.join(map(str, jobs))}")


def _queued_already(folder: Path, waiting: Sequence[Job]) -> str:
    line = f"{folder}: job {waiting[0]} is queued or running already"
    if (folder / "stop").exists():
        return (
            f"{line}, and was asked to stop: launch again when it has ended, or remove"
            f" {folder / 'stop'} to let it go on"
        )
    return f"{line}; python -m launch.status {folder}"


def submit(plan: Plan) -> list[Job]:
    """Write the plan's job folder and submit it, `executor.chain` times; return the jobs."""
    folder, script, jobs = folder_of(plan), write_job(plan), list[Job]()
    (folder / "stop").unlink(missing_ok=True)
    for _ in range(plan.executor.chain):
        try:
            job = _submit_once(plan, folder, script)
        except InputError as error:
            if jobs:
                sent = ", ".join(map(str, jobs))
                raise InputError(
                    f"{error} (of the chain of {plan.executor.chain}, job {sent} is submitted and"
                    " stays)"
                ) from None
            if not is_open(folder):  # else Slurm may have the job
                event(folder, "refused")
            raise
        jobs.append(job)
    return jobs


def _submit_once(plan: Plan, folder: Path, script: Path) -> Job:
    """Submit a job and record it; where sbatch's answer is lost, look whether Slurm has the job
    before giving up.
    """
    flags = ["--dependency=singleton"] if plan.executor.chain > 1 else []
    begin_submission(folder, script, _clusters(plan))
    try:
        answer = slurm.submit(script, *flags)  # hands this process's umask on to the job
    except InputError:
        end_submission(folder)
        raise
    if isinstance(answer, Known):
        record(folder, answer.value, **code())
        end_submission(folder)
        return answer.value
    for wait_s in LOOKS_S:
        time.sleep(wait_s)
        found = lost(folder)
        if isinstance(found, Known) and found.value:
            settle(folder)
            return found.value[-1]
    raise InputError(
        f"{folder}: {answer.reason}; whether Slurm has the job is not known. The same launch"
        " command looks for it before it submits again"
    )


def _clusters(plan: Plan) -> str:
    """Return the clusters that sbatch is asked to submit to, a,b; empty for the one that it would
    choose.
    """
    asked = [match[1] for flag in plan.cluster.extra_sbatch if (match := CLUSTERS.fullmatch(flag))]
    named = [*asked[-1:], os.environ.get("SBATCH_CLUSTERS"), os.environ.get("SLURM_CLUSTERS")]
    return next((one for one in named if one), "")
