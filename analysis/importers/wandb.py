"""Weights & Biases: the file of an offline run, and tables exported from a project's page.

An offline run (`wandb/offline-run-*/run-*.wandb`) is read with the wandb package's own reader, from a copy, because that
reader opens its file for writing; no server is asked.  An exported table has a column of steps and one a run and
metric, `run - metric`; several tables, one a metric, are joined by their steps.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.importers.facts import Facts
from analysis.importers.lines import blocks_of, significant
from analysis.importers.log import Log, join
from analysis.importers.records import NAMES, STEP, TIME, Record, log_of
from recipes.errors import InputError

OFFLINE, TABLE = "W&B offline run", "W&B table"
STEPS = ("trainer/global_step", "_step", "Step", "global_step")  # the first that there is; Lightning logs its own beside W&B's
FULL_DIGITS = 7  # a 32-bit float has so many; a table with fewer was rounded
NUMBER = re.compile(r"[-+]?\d{1,20}(?:\.\d{0,20})?(?:[eE][-+]?\d{1,4})?|[-+]?(?:nan|inf|infinity)", re.IGNORECASE)


def read_offline(paths: Sequence[Path]) -> Log:
    """Return the log in .wandb files of one run, in the order given."""
    return join([_offline(path) for path in paths])


def _offline(path: Path) -> Log:
    history, facts, said = list[Record](), Facts(), list[str]()
    for record in _protocol(path, said):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history += _of_items(record.history.item)
        elif kind in ("config", "run"):
            config = record.config if kind == "config" else record.run.config
            for item in config.update:
                facts.configuration({item.key or ".".join(item.nested_key): _json(item.value_json)})
    log = log_of(history, OFFLINE)
    log.facts, log.said = facts, [*log.said, *said]
    return log


def _protocol(path: Path, said: list[str]) -> Iterator[Any]:
    """Yield the records of a .wandb file; a damaged end is left out."""
    try:
        datastore = importlib.import_module("wandb.sdk.internal.datastore")
        protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    except ImportError:
        raise InputError("reading a W&B offline run needs the wandb package, which is not installed; pip install wandb==0.28.0") from None
    with tempfile.TemporaryDirectory() as folder:
        store = datastore.DataStore()
        try:
            store.open_for_scan(str(shutil.copyfile(path, Path(folder) / "run.wandb")))
            while (data := store.scan_data()) is not None:
                yield protocol.Record.FromString(data)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); name a .wandb file that is there") from None
        except Exception:  # the reader asserts, and raises Exception itself, on a file that is damaged
            said.append(f"{path.name} is damaged or was cut; what follows the damage was left out")
        finally:
            store.close()


def _of_items(items: Any) -> list[Record]:
    values = {item.key or ".".join(item.nested_key): _json_number(item.value_json) for item in items}
    found = {key: value for key, value in values.items() if value is not None}
    step = next((found[key] for key in STEPS if key in found), None)
    if step is None:
        return []
    clock = {TIME: found["_timestamp"]} if "_timestamp" in found else {}
    return [{**clock, **{key: value for key, value in found.items() if key in NAMES}, STEP: step}]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_number(text: str) -> float | None:
    value = _json(text)
    number = isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")
    try:
        return float(value) if number and not isinstance(value, bool) else None
    except OverflowError:
        return None


def read_tables(paths: Sequence[Path], run: str | None = None) -> Log:
    """Return the log in exported tables, joined by step; `run` names the column's run where there are several."""
    rows: dict[float, Record] = {}
    digits = 0
    for path in paths:
        for record, printed in _table(path, run):
            rows.setdefault(record[STEP], {}).update(record)
            digits = max(digits, printed)
    log = log_of((rows[step] for step in sorted(rows)), TABLE)
    log.loss_digits = digits if digits < FULL_DIGITS else None
    return log


def _table(path: Path, run: str | None) -> Iterator[tuple[Record, int]]:
    """Yield each row as a record, with the significant digits of its loss."""
    lines = (line for block in blocks_of(path) for line in block.replace("\x00", "\ufffd").rstrip("\n").split("\n"))
    try:
        reader = csv.reader(lines)
        names = next(reader, [])
        step, columns = _columns(path, names, run)
        for row in reader:
            if len(row) == len(names) and NUMBER.fullmatch(row[step].strip()):
                cells = {name: row[i].strip() for i, name in columns.items() if NUMBER.fullmatch(row[i].strip())}
                losses = [cells[name] for name in ("loss", "reduced_train_loss", "lm loss") if name in cells]
                yield {STEP: float(row[step]), **{k: float(v) for k, v in cells.items()}}, max(map(significant, losses), default=0)
    except csv.Error as error:
        raise InputError(f"{path} is no table ({error}); export it from W&B as CSV") from None


def _columns(path: Path, names: Sequence[str], run: str | None) -> tuple[int, dict[int, str]]:
    """Return the place of the steps and that of each known metric."""
    step = next((names.index(name) for name in STEPS if name in names), None)
    if step is None:
        raise InputError(f"{path} has no column of steps ({', '.join(STEPS)}); export it from W&B as CSV with one")
    split = {i: (name.rpartition(" - ")[0], name.rpartition(" - ")[2]) for i, name in enumerate(names) if i != step}
    known = {i: (owner, name) for i, (owner, name) in split.items() if name in NAMES}
    owners = sorted({owner for owner, _ in known.values()})
    if run is None and len(owners) > 1:
        raise InputError(f"{path} holds {len(owners)} runs ({', '.join(owners)[:200]}); choose one with --run NAME")
    if run is not None and run not in owners:
        raise InputError(f"{path} holds no run {run[:80]!r} but {', '.join(owners)[:200] or 'no known metric'}; name one of them")
    return step, {i: name for i, (owner, name) in known.items() if run in (None, owner)}
