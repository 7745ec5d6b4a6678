"""metrics.jsonl as columns: every line is read, or the file is refused with the line that cannot
be.

A million rows as dictionaries would take a gigabyte and most of the time, so lines become arrays a
block at a time.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from recipes.errors import InputError
from recipes.files import open_file

Array = NDArray[np.float64]
BLOCK = 1 << 20  # bytes read at a time


def read_metrics(folder: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the columns of the training lines of a run folder, and those of its evaluations."""
    train: list[dict[str, Array]] = []
    heldout: list[dict[str, Array]] = []
    with collector_at_rest():
        for rows in _rows(
            folder / "metrics.jsonl"
        ):  # an imported log may lack its losses or its step times
            train.append(
                _columns([row for row in rows if "loss" in row or "step_time_s" in row], folder)
            )
            heldout.append(_columns([row for row in rows if "heldout_loss" in row], folder))
    return _joined([part for part in train if part], folder), _joined(
        [part for part in heldout if part], folder
    )


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's collector of cycles from looking through rows, which hold none, again and
    again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _joined(parts: list[dict[str, Array]], folder: Path) -> dict[str, Array]:
    keys = list(parts[0]) if parts else []
    if any(not part.keys() >= set(keys) for part in parts):
        raise InputError(f"{folder}: lines of metrics.jsonl differ in what they hold; run it again")
    return {key: np.concatenate([part[key] for part in parts]) for key in keys}


def _rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of a .jsonl file, some thousand at a time; InputError that names the first
    one that is no JSON object.
    """
    number = 0
    try:
        with open_file(path) as file:
            while lines := file.readlines(BLOCK):
                yield _block(path, number, lines)
                number += len(lines)
    except OSError:
        raise InputError(f"{path} cannot be read; is this a run folder?") from None


def _block(path: Path, number: int, lines: list[bytes]) -> list[dict[str, Any]]:
    if not lines[-1].endswith(b"\n"):
        raise InputError(f"{path}: the last line is cut; the run lost its end, run it again")
    try:
        rows = orjson.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) != len(lines):
            raise ValueError("lines that hold more than one object, or part of one")
    except ValueError:
        rows = [_row(path, number + i, line) for i, line in enumerate(lines, 1)]
    if not {dict}.issuperset(map(type, rows)):
        raise InputError(f"{path}: a line is no JSON object; the file was changed, run it again")
    return list(rows)


def _row(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(
            line
        )  # unlike orjson, it reads the NaN and Infinity that a diverged run writes
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} line {number} cannot be read; the file was changed, run it again"
        ) from None


def _columns(rows: list[dict[str, Any]], folder: Path) -> dict[str, Array]:
    keys = rows[0].keys() if rows else ()
    try:
        found = {key: np.array([row[key] for row in rows], dtype=np.float64) for key in keys}
        if any(column.ndim > 1 for column in found.values()):
            raise TypeError("lists where numbers belong")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{folder}: lines of metrics.jsonl differ in what they hold ({str(error)[:100]}); run"
            " it again"
        ) from None
    return found
