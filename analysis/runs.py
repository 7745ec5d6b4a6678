"""Run folders as arrays, and what makes one unusable.

A comparison is worth what its runs are worth, so a run is refused here, with one line that says why, before any number
is taken from it: one that has not ended, lost its end, skipped or repeated a step, met NaN or infinity, cannot be read,
or calls itself FP8 without a single FP8 GEMM in some step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from recipes.errors import InputError
from recipes.plan import Plan
from recipes.run_folder import read_plan, status_of

Array = NDArray[np.float64]
REQUIRED = ("loss", "tokens", "step_time_s")


@dataclass(frozen=True)
class Run:
    """A sound run.

    `steps` holds a column of n values for each key of the training lines of metrics.jsonl, `step` included, in order;
    `heldout` the same for the evaluations.
    """

    folder: Path
    plan: Plan
    manifest: dict[str, Any]
    steps: dict[str, Array]
    heldout: dict[str, Array]

    @property
    def name(self) -> str:
        """The run's name, unique among the runs of a sweep."""
        return self.plan.run_name

    @property
    def is_base(self) -> bool:
        """Whether this is a BF16 run, which the others are compared with."""
        return self.plan.precision.fp8 is None

    def label(self, what: str) -> str:
        """Return where a number of this run comes from: "measured" or "emulated"; `what` is loss or step_time."""
        return str(self.manifest.get("labels", {}).get(what, "unlabelled"))


def load_run(folder: Path) -> Run:
    """Return the run in `folder`; InputError with the reason where it is not sound."""
    plan = read_plan(folder)
    status = status_of(folder)
    if status != "done":
        raise InputError(f"{folder}: the run is {status}, not done; run the same launch command again to continue it")
    rows = _rows(folder / "metrics.jsonl")
    steps = _columns([row for row in rows if "loss" in row], folder)
    heldout = _columns([row for row in rows if "heldout_loss" in row], folder)
    run = Run(folder, plan, _manifest(folder), steps, heldout)
    for check in (_is_complete, _is_finite, _is_what_it_says):
        check(run)
    return run


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} is missing or no JSON object: what ran cannot be traced; run it again") from None


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return every line of a .jsonl file; InputError that names the first one that is no JSON object."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        raise InputError(f"{path} cannot be read; is this a run folder?") from None
    if lines.pop():
        raise InputError(f"{path}: the last line is cut; the run lost its end, run it again")
    try:
        rows = orjson.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a line is no JSON object; the file was changed, run it again")
    return list(rows)


def _row(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)  # unlike orjson, it reads the NaN and Infinity that a diverged run writes
    except ValueError:
        raise InputError(f"{path} line {number} cannot be read; the file was changed, run it again") from None


def _columns(rows: list[dict[str, Any]], folder: Path) -> dict[str, Array]:
    keys = rows[0].keys() if rows else ()
    try:
        return {key: np.array([np.nan if row[key] is None else row[key] for row in rows], dtype=np.float64) for key in keys}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder}: lines of metrics.jsonl differ in what they hold ({error}); run it again") from None


def _is_complete(run: Run) -> None:
    wanted = run.plan.train.max_steps
    missing = [key for key in REQUIRED if key not in run.steps]
    if missing:
        raise InputError(f"{run.folder}: metrics.jsonl has no {missing[0]}; the run wrote no training step")
    steps = run.steps["step"]
    wrong = np.flatnonzero(steps != np.arange(1, len(steps) + 1))
    if wrong.size:
        raise InputError(f"{run.folder}: step {wrong[0] + 1} is missing, repeated or out of order in metrics.jsonl; run it again")
    evaluated = run.heldout.get("step", np.zeros(0))
    if (np.diff(evaluated) <= 0).any():
        raise InputError(f"{run.folder}: held-out losses are repeated or out of order in metrics.jsonl; run it again")
    if len(steps) != wanted:
        raise InputError(f"{run.folder}: metrics.jsonl ends at step {len(steps)} of {wanted}; the run lost its end, run it again")


def _is_finite(run: Run) -> None:
    for where, columns in (("", run.steps), ("held-out ", run.heldout)):
        for key in ("loss", "heldout_loss", "grad_norm", "step_time_s", "tokens"):
            bad = np.flatnonzero(~np.isfinite(columns.get(key, np.zeros(0))))
            if bad.size:
                step = int(columns["step"][bad[0]])
                raise InputError(f"{run.folder}: {where}{key} is no finite number in {bad.size} step(s), first at step {step}; the run diverged")


def _is_what_it_says(run: Run) -> None:
    """An FP8 run shows FP8 GEMMs in every step, a BF16 run none."""
    gemms = run.steps.get("fp8_gemms")
    if gemms is None:
        raise InputError(f"{run.folder}: no fp8_gemms in metrics.jsonl: nothing shows in which precision it ran")
    if run.is_base and gemms.any():
        raise InputError(f"{run.folder}: a BF16 run that ran FP8 GEMMs; its plan does not say what was trained")
    idle = np.flatnonzero(~(gemms > 0))
    if not run.is_base and idle.size:
        raise InputError(
            f"{run.folder}: {run.plan.precision.name} ran no FP8 GEMM in {idle.size} step(s), first at step {idle[0] + 1}: not an FP8 run"
        )
