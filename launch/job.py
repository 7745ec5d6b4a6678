"""The job folder: what a run needs to start, as it was when it was launched.

    RUN/job/job.sbatch, local.sh   the script, to be read and to be run by hand
    RUN/job/code/                  a copy of this project: edits after the launch do not reach a job that waits
    RUN/job/code/code.json         its commit; changes.diff: what differed from it
    RUN/job/submitted.jsonl        a line for each submission: time, Slurm job id, commit

The folder is readable by its owner alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.script import job_folder, render
from recipes.plan import Plan
from recipes.run_folder import open_folder, write_json

PROJECT = Path(__file__).resolve().parent.parent
PARTS = ("recipes", "launch", "conf")
SUFFIXES = {".py", ".yaml", ".csv", ".j2"}


def script_path(plan: Plan) -> Path:
    """Return the path of the plan's job script."""
    return job_folder(plan) / ("job.sbatch" if plan.executor.kind == "slurm" else "local.sh")


def write_job(plan: Plan) -> Path:
    """Write the plan's run folder with its job folder; return the script's path.  InputError where it holds another plan."""
    folder = open_folder(plan)
    folder.chmod(0o700)
    job = job_folder(plan)
    job.mkdir(exist_ok=True)
    job.chmod(0o700)
    snapshot(job / "code")
    script = script_path(plan)
    script.write_text(render(plan))
    script.chmod(0o700)
    return script


def snapshot(target: Path) -> None:
    """Copy the project's code to `target` with its commit and its changes; the old copy is replaced at the end."""
    work = target.with_name(target.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    for name in _files():
        copy = work / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, copy)
    write_json(work / "code.json", code())
    (work / "changes.diff").write_text(_git("diff", "HEAD", "--", *PARTS) or "")
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
        yield from (name for name in listed.split("\0") if name and (PROJECT / name).is_file())
        return
    for part in PARTS:
        yield from (str(p.relative_to(PROJECT)) for p in sorted((PROJECT / part).rglob("*")) if p.suffix in SUFFIXES)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *args], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
