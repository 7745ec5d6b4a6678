"""Which format a source has, told by its name and its first bytes; folders become the files in them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from analysis.importers import console, tensorboard, wandb
from analysis.importers.log import Log, join
from recipes.errors import InputError

FORMATS = ("nemo", "megatron", "tensorboard", "wandb", "wandb-csv")
CONSOLE = "console"  # NeMo or Megatron: the training lines tell
PATTERNS = {"tensorboard": "*tfevents*", "wandb": "*.wandb"}


def read(sources: Sequence[Path], wanted: str | None, run: str | None) -> tuple[Log, list[Path]]:
    """Return the log in the sources of one run, and the files that it was read from."""
    found = [_files(source, wanted) for source in sources]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise InputError(f"the sources have mixed formats ({', '.join(sorted(kinds))}); import one format of one run at a time")
    kind, files = kinds.pop(), [file for _, files in found for file in files]
    return _read(kind, files, run), files


def _read(kind: str, files: Sequence[Path], run: str | None) -> Log:
    if run is not None and kind != "wandb-csv":
        raise InputError(f"--run chooses a column of a W&B table, and this is {kind}; leave it out")
    if kind == "tensorboard":
        return tensorboard.read(files)
    if kind == "wandb":
        return wandb.read_offline(files)
    if kind == "wandb-csv":
        return wandb.read_tables(files, run)
    logs = [console.read(file, None if kind == CONSOLE else kind) for file in files]
    names = {log.format for log in logs}
    if len(names) > 1:
        raise InputError(f"the sources have mixed formats ({', '.join(sorted(names))}); import one format of one run at a time")
    return join(logs)


def _files(source: Path, wanted: str | None) -> tuple[str, list[Path]]:
    if source.is_dir():
        return _in_folder(source, wanted)
    if not source.is_file():
        raise InputError(f"{source} is no file and no folder; name a log, an event file, a .wandb file, a CSV table or a folder of one")
    return wanted or _kind(source), [source]


def _in_folder(folder: Path, wanted: str | None) -> tuple[str, list[Path]]:
    if (folder / "plan.json").exists():
        raise InputError(f"{folder} is a run folder already: analysis.compare reads it as it is; to import its logs name the file")
    found = {kind: sorted(p for p in folder.rglob(pattern) if p.is_file()) for kind, pattern in PATTERNS.items() if wanted in (None, kind)}
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) != 1:
        what = "event files of TensorBoard and W&B runs: mixed formats" if kinds else "no event file of TensorBoard and no .wandb file"
        raise InputError(f"{folder} holds {what}; name the file or the folder of one of them")
    files = found[kinds[0]]
    places = sorted({str(file.parent.relative_to(folder)) for file in files})
    if len(places) > 1:
        raise InputError(f"{folder} holds {len(places)} runs ({', '.join(places)[:200]}); name the folder of one, or those that continue each other")
    return kinds[0], files


def _kind(file: Path) -> str:
    head = _head(file)
    if "tfevents" in file.name:
        return "tensorboard"
    if head.startswith(b":W&B") or file.suffix == ".wandb":
        return "wandb"
    first = head.split(b"\n", 1)[0].replace(b'"', b"").strip()
    is_table = any(first.startswith(f"{name},".encode()) for name in wandb.STEPS)
    return "wandb-csv" if is_table or ".csv" in file.suffixes else CONSOLE


def _head(file: Path) -> bytes:
    """Return the first bytes of a file, unpacked."""
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file) if packed else file.open("rb") as opened:
            return opened.read(4096)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return b""  # what is damaged is said where it is read
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); name a file that is there") from None
