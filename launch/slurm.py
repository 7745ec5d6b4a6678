"""Slurm's own commands, and what they answer as values: submit, look, find, cancel.

A command that failed, did not answer, or printed what is no answer gives `NotKnown` with the
reason. "Not known" is never "no job": only squeue's "Invalid job id" or a whole list without the
job says that a job is gone. Nothing here waits for a job.  What Slurm refuses reaches the user as
its own message on one line.

States and message texts: Slurm 22.05 to 24.11, src/common/slurm_protocol_defs.c and slurm_errno.c.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from recipes.errors import InputError, one_line

T = TypeVar("T")
TIMEOUT_S = 60
IDS_PER_CALL = 1000  # Linux takes arguments of at most 128 KiB
REMEDIES = {
    "account": "set cluster.account",
    "partition": "set cluster.partition (sinfo lists them)",
    "qos": "set cluster.qos",
    "node count": "use fewer nodes (num_gpus) or another cluster.partition",
    "node configuration": (
        "the partition has no such nodes: check gpu, num_gpus, cluster.gpus_flag and"
        " cluster.partition (sinfo lists them)"
    ),
    "time limit": "lower executor.time_limit or choose another cluster.partition",
    "unrecognized option": (
        "remove it from cluster.extra_sbatch, or set cluster.segment=null on a Slurm older than"
        " 24.05"
    ),
    "configuration source": (
        "no slurm.conf is found here: launch on a login node, or set SLURM_CONF"
    ),
    "container": (
        "pyxis is not installed there: set cluster.container_runtime=none, or ask your"
        " administrators"
    ),
}
ABSENT = "launch where Slurm is, or use gpu=cpu or executor=local; dry_run=true prints the job"

WAITS = ("PENDING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "POWER_UP_NODE")
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNS = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED", "EXPEDITING")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
GONE = "GONE"  # ours: Slurm no longer knows the job, or its number is another job's now
UNDECIDED = {
    "REVOKED": "another cluster of the federation may run it; squeue --federation shows where",
    "LAUNCH_FAILED": (
        "it did not start on its nodes, and Slurm may queue it again; scontrol show job shows why"
    ),
}

UNKNOWN_ID = "Invalid job id"  # ESLURM_INVALID_JOB_ID: slurmctld does not know this job
# After these, slurmctld may have taken the job or not: its answer did not arrive.
# Whole phrases: a refusal repeats names of the user's, such as a partition "interconnect".
LOST = re.compile(
    r"timed out|unable to contact|zero bytes|(?:connection|connect)\b.*\b(?:fail|refused|reset)|"
    r"communications? (?:failure|error|shutdown|connection)|unexpected message|transport endpoint|"
    r"temporarily|standby mode|not responding|(?:receive|send) (?:failure|error)|broken pipe",
    re.IGNORECASE,
)
SCRIPT = re.compile(r"/job/job\.sbatch(?: |$)")  # how the script of every run of this project ends
ENDED_ALREADY = re.compile(f"{UNKNOWN_ID}|already (?:completing|completed)")
# These variables filter what the commands list, or ask back at the terminal, without a word on the
# command line.
FILTERS = re.compile(
    r"SQUEUE_|SACCT_|SCANCEL_|SLURM_CLUSTERS$|SLURM_TIME_FORMAT$|SLURM_BITSTR_LEN$"
)
QUEUE = "JobID:|,State:|,Reason:|,RestartCnt:|,UserName:\t,Cluster:\t,Command:\t"
ACCOUNTS: tuple[str, ...] = ("JobIDRaw", "State", "Reason", "User", "Cluster", "SubmitLine")


@dataclass(frozen=True)
class Known(Generic[T]):
    """An answer of Slurm's."""

    value: T


@dataclass(frozen=True)
class NotKnown:
    """Slurm gave no answer; `reason` is one line with the command and its message."""

    reason: str


