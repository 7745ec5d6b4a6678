"""The project's commands, and what is right for them to do with a broken input.

Right is an exit code that the command documents, and for a refusal (2) one line that begins with
"error: ".  A traceback is never right, nor a warning of Python beside a refusal.

A command is its module's `main` inside `recipes.cli.command`, as `python -m` runs it.  `call` does
that in this process, which spares the imports.  `in_a_process` starts a process, and
`unlike_a_process` compares the two for a sample of the inputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.cli import command
from recipes.exit_codes import EXIT_WRONG_INPUT

PROJECT = Path(__file__).resolve().parents[2]
Main = Callable[[Sequence[str]], int]
REFUSED, DONE = "refused with one line", "answered, a bad run left out with the reason"
TRACEBACK = "Traceback (most recent call last)"
# What the interpreter shows by default (PEP 565) outside of __main__.
UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Ended:
    """How a command ended; `code` is None where it raised, and `trace` says what."""

    code: int | None
    out: str
    err: str
    trace: str = ""

    def wrong(self, codes: Sequence[int] = (0, 1, 3)) -> str | None:
        """Return what is wrong with this end in one line, None if nothing.

        `codes` are right beside that of a refusal.
        """
        if self.code is None:
            return f"traceback: {self.trace}"
        if self.code == EXIT_WRONG_INPUT:
            lines = self.err.splitlines()
            one = len(lines) == 1 and lines[0].startswith("error: ")
            return None if one else f"refused with {len(lines)} lines: {self.err[-300:]!r}"
        return None if self.code in codes else f"exit code {self.code}"


def call(main: Main, arguments: Sequence[object]) -> Ended:
    """Run a command in this process, as `python -m` would, and return how it ended."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _default_warnings():
        try:
            command(lambda: main(words))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = next((f for f in reversed(where) if _is_ours(f.filename)), where[-1])
            trace = f"{type(error).__name__}: {str(error)[:150]} at {ours.filename}:{ours.lineno}"
            return Ended(None, out.getvalue(), err.getvalue(), trace)
    return Ended(code, out.getvalue(), err.getvalue())


def _is_ours(file: str) -> bool:
    return "site-packages" not in file and "/lib/python" not in file


@contextlib.contextmanager
def _default_warnings() -> Iterator[None]:
    """Show the warnings that a process shows, on its standard error."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in UNSEEN:
            warnings.simplefilter("ignore", category)
        # PyTorch's first import warns of a package that lies beside it here, whatever the command.
        warnings.filterwarnings("ignore", "The pynvml package is deprecated")
        yield


def in_a_process(module: str, arguments: Sequence[object], cwd: Path = PROJECT) -> Ended:
    """Run `python -m MODULE …` and return how it ended."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    around = {**os.environ, "PYTHONPATH": f"{PROJECT}"}
    pipes = {"capture_output": True, "text": True, "errors": "replace"}
    done = subprocess.run(words, cwd=cwd, env=around, **pipes)
    raised = TRACEBACK in done.stderr
    trace = done.stderr.rstrip().rpartition("\n")[2] if raised else ""
    return Ended(None if raised else done.returncode, done.stdout, done.stderr, trace)


def unlike_a_process(main: Main, arguments: Sequence[object], ended: Ended) -> str | None:
    """Return how a process of the same command ends otherwise than `ended`; None where it does not.

    For commands that change nothing, or that make the same again.
    """
    other = in_a_process(main.__module__.removesuffix(".__main__"), arguments)
    for what in ("code", "err", "out"):
        here, there = (_as_printed(getattr(end, what)) for end in (ended, other))
        if here != there:
            return f"as a process, its {what} is {there[-200:]!r} for {here[-200:]!r}"
    return None


def _as_printed(value: object) -> str:
    return str(value).encode(errors="replace").decode()


def what_came_out(ended: Ended) -> str:
    """Return a right end in words, for the table."""
    return REFUSED if ended.code == EXIT_WRONG_INPUT else DONE
