"""The argument parser of every command: what is wrong with a command line is said in one line, as every other wrong input is."""

from __future__ import annotations

import argparse
from typing import NoReturn

from recipes.errors import one_line
from recipes.exit_codes import EXIT_WRONG_INPUT


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line on standard error and exit code 2; the usage is left to --help."""

    def error(self, message: str) -> NoReturn:
        """End the command."""
        self.exit(EXIT_WRONG_INPUT, f"error: {one_line(message)}; see --help\n")
