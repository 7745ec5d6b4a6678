"""The job folder: what a run needs to start, as it was when it was launched.

    RUN/job/job.sbatch, local.sh   the script, to be read and to be run by hand
    RUN/job/code/                  a copy of this project: edits after the launch do not reach a job that waits
    RUN/job/code/code.json         its commit; changes.diff: what differed from it
    RUN/job/submitted.jsonl        a line for each submission: time, Slurm job id, commit
    RUN/job/lock                   locked while a launch writes here, and as long as a run on this machine lives

The folder, and what is written into it, is readable by its owner alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.script import job_folder, render
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import open_folder, write_json
from recipes.secret_values import has_secret

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("recipes", "launch", "conf")
SUFFIXES = {".py", ".yaml", ".csv", ".j2"}
SITE = "conf/local/"  # what a site sets is in the plan; its files stay where they are
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def script_path(plan: Plan) -> Path:
    """Return the path of the plan's job script."""
    return job_folder(plan) / ("job.sbatch" if plan.executor.kind == "slurm" else "local.sh")


@contextmanager
def private() -> Iterator[None]:
    """Let what is written meanwhile, by this process and by those that it starts, be readable by its owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def reserved(folder: Path, patience_s: float) -> Iterator[int]:
    """Keep other launches away from a run folder, and other people from what is written into it.

    Yields the lock's file descriptor, which a child process may go on holding.

    InputError where the folder cannot be written, or where another launch has it for longer than `patience_s`.
    """
    with private():
        file = _lock(folder / "job", patience_s)
        try:
            yield file
        finally:
            os.close(file)


def _lock(job: Path, patience_s: float) -> int:
    try:
        job.mkdir(parents=True, exist_ok=True)
        file = os.open(job / "lock", os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise _unwritable(job, error) from None
    deadline = time.monotonic() + patience_s
    while not _taken(file):
        if time.monotonic() > deadline:
            os.close(file)
            raise InputError(f"{job.parent}: another launch runs it on this machine; wait for it, or choose another run_name")
        time.sleep(0.2)
    return file


def _taken(file: int) -> bool:
    """Take the lock; True on a file system without locks as well, which is no reason not to train."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def is_held(folder: Path) -> bool | None:
    """Return whether a launch or a run on this machine holds a run folder; None where none ever did."""
    try:
        with (folder / "job" / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def write_job(plan: Plan) -> Path:
    """Write the plan's run folder with its job folder; return the script's path.

    The script is written last and at once.  InputError where the folder holds another plan or cannot be written.
    """
    job, script = job_folder(plan), script_path(plan)
    try:
        with private():
            open_folder(plan).chmod(0o700)
            job.mkdir(exist_ok=True)
            job.chmod(0o700)
            snapshot(job / "code")
            part = script.with_name(script.name + ".part")
            part.write_text(render(plan))
            part.chmod(0o700)
            part.replace(script)
    except OSError as error:
        raise _unwritable(job, error) from None
    return script


def _unwritable(job: Path, error: OSError) -> InputError:
    return InputError(f"{job} cannot be written ({error.strerror}); choose another runs_dir or make room")


def snapshot(target: Path) -> None:
    """Copy the project's code to `target` with its commit and its changes; the old copy is replaced at the end."""
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    for name in _files():
        if name.startswith("conf/") and has_secret((PROJECT / name).read_text(encoding="utf-8", errors="replace")):
            raise InputError(f"{name} has what looks like a secret in it, and a job folder holds a copy; name a file for it in cluster.token_files")
        copy = work / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, copy)
    write_json(work / "code.json", code())
    changes = _git("diff", "HEAD", "--", *PARTS) or ""
    (work / "changes.diff").write_text("left out: it has what looks like a secret in it\n" if has_secret(changes) else changes)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)


def code() -> dict[str, Any]:
    """Return the commit of the code that is launched, and whether files differ from it; None outside a git checkout."""
    if (PROJECT / "code.json").exists():
        return dict(json.loads((PROJECT / "code.json").read_text()))
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *PARTS)
    return {"commit": commit and commit.strip(), "dirty": None if changes is None else bool(changes.strip())}


def _files() -> Iterator[str]:
    """Yield the project's files: those that git tracks or would, or outside a checkout those that look like ours."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        names = [name for name in listed.split("\0") if name and (PROJECT / name).is_file()]
    else:
        names = [str(p.relative_to(PROJECT)) for part in PARTS for p in sorted((PROJECT / part).rglob("*")) if p.suffix in SUFFIXES]
    yield from (name for name in names if not name.startswith(SITE))


def _git(*args: str) -> str | None:
    try:
        command = ["git", "-C", str(PROJECT), *args]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
