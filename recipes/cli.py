"""What every command shares: the argument parser, and the end of the process with one line and no
traceback.

A command's `main` returns its exit code.  `command` runs it for a user at a terminal, in a pipe or
on a full disk.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import NoReturn

from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT

# What a write to standard output may fail with, without the name of a file.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line on standard error and exit code 2; the usage is
    left to --help.
    """

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(EXIT_WRONG_INPUT, f"error: {one_line(message)}; see --help\n")


def command(main: Callable[[], int]) -> NoReturn:
    """Run a command's `main` and end the process with its exit code.

    Characters that the terminal's encoding lacks are printed as "?".  A reader that leaves (`|
    head`) ends the command in silence, as SIGPIPE would; output that cannot be written ends it with
    one line and code 2.
    """
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(_run(main))


def _run(main: Callable[[], int]) -> int | str | None:
    try:
        code = _code(main)
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        _drop_output(1, 2)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        _drop_output(1)
        return _refuse(
            f"the output cannot be written ({error.strerror}); make room, or send it elsewhere"
        )
    return code


def _code(main: Callable[[], int]) -> int | str | None:
    try:
        return main()
    except SystemExit as ended:  # of argparse, or of Rich where a reader has left
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        return ended.code


def _refuse(line: str) -> int:
    with suppress(OSError):
        print(f"error: {line}", file=sys.stderr)
    return EXIT_WRONG_INPUT


def _drop_output(*numbers: int) -> None:
    """Send what is still to be printed nowhere, so that the interpreter's end does not try
    again.
    """
    for number in numbers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _open_standard_streams() -> None:
    """Open /dev/null as each standard stream that was closed, or the next file that is opened would
    take its place.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
