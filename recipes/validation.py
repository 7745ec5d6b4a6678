"""`python -m recipes.validation`: the memory estimate held against peaks that were measured or published.

A prediction is worth what its error is known to be.  Each row of reference/peak_memory.csv is composed as a plan, predicted
and compared; the README's table of errors is read off what this prints.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.compose import compose_plan
from recipes.memory import estimate

PEAKS = Path(__file__).resolve().parent / "reference" / "peak_memory.csv"
Row = dict[str, str | float]


def validation() -> list[Row]:
    """Return the rows of peak_memory.csv with `predicted_gb` and `error` (predicted over peak, minus one)."""
    with PEAKS.open(newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        with_step = row["kind"] != "measured without step"  # some runs stopped before the optimizer's step
        peak, predicted = float(row["peak_gb"]), estimate(compose_plan(_overrides(row)), with_step).total_gb
        row.update(peak_gb=peak, predicted_gb=round(predicted, 1), error=round(predicted / peak - 1, 3))
    return rows


def _overrides(row: Row) -> list[str]:
    axes = [f"{key}={row[key]}" for key in ("model", "precision", "gpu", "num_gpus", "seq_length")]
    layout = [f"mapping.{key}={row[key]}" for key in ("tp", "pp", "cp", "vp", "fsdp", "micro_batch", "recompute_layers")]
    return [*axes, *layout, "executor=local", *str(row["overrides"]).split()]


def shown(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table("model", "precision", "gpu", "layout", "peak GB", "kind", "predicted", "error", "note", box=None)
    for row in rows:
        layout = f"{row['num_gpus']} GPUs tp{row['tp']} pp{row['pp']} cp{row['cp']}"
        numbers = (f"{row['peak_gb']:.1f}", str(row["kind"]), f"{row['predicted_gb']:.1f}", f"{float(row['error']):+.1%}")
        table.add_row(str(row["model"]), str(row["precision"]), str(row["gpu"]), layout, *numbers, str(row["note"])[:60])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m recipes.validation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    rows, as_json = validation(), parser.parse_args(argv).json
    print(json.dumps(rows, indent=1)) if as_json else Console(width=180).print(shown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
