"""`python -m analysis.predict`: step time, throughput, speedup and memory where you have no such
GPU, with the error of the prediction.

    python -m analysis.predict model=llama3_70b precision=fp8_current gpu=h100
        the recommended layout
    python -m analysis.predict model=llama3_8b precision=mxfp8 gpu=b200 \\
        --sweep mapping.micro_batch=1,2,4
    python -m analysis.predict model=llama31_405b gpu=gb200 --sweep num_gpus=128,256,512 --weak
    python -m analysis.predict model=llama3_70b precision=fp8_current gpu=b200 num_gpus=64 --search
    python -m analysis.predict --validate
        every published row beside its prediction
    python -m analysis.predict --unseen
        published rows that are in no reference file, beside rivals

Overrides are those of every other command.  Settings are those with which NVIDIA measures speed
(experiment=throughput) unless you name others.  Nothing is run: work is counted from the plan,
priced with constants that are known or fitted to published step times (analysis/predictor), and the
interval is how far off rows were that the constants did not know.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.predictor.constants import borrowed
from analysis.predictor.forecast import Forecast, compose, compose_any_layout, forecast, values
from analysis.predictor.model.step import TERMS
from analysis.predictor.search import search
from analysis.render.table import PAGE, Table, number, percent, print_json
from analysis.render.table import write as write_tables
from recipes.cli import ArgumentParser, command
from recipes.compose.tree import sweep
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.files import write_file
from recipes.plan import Plan

if TYPE_CHECKING:
    from analysis.render.figure import Figure

Row = dict[str, Any]
Draw = Callable[[], "Figure"]
TEXT = frozenset(["what", "where the time goes", "layout", "plan", "memory"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    args = _parser().parse_args(argv)
    try:
        made, draw = _made(args)
        if args.out:
            _write(args.out, made, draw)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print_json(
            (
                [table.rows for table in made]
                if args.validate or args.refit or args.unseen
                else made[0].rows
            ),
            *made,
        )
    else:
        for table in made:
            table.print()
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m analysis.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="the plan, as in every command: model=… precision=… gpu=… mapping.tp=…",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a row for each value (repeat it for a product)",
    )
    what.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=10,
        metavar="N",
        help="the N fastest layouts that fit in memory (default: 10)",
    )
    what.add_argument(
        "--validate",
        action="store_true",
        help="fit again and print every published row beside its prediction",
    )
    what.add_argument(
        "--unseen",
        nargs="?",
        const="both",
        choices=("choose", "report", "both"),
        help=(
            "print published rows that are in no reference file, all or of one half"
            " (docs/predictor.md)"
        ),
    )
    what.add_argument(
        "--refit",
        action="store_true",
        help="the same, and keep the constants (analysis/predictor/constants.json)",
    )
    parser.add_argument(
        "--weak",
        action="store_true",
        help="with --sweep num_gpus=…: the global batch grows with the GPUs",
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help=(
            "count causal attention (half), as Megatron-LM does; default: full, as NeMo 25.04 does"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print the values as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        help="write there: .html (tables and figure), .png (figure), .csv or .md (tables)",
    )
    return parser


def _made(args: argparse.Namespace) -> tuple[list[Table], Draw | None]:
    if args.weak and not any(axis.startswith("num_gpus=") for axis in args.sweep):
        raise InputError(
            "--weak lets the global batch grow with the GPUs of a sweep; add --sweep num_gpus=…"
        )
    if args.validate or args.refit or args.unseen:
        if args.overrides:
            raise InputError(
                f"{args.overrides[0]}: the validation takes every published row and no overrides;"
                " leave them out"
            )
        return _validated(args), None
    several = next((o for o in args.overrides if len(sweep([o])) > 1), None)
    if several:
        raise InputError(f"{several}: several values make a sweep; write --sweep {several}")
    if args.sweep:
        return _swept(args)
    if args.search is not None:
        return _searched(args)
    return _one(forecast(compose(args.overrides), args.overrides), args.causal)


def _drawing(title: str, bars: Sequence[tuple[str, dict[str, float]]]) -> Draw:
    """Return what draws the figure; matplotlib is imported when it is drawn."""

    def draw() -> Figure:
        from analysis.predictor.figures import stacked

        return stacked(title, bars)

    return draw


def _validated(args: argparse.Namespace) -> list[Table]:
    """Return the tables of a validation.  A prediction imports nothing of it."""
    if args.unseen:
        from analysis.predictor.calibration.unseen_tables import tables as unseen_tables

        return list(unseen_tables(args.unseen))
    from analysis.predictor.calibration import gemm_efficiency, store
    from analysis.predictor.calibration.published_steps import rows
    from analysis.predictor.calibration.sensitivity import otherwise
    from analysis.predictor.calibration.tables import tables
    from analysis.predictor.calibration.unseen import unseen_rows
    from analysis.predictor.calibration.validation import validate

    if args.refit:
        gemm_efficiency.write()
    found = validate()
    if args.refit:
        store.write(found, choices=otherwise(rows(), unseen_rows()))
    return list(tables(found))


# ----------------------------------------------------------------------------------------- one plan


def _one(found: Forecast, causal: bool) -> tuple[list[Table], Draw]:
    row = values(found, causal)
    bars = [(row["precision"], row["terms_s"])]
    if found.iso:
        bars.insert(0, ("bf16, same layout", found.iso.prediction.terms))
    title = f"{row['model']} in {row['precision']} on {row['num_gpus']} {row['gpu']}"
    shown = [{"what": name, "value": text} for name, text in _facts(row)]
    total = row["step_time_s"]
    spent = [
        {
            "where the time goes": TERMS[name],
            "seconds": f"{value:.3f}",
            "share": f"{value / total:.1%}",
        }
        for name, value in sorted(row["terms_s"].items(), key=lambda item: -item[1])
        if value
    ]
    return [
        Table(f"{title} (predicted)", shown, [row], _notes([row]), TEXT),
        Table("Where the time goes (predicted)", spent, [row], (), TEXT),
    ], _drawing(title, bars)


def _facts(row: Row) -> list[tuple[str, str]]:
    have = row["memory_usable_gb"]
    return [
        ("layout", _layout(row)),
        (
            "step time",
            (
                f"{row['step_time_s']:.3f} s ({row['step_time_low_s']:.3f} to"
                f" {row['step_time_high_s']:.3f})"
            ),
        ),
        (
            "tokens/s/GPU",
            (
                f"{row['tokens_per_s_per_gpu']:,.0f} ({row['tokens_per_s_per_gpu_low']:,.0f} to"
                f" {row['tokens_per_s_per_gpu_high']:,.0f})"
            ),
        ),
        ("TFLOP/s/GPU", f"{row['tflops_per_gpu']:,.0f} ({row['flops_convention']})"),
        (
            "MFU",
            (
                f"{percent(row['mfu'], signed=False)} of {number(row['peak_tflops'], 0)} TFLOP/s"
                f" ({row['peak']})"
            ),
        ),
        ("memory", f"{row['memory_gb']:.1f} GB of {number(have, 1)} GB: {row['memory_fits']}"),
        ("speedup over bf16, iso-mapping", _speedup(row, "speedup_over_bf16")),
        ("speedup over bf16, best-mapping", _speedup(row, "speedup_over_bf16_best_mapping")),
    ]


def _layout(row: Row) -> str:
    m = row["mapping"]
    sizes = (
        f"tp{m['tp']} pp{m['pp']} cp{m['cp']} vp{m['vp']} dp{row['data_parallel']}"
        f" mbs{m['micro_batch']} gbs{m['global_batch']}"
    )
    flags = [name for name in ("fsdp", "cuda_graphs") if m[name]]
    counts = [f"{name} {m[name]}" for name in ("recompute_layers", "offload_layers") if m[name]]
    return " ".join([sizes, f"seq{row['seq_length']}", *flags, *counts])


def _speedup(row: Row, name: str) -> str:
    if row[name] is None:
        return "–"
    beyond = "" if row[f"{name}_base_fits"] else ", which does not fit in memory"
    of_another = borrowed(row["precision"])
    whose = f", interval of {of_another}'s pairs" if of_another else ""
    return (
        f"{row[name]:.2f}x ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f}{whose}){beyond}"
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    settings = ", ".join(sorted({row["settings"] for row in rows}))
    intervals = dict.fromkeys(row["interval"] for row in rows)
    speedups = dict.fromkeys(row["speedup_interval"] for row in rows if row["speedup_interval"])
    return [
        (
            f"Predicted, not measured, under settings={settings}; errors: python -m"
            " analysis.predict --validate."
        ),
        *(f"In brackets: {text}." for text in intervals),
        *(f"Speedups, in brackets: {text}." for text in speedups),
    ]


# ------------------------------------------------------------------------------------- many of them


def _swept(args: argparse.Namespace) -> tuple[list[Table], Draw]:
    """Return a row for each point of the sweep; a plan that the rules refuse is a row with the
    reason.
    """
    for axis in args.sweep:
        if "=" not in axis or not axis.split("=", 1)[1]:
            raise InputError(
                f"--sweep {axis}: no values; write --sweep KEY=V1,V2, e.g. --sweep"
                " mapping.micro_batch=1,2,4"
            )
    base = compose(args.overrides) if args.weak else None
    points = [(choice, _point([*args.overrides, *choice], base)) for choice in sweep(args.sweep)]
    rows = [
        (" ".join(choice), point if isinstance(point, str) else values(point, args.causal))
        for choice, point in points
    ]
    known = [(name, row) for name, row in rows if not isinstance(row, str)]
    if not known:
        raise InputError(f"no point of the sweep can run; the first: {rows[0][1]}")
    title = f"Sweep, {known[0][1]['model']} in {known[0][1]['precision']} on {known[0][1]['gpu']}"
    refused = [f"{name}: refused, {row}" for name, row in rows if isinstance(row, str)]
    table = Table(
        title,
        [_line(name, row) for name, row in known],
        [row for _, row in known],
        [*_notes([row for _, row in known]), *refused],
        TEXT,
    )
    return [table], _drawing(title, [(name, row["terms_s"]) for name, row in known])


def _point(overrides: list[str], base: Plan | None) -> Forecast | str:
    """Return the forecast of a point, its global batch grown with its GPUs where a base is given;
    or why it cannot run.
    """
    try:
        if base is None:
            return forecast(compose(overrides), overrides)
        gpus = int(next(o for o in reversed(overrides) if o.startswith("num_gpus=")).split("=")[1])
        grown = [
            *overrides,
            f"mapping.global_batch={base.mapping.global_batch * gpus // base.num_gpus}",
        ]
        return forecast(compose(grown), grown)
    except InputError as error:
        return str(error)
    except ValueError:
        return "num_gpus is no whole number"


def _line(name: str, row: Row) -> dict[str, str]:
    return {
        "plan": name,
        "layout": _layout(row),
        "GPUs": str(row["num_gpus"]),
        "step, s": (
            f"{row['step_time_s']:.3f} ({row['step_time_low_s']:.3f} to"
            f" {row['step_time_high_s']:.3f})"
        ),
        "tokens/s/GPU": f"{row['tokens_per_s_per_gpu']:,.0f}",
        "TFLOP/s": f"{row['tflops_per_gpu']:,.0f}",
        "MFU": percent(row["mfu"], signed=False),
        "GB": f"{row['memory_gb']:.0f}",
        "iso speedup": (
            "–" if row["speedup_over_bf16"] is None else f"{row['speedup_over_bf16']:.2f}x"
        ),
    }


def _searched(args: argparse.Namespace) -> tuple[list[Table], Draw]:
    """Return the fastest layouts, and for comparison the plan as it was asked for, where that can
    run.
    """
    if args.search < 1:
        raise InputError(
            f"--search {args.search}: a number of layouts to show is wanted; give 1 or more"
        )
    plan = compose_any_layout(args.overrides)
    rows = [values(forecast(found), args.causal) for found, _ in search(plan, args.search)]
    title = (
        f"Fastest layouts, {plan.model.name} in {plan.precision.name} on {plan.num_gpus}"
        f" {plan.gpu.name}"
    )
    asked = _point(args.overrides, None)
    own = [] if isinstance(asked, str) else [values(asked, args.causal)]
    lines = [_line(str(place), row) for place, row in enumerate(rows, 1)] + [
        _line("as asked", row) for row in own
    ]
    said = [*_notes(rows), "Layouts that differ by less than the error are equal."]
    said += [f"As asked: refused, {asked}"] if isinstance(asked, str) else []
    table = Table(title, lines, [*rows, *own], said, TEXT)
    return [table], _drawing(title, [(_layout(row), row["terms_s"]) for row in rows[:6]])


# ------------------------------------------------------------------------------------------- output


def _write(path: Path, made: Sequence[Table], draw: Draw | None) -> None:
    """Write the tables, or the figure, or both, by the suffix; InputError where that cannot be."""
    if path.suffix == ".png" and draw is None:
        raise InputError(f"{path}: the validation has no figure; give --out .html, .csv or .md")
    if path.suffix not in (".png", ".html"):
        write_tables(
            path, *(replace(table, rows=[_flat(row) for row in table.rows]) for table in made)
        )
        return
    if path.suffix == ".png":
        assert draw is not None
        write_file(path, draw().png())
    else:
        body = "\n".join([*(table.html() for table in made), draw()._repr_html_() if draw else ""])
        write_file(path, PAGE.format(title=made[0].title, body=body))


def _flat(row: Row) -> Row:
    """Return a row with the parts of its parts as columns of their own: mapping.tp,
    terms_s.gemm.
    """
    flat: Row = {}
    for key, value in row.items():
        flat.update(
            {f"{key}.{part}": x for part, x in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return flat


if __name__ == "__main__":
    command(main)
