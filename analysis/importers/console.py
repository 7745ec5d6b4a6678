"""Console logs of NeMo 2, Megatron-LM and Megatron-Bridge.

Of every line only what fits its printed form exactly is read: a line that was cut, or mixed with another rank's, gives
no number, and the step it stood for is then missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from analysis.importers.dialects import MEGATRON, NEMO, Dialect
from analysis.importers.facts import WORDS, Facts
from analysis.importers.lines import blocks_of, rank_of, significant
from analysis.importers.log import Log
from analysis.importers.ranks import one_stream
from analysis.importers.scanner import Scanner
from analysis.metrics import Array, collector_at_rest
from recipes.errors import InputError

NEMO_MARK, MEGATRON_MARK = "Training epoch ", "iteration "
NEMO_VALIDATING, MEGATRON_VALIDATING = "Validation: iteration", "validation loss at "
NEMO_VALIDATION = re.compile(r"(?<!Sanity checking )Validation: iteration \d")
NEMO_VALIDATION_LINE = re.compile(r"^([^\n]*Validation: iteration \d[^\n]*\n)", re.MULTILINE)  # between blocks of training lines
NEMO_HELDOUT = re.compile(
    r"Validation: iteration \d{1,9}/\d{1,9} \| global_step: (\d{1,15}) "
    r"\| val_loss: (\d{1,15}(?:\.\d{1,15})?(?:e[-+]\d{1,2})?)\s*$",
)
MEGATRON_VALIDATION = re.compile(r"validation loss at iteration (\d{1,15}) \| lm loss value: (\d\.\d+E[-+]\d+) \|")


def read(path: Path, only: str | None = None) -> Log:
    """Return the log in a text file; `only` ("nemo", "megatron") ignores the training lines of the other framework."""
    nemo, megatron, facts = Scanner(NEMO), Scanner(MEGATRON), Facts()
    with collector_at_rest():
        for text in blocks_of(path):
            for piece in NEMO_VALIDATION_LINE.split(text) if NEMO_VALIDATING in text else [text]:
                _scan(piece, nemo, megatron, facts)
    found = [s for name, s in (("nemo", nemo), ("megatron", megatron)) if s.ranks and only in (None, name)]
    if not found:
        raise InputError(
            f"{path}: no training line found: neither NeMo's 'Training epoch …' nor Megatron's 'iteration …'; name another log or --format"
        )
    if len(found) > 1:
        raise InputError(f"{path} mixes NeMo's and Megatron's training lines: two runs in one file; choose with --format nemo or megatron")
    return _log(found[0], facts)


def _scan(text: str, nemo: Scanner, megatron: Scanner, facts: Facts) -> None:
    if megatron.block(text, (*WORDS, *NEMO.marks, NEMO_VALIDATING)):
        if MEGATRON_VALIDATING in text:
            megatron.heldout += [(float(step), float(loss)) for step, loss in MEGATRON_VALIDATION.findall(text)]
    elif not nemo.block(text, (*WORDS, *MEGATRON.marks, NEMO_VALIDATING)):
        lines = text.split("\n")
        _scan_lines([*(f"{line}\n" for line in lines[:-1]), *lines[-1:]], nemo, megatron, facts)


def _scan_lines(lines: Iterable[str], nemo: Scanner, megatron: Scanner, facts: Facts) -> None:
    for line in lines:
        if NEMO_MARK in line:
            nemo.line(line, line.find(NEMO_MARK))
            continue
        at = line.find(MEGATRON_MARK)
        if at < 0:
            facts.line(line)
        elif "alidation" not in line:
            megatron.line(line, at)
        elif heldout := MEGATRON_VALIDATION.search(line):
            megatron.heldout.append((float(heldout[1]), float(heldout[2])))
        elif heldout := NEMO_HELDOUT.search(line):  # this project's own
            nemo.heldout.append((float(heldout[1]) + 1, float(heldout[2])))
        elif seen := NEMO_VALIDATION.search(line):
            nemo.pending.add(rank_of(line[: seen.start()]))
    nemo.flush()
    megatron.flush()


def _log(scanner: Scanner, facts: Facts) -> Log:
    columns = scanner.columns()  # also counts what is garbled
    log = Log(scanner.dialect.name, columns, loss_digits=scanner.dialect.loss_digits, facts=facts)
    if scanner.garbled:
        log.said.append(f"{scanner.garbled} training line(s) are cut or garbled and were left out")
    if not columns:
        return log
    log.loss_digits = _loss_digits(columns.get("loss", np.zeros(0)), scanner.dialect)
    columns.setdefault("loss", np.full(len(scanner.ranks), np.nan))  # every step was NaN: Megatron prints no loss then
    columns["step"] = _steps(scanner.dialect, columns)
    kept = one_stream(scanner.ranks, columns["step"], columns["loss"], log.said)
    log.steps = {key: values[kept] for key, values in columns.items()}
    _finish(log, scanner)
    return log


def _loss_digits(loss: Array, dialect: Dialect) -> int:
    """Return the significant digits of printed losses: the dialect's, or more where the first thousand have more."""
    printed = (repr(value) for value in loss[:1000].tolist() if np.isfinite(value))
    return max(dialect.loss_digits, *map(significant, printed), 0)


