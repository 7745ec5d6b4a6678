"""`python -m analysis.throughput RUN…`: the throughput table from real runs.

A step time is worth what it was taken from: the table gives its median and quartiles and the steps
that were timed, compares each run with the BF16 run of its own model, GPU, stack and settings, and
says whether the two have one layout (iso-mapping) or not (best-mapping), and what else differs.
TFLOP/s and MFU stand beside the convention and the peak that they use, and the published figure of
the same cell beside ours.  Runs that cannot carry a number are left out, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.render.table import Table, number, print_json, write
from analysis.runs import devices, published
from analysis.runs.load import Run
from analysis.runs.pairing import (
    LAYOUT,
    asserted,
    mapping_label,
    recorded_differences,
    records_notes,
)
from analysis.runs.published import Published, layout_of
from analysis.runs.soundness import sound
from analysis.runs.timing import MAX_SPREAD, Interval, speedup, step_time, window
from analysis.speed import expected
from analysis.speed.depth import beside_precision, device, experiment, order
from analysis.speed.full_depth import reference_of
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.estimate.flops import flops_per_token, mfu, peak_tflops
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.gpu_record import UNKNOWN

TEXT = frozenset(
    ["model", "precision", "GPUs", "layout", "pair", "clock, power", "published, source"]
)
BY_NVML = frozenset(
    ["J/step", "J/token", "clock, power"]
)  # columns that a table has where a run recorded any of them
Row = dict[str, Any]


def own_base(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the BF16 run of the same model, depth, GPU, stack and settings that differs least, on
    the same GPU if any is; None: there is none.
    """
    if run.is_base:
        return run
    found = [
        base
        for base in runs
        if base.is_base
        and experiment(base) == experiment(run)
        and base.plan.model.num_layers == run.plan.model.num_layers
    ]
    return min(
        found,
        key=lambda base: (
            len(beside_precision(base, run)),
            devices.together(base, run) != devices.SAME,
        ),
        default=None,
    )


def faster(base: Run, run: Run) -> Interval:
    """Return the speedup in tokens/s/GPU: that of the step time, corrected for another batch or
    number of GPUs.
    """
    time, scale = (
        speedup(base, run).wider(devices.apart(base, run)),
        _tokens_a_gpu(run) / _tokens_a_gpu(base),
    )
    return Interval(time.value * scale, time.low * scale, time.high * scale)


def _tokens_a_gpu(run: Run) -> float:
    return run.plan.tokens_per_step / run.plan.num_gpus


def published_of(run: Run) -> Published | None:
    """Return the published row of a run's cell: model at full depth, GPU, precision, GPUs,
    sequence, layout and batch; the nearest NeMo.
    """
    plan, whole = run.plan, reference_of(run.plan)
    if whole is None or not whole.model.is_built_as(plan.model):
        return None
    cell, layout = (
        (
            plan.model.name,
            plan.gpu.name,
            plan.precision.name,
            plan.seq_length,
        ),
        layout_of(plan),
    )
    same = (layout.num_gpus, layout.global_batch)
    found = (
        row
        for row in published.rows()
        if (row.model, row.gpu, row.precision, row.seq_length) == cell
        and published.fits(row, layout)
        and (row.layout.num_gpus, row.layout.global_batch) == same
    )
    return published.closest(found, plan.stack.recommended, layout.num_gpus)


def rows(runs: Sequence[Run], causal: bool = False) -> list[Row]:
    """Return a row a run, BF16 first within an experiment; `causal`: count half of the attention's
    FLOPs.
    """
    ordered = sorted(
        runs, key=lambda run: (experiment(run), run.plan.model.num_layers, order(run), run.name)
    )
    found = [_row(run, own_base(run, ordered), causal) for run in ordered]
    if any(run.imported for run in ordered):
        found = [
            row | expected.columns(run, row["tokens_per_s_per_gpu"])
            for run, row in zip(ordered, found, strict=True)
        ]
    return found


def _row(run: Run, base: Run | None, causal: bool) -> Row:
    plan, time = run.plan, step_time(run)
    first, last = window(run)
    rate = _tokens_a_gpu(run) / time.value if run.has_rate else None
    whole = reference_of(plan)
    return {
        "run": run.name,
        "model": plan.model.name,
        "num_layers": plan.model.num_layers,
        "model_layers": whole.model.num_layers if whole else None,
        "vocab_size": plan.model.vocab_size,
        "precision": plan.precision.name,
        "gpu": plan.gpu.name,
        "device": device(run),
        "num_gpus": None if "num_gpus" in run.imported.get("assumed", []) else plan.num_gpus,
        "layout": _layout(run),
        "seq_length": plan.seq_length,
        "step_time_s": time.value,
        "step_time_low_s": time.low,
        "step_time_high_s": time.high,
        "first_timed_step": first,
        "last_timed_step": last,
        "tokens_per_s_per_gpu": rate,
        **_against(base, run),
        **_flops(run, rate, causal),
        "memory_gb": _peak(run),
        "memory_gb_bf16": _peak(base) if base else None,
        **devices.facts(run),
        **_published(run, rate),
        "label": run.label("step_time"),
        "asserted": asserted(run),
        "commit": (run.manifest.get("code") or {}).get("commit"),
    }


