"""Tables and lines of JSON: W&B's exports, TensorBoard's own downloads, pandas' files, NVIDIA's
DLLogger.

- W&B: a panel's CSV has a column of steps and one a run and metric, `run - metric`; what its API
  gives (`scan_history`) is a JSON object a row.  Several tables, one a metric, are joined by their
  steps.
- TensorBoard (tensorboard 2.20.0, plugins/scalar): CSV with "Wall time,Step,Value" or JSON `[[wall
  time, step, value], …]`, a file a tag, whose name ends with the tag.
- DLLogger (dllogger/logger.py, 07ec82a): `DLLL {"type": "LOG", "step": …, "data": {…}}`; NeMo
  writes its configuration with the step PARAMETER (nemo/utils/loggers/dllogger.py, v2.3.2).
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.importers.facts import Facts
from analysis.importers.lines import blocks_of, significant
from analysis.importers.log import MOST_STEPS, Log, join
from analysis.importers.records import (
    LOGGER_STEPS,
    NAMES,
    ROLE_OF,
    STEP,
    STEPS,
    TIME,
    Record,
    Vocabulary,
    is_loss,
    is_step,
    log_of,
    spelled,
    step_of,
)
from recipes.errors import InputError

TABLE, ROWS, DLL, DOWNLOAD = "table", "JSON rows", "DLLogger file", "TensorBoard download"
FULL_DIGITS = 7  # a 32-bit float has so many; a table with fewer was rounded
NUMBER = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,20})?(?:\.\d{0,20})?(?:[eE][-+]?\d{1,4})?|[-+]?(?:nan|inf|infinity)",
    re.IGNORECASE,
)
DELIMITERS = (",", "\t", ";")
WALL = ["Wall time", "Step", "Value"]
DLL_JSON = re.compile(r"DLLL (\{.*\})\s*$")
DLL_TEXT = re.compile(
    r"DLL \d{4}-\d\d-\d\d [\d:.]+ - (?P<step>\d{1,15}|\((?:\d{1,15}(?:, )?){1,3},?\))"
    r" (?P<metrics>.*)$"
)
DLL_METRIC = re.compile(
    r"(train_step_timing in s|lm loss|\S+) : ([-+]?(?:[\d.]+(?:[eE][-+]?\d+)?|nan|inf))(?!\S)",
    re.IGNORECASE,
)
DEEPEST = 4  # objects within objects
HISTORY = "log_history"  # of Hugging Face's trainer_state.json
OWNERS = frozenset(
    {"run", "run_name", "run_id", "experiment", "run_path"}
)  # columns that name a row's run


def header(line: str) -> tuple[list[str], str] | None:
    """Return the columns of a table's first line and what separates them; None where it has no
    column of steps.
    """
    for delimiter in DELIMITERS:
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            return None
        if any(_is_step(name) for name in names):
            return names, delimiter
    return None


def _is_step(name: str) -> bool:
    return name in STEPS or is_step(name.rpartition(" - ")[2])


def number(text: str) -> float | None:
    """Return a printed number, with or without separators of thousands; None for what is none."""
    text = text.strip()
    return (
        float(text.replace(",", ""))
        if text and NUMBER.fullmatch(text) and text.strip("+-.")
        else None
    )


def beginning(lines: Iterable[str]) -> Iterator[str]:
    """Return a table's lines without the blank ones and comments before it."""
    return itertools.dropwhile(lambda line: not line.strip() or line.startswith("#"), lines)


def _lines(path: Path) -> Iterator[str]:
    return (
        line
        for block in blocks_of(path)
        for line in block.replace("\x00", "\ufffd").rstrip("\n").split("\n")
    )


# ---------------------------------------------------------------------------------------------- CSV


