"""Exit codes of the commands."""

EXIT_WRONG_INPUT = 2
