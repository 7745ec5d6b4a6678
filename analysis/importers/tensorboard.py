"""TensorBoard event files, read with the tensorboard package's own reader; no torch, no TensorFlow.

A writer makes one record a value, so the values of one step are those that follow each other with
its number.  Scalars are 32-bit floats, which is what the loss was computed in.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.importers.facts import Facts
from analysis.importers.log import Log
from analysis.importers.records import STEP, TIME, Record, Vocabulary, log_of
from recipes.errors import InputError

FORMAT = "TensorBoard event file"
TEXT = "/text_summary"  # what torch's SummaryWriter.add_text puts behind a tag


def read(paths: Sequence[Path], vocabulary: Vocabulary) -> Log:
    """Return the log in the event files of one run, in the order in which they were begun."""
    said, facts = list[str](), Facts()
    files = sorted(
        ([*_values(path, said, vocabulary, facts)] for path in paths),
        key=lambda values: values[0][1] if values else 0.0,
    )
    log = log_of((record for values in files for record in _records(values)), FORMAT, vocabulary)
    log.facts.merge(facts)
    log.said += said
    return log


def _values(
    path: Path, said: list[str], vocabulary: Vocabulary, facts: Facts
) -> Iterator[tuple[int, float, str, float]]:
    """Yield step, time (s), name and value of each scalar that an importer knows; what follows a
    damage is left out.
    """
    loader, decode, errors = _package()
    events = 0
    try:
        for event in loader(str(path)).Load():
            events += 1
            for value in event.summary.value:
                if value.tag.endswith(TEXT):
                    _note_text(value, decode, facts)
                elif vocabulary.knows(value.tag):
                    yield event.step, event.wall_time, value.tag, _number(value, decode)
    except errors:
        pass
    if events != _frames(path):  # the reader ends at a damaged record without a word
        said.append(f"{path.name} is damaged or was cut; what follows the damage was left out")


def _note_text(value: Any, decode: Any, facts: Facts) -> None:
    """Megatron-LM writes its arguments as texts (megatron/training/initialize.py:412,
    core_v0.12.3).
    """
    texts = decode(value.tensor).reshape(-1)
    if texts.size == 1:
        text = texts[0].decode(errors="replace") if isinstance(texts[0], bytes) else str(texts[0])
        facts.add(value.tag.removesuffix(TEXT), text.strip())


def _package() -> tuple[Any, Any, tuple[type[Exception], ...]]:
    """Return tensorboard's reader of event files, its decoder of tensors, and the errors of a
    damaged file.
    """
    try:
        loader = importlib.import_module(
            "tensorboard.backend.event_processing.event_file_loader"
        ).LegacyEventFileLoader
        decode = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
        unparsed = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError:
        raise InputError(
            "reading TensorBoard files needs the tensorboard package, which is not installed; pip"
            " install tensorboard==2.20.0"
        ) from None
    return loader, decode, (ValueError, TypeError, IndexError, OSError, unparsed)


def _frames(path: Path) -> int:
    """Return how many records a file holds by their lengths alone; -1 where the last one is cut.

    TFRecord: length (8 bytes, little-endian), its checksum (4), the data, their checksum (4).
    """
    size, at, count = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while at + 12 <= size:
            file.seek(at)
            at += 16 + int(struct.unpack("<Q", file.read(8))[0])
            count += 1
    return count if at == size else -1


def _number(value: Any, decode: Any) -> float:
    if value.WhichOneof("value") == "simple_value":
        return float(value.simple_value)
    return float(decode(value.tensor).reshape(-1)[0])  # as TensorFlow 2 writes scalars


def _records(values: Sequence[tuple[int, float, str, float]]) -> Iterator[Record]:
    """Yield the values of each step together; a name that comes again begins a new record."""
    record: Record = {}
    for step, time, name, value in values:
        if record and (record[STEP] != step or name in record):
            yield record
            record = {}
        record = (
            {**record, STEP: float(step), name: value}
            if record
            else {STEP: float(step), TIME: time, name: value}
        )
    if record:
        yield record