def read_tables(paths: Sequence[Path], vocabulary: Vocabulary, run: str | None = None) -> Log:
    """Return the log in tables, joined by step; `run` names the column's run where there are
    several.
    """
    digits, counted, averaged, what = 0, False, False, TABLE
    found_in = list[list[Record]]()
    for path in paths:
        found = _Table(path, vocabulary, run)
        counted |= found.counts_calls
        what = DOWNLOAD if found.is_download else what
        found_in.append(records := list[Record]())
        for record, printed in found.rows():
            records.append(record)
            digits = max(digits, printed)
        averaged |= found.averaged
    log = log_of(_one_run(found_in, vocabulary.loss_key), what, vocabulary, counts_calls=counted)
    log.loss_digits = digits if digits < FULL_DIGITS else None
    if averaged:
        log.averaged = True
        log.said.append(
            "losses are means of several steps, for the table's __MIN and __MAX differ; "
            "export all points, or compare it with a run that was thinned out alike"
        )
    return log


def _one_run(tables: Sequence[list[Record]], loss_key: str | None) -> list[Record]:
    """Return the records of a run's tables, in the order in which they were written.

    Tables of different metrics are joined by their steps.  One with the same loss, or with all the
    same metrics, as one before is the next part of the run.
    """
    parts = list[list[list[Record]]]()
    for table in tables:
        part = next((p for p in parts if not any(_goes_on(t, table, loss_key) for t in p)), None)
        if part is None:
            parts.append(part := [])
        part.append(_as_written(table))
    whole = [
        part[0] if len(part) == 1 else _joined(r for table in part for r in _survive(table))
        for part in parts
    ]
    by_step = sorted((part for part in whole if part), key=lambda part: part[0][STEP])
    if all(a[-1][STEP] < b[0][STEP] for a, b in itertools.pairwise(by_step)):
        whole = by_step  # parts without a step in common, whatever order they were named in
    return [record for part in whole for record in part]


def _names(table: Sequence[Record]) -> set[str]:
    return {name for record in table for name in record} - {STEP, TIME}


def _goes_on(before: Sequence[Record], after: Sequence[Record], loss_key: str | None) -> bool:
    ours, theirs = _names(before), _names(after)
    return ours == theirs or any(is_loss(name, loss_key) for name in ours & theirs)


def _falls(table: Sequence[Record]) -> int:
    return sum(after[STEP] < before[STEP] for before, after in itertools.pairwise(table))


def _as_written(table: list[Record]) -> list[Record]:
    """Return a table in its own order, where a step that falls is a resume; sorted by steps where
    many fall, as in one that was turned round or shuffled.
    """
    is_unsorted = _falls(table) * 4 > len(table)
    return _joined(table) if is_unsorted and len({r[STEP] for r in table}) == len(table) else table


def _survive(table: list[Record]) -> list[Record]:
    """Return the records that no later one has an earlier step than: those of the later run."""
    kept, least = list[Record](), math.inf
    for record in reversed(table) if _falls(table) else ():
        least = min(least, record[STEP])
        kept += [record] if record[STEP] == least else []
    return kept[::-1] or table


def _joined(records: Iterable[Record]) -> list[Record]:
    """Return records of one step as one, in the order of the steps; a later value counts."""
    rows: dict[float, Record] = {}
    for record in records:
        rows.setdefault(record[STEP], {}).update(record)
    return [rows[step] for step in sorted(rows)]


