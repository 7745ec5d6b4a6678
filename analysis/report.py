"""`python -m analysis.report RUN RUN…`: one HTML page with verdicts, figures, what differed, and
what ran.

The page needs nothing beside itself: figures are inline SVG, there is no script and no link.  Runs
that are not sound are left out and listed with the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.convergence import numerics_figures
from analysis.convergence.comparison import (
    Comparison,
    all_notes,
    compare,
    headline,
    shown,
    terminal_table,
)
from analysis.convergence.figures import figures
from analysis.convergence.tasks import section
from analysis.render.figure import Figure
from analysis.render.pages import render
from analysis.render.table import wide_console
from analysis.runs import devices
from analysis.runs.load import Run, load_all
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError, one_line
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.files import write_file
from recipes.gpu_record import UNKNOWN


def page(found: Comparison, drawn: Sequence[Figure], left_out: Sequence[str]) -> str:
    """Return the report as HTML; every text that comes from a run is escaped."""
    from markupsafe import Markup

    rows = found.rows
    return render(
        "report.html.j2",
        base=found.bases[0],
        rows=rows,
        shown=shown(rows),
        notes=all_notes(found),
        headline=headline(rows),
        evaluation=section(found.bases, found.verdicts),
        figures=[
            (figure, Markup(figure.svg())) for figure in drawn
        ],  # drawn here, by matplotlib, which escapes its text
        runs=[(run, facts(run)) for run in found.runs],
        left_out=left_out,
    )


def facts(run: Run) -> dict[str, Any]:
    """Return what a reader should know of how a run was made."""
    m = run.manifest
    code, data = m.get("code") or {}, m.get("data") or {}
    return {
        "folder": str(run.folder),
        "commit": (
            f"{code.get('commit') or 'unknown'}{' with changes' if code.get('dirty') else ''}"
        ),
        "device": m.get("device", "unknown"),
        "attention": m.get("attention") or UNKNOWN,
        **devices.described(run),
        "versions": ", ".join(f"{k} {v}" for k, v in (m.get("versions") or {}).items() if v),
        "environment": (
            ", ".join(f"{k}={v}" for k, v in (m.get("environment") or {}).items()) or UNKNOWN
        ),
        "data": json.dumps(data.get("source", "unknown")),
        "steps, tokens": f"{int(run.steps['step'][-1]):,}, {int(run.steps['tokens'][-1]):,}",
        "FP8 GEMMs": (
            f"{int(run.steps['fp8_gemms'].sum()):,}" if "fp8_gemms" in run.steps else "not recorded"
        ),
        "peak memory": (
            f"{run.steps['memory_gb'].max():.2f} GB" if "memory_gb" in run.steps else "unknown"
        ),
    }


def report(folders: Sequence[Path], out: Path, png: Path | None) -> None:
    """Write the report on the runs to `out`, and its figures as PNG to the folder `png`."""
    runs, left_out = load_all(folders)
    if not runs:
        raise InputError(f"none of the runs can be used: {'; '.join(left_out)}")
    found = _compared(runs, left_out)
    drawn = [*figures(found), *numerics_figures.figures(found.runs)]
    write_file(out, page(found, drawn, left_out))
    if png:
        for figure in drawn:
            figure.write_png(png)
    console = wide_console()
    console.print(terminal_table(found.rows))
    for line in [*left_out, *all_notes(found)]:
        console.print(line, markup=False, highlight=False)
    print(one_line(f"report: {out}"))


def _compared(runs: Sequence[Run], left_out: Sequence[str]) -> Comparison:
    """Return the comparison; where none can be made of the sound runs, InputError that names those
    left out too.
    """
    try:
        return compare(runs)
    except InputError as error:
        raise InputError("; left out: ".join([str(error), *left_out])) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, at least one BF16 and one FP8",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        help="where the page is written (default: report.html)",
    )
    parser.add_argument(
        "--png", type=Path, metavar="DIR", help="write the figures there as PNG too"
    )
    args = parser.parse_args(argv)
    try:
        report(args.runs, args.out, args.png)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    command(main)
