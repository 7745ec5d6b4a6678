"""Two nodes of two processes, as a real Slurm runs them: ranks that are killed, and the warning
before a time limit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from launch.__main__ import main as launch
from tests.faults.commands import call
from tests.faults.folders import jobs
from tests.faults.load import SLURM
from tests.faults.registry import Outcome, Unavailable, fault
from tests.faults.training.launcher import processes_of
from tests.faults.training.process import LIMIT_S
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    STEPS,
    events,
    precision_of,
    short,
    shown,
    step_of,
    unlike,
)
from tests.launch.slurm import install
from tests.launch.slurm.cluster import Slurm

SITE = [
    "cluster.account=research",
    "cluster.partition=batch",
    f"cluster.python={sys.executable}",
    "gpu.devices_per_node=2",
]
SITE += ["executor.time_limit='10'", "executor.stop_before_limit_s=60"]
ENDS = ("kill -9 of a rank", "USR1", "kill -9 of all ranks")


@fault(
    AREA,
    "2 x 2 processes on a real Slurm: kill -9 of a rank or of all, launched again; the warning"
    " before a time limit, queued again by the job",
    small=0,
    full=3,
    nemo=True,
    slurm=True,
)
def ranks_on_slurm(count: int, folder: Path) -> Outcome:
    """The numbers are those of four processes on this machine that nothing interrupts."""
    if reason := install.missing():
        raise Unavailable(reason)
    outcome = Outcome()
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as root,
        Slurm(Path(root) / "slurm") as slurm,
        _seen(slurm),
    ):  # Unix sockets want short paths
        for n in range(count):
            how, precision, run = ENDS[n % len(ENDS)], precision_of(n), folder / f"run{n}"
            wrong = _broken_and_continued(
                slurm, run, how, [*short(run, precision, 4), *SLURM, *SITE], random.Random(n)
            )
            outcome.add(
                EQUAL, lost=(wrong := wrong or unlike(run, precision, 4)) and f"{how}: {wrong}"
            )
    return outcome


def _seen(slurm: Slurm) -> Any:
    """The launch commands see the cluster."""
    return mock.patch.dict(os.environ, {name: slurm.env[name] for name in ("SLURM_CONF", "PATH")})


def _broken_and_continued(
    slurm: Slurm, run: Path, how: str, command: list[str], draw: random.Random
) -> str | None:
    if wrong := call(launch, command).wrong((0,)) or _trained_until(
        slurm, run, draw.randint(1, STEPS - 4)
    ):
        return wrong
    return (
        _warned(slurm, run)
        if how == "USR1"
        else _killed(slurm, run, command, draw, everyone="all" in how)
    )


def _job(run: Path) -> str:
    return str(jobs(run)[-1])


def _trained_until(slurm: Slurm, run: Path, step: int) -> str | None:
    deadline = time.monotonic() + LIMIT_S
    while step_of(run) < step:
        if time.monotonic() > deadline:
            return f"no step {step} in time; job {slurm.state(_job(run))}"
        time.sleep(0.02)
    return None


def _killed(
    slurm: Slurm, run: Path, command: list[str], draw: random.Random, everyone: bool
) -> str | None:
    ranks = processes_of(run)
    for pid in ranks if everyone else [draw.choice(ranks)]:
        os.kill(pid, signal.SIGKILL)
    slurm.wait(_job(run), "FAILED", timeout=LIMIT_S)
    found, why = shown(run)
    if len(ranks) != 4 or found != "failed" or not why or processes_of(run):
        left = len(processes_of(run))
        return f"{len(ranks)} ranks found; status shows {found} ({why}); {left} rank(s) left"
    if wrong := call(launch, command).wrong((0,)):
        return f"launched again: {wrong}"
    slurm.wait(_job(run), "COMPLETED", timeout=LIMIT_S)
    return None if len(jobs(run)) == 2 else f"{len(jobs(run))} jobs"


def _warned(slurm: Slurm, run: Path) -> str | None:
    slurm.run("scancel", "--batch", "--signal=USR1", _job(run))
    slurm.wait(_job(run), "COMPLETED", timeout=LIMIT_S)
    right = ["submitted", "start", "pause", "resume", "end"]
    return None if events(run) == right else f"events: {events(run)}"
