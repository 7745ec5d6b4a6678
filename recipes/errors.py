"""The one exception for what a user can mend: it carries a line that says what, why, and what to do instead."""


class InputError(Exception):
    """A wrong input or an illegal cell.  Commands print its text on one line and exit with code 2."""


def one_line(text: str) -> str:
    """Return `text` with every run of white space, newlines included, folded to one blank."""
    return " ".join(text.split())
