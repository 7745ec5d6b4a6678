"""The project's commands, run in this process, and what is right for them to do with a broken input.

Right is an exit code that the command documents, and for a refusal (2) one line that begins with "error: ".  A traceback is
never right, whatever the input.
"""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recipes.exit_codes import EXIT_WRONG_INPUT

Main = Callable[[Sequence[str]], int]
REFUSED, DONE = "refused with one line", "answered, a bad run left out with the reason"


@dataclass(frozen=True)
class Ended:
    """How a command ended; `code` is None where it raised, and `trace` says what."""

    code: int | None
    out: str
    err: str
    trace: str = ""

    def wrong(self, codes: Sequence[int] = (0, 1, 3)) -> str | None:
        """Return what is wrong with this end in one line, None if nothing; `codes` are right beside that of a refusal."""
        if self.code is None:
            return f"traceback: {self.trace}"
        if self.code == EXIT_WRONG_INPUT:
            lines = self.err.splitlines()
            one = len(lines) == 1 and lines[0].startswith("error: ")
            return None if one else f"refused with {len(lines)} lines: {self.err[-300:]!r}"
        return None if self.code in codes else f"exit code {self.code}"


def call(main: Main, arguments: Sequence[object]) -> Ended:
    """Run a command's `main` and return how it ended; warnings are errors of the command too, as its user would see them."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True):
        try:
            code: int | None = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            code = ended.code if isinstance(ended.code, int) else EXIT_WRONG_INPUT
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = next((f for f in reversed(where) if "site-packages" not in f.filename and "/lib/python" not in f.filename), where[-1])
            return Ended(None, out.getvalue(), err.getvalue(), f"{type(error).__name__}: {str(error)[:150]} at {ours.filename}:{ours.lineno}")
    return Ended(code, out.getvalue(), err.getvalue())


def what_came_out(ended: Ended) -> str:
    """Return a right end in words, for the table."""
    return REFUSED if ended.code == EXIT_WRONG_INPUT else DONE