class _Table:
    """One table: the place of its steps, and that of each metric that is read."""

    def __init__(self, path: Path, vocabulary: Vocabulary, run: str | None) -> None:
        self.path, self.vocabulary = path, vocabulary
        try:
            first = next(beginning(_lines(path)), "")
            self.names, self.delimiter = header(first) or (
                [name.strip() for name in next(csv.reader([first]), [])],
                ",",
            )
        except csv.Error as error:
            raise InputError(f"{path} is no table ({error}); export it as CSV") from None
        self.is_download = self.names[:3] == WALL
        self.columns = {2: _tag_of(path)} if self.is_download else self._columns(run)
        self.step = self._step(run)
        self.counts_calls = not self.is_download and self.names[self.step] in LOGGER_STEPS
        self.owner = next((i for i, name in enumerate(self.names) if spelled(name) in OWNERS), None)
        self.run = self.wanted = run
        shown = [
            self.names[i] for i, name in self.columns.items() if is_loss(name, vocabulary.loss_key)
        ]
        self.ends = [
            self.names.index(end)
            for name in shown
            for end in (f"{name}__MIN", f"{name}__MAX")
            if end in self.names
        ]
        self.averaged = False
        for name in self.columns.values():
            vocabulary.knows(name)

    def rows(self) -> Iterator[tuple[Record, int]]:
        """Yield each row as a record, with the significant digits of its loss."""
        try:
            reader = csv.reader(beginning(_lines(self.path)), delimiter=self.delimiter)
            next(reader, None)
            for cells_as_printed in reader:
                row = [self._with_point(cell) for cell in cells_as_printed]
                step = number(row[self.step]) if len(row) == len(self.names) else None
                if step is None or not self._is_of_run(cells_as_printed):
                    continue
                cells = {
                    name: row[i] for i, name in self.columns.items() if number(row[i]) is not None
                }
                losses = [name for name in cells if is_loss(name, self.vocabulary.loss_key)]
                self._refuse_comma(cells[name] for name in losses)
                printed = max(
                    (significant(cells[name].strip().replace(",", "")) for name in losses),
                    default=0,
                )
                self._note_average(row)
                yield (
                    {
                        STEP: step,
                        **{name: number(text) or 0.0 for name, text in cells.items()},
                    },
                    printed,
                )
        except csv.Error as error:
            raise InputError(f"{self.path} is no table ({error}); export it as CSV") from None

    def _refuse_comma(self, losses: Iterable[str]) -> None:
        """No loss is in the thousands, so a comma in one stands for the decimal point."""
        found = next((text.strip() for text in losses if "," in text), None)
        if found:
            raise InputError(
                f"{self.path} prints a loss as {found[:40]!r}, with a comma for the decimal point;"
                " export it with points, or separate its columns with semicolons"
            )

    def _note_average(self, row: Sequence[str]) -> None:
        """W&B thins out long curves: a point is then the mean of several steps, between its __MIN
        and __MAX.
        """
        ends = (number(row[i]) for i in self.ends)
        self.averaged |= len({end for end in ends if end is not None}) > 1

    def _is_of_run(self, row: Sequence[str]) -> bool:
        """Whether a row is of the run that is read, where a column names the runs; InputError where
        that is open.
        """
        if self.owner is None or self.owner in self.columns:
            return True
        name = row[self.owner].strip()
        if self.wanted is None:
            self.wanted = self.run or name
        if self.run is None and name != self.wanted:
            raise InputError(
                f"{self.path} holds several runs ({self.wanted[:80]}, {name[:80]}, …); choose one"
                " with --run NAME"
            )
        return name == self.wanted

    def _with_point(self, cell: str) -> str:
        """Where semicolons separate, a comma stands for the decimal point, and a point separates
        thousands.
        """
        if self.delimiter != ";" or "," not in cell:
            return cell
        return (cell.replace(".", "") if cell.rfind(",") > cell.rfind(".") else cell).replace(
            ",", ".", 1
        )

    def _step(self, run: str | None) -> int:
        """Return the column of steps: the trainer's before the logger's own."""
        metrics = {i: column.rpartition(" - ") for i, column in enumerate(self.names)}
        ours = {
            metric: i
            for i, (owner, _, metric) in reversed(metrics.items())
            if not owner or run in (None, owner)
        }
        if found := step_of(ours, trainers=True):
            return ours[found]
        place = next((self.names.index(name) for name in LOGGER_STEPS if name in self.names), None)
        if place is None:
            held = ", ".join(self.names)[:200] or "nothing"
            raise InputError(
                f"{self.path} has no column of steps ({', '.join(STEPS)}) but {held}; export it as"
                " CSV with one"
            )
        return place

    def _columns(self, run: str | None) -> dict[int, str]:
        split = {
            i: (name.rpartition(" - ")[0], name.rpartition(" - ")[2])
            for i, name in enumerate(self.names)
        }
        known = {
            i: pair
            for i, pair in split.items()
            if pair[1] not in LOGGER_STEPS and self.vocabulary.knows(pair[1])
        }
        owners = sorted({owner for owner, _ in known.values()})
        if any(spelled(name) in OWNERS for name in self.names) and owners == [""]:
            run = None  # a column names the runs
        if run is None and len(owners) > 1:
            raise InputError(
                f"{self.path} holds {len(owners)} runs ({', '.join(owners)[:200]}); choose one with"
                " --run NAME"
            )
        if run is not None and run not in owners:
            held = ", ".join(owners)[:200] or f"no known metric: {', '.join(self.names)[:200]}"
            raise InputError(f"{self.path} holds no run {run[:80]!r} but {held}; name one of them")
        return {i: name for i, (owner, name) in known.items() if run in (None, owner)}


