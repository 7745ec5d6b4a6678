"""Training steps that are printed on several lines, put on one, so that one pattern reads each
(dialects.py).

- OLMo-core and Composer print a step's head, `[step=10/100,epoch=1]` or `[batch=10/100]:`, and
  below it a value a line, indented.
- Hugging Face's Trainer prints a dictionary that lacks its step, which the progress bar before it
  shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

HEADS = ("[step=", "[batch=")
LABEL = r"(?:\d{1,6}: |\[[\w.:-]{1,70}\]:)?"  # of a rank
HEAD = r"[^\n]{0,300}\[(?:step|batch)=\d{1,15}/\d{1,15}[^\]\n]{0,100}\]:?"
VALUE = rf"{LABEL}[ \t]{{2,8}}[^\n|=:]{{1,200}}[=:][^\n|]{{0,200}}\n"
GROUP = re.compile(rf"^({HEAD})[ \t]*\n((?:{VALUE}){{1,500}})", re.MULTILINE)
INDENT = re.compile(rf"^{LABEL}[ \t]+", re.MULTILINE)
DICTIONARY = "{'loss'"
STEP_AND_DICTIONARY = re.compile(
    r"(?P<step>\d{1,15}/\d{1,15}) \[[^\]\n]{0,80}\]\s{0,400}\{(?P<fields>'loss': [^{}\n]{1,2000}\})"
)
BAR = re.compile(r"\d{1,15}/\d{1,15} \[")
MOST_KEPT = 1 << 16  # characters of a step, or of what stands between a bar and its dictionary


def on_one_line(blocks: Iterable[str]) -> Iterator[str]:
    """Yield blocks of whole lines in which each step of these forms stands on one line; all else is
    as it was.
    """
    kept = ""
    for block in blocks:
        text = kept + block
        start = _open(text) if text.endswith("\n") else len(text)
        kept = text[start:]
        if start:
            yield _joined(text[:start])
    if kept:
        yield _joined(kept)


def _open(text: str) -> int:
    """Return where a step begins whose values may go on in the next block; the length of the text
    where none does.
    """
    near = text[-MOST_KEPT:]
    place = max(near.rfind(head) for head in HEADS)
    bars = [found.start() for found in BAR.finditer(near, max(0, len(near) - 1000))]
    place = max(place, *bars[-1:], -1)
    if place < 0:
        return len(text)
    return len(text) - len(near) + near.rfind("\n", 0, place) + 1


def _joined(text: str) -> str:
    if (
        "[" in text and "=" in text and any(head in text for head in HEADS)
    ):  # single characters are found faster
        text = GROUP.sub(lambda found: f"{found[1]} | {_fields(found[2])}\n", text)
    if "{" in text and DICTIONARY in text:
        text = STEP_AND_DICTIONARY.sub(
            lambda found: (
                f"\nTrainer step {found['step']}, {found['fields'].replace(chr(39), '')}\n"
            ),
            text,
        )
    return text


def _fields(lines: str) -> str:
    return INDENT.sub("", lines).rstrip("\n").replace("\n", " | ")