@dataclass(frozen=True)
class Call:
    """A command that was run: exit code (None where it could not be run or did not answer), output,
    and standard error.
    """

    command: tuple[str, ...]
    code: int | None
    out: str = ""
    err: str = ""

    @property
    def message(self) -> str:
        """What it wrote to standard error, on one line."""
        return _message(self.err)

    @property
    def complained(self) -> bool:
        """Whether it reported an error, whatever its exit code."""
        return bool(re.search(r"error|fatal", self.err, re.IGNORECASE))

    @property
    def why(self) -> NotKnown:
        """The reason why this was no answer."""
        ended = f"ended with code {self.code} and no message"
        return NotKnown(one_line(f"{self.command[0]}: {self.message or ended}"))


@dataclass(frozen=True)
class Job:
    """A job as it was recorded when it was submitted; what was not recorded is empty."""

    job_id: int
    cluster: str = ""
    user: str = ""
    script: str = ""

    def __str__(self) -> str:
        """Return the number as sbatch prints it."""
        return f"{self.job_id};{self.cluster}" if self.cluster else str(self.job_id)


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it: its state (PENDING, RUNNING, COMPLETED, …), Slurm's reason, and how
    often it was restarted.
    """

    job_id: int
    state: str
    reason: str = ""
    restarts: int = 0

    @property
    def waits(self) -> bool:
        """Whether it is queued, held jobs included."""
        return self.state in (*WAITS, *HELD)

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in (*ENDED, GONE)


Answer = Known[JobState] | NotKnown


@dataclass(frozen=True)
class _Row:
    state: JobState
    user: str = ""
    cluster: str = ""
    command: str = (
        ""  # squeue: the script's path and its arguments; sacct: the whole command line of sbatch
    )

    def is_of(self, job: Job) -> bool | None:
        """Return whether a number is the job's: False where user or script is another's, None where
        a script is no run's.

        A site's wrapper may hand a copy of the script to sbatch, under a path of its own.
        """
        if len({self.user, job.user} - {""}) > 1:
            return False
        if not job.script or not self.command or self.names(job.script):
            return True
        return False if SCRIPT.search(self.command) else None

    def names(self, script: str) -> bool:
        """Return whether the job runs a script, given by its path or by the end of that."""
        return f"{script} " in f"{self.command} "


def call(*command: str) -> Call:
    """Run one of Slurm's commands to its end; those that list or cancel jobs run without the
    filters of the user's shell.
    """
    kept = {k: v for k, v in os.environ.items() if command[0] == "sbatch" or not FILTERS.match(k)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            env=kept,
        )
    except FileNotFoundError:
        return Call(command, None, err=f"is not on this machine: {ABSENT}")
    except OSError as error:
        return Call(command, None, err=f"cannot be run ({error.strerror}); is it Slurm's own?")
    except subprocess.TimeoutExpired:
        return Call(command, None, err=f"no answer within {TIMEOUT_S} s; is slurmctld up?")
    killed = f"ended by signal {-done.returncode}" if done.returncode < 0 else ""
    return Call(command, done.returncode, done.stdout, done.stderr or killed)


def _message(written: str) -> str:
    """Return what a command wrote to standard error on one line, each message once and without its
    prefixes.
    """
    lines = [
        re.sub(r"^(?:s\w+: )?(?:error: |fatal: )?", "", line.strip())
        for line in written.splitlines()
    ]
    return one_line("; ".join(dict.fromkeys(line for line in lines if line)))


def user() -> str:
    """Return the name of this process's user, as Slurm prints it; empty where this machine does not
    know it.
    """
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


def _named(printed: str) -> str:
    """Return a name or a path that Slurm printed; empty for its words for "not known", and for a
    user id that it could not name.
    """
    return "" if printed in ("nobody", "(null)", "(none)") or printed.isdecimal() else printed


def check_present() -> None:
    """Raise InputError where this machine has no sbatch, or none that runs."""
    asked = call("sbatch", "--version")
    if asked.code is None:
        raise InputError(f"sbatch {asked.message}")


def submit(script: Path, *flags: str) -> Known[Job] | NotKnown:
    """Submit `script` and return its job; NotKnown where the answer is lost, and Slurm may have the
    job or not.

    InputError, with Slurm's message and a remedy, where it refuses.
    """
    asked = call("sbatch", "--parsable", *flags, str(script))
    answer = re.findall(
        r"^(\d+)(?:;(\S+))?$", asked.out, re.MULTILINE
    )  # a site's wrapper may print lines beside it
    if asked.code == 0 and len(answer) == 1:
        return Known(Job(int(answer[0][0]), answer[0][1], user(), str(script)))
    if asked.code is None and ABSENT in asked.message:
        raise InputError(f"sbatch {asked.message}")
    if asked.code == 0:
        return NotKnown(f"sbatch --parsable printed no job id but {one_line(asked.out)[:100]!r}")
    if asked.code is None or asked.code < 0 or LOST.search(asked.message) or not asked.message:
        return asked.why
    raise InputError(f"sbatch refused {script}: {refusal(asked.message)}")


def refusal(message: str) -> str:
    """Return Slurm's message with what to do about it where that is known."""
    text = _message(message)
    remedy = next(
        (what for word, what in REMEDIES.items() if word in text.lower()),
        "see the script, and run sbatch on it by hand",
    )
    return f"{text}; {remedy}"


