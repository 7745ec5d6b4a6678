"""Figures of a comparison, drawn once and used by the report, the notebooks and the documentation.

Each function returns a `Figure`: the drawing, a title and a sentence on how to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from analysis.convergence.comparison import Comparison
from analysis.convergence.verdict import Verdict, heldout_gaps
from analysis.render.figure import COLOURS, Figure, axes
from analysis.runs.load import Run
from analysis.runs.timing import step_time
from analysis.stats.series import Array, smooth

OTHER = ("#CC79A7", "#56B4E9", "#999933", "#882255")
BROKEN = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))  # lines of further seeds
SMOOTHING = 0.05  # share of the run in the moving average


def colour(run: Run, runs: Sequence[Run]) -> str:
    """Return a run's colour: that of its precision, or the next free one for a precision of the
    user's own.
    """
    own = [
        name for name in dict.fromkeys(r.plan.precision.name for r in runs) if name not in COLOURS
    ]
    name = run.plan.precision.name
    return COLOURS.get(name) or OTHER[own.index(name) % len(OTHER)]


def _window(run: Run) -> int:
    return max(1, round(len(run.steps["loss"]) * SMOOTHING))


def _millions(run: Run) -> Array:
    return run.steps["tokens"] / 1e6


def _name(run: Run, runs: Sequence[Run]) -> str:
    same = [r for r in runs if r.plan.precision.name == run.plan.precision.name]
    return run.plan.precision.name + (f", seed {run.plan.seed}" if len(same) > 1 else "")


def _style(run: Run, runs: Sequence[Run]) -> Any:
    """Return a solid line, or a broken one for each further run of a precision."""
    place = [other for other in runs if other.plan.precision.name == run.plan.precision.name].index(
        run
    )
    return BROKEN[(place - 1) % len(BROKEN)] if place else "-"


def _legend_below(drawing: Drawing, axis: Axes) -> None:
    drawing.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        fontsize=8,
        frameon=False,
        ncols=4,
    )


def loss_curves(found: Comparison) -> Figure:
    """Smoothed training loss of every run over tokens, the whole run and its last quarter
    enlarged.
    """
    title = f"Training loss, {found.bases[0].plan.model.name} on {found.bases[0].plan.gpu.name}"
    drawing, (whole, close) = axes(title, "tokens, millions", "loss, nats per token", panels=2)
    for run in found.runs:
        x, y = _millions(run), smooth(run.steps["loss"], _window(run))
        start = len(x) * 3 // 4
        style: Any = {
            "color": colour(run, found.runs),
            "ls": _style(run, found.runs),
            "lw": 1.4,
            "label": _name(run, found.runs),
        }
        whole.plot(x, y, **style)
        close.plot(x[start:], y[start:], **style)
    entropy = (found.bases[0].manifest.get("data") or {}).get("unigram_entropy_nats")
    if entropy:
        whole.axhline(
            entropy, color="#777777", lw=0.8, ls=":", label="unigram entropy of the held-out text"
        )
    close.set_title("the last quarter", fontsize=9)
    _legend_below(drawing, whole)
    caption = (
        f"Moving average over {SMOOTHING:.0%} of the run. A run that learns falls below the grey"
        " dotted line, the loss of a model that only knows how often each token occurs. Curves"
        " that lie on each other are the wanted result: the next figure shows their distance."
    )
    return Figure("loss", title, caption, drawing)


def gap(found: Comparison) -> Figure:
    """Relative gap to BF16 over tokens, with the bar and the noise floor."""
    first = found.verdicts[0]
    title = "Gap of the training loss to BF16"
    drawing, (axis,) = axes(title, "tokens, millions", "gap, % of the BF16 loss")
    base = first.base
    reference = smooth(base.steps["loss"], _window(base))
    for run in found.runs:
        pair = next((v.base for v in found.verdicts if v.candidate is run), base)
        if run is pair:
            continue
        y = smooth(run.steps["loss"] - pair.steps["loss"], _window(run)) / reference * 100
        faint = run in found.bases
        style: Any = {
            "color": colour(run, found.runs),
            "ls": _style(run, found.runs),
            "lw": 1.0 if faint else 1.5,
            "alpha": 0.6 if faint else 1,
        }
        axis.plot(_millions(run), y, label=_name(run, found.runs), **style)
    limit = first.candidate.plan.bar.relative * 100
    axis.axhspan(-limit, limit, color="#009E73", alpha=0.08, lw=0, label=f"tolerance ±{limit:g} %")
    axis.axhline(0, color="#222222", lw=0.8)
    axis.axvspan(*_tail(first), color="#777777", alpha=0.07, lw=0, label="tail, which decides")
    _legend_below(drawing, axis)
    caption = (
        "Loss minus the BF16 loss on the same batches, smoothed. The verdict takes the mean over"
        " the grey tail: inside the green band a recipe passes. Black and broken: a BF16 run with"
        " another seed, which is how far seed noise moves a curve."
    )
    return Figure("gap", title, caption, drawing)


def _tail(verdict: Verdict) -> tuple[float, float]:
    tokens = _millions(verdict.candidate)
    return float(tokens[-verdict.gaps["tail"].nats.count]), float(tokens[-1])


def heldout(found: Comparison) -> Figure | None:
    """Gap of the held-out loss to BF16 at each evaluation; None where no run was evaluated."""
    title = "Gap of the held-out loss to BF16"
    drawing, (axis,) = axes(title, "step", "gap, nats per token")
    points = 0
    for verdict in found.verdicts:
        steps, gaps = heldout_gaps(verdict.base, verdict.candidate)
        points += len(steps)
        run = verdict.candidate
        style: Any = {
            "color": colour(run, found.runs),
            "ls": _style(run, found.runs),
            "label": _name(run, found.runs),
        }
        axis.plot(steps, gaps, marker="o", ms=4, lw=1.2, **style)
    axis.axhline(0, color="#222222", lw=0.8)
    _legend_below(drawing, axis)
    caption = (
        "Loss on text that was held out, minus that of BF16 at the same step. Below zero the recipe"
        " is the better one."
    )
    return Figure("heldout", title, caption, drawing) if points else None


def step_times(found: Comparison) -> Figure:
    """Median step time of every run, with quartiles."""
    base = found.bases[0]
    title = f"Step time on {base.plan.gpu.name} ({base.label('step_time')})"
    drawing, (axis,) = axes(title, "seconds a step, median and quartiles", "")
    for place, run in enumerate(reversed(found.runs)):
        time = step_time(run)
        reach = [[time.value - time.low], [time.high - time.value]]
        axis.barh(
            place,
            time.value,
            xerr=reach,
            color=colour(run, found.runs),
            alpha=0.85,
            height=0.6,
            error_kw={"lw": 1, "ecolor": "#555555"},
        )
        axis.annotate(f" {time.value:.3f} s", (time.high, place), va="center", fontsize=9)
    axis.set_yticks(
        range(len(found.runs)), [_name(run, found.runs) for run in reversed(found.runs)]
    )
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.12)
    caption = "The first tenth of the steps is left out, three at least."
    if any(run.emulated for run in found.runs):
        caption += (
            " FP8 is emulated here: its times say what the emulation costs on this machine, nothing"
            " about FP8 in hardware."
        )
    return Figure("step_time", title, caption, drawing)


def figures(found: Comparison) -> list[Figure]:
    """Return every figure of a comparison."""
    drawn = [loss_curves(found), gap(found), heldout(found), step_times(found)]
    return [figure for figure in drawn if figure]
