"""The launcher of runs on this machine, killed or asked to end while one of them trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.__main__ import main as launch
from tests.faults.commands import PROJECT, call
from tests.faults.folders import recorded
from tests.faults.registry import Outcome, fault
from tests.faults.training.process import LIMIT_S
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    FP8,
    events,
    short,
    shown,
    step_of,
    unlike,
)

RANK, TORCHRUN = "recipes.training.run", "torch.distributed.run"
DEATHS = ("-9", "-9, and torchrun too", "SIGTERM", "SIGINT")


@fault(
    AREA,
    "the launcher of a run on this machine: kill -9, of torchrun too; SIGTERM, SIGINT",
    small=0,
    full=4,
    nemo=True,
)
def launcher_of_a_run_dies(count: int, folder: Path) -> Outcome:
    """Killed, it leaves a run that goes on and that a second launch does not touch; asked to end,
    it has the run save a checkpoint.
    """
    outcome = Outcome()
    for n in range(count):
        how, precision, run = DEATHS[n % len(DEATHS)], FP8[n % len(FP8)], folder / f"run{n}"
        processes = 2 if "torchrun" in how else 1
        command = short(run, precision, processes)
        launcher = _launch(command)
        _until(lambda run=run: step_of(run) >= 2)
        wrong = (
            _killed(launcher, run, command, with_torchrun=processes == 2)
            if "-9" in how
            else _asked(launcher, run, how)
        )
        if recorded(run) != "done":
            code = _launch(command).wait(LIMIT_S)
            wrong = wrong or (f"launched again: exit code {code}" if code else None)
        wrong = wrong or unlike(run, precision, processes)
        outcome.add(
            f"the run went on, or saved and left; {EQUAL}", lost=wrong and f"{how}: {wrong}"
        )
    return outcome


def _launch(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a launcher that SIGINT reaches, which is ignored in what a shell has put into the
    background.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        arguments = [sys.executable, "-m", "launch", *command]
        return subprocess.Popen(
            arguments,
            cwd=PROJECT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _until(condition: Callable[[], bool], timeout: float = LIMIT_S) -> bool:
    deadline = time.monotonic() + timeout
    while not (came := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return came


def processes_of(run: Path, module: str = RANK) -> list[int]:
    """Return the processes of a run: its ranks without what they have forked, or torchrun."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if str(run) in words and module in words and (module != RANK or TORCHRUN not in words):
            found[int(process.name)] = parent
    return [pid for pid, parent in found.items() if parent not in found]


def _killed(
    launcher: subprocess.Popen[bytes], run: Path, command: list[str], with_torchrun: bool
) -> str | None:
    ranks = processes_of(run)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # or it might be done before it is looked at
    try:
        launcher.kill()
        launcher.wait()
        if with_torchrun:
            for pid in processes_of(run, TORCHRUN):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        found, _ = shown(run)
        second = call(launch, command)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
    ended = _until(lambda: not processes_of(run))
    if not ranks or found != "running":
        return f"{len(ranks)} rank(s) found, and status shows {found}"
    if second.code != 2 or second.wrong():
        return f"a second launch: exit code {second.code}: {second.err[-200:]}"
    if not ended:
        return "its ranks live on"
    return None if with_torchrun or recorded(run) == "done" else f"the run was left {recorded(run)}"


def _asked(launcher: subprocess.Popen[bytes], run: Path, how: str) -> str | None:
    ranks = processes_of(run)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)  # or it might be done before the launcher has heard
    launcher.send_signal(getattr(signal, how))
    heard = _until((run / "stop").exists)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    if not heard:
        return "the launcher did not ask its run to stop"
    code = launcher.wait(LIMIT_S)
    if code != 130 or recorded(run) not in ("paused", "done") or processes_of(run):
        return (
            f"exit code {code}, the run is {recorded(run)}, {len(processes_of(run))} rank(s) left"
        )
    return None if events(run)[-1] in ("pause", "end") else f"events: {events(run)}"
