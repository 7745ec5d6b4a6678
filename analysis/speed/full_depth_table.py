"""`python -m analysis.speed.full_depth_table RUN RUN…`: the post's third figure, FP8's speedup in
training, from runs cut in depth.

Each model is measured at its true width and two depths or more; `analysis.speed.depth` takes a step
apart, `analysis.speed.full_depth` puts whole models together.  The table holds them beside the
post's speedups and NVIDIA's published step times, and says which goals, set before the measurement,
were met.  The notes name what differs from the published runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.render.figure import COLOURS, Figure, axes
from analysis.render.table import Table, number, print_json, write
from analysis.runs import devices
from analysis.runs.pairing import unproved
from analysis.runs.published import post_speedups
from analysis.runs.soundness import sound
from analysis.runs.timing import Interval
from analysis.speed import depth
from analysis.speed.depth import Depth, base_of, ratio
from analysis.speed.full_depth import Whole, assemble, published_base, published_step, reference_of
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT

# Set before any step was measured: a layer's speedup over BF16 from the first two bare Transformer
# Engine layers, the whole model's from the post.
GOALS_PER_LAYER = {
    ("llama3_8b", "fp8_current"): 1.36,
    ("llama3_70b", "fp8_current"): 1.57,
    ("llama31_405b", "fp8_current"): 1.65,
}
GOALS_WHOLE = {("llama3_8b", "fp8_current"): 1.30}
TEXT = frozenset(["model", "precision", "depths", "layout"])
EDGE = "#222222"
Row = dict[str, Any]


def rows(lines: Sequence[Depth]) -> list[Row]:
    """Return a row a line: its parts (`analysis.speed.depth.rows`), the goals, the whole model, and
    what was published of it.
    """
    return [_row(line, part, lines) for line, part in zip(lines, depth.rows(lines), strict=True)]


def _row(line: Depth, part: Row, lines: Sequence[Depth]) -> Row:
    cell, whole, base = (part["model"], part["precision"]), assemble(line), base_of(line, lines)
    base_whole = assemble(base) if base else None
    faster = (
        ratio(base_whole.seconds, whole.seconds).wider(depth.apart(base, line))
        if base and whole and base_whole
        else None
    )
    part["speedup_per_layer"] = (
        None if math.isnan(part["speedup_per_layer"]) else part["speedup_per_layer"]
    )
    per_layer = part["speedup_per_layer"] if part["split"] else None
    return {
        **part,
        **_judged("per_layer", GOALS_PER_LAYER.get(cell), per_layer),
        **_model(line),
        **_whole(whole),
        **_speedup(faster),
        **_judged("whole", GOALS_WHOLE.get(cell), faster.value if faster else None),
        **_published(line, whole),
    }


def _judged(what: str, goal: float | None, reached: float | None) -> Row:
    """Return the goal, and whether it was met: None where there is none, or nothing to hold it
    to.
    """
    return {
        f"goal_{what}": goal,
        f"goal_{what}_met": None if goal is None or reached is None else bool(reached >= goal),
    }


def _model(line: Depth) -> Row:
    """Return the whole model's size, where it is one of the project's."""
    plan = reference_of(line.plan)
    return {
        "model_layers": plan.model.num_layers if plan else None,
        "model_vocab_size": plan.model.vocab_size if plan else None,
    }


def _whole(whole: Whole | None) -> Row:
    if whole is None:
        return dict.fromkeys(("layout", "whole_micro_batches", "whole_step_time_s"))
    layout = whole.layout
    shown = (
        f"{layout.num_gpus} GPUs, tp{layout.tp} pp{layout.pp} cp{layout.cp}"
        f" dp{layout.data_parallel}"
    )
    return {
        "layout": f"{whole.reference.gpu.name}, {shown}",
        "whole_micro_batches": whole.micro_batches,
        "whole_step_time_s": round(whole.step_time_s, 3),
    }


def _speedup(faster: Interval | None) -> Row:
    names = ("speedup_whole", "speedup_whole_low", "speedup_whole_high")
    return dict(
        zip(
            names,
            (
                (round(v, 3) for v in (faster.value, faster.low, faster.high))
                if faster
                else (None,) * 3
            ),
            strict=True,
        )
    )


def _published(line: Depth, whole: Whole | None) -> Row:
    """Return the post's speedup, and the published step time of the same work a GPU with its
    speedup over the BF16 row beside it.
    """
    gpu, cell = line.plan.gpu, (line.plan.model.name, line.precision)
    step = published_step(whole, line.precision) if whole else None
    base = published_base(step) if step and line.precision != "bf16" else None
    faster = (
        base.step_time_s / step.step_time_s
        if step and base and base.step_time_s and step.step_time_s
        else None
    )
    return {
        "post_speedup": (
            post_speedups().get(cell) if (gpu.mapped_like or gpu.name) == "h100" else None
        ),
        "published_step_time_s": step.step_time_s if step else None,
        "published_num_gpus": step.layout.num_gpus if step else None,
        "published_speedup": faster,
        "published_source": f"{step.source}, NeMo {step.nemo}" if step else None,
    }


def layer_cells(values: Row) -> dict[str, str]:
    """Return what a row says of layers, as the columns that people read."""
    return {
        "model": values["model"],
        "precision": values["precision"],
        "depths": ", ".join(map(str, values["layers"])),
        "vocabulary": str(values["vocab_size"]),
        "a layer, ms": number(values["per_layer_ms"], 2) + ("" if values["split"] else " (step)"),
        "fixed, ms": number(values["fixed_ms"], 1),
        "optimizer a layer, ms": number(values["optimizer_per_layer_ms"], 2),
        "optimizer fixed, ms": number(values["optimizer_fixed_ms"], 1),
        "residual, ms": number(values["residual_ms"], 2),
        "speedup of a layer": _with_interval(values, "speedup_per_layer"),
        "goal": _goal(values, "per_layer"),
    }


def whole_cells(values: Row) -> dict[str, str]:
    """Return what a row says of the whole model, as the columns that people read."""
    return {
        "model": values["model"],
        "precision": values["precision"],
        "layout": values["layout"],
        "micro-batches": str(values["whole_micro_batches"]),
        "step, s": number(values["whole_step_time_s"], 2),
        "published step, s": number(values["published_step_time_s"], 2),
        "speedup": _with_interval(values, "speedup_whole"),
        "goal": _goal(values, "whole"),
        "the post": _times(values["post_speedup"]),
        "published steps": _times(values["published_speedup"]),
    }


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def _with_interval(values: Row, key: str) -> str:
    if values[key] is None or values["precision"] == "bf16":
        return "–"
    return f"{values[key]:.2f}x ({values[key + '_low']:.2f} to {values[key + '_high']:.2f})"


def _goal(values: Row, what: str) -> str:
    goal, met = values[f"goal_{what}"], values[f"goal_{what}_met"]
    return (
        "–"
        if goal is None
        else f"{goal:.2f}x {'not measured' if met is None else 'met' if met else 'missed'}"
    )


def layers_table(found: Sequence[Row], left_out: Sequence[str] = ()) -> Table:
    """Return the table of what a layer costs and gains."""
    shown = [layer_cells(row) for row in found]
    return Table(
        "FP8 over BF16, a layer",
        shown,
        found,
        [*_layer_notes(found), *(f"Left out: {reason}" for reason in left_out)],
        TEXT,
    )


def whole_table(found: Sequence[Row]) -> Table:
    """Return the table of whole models; InputError where none can be put together."""
    wholes = [row for row in found if row["whole_step_time_s"]]
    if not wholes:
        raise InputError(
            "no whole model can be put together: the runs recorded no optimizer_time_s, or no"
            " layout is recommended; measure them again"
        )
    return Table(
        "FP8 over BF16, whole models put together",
        [whole_cells(row) for row in wholes],
        found,
        _whole_notes(wholes),
        TEXT,
    )


def _layer_notes(found: Sequence[Row]) -> list[str]:
    labels, names = (", ".join(sorted({row[key] for row in found})) for key in ("label", "device"))
    said = [
        f"Step times {labels} on {names}, at true widths. A layer, fixed: forward and backward pass"
        " of one micro-batch. In brackets: 95 % intervals from the spread of these runs' steps,"
        " which say nothing about other days and machines."
    ]
    if not all(row["split"] for row in found):
        said.append(
            "(step): the optimizer's time was not recorded; the line is of the whole step, all"
            " micro-batches and the optimizer in it."
        )
    if any(len(row["layers"]) == 2 for row in found):
        said.append(
            "A line through two depths meets both: what is left as residual is that medians of"
            " parts do not add up to the median of the whole."
        )
    cut = dict.fromkeys(
        f"{row['model']} {_share(row)}"
        for row in found
        if row["model_vocab_size"] not in (None, row["vocab_size"])
    )
    if cut:
        said.append(f"Vocabulary cut to one GPU's tensor-parallel share: {', '.join(cut)}.")
    lacking = unproved(
        [(f"{row['model']} {row['precision']}", row["not_recorded"]) for row in found]
    )
    return [*said, *_differences(found), *lacking, *_gpus(found)]


def _gpus(found: Sequence[Row]) -> list[str]:
    """Return which speedups are of runs on several GPUs, or on what nothing recorded."""
    pairs = [
        (f"{row['model']} {row['precision']}", row["pair_gpu"]) for row in found if row["pair_gpu"]
    ]
    magnified = [
        "A layer's time is a difference of two steps: there the interval is wider by as much more"
        " as the difference is smaller than the step."
    ]
    said = devices.notes(pairs)
    shared = [
        f"{row['model']} {row['precision']}"
        for row in found
        if row["gpu_shared"] and not row["pair_gpu"]
    ]
    alone = [
        "Other processes were on the GPU while these were measured, and step times may be theirs"
        f" too: {', '.join(shared)}."
    ]
    return [*(alone if shared else []), *said, *(magnified if said else [])]


def _share(row: Row) -> str:
    return (
        f"{row['vocab_size']} of {row['model_vocab_size']}"
        f" (1/{row['model_vocab_size'] / row['vocab_size']:.3g})"
    )


def _whole_notes(wholes: Sequence[Row]) -> list[str]:
    names, sources = (
        sorted({row[key] for row in wholes if row[key]}) for key in ("device", "published_source")
    )
    cut = any(row["vocab_size"] != row["model_vocab_size"] for row in wholes)
    return [
        f"Put together from parts measured on {', '.join(names)}, not measured as a whole: one"
        " GPU's share of NVIDIA's recommended layout, all layers, the vocabulary once, the"
        " optimizer shared out by the distributed optimizer; without communication, bubble and"
        " uneven stages."
        + (" A vocabulary that was cut to one GPU's share is scaled up." if cut else ""),
        (
            "What differs from the published runs: those are whole jobs on H100s, with"
            " communication and bubble, in NVIDIA's container. The post (NeMo 25.04, current"
            " scaling) does not say with which layouts. The published steps are of delayed scaling"
            " by inference, and may be of fewer GPUs with the same work a GPU; where the layouts of"
            " BF16 and FP8 differ, so do those of the published steps."
        ),
        "; ".join(["Published: the post's figure 3", *sources]) + ".",
    ]


def _differences(found: Sequence[Row]) -> list[str]:
    """Return a sentence for each way in which rows differ from their BF16 in more than
    precision.
    """
    by_what: dict[tuple[str, ...], list[str]] = {}
    for row in found:
        if row["differs"]:
            by_what.setdefault(tuple(row["differs"]), []).append(
                f"{row['model']} {row['precision']}"
            )
    return [
        f"Not only precision differs from BF16 ({', '.join(what)}): {', '.join(who)}."
        for what, who in by_what.items()
    ]


def figure(found: Sequence[Row]) -> Figure:
    """Speedup over BF16 by model: whole models as bars, layers as dots, the post's as diamonds and
    published step times as triangles.
    """
    models = list(dict.fromkeys(row["model"] for row in found))
    recipes = [
        name
        for name in COLOURS
        if name != "bf16" and any(row["precision"] == name for row in found)
    ]
    title = f"FP8's speedup in training, {', '.join(sorted({row['device'] for row in found}))}"
    drawing, (axis,) = axes(title, "", "speedup over BF16")
    width = 0.8 / max(1, len(recipes))
    for i, name in enumerate(recipes):
        places = np.arange(len(models)) + (i - (len(recipes) - 1) / 2) * width
        of = {row["model"]: row for row in found if row["precision"] == name}
        keys = ("speedup_whole", "speedup_per_layer", "post_speedup", "published_speedup")
        whole, layer, post, other = (
            [_value(of.get(model, {}).get(key)) for model in models] for key in keys
        )
        axis.bar(places, whole, width * 0.9, color=COLOURS[name], alpha=0.75)
        axis.plot(places, layer, "o", color=COLOURS[name], mec=EDGE, ms=6)
        axis.plot(places, post, "D", color="white", mec=EDGE, ms=6)
        axis.plot(places, other, "^", color="white", mec=EDGE, ms=7)
    axis.axhline(1, color="#222222", lw=0.8)
    axis.set_xticks(range(len(models)), models)
    axis.grid(axis="x", visible=False)
    drawing.legend(
        handles=_legend(recipes), loc="outside lower center", fontsize=8, frameon=False, ncols=3
    )
    caption = (
        "Dots: a layer's forward and backward pass, measured at true width. Bars: the whole model"
        " on one GPU's share, put together from measured parts without communication or bubble."
        " Diamonds: published, the post's figure 3. Triangles: published, from NVIDIA's step times."
    )
    return Figure("fig3", title, caption, drawing)


def _legend(recipes: Sequence[str]) -> list[Artist]:
    """Return what colours and shapes mean."""
    shapes = {
        "a layer (measured)": ("o", "#777777"),
        "published: the post's figure 3": ("D", "white"),
        "published: NVIDIA's step times": ("^", "white"),
    }
    return [
        *(Patch(color=COLOURS[name], alpha=0.75, label=name) for name in recipes),
        *(
            Line2D([], [], ls="", marker=marker, color=fill, mec=EDGE, ms=6, label=name)
            for name, (marker, fill) in shapes.items()
        ),
        Patch(
            color="#777777",
            alpha=0.75,
            label="whole model: put together from measured parts, without communication",
        ),
    ]


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m analysis.speed.full_depth_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders at two depths or more, BF16 and FP8",
    )
    parser.add_argument("--out", type=Path, help="write the table there: .csv, .md or .html")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the figure there as PNG")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    try:
        runs, left_out = sound(args.runs)
        lines = depth.fit(runs)
        if not lines:
            why = f"; left out: {'; '.join(left_out)}" if left_out else ""
            raise InputError(
                f"no precision was measured at two depths or more: no line to draw{why}"
            )
        found = rows(lines)
        tables = [
            layers_table(found, left_out),
            *([whole_table(found)] if any(row["whole_step_time_s"] for row in found) else []),
        ]
        if args.out:
            write(args.out, *tables)
        if args.png:
            figure(found).write_png(args.png)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print_json(found, *tables)
    for table in [] if args.json else tables:
        table.print()
    return 0


if __name__ == "__main__":
    command(main)
