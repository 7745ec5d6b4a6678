"""Console logs: NeMo 2, Megatron-LM and its relatives, torchtitan, and Lightning's progress bar
(dialects.py).

Of every line only what fits its printed form exactly is read: a line that was cut, or mixed with
another rank's, gives no number, and the step it stood for is then missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.importers.dialects import DIALECTS, MEGATRON, NEMO
from analysis.importers.facts import WORDS, Facts
from analysis.importers.lines import blocks_of, rank_of, significant
from analysis.importers.log import Log, join, keep_rows, put_units
from analysis.importers.multiline import DICTIONARY, on_one_line
from analysis.importers.ranks import one_stream
from analysis.importers.scanner import Scanner
from analysis.runs.metrics import Array, collector_at_rest
from recipes.errors import InputError

FORMATS = tuple(DIALECTS)
MARKS = tuple(mark for dialect in DIALECTS.values() for mark in dialect.marks)
SURE = (
    NEMO.name,
    MEGATRON.name,
)  # forms that nothing else has; where they are found, a progress bar beside them is not the log
# "Validation: iteration 1/2" of NeMo 2, "Validation DataLoader 0: 50%" of a progress bar; not those
# of a sanity check.
VALIDATING = re.compile(r"(?<!Sanity checking )Validation(?:: iteration \d| DataLoader \d{1,3}:)")
VALIDATION = "Validation"
VALIDATION_LINE = re.compile(
    r"^([^\n]*Validation(?:: iteration \d| DataLoader \d)[^\n]*\n)", re.MULTILINE
)  # between blocks of training lines
EVALUATED = ("validation loss at ", "validate step:")
# Megatron-LM megatron/training/utils.py (report_memory, core_v0.12.3: MB of 1024 x 1024 bytes);
# Bridge prints GB of 1e9 bytes.
MEMORY = re.compile(r"memory \((?P<unit>MB|GB)\) \|(?P<fields>[^\n]*)")
MEMORY_FIELD = re.compile(
    r"(?P<name>max allocated|max reserved|mem-max-allocated-gigabytes|mem-max-reserved-gigabytes):"
    r" (?P<value>\d{1,9}(?:\.\d{0,20})?)"
)
MEMORY_UNITS = {"MB": 2**20 / 1e9, "GB": 1.0}
LOSSES_LOOKED_AT = 1000
SHOWN = 120  # characters of a line that an error shows


def read_all(paths: Sequence[Path], only: str | None, loss_key: str | None) -> Log:
    """Return the log in text files of one run, in the order given."""
    logs = [read(path, only, loss_key) for path in paths]
    names = {log.format for log in logs}
    if len(names) > 1:
        raise InputError(
            f"the sources have mixed formats ({', '.join(sorted(names))}); import one format of one"
            " run at a time"
        )
    return join(logs)


def read(path: Path, only: str | None = None, loss_key: str | None = None) -> Log:
    """Return the log in a text file; `only`, one of FORMATS, ignores the training lines of other
    harnesses.
    """
    reader = _Reader(only, loss_key)
    with collector_at_rest():
        for text in on_one_line(blocks_of(path)):
            reader.text(text)
    return reader.log(path)


class _Reader:
    """Reads the lines of one file: training steps, evaluations, memory, and what the log states."""

    def __init__(self, only: str | None, loss_key: str | None) -> None:
        self.scanners = [
            Scanner(d.with_loss(loss_key)) for name, d in DIALECTS.items() if only in (None, name)
        ]
        self.facts, self.memory, self.reserved = Facts(), 0.0, 0.0
        self.loss_key, self.unread = loss_key, ""
        self.words = {scanner: (*WORDS, *self._others(scanner)) for scanner in self.scanners}

    def _others(self, scanner: Scanner) -> list[str]:
        """Return texts of lines that matter beside a dialect's training lines."""
        others = [
            mark for other in self.scanners if other is not scanner for mark in other.dialect.marks
        ]
        return [*others, "memory (", VALIDATION, *EVALUATED]

    def text(self, text: str) -> None:
        """Read a block of whole lines."""
        for piece in VALIDATION_LINE.split(text) if VALIDATION in text else [text]:
            if piece and not any(
                scanner.block(piece, self.words[scanner]) for scanner in self._likely()
            ):
                lines = piece.split("\n")
                for line in (*(f"{line}\n" for line in lines[:-1]), lines[-1]):
                    self._line(line)
                for scanner in self.scanners:
                    scanner.flush()

    def _likely(self) -> list[Scanner]:
        return [scanner for scanner in self.scanners if scanner.count]

    def _line(self, line: str) -> None:
        if ("alidat" in line) and self._evaluation(line):
            return
        for scanner in self.scanners:
            at = line.find(scanner.dialect.mark)
            if at >= 0 and scanner.line(line, at):
                return
        self._memory(line)
        self.facts.line(line)
        if not self.unread and "loss" in line.lower() and re.search(r"\d", line):
            self.unread = line.strip()[:SHOWN]

    def _evaluation(self, line: str) -> bool:
        """Read a line of an evaluation; return whether it is one."""
        for scanner in self.scanners:
            found = scanner.dialect.heldout.search(line) if scanner.dialect.heldout else None
            if found:
                self._heldout(scanner, found.groupdict())
                return True
        if VALIDATION in line and (seen := VALIDATING.search(line)):
            for scanner in self.scanners:
                scanner.pending.add(rank_of(line[: seen.start()]))
            return True
        return False

    def _heldout(self, scanner: Scanner, found: dict[str, str | None]) -> None:
        """Keep an evaluation's loss; one after training names its set, and in old versions no
        step.
        """
        is_test = "test" in (found.get("set"), found.get("data"))
        step = (
            np.inf
            if found["step"] is None
            else float(found["step"]) + 1 - scanner.dialect.first_iteration
        )
        kept = scanner.test if is_test else scanner.heldout
        is_repeated = kept and kept[-1][0] == step and scanner.evaluated[is_test] == scanner.count
        scanner.evaluated[is_test] = scanner.count
        if not is_repeated:  # by another rank; after training lines it is that of a resumed run
            kept.append((step, float(found["loss"] or "nan")))

    def _memory(self, line: str) -> None:
        if "memory (" in line and (found := MEMORY.search(line)):
            for field in MEMORY_FIELD.finditer(found["fields"]):
                size = float(field["value"]) * MEMORY_UNITS[found["unit"]]
                if "allocated" in field["name"]:
                    self.memory = max(self.memory, size)
                else:
                    self.reserved = max(self.reserved, size)

    def _unread(self) -> str:
        """Return what was looked for, what was found instead, and what to do."""
        forms = ", ".join(
            scanner.dialect.name.removesuffix(" console log") for scanner in self.scanners
        )
        named = f" with a loss called {self.loss_key!r}" if self.loss_key else ""
        held = (
            f"; its first line with a loss is {self.unread!r}"
            if self.unread
            else "; no line names a loss"
        )
        remedy = "name another log, --format or --loss-key"
        if DICTIONARY in self.unread:
            remedy = (
                "no progress bar shows its step; import the run's trainer_state.json, which has the"
                " steps"
            )
        return f"{named}, of any form that is known ({forms}){held}; {remedy}"

    def log(self, path: Path) -> Log:
        """Return what was read as a log; InputError where it is none, or holds two."""
        found = [scanner for scanner in self.scanners if scanner.count]
        found = [scanner for scanner in found if scanner.dialect.name in SURE] or found
        if not found:
            raise InputError(f"{path}: no training line found{self._unread()}")
        if len(found) > 1:
            raise InputError(
                f"{path} mixes training lines of {' and '.join(s.dialect.name for s in found)}: two"
                " runs in one file; choose with --format"
            )
        log = _log(found[0], self.facts)
        log.memory_gb, log.reserved_gb = (
            max(read, kept or 0.0) or None
            for read, kept in ((self.memory, log.memory_gb), (self.reserved, log.reserved_gb))
        )
        return log


