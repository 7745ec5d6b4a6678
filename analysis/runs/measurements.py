"""Folders of measurements: a file of JSON lines, a row for each measurement, beside a manifest that
names the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.render.table import Table
from recipes.errors import InputError, one_line
from recipes.run_folder import read_json, rows_of


def measured(path: Path, columns: Sequence[str], command: str) -> pd.DataFrame:
    """Return the rows of a file of measurements, with the device as a further column.

    `columns` must all be there; `command` is what measures them and writes the folder.
    InputError where the file is missing, lacks a column, or its manifest names no device.
    """
    if not path.exists():
        raise InputError(f"{path.parent}: no {path.name}; make one with {command}")
    table = pd.DataFrame(rows_of(path))
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path} has no {missing[0]}; measure it again with this version")
    return table.assign(device=device(path.parent))


def device(folder: Path) -> str:
    """Return the GPU that the measurements are from."""
    try:
        return one_line(str(read_json(folder / "manifest.json")["device"]))
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{folder / 'manifest.json'} does not name a device: the numbers cannot be traced;"
            " measure them again"
        ) from None


def of_frame(table: pd.DataFrame, note: str, digits: int | None = None, title: str = "") -> Table:
    """Return a data frame as a table, its index as first columns; numbers with `digits` decimals,
    or six significant ones.
    """
    flat = table.reset_index()
    words = frozenset(str(name) for name in flat if not pd.api.types.is_numeric_dtype(flat[name]))
    rows = [{str(key): value for key, value in line.items()} for line in flat.to_dict("records")]
    return Table(
        title,
        [{key: _cell(value, digits) for key, value in line.items()} for line in rows],
        rows,
        [note],
        words,
    )


def _cell(value: Any, digits: int | None) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if pd.isna(value) else f"{value:.6g}" if digits is None else f"{value:.{digits}f}"
