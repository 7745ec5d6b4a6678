"""The job folder: what a run needs to start, as it was when it was launched.

    RUN/job/job.sbatch, local.sh  the script, to be read and to be run by hand
    RUN/job/code/                 a copy of this project: edits after the launch do not reach a job
                                  that waits
    RUN/job/code/code.json        its commit; changes.diff: what differed from it
    RUN/job/submitted.jsonl       a line for each submission: time, Slurm job id, commit
    RUN/job/lock                  locked while a launch writes here, and as long as a run on this
                                  machine lives

The folder, and what is written into it, is readable by its owner alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.script import job_folder, render
from recipes.code import PARTS, PROJECT, code, git, is_tracked
from recipes.compose.secrets import SECRET_FILES, holds_secret, is_secret_file
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import open_folder, write_json

SUFFIXES = {".py", ".yaml", ".csv", ".j2"}
SITE = "conf/local/"  # what a site sets is in the plan; its files stay where they are
NO_DIFF = (f":(exclude){SITE}", *(f":(exclude,glob)**/{pattern}" for pattern in SECRET_FILES))
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def script_path(plan: Plan) -> Path:
    """Return the path of the plan's job script."""
    return job_folder(plan) / ("job.sbatch" if plan.executor.kind == "slurm" else "local.sh")


@contextmanager
def private() -> Iterator[None]:
    """Let what is written meanwhile, by this process and by those that it starts, be readable by
    its owner alone.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def reserved(folder: Path, patience_s: float) -> Iterator[int]:
    """Keep other launches away from a run folder, and other people from what is written into it.

    Yields the lock's file descriptor, which a child process may go on holding.

    InputError where the folder cannot be written, or where another launch has it for longer than
    `patience_s`.
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
            raise InputError(
                f"{job.parent}: another launch runs it on this machine; wait for it, or choose"
                " another run_name"
            )
        time.sleep(0.2)
    return file


def _taken(file: int) -> bool:
    """Take the lock; True on a file system without locks as well, which is no reason not to
    train.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def is_held(folder: Path) -> bool | None:
    """Return whether a launch or a run on this machine holds a run folder; None where none ever
    did.
    """
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

    The script is written last and at once.  InputError where the folder holds another plan or
    cannot be written.
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
    return InputError(
        f"{job} cannot be written ({error.strerror}); choose another runs_dir or make room"
    )


def snapshot(target: Path) -> None:
    """Copy the project's code to `target` with its commit and its changes; the old copy is replaced
    at the end.
    """
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    for name in _files():
        text = (PROJECT / name).read_bytes()
        if holds_secret(text.decode(errors="replace")):
            raise InputError(
                f"{name} has what looks like a secret in it, and a job folder holds a copy; name a"
                " file for it in cluster.token_files"
            )
        copy = work / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(text)
    write_json(work / "code.json", code())
    changes = git("diff", "HEAD", "--", *PARTS, *NO_DIFF) if is_tracked() else None
    (work / "changes.diff").write_text(
        "left out: it has what looks like a secret in it\n"
        if holds_secret(changes or "")
        else changes or ""
    )
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)


def _files() -> Iterator[str]:
    """Yield the project's files: those that git tracks, and new ones that look like ours; outside a
    checkout all that do.

    Never the files of a site, files that hold secrets by their name, or links that lead out of the
    project.
    """
    tracked = _listed("--cached") if is_tracked() else []
    new = _listed("--others", "--exclude-standard") if tracked else _found()
    for name in sorted({*tracked, *(name for name in new if Path(name).suffix in SUFFIXES)}):
        file = PROJECT / name
        if (
            file.is_file()
            and file.resolve().is_relative_to(PROJECT)
            and not name.startswith(SITE)
            and not is_secret_file(file.name)
        ):
            yield name


def _listed(*which: str) -> list[str]:
    return [
        name for name in (git("ls-files", "-z", *which, "--", *PARTS) or "").split("\0") if name
    ]


def _found() -> list[str]:
    return [
        str(path.relative_to(PROJECT)) for part in PARTS for path in (PROJECT / part).rglob("*")
    ]