def _steps(dialect: Dialect, columns: dict[str, Array]) -> Array:
    """Return the steps from 1; NeMo's iteration starts anew with each epoch, global_step does not."""
    counted = columns["iteration"] + 1 - dialect.first_iteration
    if dialect is not NEMO:
        return counted
    given = columns.get("global_step", np.full(counted.size, np.nan)) + 1
    if (np.isnan(given) & (columns["epoch"] > 0)).any():
        raise InputError(
            "the log goes over more than one epoch and does not print global_step; its iterations count anew; import TensorBoard's events"
        )
    return np.where(np.isnan(given), counted, given)


def _finish(log: Log, scanner: Scanner) -> None:
    """Put columns into the project's units, and find the held-out losses."""
    steps = log.steps
    log.total = int(steps["total"][-1]) + 1 - scanner.dialect.first_iteration if steps["total"].size else None
    if "step_time_ms" in steps:
        steps["step_time_s"] = steps["step_time_ms"] / 1000
    _put_memory(log)
    if scanner.heldout:
        log.heldout = dict(zip(("step", "heldout_loss"), np.array(scanner.heldout, dtype=np.float64).T, strict=True))
    elif "val_loss" in steps:
        _heldout_of_nemo(log)
    for key in ("total", "iteration", "epoch", "global_step", "val_loss", "validated", "step_time_ms"):
        steps.pop(key, None)


def _put_memory(log: Log) -> None:
    """NeMo prints bytes; the column is kept where every line has it, for a metric has a value a step."""
    allocated, reserved = (log.steps.pop(name, np.zeros(0)) / 1e9 for name in ("memory_bytes", "reserved_bytes"))
    if allocated.size and np.isfinite(allocated).all():
        log.steps["memory_gb"] = allocated
    log.memory_gb, log.reserved_gb = (float(np.nanmax(values)) if np.isfinite(values).any() else None for values in (allocated, reserved))


def _heldout_of_nemo(log: Log) -> None:
    """NeMo shows val_loss only on the training lines that follow a validation, averaged with them over the log's interval."""
    gaps = np.diff(log.steps["step"])
    if gaps.size and np.median(gaps) > 1:
        log.said.append("held-out losses were left out: a line for several steps averages them with the evaluation before")
        return
    at = (log.steps["validated"] > 0) & np.isfinite(log.steps["val_loss"]) & (log.steps["step"] > 1)
    log.heldout = {"step": log.steps["step"][at] - 1, "heldout_loss": log.steps["val_loss"][at]}
