"""Runs on this machine: the scripts of their job folders, so many side by side as the plan allows.

A run's output goes to log.txt in its folder.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launch.status import cause
from recipes.plan import Plan
from recipes.run_folder import last_step, status_of


@dataclass
class Job:
    """A run on this machine; `lock` is the file descriptor that reserves its folder, `process` is None until it is started."""

    plan: Plan
    folder: Path
    script: Path
    lock: int
    process: subprocess.Popen[bytes] | None = None


def run_all(jobs: Sequence[Job]) -> int:
    """Run the jobs, at most `executor.max_parallel` at once; return 0 if all are done, else 1."""
    waiting, running = list(jobs), list[Job]()
    limit = min(job.plan.executor.max_parallel for job in jobs)
    with _bars(jobs) as bars, _ended(running):
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(_start(waiting.pop(0)))
            time.sleep(0.5)
            for job in running[:]:
                bars.show(job)
                if job.process and job.process.poll() is not None:
                    running.remove(job)
                    bars.close(job)
    return 0 if all(status_of(job.folder) in ("done", "paused") for job in jobs) else 1


def _start(job: Job) -> Job:
    command = ["bash", str(job.script)]
    with (job.folder / "log.txt").open("ab") as log:
        job.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, pass_fds=[job.lock])
    return job


@contextmanager
def _ended(running: list[Job]) -> Iterator[None]:
    """End what still runs when the launcher is interrupted; the next launch continues from the last checkpoint."""
    try:
        yield
    finally:
        for job in running:
            if job.process and job.process.poll() is None:
                job.process.terminate()
                try:
                    job.process.wait(10)
                except subprocess.TimeoutExpired:
                    job.process.kill()


class _Bars:
    """One progress bar a run: step, loss, tokens/s and time left, read from its run folder."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {
            str(j.folder): progress.add_task(j.plan.run_name, total=j.plan.train.max_steps, facts="waiting", start=False) for j in jobs
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
            said = f"{job.plan.run_name}: {status}: {cause(job.folder)}; see {job.folder / 'log.txt'}"
            self.progress.console.print(said, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(jobs: Sequence[Job]) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[facts]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=2) as progress:
        yield _Bars(progress, jobs)
