"""The one exception for a wrong input: it carries a line that says what, why, and what to do
instead.
"""


class InputError(Exception):
    """A wrong input or an illegal cell.

    Commands print its text, which is one line whatever stands in it, and exit with code 2.
    """

    def __str__(self) -> str:
        """Return the line."""
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Return `text` with every run of white space folded to one blank, and what no terminal should
    be sent as U+FFFD.

    That is control characters, marks that turn the direction of text, and halves of surrogate
    pairs, which no encoding has.
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