def _layout(run: Run) -> str:
    m = run.plan.mapping
    flags = "".join(f" {name}" for name in ("fsdp", "cuda_graphs") if getattr(m, name))
    return f"tp{m.tp} pp{m.pp} cp{m.cp} vp{m.vp} mbs{m.micro_batch} gbs{m.global_batch}{flags}"


def _against(base: Run | None, run: Run) -> Row:
    if base is None or base is run:
        pair = (
            "its own base"
            if base is run
            else "no BF16 run of its model, depth, GPU, stack and settings"
        )
        alone: Row = {
            "base": base.name if base else None,
            "pair": pair,
            "pair_gpu": None,
            "also_differs": [],
        }
        return {**alone, "speedup_over_bf16": 1.0 if base else None, **_ends(None)}
    differs = beside_precision(base, run)
    ratio = faster(base, run) if base.has_rate and run.has_rate else None
    recorded = recorded_differences(base, run)
    other = [
        *(each for each in differs if not each.startswith(LAYOUT)),
        *recorded.named,
        *recorded.speed,
    ]
    named = {
        "base": base.name,
        "pair": mapping_label(differs),
        "pair_gpu": devices.together(base, run),
        "also_differs": other,
    }
    return {**named, "speedup_over_bf16": ratio and ratio.value, **_ends(ratio)}


def _ends(interval: Interval | None) -> Row:
    return {
        "speedup_low": interval.low if interval else None,
        "speedup_high": interval.high if interval else None,
    }


def _flops(run: Run, rate: float | None, causal: bool) -> Row:
    """Return model TFLOP/s a GPU and MFU, against the dense peak of the format that the linear
    layers multiply in.
    """
    model, gpu, length = run.plan.model, run.plan.gpu, run.plan.seq_length
    peak = peak_tflops(gpu, run.plan.precision)
    return {
        "tflops_per_gpu": rate * flops_per_token(model, length, causal) / 1e12 if rate else None,
        "flops_convention": "causal attention" if causal else "full attention",
        "mfu": mfu(rate, model, length, causal, peak) if peak and rate else None,
        "peak_tflops": peak,
        "peak": f"{gpu.name} {'BF16' if run.is_base else 'FP8'} dense",
    }


def _peak(run: Run) -> float | None:
    """Return the peak of allocated memory in GB; a log may print it once and not with each step."""
    return (
        float(run.steps["memory_gb"].max())
        if "memory_gb" in run.steps
        else run.imported.get("memory_gb")
    )


def _published(run: Run, rate: float | None) -> Row:
    row = published_of(run) if rate else None
    return {
        "published_tokens_per_s_per_gpu": row.tokens_per_s_per_gpu if row else None,
        "share_of_published": rate / row.tokens_per_s_per_gpu if row and rate else None,
        "published_source": f"{row.source}, NeMo {row.nemo}" if row else None,
    }


def cells(values: Row) -> dict[str, str]:
    """Return a row as the columns that people read."""
    cut = (
        f" ({values['num_layers']} of {values['model_layers']} layers)"
        if values["model_layers"] not in (None, values["num_layers"])
        else ""
    )
    share, against = values["share_of_published"], values["memory_gb_bf16"]
    return {
        "model": f"{values['model']}{cut}",
        "precision": values["precision"],
        "GPUs": f"{values['num_gpus'] or '?'} {values['gpu']}",
        "layout": f"{values['layout']} seq{values['seq_length']}",
        "step, s": (
            f"{values['step_time_s']:.3f} ({values['step_time_low_s']:.3f} to"
            f" {values['step_time_high_s']:.3f}){devices.mark(values)}"
        ),
        "steps": f"{values['first_timed_step']} to {values['last_timed_step']}",
        "tokens/s/GPU": (
            "–"
            if values["tokens_per_s_per_gpu"] is None
            else f"{values['tokens_per_s_per_gpu']:,.0f}"
        ),
        "speedup": _speedup(values),
        "pair": _pair(values) if values["base"] != values["run"] else "–",
        "TFLOP/s": number(values["tflops_per_gpu"], 0),
        "MFU": "–" if values["mfu"] is None else f"{values['mfu']:.1%}",
        "J/step": (
            "–" if values["energy_per_step_j"] is None else f"{values['energy_per_step_j']:,.0f}"
        ),
        "J/token": devices.per_token(values),
        "clock, power": devices.clocks(values).replace(UNKNOWN, "–"),
        "peak GB (BF16)": f"{number(values['memory_gb'], 1)} ({number(against, 1)})",
        "of published": "–" if share is None else f"{share:.0%}",
        **expected.cells(values),
    }


