"""Download the sources of stacks.yaml: commits by git, packages as wheels; keep source files alone.

PyTorch comes as its wheel for macOS.  That has the same Python files and stubs as the one for
Linux, in a tenth of the size, since it lacks CUDA's libraries.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from recipes.errors import InputError, one_line
from tests.contract.index import read

PLATFORMS = ("any", "macosx_11_0_arm64", "macosx_14_0_arm64")
KEPT = (".py", ".pyi", ".cpp", ".h")


def fetch(folder: Path) -> None:
    """Fill `folder` with the sources that it lacks; InputError where one cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in read("stacks.yaml")["sources"].items():
        if not (folder / name).is_dir():
            print(name, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                kept = Path(scratch) / "kept"
                kept.mkdir()
                (_from_git if "git" in source else _from_wheel)(source, Path(scratch), kept)
                kept.rename(folder / name)


def _from_git(source: dict[str, Any], scratch: Path, kept: Path) -> None:
    repository = ["git", "-C", str(scratch)]
    _run(["git", "init", "-q", "--bare", str(scratch)])
    _run([*repository, "fetch", "-q", "--depth=1", source["git"], source["commit"]])
    _run(
        [
            *repository,
            "archive",
            "-o",
            str(scratch / "all.tar"),
            "FETCH_HEAD",
            "--",
            source["packages"][0],
        ]
    )
    with tarfile.open(scratch / "all.tar") as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(KEPT)]
        archive.extractall(kept, members, filter="data")


def _from_wheel(source: dict[str, Any], scratch: Path, kept: Path) -> None:
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=312",
    ]
    _run([*download, *platforms, "-d", str(scratch), source["wheel"]])
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(kept, [name for name in archive.namelist() if name.endswith(KEPT)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"`{' '.join(command)}` failed: {one_line(done.stderr)[-300:]}")