def cancel(jobs: Iterable[Job]) -> None:
    """Cancel jobs; jobs that have ended are left alone.

    InputError where Slurm did not take the order.
    """
    for cluster, ids in _by_cluster(jobs).items():
        asked = call("scancel", *_where(cluster), *map(str, ids))
        lines = [line for line in asked.err.splitlines() if line.strip()]
        if asked.code != 0 and not (lines and all(ENDED_ALREADY.search(line) for line in lines)):
            raise InputError(
                f"{asked.why.reason}; job {', '.join(map(str, ids))} may still wait or run: try"
                " again"
            )


def look(jobs: Iterable[Job]) -> dict[Job, Answer]:
    """Return what Slurm knows of each job: its state, from squeue and where that has forgotten it
    from sacct, or NotKnown.
    """
    found: dict[Job, Answer] = {}
    every = list(dict.fromkeys(jobs))
    for cluster in dict.fromkeys(job.cluster for job in every):
        of_cluster = [job for job in every if job.cluster == cluster]
        for at in range(0, len(of_cluster), IDS_PER_CALL):
            some = of_cluster[at : at + IDS_PER_CALL]
            queued = _queued(cluster, [job.job_id for job in some])
            if isinstance(queued, NotKnown):
                found |= dict.fromkeys(of_cluster[at:], queued)
                break
            found |= _judged(some, queued.value, cluster)
    return found


def _judged(jobs: Sequence[Job], queued: Mapping[int, _Row], cluster: str) -> dict[Job, Answer]:
    forgotten = [
        job for job in jobs if job.job_id not in queued or queued[job.job_id].is_of(job) is False
    ]
    accounted = _accounted(cluster, [job.job_id for job in forgotten])
    found: dict[Job, Answer] = {}
    for job in jobs:
        row = queued[job.job_id] if job not in forgotten else accounted.get(job.job_id)
        if job not in forgotten and row:
            found[job] = _decided(row.state) if row.is_of(job) else NotKnown(_unclear(job, row))
        # squeue does not have it, so it neither waits nor runs, whatever accounting still says
        else:
            known = row is not None and row.is_of(job) and row.state.ended
            found[job] = Known(row.state if row and known else JobState(job.job_id, GONE))
    return found


def _unclear(job: Job, row: _Row) -> str:
    return one_line(
        f"job {job.job_id} is {row.state.state} with {row.command}, not with {job.script}: it may"
        " be this run's or another's"
    )


def _decided(state: JobState) -> Answer:
    if state.waits or state.ended or state.state in RUNS:
        return Known(state)
    why = UNDECIDED.get(state.state, "a state that this version does not know")
    return NotKnown(f"job {state.job_id} is {state.state} in Slurm: {why}")


def _queued(cluster: str, ids: Sequence[int]) -> Known[dict[int, _Row]] | NotKnown:
    """Return squeue's rows by job id; a job that is not among them is gone."""
    if not ids:
        return Known({})
    asked = call(
        "squeue",
        *_where(cluster),
        "--noheader",
        f"--jobs={','.join(map(str, ids))}",
        "--states=all",
        f"--Format={QUEUE}",
    )
    if UNKNOWN_ID in asked.message and asked.code:
        if len(ids) == 1:
            return Known({})
        halves = [_queued(cluster, half) for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :])]
        lost = next((half for half in halves if isinstance(half, NotKnown)), None)
        return lost or Known(
            {k: row for half in halves if isinstance(half, Known) for k, row in half.value.items()}
        )
    rows = _rows(asked)
    if isinstance(rows, NotKnown):
        return rows
    found = {row.state.job_id: row for row in rows.value}
    if not found.keys() >= set(ids) and asked.complained:
        return asked.why
    return Known(found)


