"""Which format a source has, told by its name and its first bytes; folders become the files in
them.

A format is a name and a reader: files of one run in, and out what they state and the columns that
they hold (`Log`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analysis.importers import console, tables, tensorboard, wandb
from analysis.importers.lines import damages, opened
from analysis.importers.log import Log
from analysis.importers.records import Vocabulary
from recipes.errors import InputError


@dataclass(frozen=True)
class Options:
    """What the user says about a source: which run of a table, and what its loss is called."""

    run: str | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)


Reader = Callable[[Sequence[Path], Options], Log]


def _console(name: str | None, files: Sequence[Path], options: Options) -> Log:
    return console.read_all(files, name, options.vocabulary.loss_key)


CONSOLE = "console"  # which harness printed it, the training lines tell
READERS: dict[str, Reader] = {
    CONSOLE: functools.partial(_console, None),
    **{name: functools.partial(_console, name) for name in console.FORMATS},
    "tensorboard": lambda files, options: tensorboard.read(files, options.vocabulary),
    "tensorboard-json": lambda files, options: tables.read_downloads(files, options.vocabulary),
    "wandb": lambda files, options: wandb.read_offline(files, options.vocabulary),
    "table": lambda files, options: tables.read_tables(files, options.vocabulary, options.run),
    "json-rows": lambda files, options: tables.read_rows(files, options.vocabulary),
    "dllogger": lambda files, options: tables.read_dllogger(files, options.vocabulary),
}
FORMATS = tuple(name for name in READERS if name != CONSOLE)
PATTERNS = {"tensorboard": "*tfevents*", "wandb": "*.wandb"}


def read(sources: Sequence[Path], wanted: str | None, options: Options) -> tuple[Log, list[Path]]:
    """Return the log in the sources of one run, and the files that it was read from."""
    found = [_files(source, wanted) for source in sources]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise InputError(
            f"the sources have mixed formats ({', '.join(sorted(kinds))}); import one format of one"
            " run at a time"
        )
    kind, files = kinds.pop(), [file for _, files in found for file in files]
    if options.run is not None and kind != "table":
        raise InputError(f"--run chooses a column of a W&B table, and this is {kind}; leave it out")
    return READERS[kind](files, options), files


def _files(source: Path, wanted: str | None) -> tuple[str, list[Path]]:
    if source.is_dir():
        return _in_folder(source, wanted)
    if not source.is_file():
        raise InputError(
            f"{source} is no file and no folder; name a log, an event file, a .wandb file, a CSV"
            " table or a folder of one"
        )
    return wanted or _kind(source), [source]


def _in_folder(folder: Path, wanted: str | None) -> tuple[str, list[Path]]:
    if (folder / "plan.json").exists():
        raise InputError(
            f"{folder} is a run folder already: analysis.compare reads it as it is; to import its"
            " logs name the file"
        )
    found = {
        kind: sorted(p for p in folder.rglob(pattern) if p.is_file())
        for kind, pattern in PATTERNS.items()
        if wanted in (None, kind)
    }
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) != 1:
        what = (
            "event files of TensorBoard and W&B runs: mixed formats"
            if kinds
            else "no event file of TensorBoard and no .wandb file"
        )
        raise InputError(f"{folder} holds {what}; name the file or the folder of one of them")
    files = found[kinds[0]]
    places = sorted({str(file.parent.relative_to(folder)) for file in files})
    if len(places) > 1:
        raise InputError(
            f"{folder} holds {len(places)} runs ({', '.join(places)[:200]}); name the folder of"
            " one, or those that continue each other"
        )
    return kinds[0], files


def _kind(file: Path) -> str:
    head = _head(file)
    if "tfevents" in file.name:
        return "tensorboard"
    if head.startswith(b":W&B") or file.suffix == ".wandb":
        return "wandb"
    text = head.decode("utf-8-sig", errors="replace").replace("\x00", "").lstrip()
    if "DLLL {" in text or "\nDLL 20" in f"\n{text}":
        return "dllogger"
    beginning = "".join(text[:100].split())
    if beginning.startswith("[["):
        return "tensorboard-json"
    is_printed = any(mark in text for mark in console.MARKS)  # below a configuration that is JSON
    if beginning.startswith(('{"', '[{"')) and '":' in beginning and not is_printed:
        return "json-rows"
    first = next(tables.beginning(text.splitlines()), "").strip()
    return (
        "table"
        if ".csv" in file.suffixes
        or ".tsv" in file.suffixes
        or (len(first) < 4000 and _is_header(first))
        else CONSOLE
    )


def _is_header(line: str) -> bool:
    found = tables.header(line)
    return (
        found is not None and len(found[0]) > 1 and not any(mark in line for mark in console.MARKS)
    )


def _head(file: Path) -> bytes:
    """Return the first bytes of a file, unpacked."""
    try:
        with opened(file) as raw:
            return raw.read(4096)
    except damages():
        return b""  # what is damaged is said where it is read
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}); name a file that is there"
        ) from None
