"""What a recipe does to tensors while a model trains: quantisation noise, saturation and underflow,
by layer and over time.

A loss curve says that something went wrong, not what.  At intervals a run looks closely at every
operand that it turns into FP8 (fp8.jsonl): the largest magnitude, the share that saturated (too
large for the scale), the share that became zero (too small for it), and the power of the signal
over that of the rounding noise (SQNR).  Per-tensor scales fluctuate where one outlier sets the
scale for all; smaller blocks keep the damage local.  That is what these tables and figures let one
see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from analysis.runs.load import Run
from recipes.errors import InputError
from recipes.run_folder import rows_of

ROLES = ("input", "weight", "grad")
COLUMNS = ("step", "module", "role", "amax", "saturated", "underflow", "sqnr_db")
LAYER = re.compile(r"layers\.(\d+)\.(?:self_attention|mlp)\.(\w+)$")


def load(run: Run) -> pd.DataFrame:
    """Return the diagnostics of a run: a row for each step, layer, linear and role, with the
    precision's name.

    Columns: precision, step, layer (from 0), linear (linear_qkv, …), role (input, weight, grad),
    amax, saturated and underflow (shares of the elements), sqnr_db (decibels; NaN where there was
    no noise).
    """
    path = run.folder / "fp8.jsonl"
    rows = rows_of(path) if path.exists() else []
    if not rows:
        raise InputError(
            f"{run.folder}: no fp8.jsonl, the run kept no diagnostics; FP8 runs on real text do,"
            " every train.diagnostics_interval steps"
        )
    try:
        table = pd.DataFrame(rows)[list(COLUMNS)]
        if not table["role"].isin(ROLES).all():
            raise ValueError(f"a role beside {', '.join(ROLES)}")
        found = table["module"].str.extract(LAYER)
        table = table.assign(
            precision=run.plan.precision.name, layer=found[0].astype(int), linear=found[1]
        )
        return table.drop(columns="module").astype(
            {"step": int, "sqnr_db": float, "underflow": float, "saturated": float, "amax": float}
        )
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is not what this version writes ({str(error)[:100]}); run it again"
        ) from None


def load_all(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the diagnostics of all runs that have some; InputError where none has."""
    tables = [load(run) for run in runs if (run.folder / "fp8.jsonl").exists()]
    if not tables:
        raise InputError(
            "none of the runs kept diagnostics (fp8.jsonl); name an FP8 run on gpu=cpu"
        )
    return pd.concat(tables, ignore_index=True)


def after_first(table: pd.DataFrame) -> pd.DataFrame:
    """Return what was looked at after step 1, in which delayed scaling has no history."""
    return table[table["step"] > 1]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each precision and role: over layers and the steps after the first SQNR's
    median, underflow's mean, and the worst.

    `underflow_step_1` is the mean of the first step.
    """
    groups, first = (
        part.groupby(["precision", "role"], sort=True)
        for part in (after_first(table), table[table["step"] == 1])
    )
    found = groups.agg(
        sqnr_db=("sqnr_db", "median"),
        underflow=("underflow", "mean"),
        underflow_worst=("underflow", "max"),
        saturated_worst=("saturated", "max"),
    )
    return found.assign(underflow_step_1=first["underflow"].mean()).reset_index()


def over_training(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return the median of a column over layers and linears, with its quartiles: a row for each
    precision, role and step.
    """
    groups = table.groupby(["precision", "role", "step"], sort=True)[value]
    return (
        groups.quantile([0.25, 0.5, 0.75])
        .unstack()
        .set_axis(["low", "median", "high"], axis=1)
        .reset_index()
    )


def by_layer(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return the mean of a column over steps and linears: a row for each precision, role and
    layer.
    """
    return table.groupby(["precision", "role", "layer"], sort=True)[value].mean().reset_index()