def _tag_of(path: Path) -> str:
    """Return the tag of a TensorBoard download from its file's name, in which other characters are
    underscores.
    """
    stem = spelled(path.name.partition(".gz")[0].rpartition(".")[0])
    names = {spelled(name): name for name in (*ROLE_OF, *NAMES)}
    before, _, tag = stem.rpartition("_tag_")
    if before:
        return names.get(tag, tag)
    return (
        names[max(found, key=len)]
        if (found := [name for name in names if stem.endswith(name)])
        else "Value"
    )


# --------------------------------------------------------------------------------------------- JSON


def read_rows(paths: Sequence[Path], vocabulary: Vocabulary) -> Log:
    """Return the log in files of JSON rows, in the order given: an object a line, or a list of
    them.
    """
    return join([_rows_log(path, vocabulary) for path in paths])


def _rows_log(path: Path, vocabulary: Vocabulary) -> Log:
    records, counted, damaged, total = list[Record](), False, 0, None
    for row in _objects(path):
        if isinstance(row, dict) and HISTORY in row:
            total = json_number(row.get("max_steps"))
            continue
        found = _record(row, vocabulary) if isinstance(row, dict) else None
        if found is None:
            damaged += 1
            continue
        records.append(found[0])
        counted |= found[1] and bool(
            found[0].keys() - {STEP, TIME}
        )  # a row without a known name proves nothing
    if not records:
        raise InputError(
            f"{path} holds no row with a step ({', '.join(STEPS)}); write it with one, e.g. as"
            " W&B's scan_history gives it"
        )
    log = log_of(records, ROWS, vocabulary, counts_calls=counted)
    log.total = int(total) if total and 1 <= total < MOST_STEPS else None
    if damaged:
        log.said.append(
            f"{damaged} row(s) without a step, or that are no JSON object, were left out"
        )
    return log


def _objects(path: Path) -> Iterator[Any]:
    lines = (line.strip() for line in _lines(path))
    first = next((line for line in lines if line), "")
    if first == "{" or first.startswith("["):
        try:
            found = json.loads("\n".join([first, *lines]))
        except (ValueError, RecursionError):
            raise InputError(
                f"{path} is no list of JSON and no object; write an object a line"
            ) from None
        rows = found.get(HISTORY) if isinstance(found, dict) else found
        yield from [found] if isinstance(found, dict) else []
        yield from rows if isinstance(rows, list) else []
        return
    for line in (first, *lines):
        if line:
            yield loads(line)


