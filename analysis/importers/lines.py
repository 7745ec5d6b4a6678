"""Text as it comes out of a cluster: compressed, in any encoding, with colours, progress bars and
rank labels.

Nothing in a log is trusted to be text: bytes that are none become U+FFFD, escape sequences are
dropped, and a carriage return ends a line as a line feed does.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import math
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from recipes.errors import InputError

BLOCK = 1 << 18  # characters read at a time
LONGEST = 1 << 20  # characters of a line
WINDOW = 1 << 27  # bytes that Zstandard may look back, its own limit without --long
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# srun --label "0: ", nemo-run "name/0 ", torchrun "[default0]:", Slurm tools "[host:3]:"
RANK = re.compile(r"^\s*(\d{1,6}): |/(\d{1,6})\s|\[(?:default|rank|[\w.-]{1,64}:)(\d{1,6})\]:?")
Rank = tuple[int, ...]


def opened(path: Path) -> IO[bytes]:
    """Return a file's bytes, unpacked where it is compressed (gzip, bzip2, xz, and Zstandard with
    its package).
    """
    file = path.open("rb")
    head = file.peek(6)[:6]
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith(b"\xfd7zXZ"):
        return cast(IO[bytes], lzma.LZMAFile(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstandard(file, path)
    return file


def _zstandard(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        package = importlib.import_module("zstandard")
    except ImportError:
        remedy = "pip install zstandard, or unpack it first (zstd -d)"
        raise InputError(
            f"{path} is compressed with Zstandard, whose package is not installed; {remedy}"
        ) from None
    unpacked = package.ZstdDecompressor(max_window_size=WINDOW).stream_reader(
        file, read_across_frames=True, closefd=True
    )
    return cast(IO[bytes], unpacked)


def damages() -> tuple[type[Exception], ...]:
    """Return the errors of compressed files that are damaged."""
    package = sys.modules.get("zstandard")
    return (
        EOFError,
        gzip.BadGzipFile,
        zlib.error,
        lzma.LZMAError,
        *([package.ZstdError] if package else []),
    )


def blocks_of(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks of whole lines; the last one lacks its line feed where the
    file does.

    A line that is longer than LONGEST is left out: no training line is, and it must not fill the
    memory.
    """
    try:
        with opened(path) as raw:
            buffered = io.BufferedReader(cast(io.RawIOBase, raw))
            text = io.TextIOWrapper(
                buffered, encoding=_encoding(buffered.peek(4)[:4]), errors="replace"
            )
            for block in _whole_lines(text):
                yield ANSI.sub("", block) if "\x1b" in block else block
    except damages():
        raise InputError(
            f"{path} is compressed and damaged; its end cannot be read; copy it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); name a log file that is there"
        ) from None


def _whole_lines(text: io.TextIOWrapper) -> Iterator[str]:
    kept, too_long = "", False
    while block := text.read(BLOCK):
        lines, feed, rest = block.rpartition("\n")
        if feed and too_long:
            lines = lines.partition("\n")[2]
            kept = ""
        if feed:
            yield f"{kept}{lines}\n"
            kept, too_long = rest, False
        elif not too_long:
            kept += rest
        if len(kept) > LONGEST:
            kept, too_long = "", True
    if kept:
        yield kept


def _encoding(head: bytes) -> str:
    """UTF-16 has no ASCII in it, so it is told by its byte order mark; everything else is read as
    UTF-8.
    """
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def rank_of(prefix: str) -> Rank:
    """Return the numbers of the process that printed a line, from what stands before it; () without
    a label.
    """
    return tuple(int(a or b or c) for a, b, c in RANK.findall(prefix))


def significant(text: str) -> int:
    """Return how many significant digits a printed number has."""
    mantissa = re.split("[eE]", text)[0].lstrip("+-").replace(".", "").lstrip("0")
    return len(mantissa) if math.isfinite(float(text)) else 0