def _log(scanner: Scanner, facts: Facts) -> Log:
    names, who = scanner.who()
    columns = scanner.columns()  # also counts what is garbled
    log = Log(scanner.dialect.name, columns, facts=facts, total=scanner.total)
    if scanner.garbled:
        log.said.append(f"{scanner.garbled} training line(s) are cut or garbled and were left out")
    if scanner.dialect.note:
        log.said.append(scanner.dialect.note)
    if not columns:
        return log
    if "loss" not in columns:
        _refuse_other_loss(scanner, columns)
        columns["loss"] = np.full(
            who.size, np.nan
        )  # every step was NaN: Megatron prints no loss then
    log.loss_digits, log.averaged = _loss_digits(scanner, columns["loss"]), scanner.dialect.averages
    validated = np.zeros(who.size, dtype=bool)
    validated[list(scanner.validated)] = True
    kept = one_stream(names, who, columns["step"], columns["loss"], log.said)
    keep_rows(columns, kept)
    if scanner.epoch and log.total and columns["step"].max(initial=0) > log.total:
        log.total = None  # it counts an epoch's steps
    put_units(log)
    end = _end(columns["step"], log.total)
    for name, key, pairs in (
        ("heldout", "heldout_loss", scanner.heldout),
        ("test", "test_loss", scanner.test),
    ):
        placed = [(step if np.isfinite(step) else end, loss) for step, loss in pairs]
        setattr(
            log,
            name,
            (
                dict(zip(("step", key), np.array(placed, dtype=np.float64).T, strict=True))
                if placed
                else {}
            ),
        )
    values = columns.pop("val_loss", None)
    if values is not None and not log.heldout:
        _heldout_of_nemo(log, values, validated[kept])
    return log