def loads(text: str) -> Any:
    """Return JSON's value; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _record(row: dict[str, Any], vocabulary: Vocabulary) -> tuple[Record, bool] | None:
    """Return a row as a record, and whether its step is the logger's own; None where it has no
    step.
    """
    values = flat(row)
    step = step_of(values)
    if step is None:
        return None
    clock = {TIME: values["_timestamp"]} if "_timestamp" in values else {}
    kept = {
        name: value
        for name, value in values.items()
        if name not in (*LOGGER_STEPS, "_timestamp", "_runtime") and vocabulary.knows(name)
    }
    return {**clock, **kept, STEP: values[step]}, step in LOGGER_STEPS


def flat(row: dict[str, Any], before: str = "", depth: int = 0) -> Record:
    """Return the numbers of an object by their names, those of objects within it with a slash
    between.
    """
    found: Record = {}
    for key, value in row.items():
        if isinstance(value, dict) and depth < DEEPEST:
            found |= flat(value, f"{before}{key}/", depth + 1)
        elif (plain := json_number(value)) is not None:
            found[f"{before}{key}"] = plain
    return found


def json_number(value: Any) -> float | None:
    """Return a JSON value as a number; None for what is none.

    W&B writes NaN and infinities as text, some scripts all numbers.
    """
    if isinstance(value, str):
        return number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def read_downloads(paths: Sequence[Path], vocabulary: Vocabulary) -> Log:
    """Return the log in TensorBoard's JSON downloads, a file a tag, joined by step."""
    found_in = list[list[Record]]()
    for path in paths:
        name = _tag_of(path)
        vocabulary.knows(name)
        found_in.append([])
        for row in _objects(path):
            if (
                isinstance(row, list)
                and len(row) == 3
                and None not in (values := [json_number(value) for value in row])
            ):
                found_in[-1].append({STEP: values[1] or 0.0, name: values[2] or 0.0})
    return log_of(_one_run(found_in, vocabulary.loss_key), DOWNLOAD, vocabulary)


# ----------------------------------------------------------------------------------------- DLLogger


def read_dllogger(paths: Sequence[Path], vocabulary: Vocabulary) -> Log:
    """Return the log in files of DLLogger, in the order given."""
    return join([_dllogger(path, vocabulary) for path in paths])


def _dllogger(path: Path, vocabulary: Vocabulary) -> Log:
    facts, records, epochs = Facts(), list[Record](), list[tuple[float, float]]()
    for step, data in _dll_entries(_lines(path)):
        if step == "PARAMETER":
            facts.configuration(data)
        elif place := _dll_step(step):
            epochs.append(place)
            records.append(
                {STEP: place[1], **{k: v for k, v in flat(data).items() if vocabulary.knows(k)}}
            )
    if any(
        epoch > before[0] and step <= before[1]
        for before, (epoch, step) in itertools.pairwise(epochs)
    ):
        raise InputError(
            f"{path} counts its steps anew in each epoch, so they cannot be placed; log a step that"
            " does not"
        )
    log = log_of(records, DLL, vocabulary)
    log.facts.merge(facts)
    return log


def _dll_entries(lines: Iterable[str]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield step and data of each entry, of the JSON file and of the form for terminals."""
    for line in lines:
        if (found := DLL_JSON.search(line)) and isinstance(entry := loads(found[1]), dict):
            if entry.get("type") == "LOG" and isinstance(entry.get("data"), dict):
                yield entry.get("step"), entry["data"]
        elif found := DLL_TEXT.search(line):
            yield (
                [int(n) for n in re.findall(r"\d+", found["step"])],
                {k: float(v) for k, v in DLL_METRIC.findall(found["metrics"])},
            )


def _dll_step(step: Any) -> tuple[float, float] | None:
    """Return epoch and iteration of a DLLogger step: a number, or a list (epoch, iteration, …);
    None for a summary.
    """
    parts = [json_number(part) for part in (step if isinstance(step, list) else [step])]
    known = [part for part in parts if part is not None and math.isfinite(part)]
    if not known or len(known) != len(parts):
        return None
    return (known[0], known[1]) if len(known) > 1 else (0.0, known[0])