def _rows(asked: Call) -> Known[list[_Row]] | NotKnown:
    """Return the rows that squeue printed; NotKnown where it failed, or where a line is none of its
    rows.
    """
    if asked.code != 0:
        return asked.why
    rows = []
    for line in asked.out.splitlines():
        if not line.strip() or line.startswith(
            "CLUSTER: "
        ):  # a title, where several clusters are asked
            continue
        job_id, state, reason, rest = [*(part.strip() for part in line.split("|", 3)), "", "", ""][
            :4
        ]
        restarts, _, owner = rest.partition("|")
        who, where, command = [*owner.split("\t"), "", "", ""][:3]
        if not job_id.isdecimal() or not state:
            return NotKnown(one_line(f"squeue printed no list of jobs but {line[:100]!r}"))
        count = int(restarts) if restarts.isdecimal() else 0
        one = JobState(int(job_id), state, "" if reason == "None" else reason, count)
        rows.append(_Row(one, _named(who.strip()), where.strip(), _named(command.strip())))
    return Known(rows)


def _accounted(cluster: str, ids: Sequence[int], *flags: str) -> dict[int, _Row]:
    """Return sacct's rows by job id; {} where accounting is off or does not answer: nothing is
    decided on its silence.
    """
    if not ids and not flags:
        return {}
    chosen = [f"--jobs={','.join(map(str, ids))}"] if ids else []
    command = [
        "sacct",
        *_where(cluster),
        "--noheader",
        "--parsable2",
        "--allocations",
        *chosen,
        *flags,
    ]
    fields: tuple[str, ...] = ACCOUNTS
    asked = call(*command, f"--format={','.join(fields)}")
    if asked.code and "Invalid field" in asked.message:  # SubmitLine came with Slurm 21.08
        fields = ACCOUNTS[:-1]
        asked = call(*command, f"--format={','.join(fields)}")
    lines = (
        [line.split("|", len(fields) - 1) for line in asked.out.splitlines()]
        if asked.code == 0
        else []
    )
    whole = [
        [*line, "", "", ""]
        for line in lines
        if len(line) >= 3 and line[0].isdecimal() and line[1].strip()
    ]
    return {
        int(i): _Row(
            JobState(int(i), state.split()[0], "" if reason == "None" else reason),
            _named(who),
            where,
            _named(command),
        )
        for i, state, reason, who, where, command, *_ in whole
    }


def find(script: str, since: datetime, clusters: str) -> Known[list[Job]] | NotKnown:
    """Return this user's jobs of a script: those that squeue lists, and those that accounting has
    since a time.

    `clusters` names where sbatch was asked to submit (a,b), or is empty.  NotKnown where squeue
    does not answer, or not for which scripts jobs are.
    """
    asked = call(
        "squeue",
        *_where(clusters),
        "--noheader",
        f"--user={user() or os.geteuid()}",
        "--states=all",
        f"--Format={QUEUE}",
    )
    rows = _rows(asked)
    if isinstance(rows, NotKnown):
        return rows
    if asked.complained:
        return asked.why
    nameless = [row.state.job_id for row in rows.value if not row.command]
    if nameless:
        return NotKnown(f"squeue does not tell of which script job {nameless[0]} is")
    begun = since.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    ended = _accounted(clusters, [], f"--user={user() or os.geteuid()}", f"--starttime={begun}")
    of_script = [row for row in (*ended.values(), *rows.value) if row.names(script)]
    several = "," in clusters
    named = {
        row.state.job_id: Job(
            row.state.job_id, row.cluster if several else clusters, user(), script
        )
        for row in of_script
    }
    return Known([named[job_id] for job_id in sorted(named)])


def _where(cluster: str) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _by_cluster(jobs: Iterable[Job]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for job in jobs:
        found.setdefault(job.cluster, []).append(job.job_id)
    return found