def _end(steps: Array, total: int | None) -> float:
    """Return the step that a run ended at: the planned one where no line is printed between the
    last one and it.
    """
    last = float(steps[-1]) if steps.size else 0.0
    every = last - float(steps[-2]) if steps.size > 1 else 1.0
    return float(total) if total and last < total < last + every else last


def _refuse_other_loss(scanner: Scanner, columns: dict[str, Array]) -> None:
    """Raise InputError where lines lack their loss, and did not lose it to NaN: it has another name
    there.
    """
    if not np.nan_to_num(columns.get("nan", np.zeros(1))).any():
        wanted = next(name for name, column in scanner.dialect.columns.items() if column == "loss")
        held = ", ".join(
            dict.fromkeys(name for shape in scanner.shapes for name in shape.fields if name)
        )[:400]
        raise InputError(
            f"the {scanner.dialect.name} holds no field {wanted!r} but {held}; name the loss with"
            " --loss-key"
        )


def _loss_digits(scanner: Scanner, loss: Array) -> int:
    """Return the significant digits of printed losses: fewer for a small loss where decimals are
    fixed, more where the first lines have more.
    """
    first = [value for value in loss[:LOSSES_LOOKED_AT].tolist() if np.isfinite(value)]
    if scanner.dialect.decimals is not None:
        least = float(np.nanmin(np.abs(loss))) if first else 1.0
        decimals = max(
            scanner.dialect.decimals,
            *(len(repr(value).partition(".")[2]) for value in first if value >= 1e-3),
            0,
        )
        return max(1, decimals + int(np.floor(np.log10(max(least, 1e-9)))) + 1)
    return max(scanner.dialect.digits, *(significant(repr(value)) for value in first), 0)


def _heldout_of_nemo(log: Log, values: Array, validated: Array) -> None:
    """NeMo shows val_loss only on the training lines that follow a validation, averaged with them
    over the log's interval.
    """
    gaps = np.diff(log.steps["step"])
    if gaps.size and np.median(gaps) > 1:
        log.said.append(
            "held-out losses were left out: a line for several steps averages them with the"
            " evaluation before"
        )
        return
    at = validated & np.isfinite(values) & (log.steps["step"] > 1)
    log.heldout = {"step": log.steps["step"][at] - 1, "heldout_loss": values[at]}