def _pair(values: Row) -> str:
    other = dict.fromkeys(each.split(" ")[0].partition(".")[0] for each in values["also_differs"])
    gpu = [values["pair_gpu"]] if values["pair_gpu"] else []
    return ", ".join([values["pair"].split(" (")[0], *(f"other {part}" for part in other), *gpu])


def _speedup(values: Row) -> str:
    if values["speedup_low"] is None:
        return "–" if values["speedup_over_bf16"] is None else "1"
    return (
        f"{values['speedup_over_bf16']:.2f}x ({values['speedup_low']:.2f} to"
        f" {values['speedup_high']:.2f})"
    )


def notes(found: Sequence[Row], left_out: Sequence[str]) -> list[str]:
    """Return what the columns rest on, what pairs differ in, where published figures are from, and
    what was left out.
    """
    names, peaks, labels, conventions = (
        ", ".join(sorted({text(row) for row in found}))
        for text in (
            lambda row: row["device"],
            lambda row: (
                f"{row['peak']} {row['peak_tflops']:g} TFLOP/s"
                if row["peak_tflops"]
                else f"{row['peak']} unknown"
            ),
            lambda row: row["label"],
            lambda row: row["flops_convention"],
        )
    )
    said = [
        (
            f"Step time {labels} on {names}: median with quartiles over the steps named; runs whose"
            f" quartiles, or whose first and last third, lie more than {MAX_SPREAD:.0%} apart are"
            " refused. Speedup: tokens/s/GPU over the BF16 run of the same model, depth, GPU,"
            " stack and settings, with its 95 % interval."
        ),
        (
            f"TFLOP/s of the model's FLOPs with {conventions}; MFU against {peaks}. Peak memory in"
            " GB of 10⁹ bytes, as PyTorch's allocator saw it."
        ),
    ]
    said += _pairs(found)
    said += devices.notes((row["run"], row["pair_gpu"]) for row in found if row["pair_gpu"])
    said += [
        f"{row['run']}: imported; asserted, not proved: {', '.join(row['asserted'])}"
        for row in found
        if row["asserted"]
    ]
    if any(row.get("expected") for row in found):
        said.append(expected.RANGES)
    said += [row["expected"] for row in found if row.get("expected")]
    sources = dict.fromkeys(row["published_source"] for row in found if row["published_source"])
    said += [f"Published: {source}" for source in sources]
    return [*said, *(f"Left out: {reason}" for reason in left_out)]


def _pairs(found: Sequence[Row]) -> list[str]:
    """Return a sentence for each way in which pairs differ in more than precision."""
    named = dict[str, list[str]]()
    for row in found:
        layout = [row["pair"]] if row["pair"].startswith("best-mapping") else []
        for what in (
            *layout,
            *(f"Beside precision and layout: {each}" for each in row["also_differs"]),
        ):
            named.setdefault(what, []).append(row["run"])
    return [f"{what}: {', '.join(names)}" for what, names in named.items()]


def table(folders: Sequence[Path], causal: bool = False) -> Table:
    """Return the table of runs; InputError where none can be used."""
    runs, left_out = sound(folders)
    if not runs:
        raise InputError(f"none of the runs can stand in the table: {'; '.join(left_out)}")
    found = rows(runs, causal)
    shown, said = [cells(row) for row in found], notes(found, left_out)
    measured = devices.energy_notes(runs)
    if not measured:
        shown = [
            {column: cell for column, cell in line.items() if column not in BY_NVML}
            for line in shown
        ]
    return Table(
        "Throughput",
        shown,
        found,
        [*said, *records_notes(runs), *devices.shared_notes(runs), *measured],
        TEXT,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m analysis.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, BF16 ones among them"
    )
    parser.add_argument("--out", type=Path, help="write the table there: .csv, .md or .html")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--causal",
        action="store_true",
        help=(
            "count causal attention (half), as Megatron-LM does; default: full, as NeMo 25.04 does"
        ),
    )
    args = parser.parse_args(argv)
    try:
        made = table(args.runs, args.causal)
        if args.out:
            write(args.out, made)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print_json(made.rows, made)
    else:
        made.print()
    return 0


if __name__ == "__main__":
    command(main)
