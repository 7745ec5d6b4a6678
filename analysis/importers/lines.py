"""Text as it comes out of a cluster: compressed, in any encoding, with colours, progress bars and rank labels.

Nothing in a log is trusted to be text: bytes that are none become U+FFFD, escape sequences are dropped, and a carriage
return ends a line as a line feed does.
"""

from __future__ import annotations

import codecs
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from recipes.errors import InputError

BLOCK = 1 << 18  # characters read at a time
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# srun --label "0: ", nemo-run "name/0 ", torchrun "[default0]:", Slurm tools "[host:3]:"
RANK = re.compile(r"^\s*(\d{1,6}): |/(\d{1,6})\s|\[(?:default|rank|[\w.-]{1,64}:)(\d{1,6})\]:?")
Rank = tuple[int, ...]


def blocks_of(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks of whole lines; the last one lacks its line feed where the file does."""
    try:
        with path.open("rb") as file:
            head = file.peek(4)[:4]
            raw = gzip.GzipFile(fileobj=file) if head[:2] == b"\x1f\x8b" else file
            text = io.TextIOWrapper(io.BufferedReader(raw), encoding=_encoding(head), errors="replace")
            while block := text.read(BLOCK):
                block += text.readline()
                yield ANSI.sub("", block) if "\x1b" in block else block
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path} is compressed and damaged; its end cannot be read; copy it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a log file that is there") from None


def _encoding(head: bytes) -> str:
    """UTF-16 has no ASCII in it, so it is told by its byte order mark; everything else is read as UTF-8."""
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def rank_of(prefix: str) -> Rank:
    """Return the numbers of the process that printed a line, from what stands before it; () without a label."""
    return tuple(int(a or b or c) for a, b, c in RANK.findall(prefix))


def significant(text: str) -> int:
    """Return how many significant digits a printed number has."""
    mantissa = re.split("[eE]", text)[0].lstrip("+-").replace(".", "").lstrip("0")
    return len(mantissa) if math.isfinite(float(text)) else 0
