"""Runs on this machine: the scripts of their job folders, so many side by side as the plan and the
GPUs allow.

A run's output goes to log.txt in its folder.  Each run on GPUs has its own; interrupted, the
launcher asks its runs to save a checkpoint and waits for that; killed, it leaves them running, each
the only one that may write its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launch import gpus
from launch.gpus import Gpu, HeldGpu
from launch.state import cause, check_unwritten
from recipes.errors import InputError, one_line
from recipes.plan import Plan
from recipes.run_folder import SESSION, last_step, status_of

TORCHRUN_KILLS_S = 45  # it gives its processes 30 s after SIGTERM


@dataclass
class Job:
    """A run on this machine; `lock` is the file descriptor that reserves its folder, `process` is
    None until it is started.
    """

    plan: Plan
    folder: Path
    script: Path
    lock: int
    gpus: list[HeldGpu] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None


def run_all(jobs: Sequence[Job]) -> int:
    """Run the jobs, at most `executor.max_parallel` at once, each on GPUs of its own; return 0 if
    all are done, else 1.
    """
    waiting, running = list(jobs), list[Job]()
    limit = min(job.plan.executor.max_parallel for job in jobs)
    visible, told = _checked(jobs), False
    with _bars(jobs) as bars, _ended(running):
        while waiting or running:
            while waiting and len(running) < limit:
                held = gpus.take(visible, _needs(waiting[0]), waiting[0].folder) if visible else []
                if held is None:
                    break
                waiting[0].gpus = held
                running.append(_start(waiting.pop(0)))
            if visible and waiting and not running and not told:
                print(f"{waiting[0].folder} waits: {gpus.holders(visible)}", file=sys.stderr)
                told = True
            time.sleep(0.5)
            for job in running[:]:
                bars.show(job)
                if job.process and job.process.poll() is not None:
                    running.remove(job)
                    gpus.give_back(job.gpus)
                    bars.close(job)
    return 0 if all(status_of(job.folder) in ("done", "paused") for job in jobs) else 1


def _needs(job: Job) -> int:
    return 0 if job.plan.on_cpu else job.plan.num_gpus


def _checked(jobs: Sequence[Job]) -> list[Gpu] | None:
    """Return the GPUs that can be seen; InputError where a job wants more, or another process still
    writes its folder.
    """
    for job in jobs:
        check_unwritten(job.folder)
    free = gpus.visible() if any(map(_needs, jobs)) else None
    most = max(jobs, key=_needs)
    if free is not None and len(free) < _needs(most):
        raise InputError(
            f"{most.folder}: num_gpus={_needs(most)}, and {len(free)} GPU(s) can be seen here;"
            " lower num_gpus, or see CUDA_VISIBLE_DEVICES"
        )
    return free


def _start(job: Job) -> Job:
    """Start a job in a session of its own: an interrupt from the keyboard is for the launcher,
    which asks the runs to stop.
    """
    env = dict(os.environ)
    if job.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(held.gpu.name for held in job.gpus)
        env.setdefault(
            "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
        )  # nvidia-smi's order, by which the GPU was locked
    for held in job.gpus:
        if held.gpu.others:
            print(
                f"{job.folder}: {held.gpu.others} computes on GPU {held.gpu.name} too; step times"
                " will not be sound",
                file=sys.stderr,
            )
    with (job.folder / "log.txt").open("ab") as log:
        log.write(f"{SESSION}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            ["bash", str(job.script)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[job.lock, *(held.lock for held in job.gpus)],
            env=env,
            start_new_session=True,
        )
    return job


@contextmanager
def _ended(running: list[Job]) -> Iterator[None]:
    """Have what still runs save a checkpoint when the launcher is interrupted or terminated; a
    second interrupt kills it.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        alive = [job for job in running if job.process and job.process.poll() is None]
        try:
            _stop(alive)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for job in alive:
                _kill(job)
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _stop(alive: Sequence[Job]) -> None:
    if not alive:
        return
    print("stopping: the runs save a checkpoint; interrupt again to kill them", file=sys.stderr)
    for job in alive:
        (job.folder / "stop").touch()
    for job in alive:
        if job.process:
            job.process.wait(job.plan.executor.stop_before_limit_s)


def _kill(job: Job) -> None:
    """Kill a run; torchrun, whose ranks are in sessions of their own, takes half a minute to kill
    them.
    """
    if not job.process or job.process.poll() is not None:
        return
    os.killpg(job.process.pid, signal.SIGTERM if job.plan.num_gpus > 1 else signal.SIGKILL)
    try:
        job.process.wait(TORCHRUN_KILLS_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        os.killpg(job.process.pid, signal.SIGKILL)


class _Bars:
    """One progress bar a run: step, loss, tokens/s and time left, read from its run folder."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {
            str(j.folder): progress.add_task(
                j.plan.run_name, total=j.plan.train.max_steps, facts="waiting", start=False
            )
            for j in jobs
        }

    def show(self, job: Job) -> None:
        """Bring a run's bar up to date."""
        row, task = last_step(job.folder), self.tasks[str(job.folder)]
        if not row:
            self.progress.update(task, facts="starting")
            return
        self.progress.start_task(task)
        facts = f"loss {row['loss']:.3f}  {row['tokens_per_s_per_gpu']:,.0f} tokens/s"
        self.progress.update(task, completed=row["step"], facts=facts)

    def close(self, job: Job) -> None:
        """Leave the run's last word in its bar, and say where to look where it failed."""
        self.show(job)
        status = status_of(job.folder)
        if status not in ("done", "paused"):
            said = one_line(
                f"{job.plan.run_name}: {status}: {cause(job.folder)}; see {job.folder / 'log.txt'}"
            )
            self.progress.console.print(said, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(jobs: Sequence[Job]) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[facts]}"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=2
    ) as progress:
        yield _Bars(progress, jobs)
