"""Text as it lies on disk: files -> documents, and which of them are held out.

A file is a document, of JSONL a line.  Few files may leave one split without any: then blank lines
part a file into documents.

The default corpus is the text that every machine with Python has: the sources of its standard
library.  A document's split is decided by a hash of its name, relative to the source it came from,
so it depends neither on the order of the files nor on the machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import InputError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
HELD_OUT_ONE_IN = 10
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Document:
    """A piece of text and the split that it belongs to."""

    split: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file and its name relative to the source that it came from."""

    path: Path
    name: str


def source_files(sources: tuple[str, ...]) -> list[SourceFile]:
    """Return the files of `sources` (files, or folders searched for text), sorted; InputError where
    one is missing.
    """
    if not sources:
        library = Path(sysconfig.get_paths()["stdlib"])
        paths = [
            p
            for p in library.rglob("*.py")
            if not {"site-packages", "dist-packages", "test"} & set(p.parts)
        ]
        return [SourceFile(p, str(p.relative_to(library))) for p in sorted(paths)]
    return [file for source in sources for file in _files_under(Path(source))]


def _files_under(source: Path) -> list[SourceFile]:
    if not source.exists():
        raise InputError(
            f"data.sources: no such file {source}; name text ({', '.join(SUFFIXES)}) files or"
            " folders of them"
        )
    if source.is_file():
        return [SourceFile(source, source.name)]
    return [
        SourceFile(p, str(p.relative_to(source.parent)))
        for p in sorted(source.rglob("*"))
        if p.suffix in SUFFIXES and p.is_file()
    ]


def are_parted(files: Sequence[SourceFile]) -> bool:
    """Return whether blank lines must part the files, which as whole documents are of one split."""
    texts = [file for file in files if file.path.suffix != ".jsonl"]
    return len(texts) == len(files) and len({split_of(file.name) for file in texts}) == 1


def documents(file: SourceFile, parted: bool = False) -> Iterator[Document]:
    """Yield the documents of a file: one a line (its "text") of a JSONL file, else the whole file.

    `parted`: what blank lines part is a document each.  InputError where it cannot be read, bytes
    are not UTF-8, or a line has no text.
    """
    try:
        if file.path.suffix != ".jsonl":
            text = file.path.read_text(encoding="utf-8")
            yield from _parts(file.name, text) if parted else _whole(file.name, text)
            return
        with file.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield Document(split_of(f"{file.name}#{number}"), _text_of(line, file.path, number))
    except UnicodeDecodeError as error:
        raise InputError(
            f"data: {file.path} is not UTF-8 (byte {error.start}); convert it or leave it out"
        ) from None
    except OSError as error:
        raise InputError(
            f"data: {file.path} cannot be read ({error.strerror}); mend or leave it out"
        ) from None


def _whole(name: str, text: str) -> Iterator[Document]:
    if text.strip():
        yield Document(split_of(name), text)


def _parts(name: str, text: str) -> Iterator[Document]:
    for number, part in enumerate(BLANK_LINES.split(text), 1):
        yield from _whole(f"{name}#{number}", part)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # JSON can spell halves of surrogate pairs, which are no text
        return text
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f'data: {path} line {number} is no JSON object with a "text"; mend the file'
        ) from None


def split_of(name: str) -> str:
    """Return "train" or "heldout" for a document's name."""
    digest = hashlib.sha256(name.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0 else "train"
