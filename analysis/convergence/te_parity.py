"""How many bits of this project's FP8 numerics are Transformer Engine's, as `python -m
recipes.measure.te_parity` compared them on a GPU.

A cast is a matter of bits: bytes and scales are the same or they are not, and a difference has a
cause.  Two of the causes carry no value, the sign of a zero and the bits of a NaN.  A GEMM is a
matter of sums: two orders of the same additions round to different BF16 numbers now and then, and
the distance of both from the exact product says which one is closer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from analysis.runs.measurements import measured
from recipes.te_parity_rows import OUTPUT, STATE

COLUMNS = (
    "case",
    "recipe",
    "operand",
    "what",
    "shape",
    "accumulation",
    "elements",
    "identical",
    "share",
    "scales",
    "scales_identical",
    "refused",
)
NO_VALUE = ("sign of zero", "NaN payload")  # recipes/measure/gpu/byte_differences.py


def load(folder: Path) -> pd.DataFrame:
    """Return the comparisons of a folder, a row each."""
    return measured(
        folder / "bits.jsonl",
        COLUMNS,
        f"python -m recipes.measure.te_parity --out {folder}, on a machine with Transformer Engine",
    )


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the casts by recipe and operand: shares of identical bytes, values and scales over all
    tensors, and the causes of differences.
    """
    return _summed(rows[~rows["what"].isin([OUTPUT, STATE])], ["recipe", "operand"])


def states(rows: pd.DataFrame) -> pd.DataFrame:
    """Return delayed scaling's histories and scales by case and operand."""
    return _summed(rows[rows["what"] == STATE], ["case", "operand"])


def gemms(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the outputs of the linear layers' GEMMs: share of identical bits, largest difference
    in BF16 ULP, and errors over the exact product.
    """
    mine = rows[(rows["what"] == OUTPUT) & (rows["refused"] == "")]
    size = mine["shape"].map(lambda shape: " x ".join(str(length) for length in shape))
    found = mine.assign(tokens_in_out=size).set_index(
        ["recipe", "accumulation", "operand", "tokens_in_out"]
    )
    columns = [
        "share",
        "largest",
        "largest_over_rms",
        "te_error",
        "te_bias",
        "our_error",
        "our_bias",
        "unexplained",
    ]
    return found.reindex(columns=columns).astype(float)


def refusals(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what was refused and why, each reason once a recipe."""
    return rows.loc[rows["refused"] != "", ["recipe", "what", "refused"]].drop_duplicates(
        ["recipe", "refused"]
    )


def _summed(rows: pd.DataFrame, groups: list[str]) -> pd.DataFrame:
    made = rows[rows["refused"] == ""]
    lines = [
        dict(zip(groups, names, strict=True)) | _sums(part)
        for names, part in made.groupby(groups, sort=False)
    ]
    columns = [
        *groups,
        "elements",
        "identical bytes",
        "same value",
        "identical scales",
        "unexplained",
        "causes",
    ]
    return pd.DataFrame(lines, columns=columns).set_index(groups)


def _sums(part: pd.DataFrame) -> dict[str, object]:
    causes = sum((Counter(found) for found in part["explained"]), Counter[str]())
    of_scales = sum((Counter(found) for found in part["scales_explained"]), Counter[str]())
    elements, identical = int(part["elements"].sum()), int(part["identical"].sum())
    same = identical + sum(causes[cause] for cause in NO_VALUE)
    scales = float((part["scales"] * part["scales_identical"]).sum() / part["scales"].sum())
    said = [
        *(f"{cause}: {n}" for cause, n in causes.most_common()),
        *(f"{cause}: {n} scales" for cause, n in of_scales.most_common()),
    ]
    shares = {
        "identical bytes": identical / elements,
        "same value": same / elements,
        "identical scales": scales,
    }
    return {
        "elements": elements,
        **shares,
        "unexplained": int(part["unexplained"].sum()),
        "causes": "; ".join(said),
    }
