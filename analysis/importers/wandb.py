"""Weights & Biases: the file of an offline run.

An offline run (`wandb/offline-run-*/run-*.wandb`) is read with the wandb package's own reader, from
a copy, because that reader opens its file for writing; no server is asked.  Its exports are tables
(tables.py).
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.importers.facts import Facts
from analysis.importers.log import Log, join
from analysis.importers.records import LOGGER_STEPS, STEP, TIME, Record, Vocabulary, log_of, step_of
from analysis.importers.tables import flat, loads
from recipes.errors import InputError

OFFLINE = "W&B offline run"


def read_offline(paths: Sequence[Path], vocabulary: Vocabulary) -> Log:
    """Return the log in .wandb files of one run, in the order given."""
    return join([_offline(path, vocabulary) for path in paths])


def _offline(path: Path, vocabulary: Vocabulary) -> Log:
    history, facts, said, counted = list[Record](), Facts(), list[str](), False
    for record in _protocol(path, said):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found, own = _of_items(record.history.item, vocabulary)
            history += found
            counted |= own
        elif kind in ("config", "run"):
            config = record.config if kind == "config" else record.run.config
            for item in config.update:
                facts.configuration({item.key or ".".join(item.nested_key): loads(item.value_json)})
    log = log_of(history, OFFLINE, vocabulary, counts_calls=counted)
    log.facts.merge(facts)
    log.said += said
    return log


def _protocol(path: Path, said: list[str]) -> Iterator[Any]:
    """Yield the records of a .wandb file; a damaged end is left out."""
    try:
        datastore = importlib.import_module("wandb.sdk.internal.datastore")
        protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    except ImportError:
        raise InputError(
            "reading a W&B offline run needs the wandb package, which is not installed; pip install"
            " wandb==0.28.0"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        store = datastore.DataStore()
        try:
            store.open_for_scan(str(shutil.copyfile(path, Path(folder) / "run.wandb")))
            while (data := store.scan_data()) is not None:
                yield protocol.Record.FromString(data)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); name a .wandb file that is there"
            ) from None
        except (
            Exception
        ):  # the reader asserts, and raises Exception itself, on a file that is damaged
            said.append(f"{path.name} is damaged or was cut; what follows the damage was left out")
        finally:
            store.close()


def _of_items(items: Any, vocabulary: Vocabulary) -> tuple[list[Record], bool]:
    """Return a call of the logger as a record, and whether its step is W&B's own count."""
    values = flat({item.key or "/".join(item.nested_key): loads(item.value_json) for item in items})
    step = step_of(values)
    kept = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and vocabulary.knows(name)
    }
    if step is None or not kept:
        return [], False
    clock = {TIME: values["_timestamp"]} if "_timestamp" in values else {}
    return [{**clock, **kept, STEP: values[step]}], step in LOGGER_STEPS
