"""Loggers that store values by name: what the names are called, and from where their steps count.

Three families write to TensorBoard and W&B: our own run folder callback, NeMo (through Lightning, whose steps count
from 0) and Megatron-LM or Megatron-Bridge.  One call of a logger is one record; the records of one family, in the order
in which they were written, are a log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from analysis.importers.log import Log
from analysis.metrics import Array
from recipes.errors import InputError

STEP, TIME = "step", "time"  # keys of every record, beside the names that the logger was given
Record = dict[str, float]


@dataclass(frozen=True)
class Family:
    """The names that one framework logs; `first` is the step that it calls the first."""

    name: str
    loss: str
    heldout: str
    first: int
    columns: dict[str, str]


OWN = Family(
    "this project's",
    "loss",
    "heldout_loss",
    1,
    {key: key for key in ("grad_norm", "lr", "step_time_s", "fp8_gemms", "memory_gb")},
)
NEMO = Family(
    "NeMo's",
    "reduced_train_loss",
    "val_loss",
    0,
    {
        "grad_norm": "grad_norm",
        "lr": "lr",
        "train_step_timing in s": "step_time_s",
        "global_batch_size": "global_batch",
    },
)
MEGATRON = Family(
    "Megatron's",
    "lm loss",
    "lm loss validation",
    1,
    {"grad-norm": "grad_norm", "learning-rate": "lr", "iteration-time": "step_time_s", "batch-size": "global_batch"},
)
FAMILIES = (OWN, NEMO, MEGATRON)
GLOBAL_STEP = "global_step"
NAMES = frozenset([GLOBAL_STEP, *(name for family in FAMILIES for name in (family.loss, family.heldout, *family.columns))])


def log_of(records: Iterable[Record], what: str) -> Log:
    """Return the log that records tell; `what` names the source's format."""
    kept = list(records)
    family = next((f for f in FAMILIES if any(f.loss in record for record in kept)), None)
    if family is None:
        wanted = ", ".join(f.loss for f in FAMILIES)
        raise InputError(f"no training loss found in the {what}: none of {wanted}; name another source or --format")
    placed = [*_placed(kept, family)]
    log = Log(f"{what} ({family.name} names)", _columns([r for r in placed if family.loss in r], family))
    heldout = [(record[STEP], record[family.heldout]) for record in placed if family.heldout in record]
    if heldout:
        log.heldout = dict(zip((STEP, "heldout_loss"), np.array(heldout, dtype=np.float64).T, strict=True))
    _time_steps(log)
    return log


def _placed(records: Iterable[Record], family: Family) -> Iterator[Record]:
    """Yield records with their steps counted from 1.

    Lightning's counter falls back by one at each restart; global_step, which NeMo logs beside the loss, does not.
    """
    ahead: float = 1 - family.first
    for record in records:
        if family is NEMO and family.loss in record and math.isfinite(record.get(GLOBAL_STEP, math.nan)):
            ahead = record[GLOBAL_STEP] + 1 - record[STEP]
        yield {**record, STEP: record[STEP] + ahead}


def _columns(records: list[Record], family: Family) -> dict[str, Array]:
    names = {STEP: STEP, TIME: TIME, family.loss: "loss", **family.columns}
    whole = {ours: name for name, ours in names.items() if all(name in record for record in records)}  # not logged is not NaN
    found = {ours: np.array([record[name] for record in records], dtype=np.float64) for ours, name in whole.items()}
    times = next(name for name, ours in family.columns.items() if ours == "step_time_s")
    if "step_time_s" not in found and any(times in record for record in records):
        found["step_time_s"] = np.array([record.get(times, np.nan) for record in records], dtype=np.float64)
    return found


def _time_steps(log: Log) -> None:
    """Where no step times were logged, the clock between records tells them, evaluations and pauses included."""
    clock = log.steps.pop(TIME, None)
    if "step_time_s" in log.steps or clock is None or np.isnan(clock).any() or clock.size < 2:
        return
    took = np.diff(clock) / np.maximum(np.diff(log.steps[STEP]), 1)
    log.steps["step_time_s"] = np.concatenate([took[:1], took])
    log.said.append("step times are differences of the logger's clock; evaluations and pauses are in them")
