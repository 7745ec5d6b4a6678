"""Which code runs: the commit of this project, or None where none is known.

A copy of this project may lie inside a checkout of another one, and variables of git may point to
another one.  Their commit says nothing about this code, so a commit is named only where git tracks
a file of this project in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from recipes.errors import InputError
from recipes.files import read_text

PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("recipes", "launch", "conf")  # what a job runs
TIMEOUT_S = 30


def code() -> dict[str, Any]:
    """Return the commit that this code is at, and whether files of PARTS differ from it; None where
    that is not known.

    A job runs a copy of the code, in which `code.json` holds what was known when it was made.
    """
    copied = PROJECT / "code.json"
    if copied.exists():
        return _copied(copied)
    commit = git("rev-parse", "HEAD") if is_tracked() else None
    changes = git("status", "--porcelain", "--", *PARTS) if commit else None
    return {
        "commit": commit and commit.strip(),
        "dirty": None if changes is None else bool(changes.strip()),
    }


def _copied(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
        return {"commit": found["commit"], "dirty": found["dirty"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} was changed or cut: the commit of this copy is not known; launch again"
        ) from None


def sources_sha256() -> str:
    """Return the SHA-256 over names and contents of what trains (recipes/**/*.py), committed or
    not, in a checkout or a copy.
    """
    digest = hashlib.sha256()
    for path in sorted((PROJECT / "recipes").rglob("*.py")):
        digest.update(f"{path.relative_to(PROJECT).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_tracked() -> bool:
    """Return whether this project's files are tracked by the checkout that they lie in."""
    return git("ls-files", "--error-unmatch", "--", "recipes/plan.py") is not None


def git(*args: str) -> str | None:
    """Return what git prints about the project's folder, whatever GIT_DIR and its like name; None
    where it fails.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("GIT_") or key == "GIT_CEILING_DIRECTORIES"
    }
    command = ["git", "-C", str(PROJECT), *args]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
