"""Slurm's own commands, and what they say as values: submit, look, cancel.

Nothing here waits for a job.  What Slurm refuses reaches the user as its own message on one line.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import InputError, one_line

TIMEOUT_S = 60
REMEDIES = {
    "account": "set cluster.account",
    "partition": "set cluster.partition (sinfo lists them)",
    "qos": "set cluster.qos",
    "node count": "use fewer nodes (num_gpus) or another cluster.partition",
    "node configuration": "the partition has no such nodes: check gpu, num_gpus, cluster.gpus_flag and cluster.partition (sinfo lists them)",
    "time limit": "lower executor.time_limit or choose another cluster.partition",
    "unrecognized option": "remove it from cluster.extra_sbatch, or set cluster.segment=null on a Slurm older than 24.05",
    "configuration source": "no slurm.conf is found here: launch on a login node, or set SLURM_CONF",
    "container": "pyxis is not installed there: set cluster.container_runtime=none, or ask your administrators",
}


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it: its state (PENDING, RUNNING, COMPLETED, …), Slurm's reason, and how often it was restarted."""

    job_id: int
    state: str
    reason: str = ""
    restarts: int = 0


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; InputError where this machine has no Slurm or it does not answer."""
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not on this machine: launch where Slurm is, or use gpu=cpu or executor=local; dry_run=true prints the job")
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run ({error.strerror}); is it Slurm's own?") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not answer within {TIMEOUT_S} s; is slurmctld up? try again") from None


def submit(script: Path, *flags: str) -> int:
    """Submit `script` and return its job id; InputError with Slurm's message and a remedy where it refuses."""
    done = run("sbatch", "--parsable", *flags, str(script))
    if done.returncode:
        raise InputError(f"sbatch refused {script}: {refusal(done.stderr)}")
    job_id = done.stdout.strip().split(";")[0]
    if not job_id.isdecimal():
        raise InputError(f"sbatch --parsable {script} printed no job id but {one_line(done.stdout)[:100]!r}; is it Slurm's own?")
    return int(job_id)


def refusal(said: str) -> str:
    """Return Slurm's message without its prefixes, with what to do about it where that is known."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines()]
    text = one_line("; ".join(dict.fromkeys(line.strip() for line in lines if line.strip())))
    remedy = next((what for word, what in REMEDIES.items() if word in text.lower()), "see the script, and run sbatch on it by hand")
    return f"{text}; {remedy}"


def cancel(job_ids: list[int]) -> None:
    """Cancel jobs; jobs that have ended are left alone."""
    done = run("scancel", *map(str, job_ids))
    if done.returncode and "Invalid job id" not in done.stderr:
        raise InputError(f"scancel: {one_line(done.stderr)}")


def states(job_ids: list[int]) -> dict[int, JobState]:
    """Return the state of each job that Slurm still knows, from squeue, or from sacct where accounting is on."""
    if not job_ids:
        return {}
    found = _accounted(job_ids)
    wanted = ",".join(map(str, job_ids))
    lines = run("squeue", "--noheader", f"--jobs={wanted}", "--states=all", "--Format=JobID:|,State:|,Reason:|,RestartCnt:").stdout.splitlines()
    for line in lines:
        job_id, state, reason, restarts = [*(part.strip() for part in line.split("|", 3)), "", "", ""][:4]
        if job_id.isdecimal() and state:
            found[int(job_id)] = JobState(int(job_id), state, "" if reason == "None" else reason, int(restarts) if restarts.isdecimal() else 0)
    return found


def _accounted(job_ids: list[int]) -> dict[int, JobState]:
    if shutil.which("sacct") is None:
        return {}
    done = run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(map(str, job_ids))}", "--format=JobIDRaw,State,Reason")
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2] if done.returncode == 0 else []
    return {int(i): JobState(int(i), state.split()[0], "" if reason == "None" else reason) for i, state, reason in rows if i.isdecimal() and state}
