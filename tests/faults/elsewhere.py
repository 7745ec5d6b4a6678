"""The project in another folder, with a site's own files, and a process there that runs `launch`.

`python -m tests.faults.elsewhere` reads a JSON list of arguments from each line of its input, runs
`launch` with them and prints how it ended as one line of JSON.  The imports are paid once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from launch.__main__ import main
from tests.faults.commands import PROJECT, Ended, call

PARTS = ("recipes", "launch", "conf")


class Elsewhere:
    """A copy of the project, and a process that runs its launch."""

    def __init__(self, root: Path, process: subprocess.Popen[str]) -> None:
        self.root, self._process = root, process

    def launch(self, arguments: Sequence[object]) -> Ended:
        """Run `python -m launch` in the copy."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


@contextmanager
def elsewhere(root: Path, env: Mapping[str, str] | None = None) -> Iterator[Elsewhere]:
    """Copy the project to `root`, without this site's files, and run a process there."""
    left_out = shutil.ignore_patterns("__pycache__", "site.yaml", "training")
    for part in PARTS:
        shutil.copytree(PROJECT / part, root / part, ignore=left_out)
    (root / "conf" / "local").mkdir(exist_ok=True)
    around = {**os.environ, **(env or {}), "PYTHONPATH": f"{root}:{PROJECT}", "PYTHONSAFEPATH": "1"}
    around["GIT_CEILING_DIRECTORIES"] = str(root.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.elsewhere"],
        cwd=root,
        env=around,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Elsewhere(root, process)
        finally:
            process.communicate()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asdict(call(main, json.loads(line)))), flush=True)
