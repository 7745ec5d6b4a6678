"""The step time of a deep model from shallow ones: what a layer costs, and what does not depend on
the depth.

A model that is too large for the GPU at hand is measured at its true width and two depths or more.
A step of N micro-batches and L layers is N forward and backward passes and one optimizer step,

    t = N (a + b L) + (c + d L)

with a layer's pass b, the embedding, output layer and loss in a, a layer's share of the optimizer
(gradients, clipping, Adam, casts of parameters) d, and what is left of it c.  A speedup that is
read off a shallow model mixes the four; FP8 speeds up b, and b is what a deep model is made of.
`analysis.speed.full_depth` puts whole models together from these parts.

Runs that did not record `optimizer_time_s` give one line only, of the whole step: its slope holds N
passes and the optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from analysis.render.figure import COLOURS, Figure, axes
from analysis.runs import devices
from analysis.runs.load import Run
from analysis.runs.pairing import flat, plan_differences, recorded_differences, unproved_of
from analysis.runs.published import layout_of
from analysis.runs.timing import RESAMPLES, Interval, step_time, timed
from analysis.stats.series import Array
from recipes.errors import InputError
from recipes.plan import Plan

OPTIMIZER = "optimizer_time_s"
NOT_THE_STEP = ("seed", "train.", "data.")  # parts of a plan that leave a step's work as it is


class Line(NamedTuple):
    """Seconds a layer and seconds that do not depend on the depth: the first value is the estimate,
    the others its bootstrap samples.
    """

    per_layer: Array
    fixed: Array


@dataclass(frozen=True)
class Depth:
    """One precision of one model: its runs by depth, and the lines through them.

    `step` is the line of the whole step; `passes` (one micro-batch's forward and backward) and
    `optimizer` are None where runs did not record `optimizer_time_s`.  `residual_s`: the largest
    distance of a measured step from the model.
    """

    precision: str
    runs: tuple[Run, ...]
    step: Line
    passes: Line | None
    optimizer: Line | None
    residual_s: float

    @property
    def plan(self) -> Plan:
        """The plan of the shallowest run."""
        return self.runs[0].plan

    @property
    def layers(self) -> tuple[int, ...]:
        """The depths."""
        return tuple(run.plan.model.num_layers for run in self.runs)

    @property
    def step_time_s(self) -> tuple[float, ...]:
        """The measured step times, median seconds."""
        return tuple(step_time(run).value for run in self.runs)

    @property
    def per_layer_s(self) -> float:
        """Seconds that a layer adds to a step."""
        return float(self.step.per_layer[0])

    @property
    def fixed_s(self) -> float:
        """Seconds of a step that do not depend on the depth."""
        return float(self.step.fixed[0])

    @property
    def layer_pass(self) -> Array:
        """A layer's part in what FP8 speeds up: its pass, or where that is not known its part of
        the step.
        """
        return (self.passes or self.step).per_layer


def fit(runs: Sequence[Run]) -> list[Depth]:
    """Return the lines of each model and precision that was measured at two depths or more: models
    by width, BF16 first.

    InputError where runs of one line differ in more than their depth.
    """
    lines = []
    for _, group in itertools.groupby(sorted(runs, key=order), key=order):
        same = sorted(group, key=lambda run: run.plan.model.num_layers)
        if same[0].plan.model.num_layers < same[-1].plan.model.num_layers:
            lines.append(_depth(same))
    return lines


def experiment(run: Run) -> tuple[int | str, ...]:
    """Return what runs have in common that are compared with one BF16: the model but its depth,
    sequence, GPU, stack and settings.
    """
    plan = run.plan
    model = (plan.model.hidden_size, plan.model.name, plan.model.vocab_size, plan.seq_length)
    return (*model, plan.gpu.name, device(run), plan.stack.name, plan.settings.name)


def order(run: Run) -> tuple[Any, ...]:
    """Return the place of a run's line among others: models by width, then the project's order of
    recipes, BF16 first.
    """
    name, known = run.plan.precision.name, list(COLOURS)
    return (*experiment(run), known.index(name) if name in known else len(known), name)


def device(run: Run) -> str:
    """Return the device that a run was measured on."""
    return str(run.manifest.get("device", "unknown"))


def _depth(runs: Sequence[Run]) -> Depth:
    """Return the lines through the runs of one precision, shallowest first."""
    name, layers = (
        runs[0].plan.precision.name,
        np.array([run.plan.model.num_layers for run in runs], dtype=float),
    )
    counts = np.array([layout_of(run.plan).micro_batches for run in runs], dtype=float)[:, None]
    split = all(OPTIMIZER in run.steps for run in runs)
    _check(runs, may_differ=("model.num_layers", *(["mapping.global_batch"] if split else [])))
    samples = [_samples(run, split) for run in runs]
    step, total = (
        _line(layers, [a + b for a, b in samples]),
        np.array([step_time(run).value for run in runs]),
    )
    if not split:
        return Depth(name, tuple(runs), step, None, None, _distance(_at(step, layers), total))
    passes, optimizer = (
        _line(layers, np.stack([a for a, _ in samples]) / counts),
        _line(layers, [b for _, b in samples]),
    )
    model = counts[:, 0] * _at(passes, layers) + _at(optimizer, layers)
    return Depth(name, tuple(runs), step, passes, optimizer, _distance(model, total))


def _check(runs: Sequence[Run], may_differ: Sequence[str]) -> None:
    for run in runs[1:]:
        keys = [
            key
            for key in plan_differences(runs[0], run)
            if not key.startswith((*NOT_THE_STEP, *may_differ))
        ]
        if keys:
            raise InputError(
                f"{run.folder} and {runs[0].folder} differ in"
                f" {', '.join(changes(runs[0], run, keys))}: no line over depth goes through them;"
                " give runs that differ in model.num_layers alone"
            )


def changes(a: Run, b: Run, keys: Sequence[str]) -> list[str]:
    """Return plan keys with both runs' values."""
    ours, theirs = (flat(run.plan) for run in (a, b))
    return [f"{key} {ours.get(key, '-')} → {theirs.get(key, '-')}" for key in keys]


def beside_precision(base: Run, run: Run) -> list[str]:
    """Return what two runs' steps differ in beside precision and depth, with both values."""
    skipped = (*NOT_THE_STEP, "precision.", "model.num_layers")
    return changes(
        base, run, [key for key in plan_differences(base, run) if not key.startswith(skipped)]
    )


def _samples(run: Run, split: bool) -> tuple[Array, Array]:
    """Return median seconds of all passes and of the optimizer (0 where it is not split off): the
    estimate, then bootstrap samples of the steps.
    """
    step = timed(run)
    optimizer = timed(run, OPTIMIZER) if split else np.zeros_like(step)
    if not ((optimizer >= 0) & (optimizer <= step)).all():
        raise InputError(
            f"{run.folder}: {OPTIMIZER} is no part of the step's time in some step; its timing is"
            " broken, measure it again"
        )
    drawn = np.random.default_rng(crc32(run.name.encode())).integers(
        len(step), size=(RESAMPLES, len(step))
    )
    steps = np.vstack([np.arange(len(step)), drawn])
    return np.median((step - optimizer)[steps], axis=1), np.median(optimizer[steps], axis=1)


def _line(layers: Array, seconds: Any) -> Line:
    """Return the least-squares line of each column of `seconds`, [depths, samples]."""
    slope, start = np.polyfit(layers, np.asarray(seconds), 1)
    return Line(slope, start)


def _at(line: Line, layers: Array) -> Array:
    return np.asarray(line.fixed[0] + line.per_layer[0] * layers)


def _distance(model: Array, measured: Array) -> float:
    return float(np.abs(model - measured).max())


def ratio(base: Array, other: Array) -> Interval:
    """Return how often `other` fits into `base`, with the 95 % interval of their bootstrap
    samples.
    """
    samples = base / other
    low, high = np.percentile(samples[1:], [2.5, 97.5])
    return Interval(float(samples[0]), float(low), float(high))


def apart(base: Depth, line: Depth) -> float:
    """Return by which share a speedup may be off because the lines' runs were on several GPUs; 0
    where all were on the same one.

    A slope magnifies what its ends differ by: by the deepest step over the difference between
    deepest and shallowest.
    """
    magnified = [
        times[-1] / max(times[-1] - times[0], 1e-9)
        for times in (base.step_time_s, line.step_time_s)
    ]
    return devices.apart(*base.runs, *line.runs) * max(magnified)


def base_of(line: Depth, lines: Sequence[Depth]) -> Depth | None:
    """Return the BF16 line of the same model, GPU, stack and settings; None where it was not
    measured.
    """
    return next(
        (
            other
            for other in lines
            if other.runs[0].is_base and experiment(other.runs[0]) == experiment(line.runs[0])
        ),
        None,
    )


def rows(lines: Sequence[Depth]) -> list[dict[str, Any]]:
    """Return the lines as rows, with a layer's speedup over BF16 where BF16 was measured.

    `per_layer_ms` and `fixed_ms` are of one micro-batch's forward and backward pass; of the whole
    step where `split` is False.
    """
    return [_row(line, base_of(line, lines)) for line in lines]


def _row(line: Depth, base: Depth | None) -> dict[str, Any]:
    run, of_pass = line.runs[0], line.passes or line.step
    runs = [*(base.runs if base and base is not line else ()), *line.runs]
    faster = (
        ratio(base.layer_pass, line.layer_pass).wider(apart(base, line))
        if base and (base.passes is None) == (line.passes is None)
        else None
    )
    return {
        "model": run.plan.model.name,
        "precision": line.precision,
        "gpu": run.plan.gpu.name,
        "device": device(run),
        "layers": list(line.layers),
        "micro_batches": layout_of(run.plan).micro_batches,
        "micro_batch": run.plan.mapping.micro_batch,
        "seq_length": run.plan.seq_length,
        "vocab_size": run.plan.model.vocab_size,
        "split": line.passes is not None,
        "per_layer_ms": _ms(of_pass.per_layer),
        "fixed_ms": _ms(of_pass.fixed),
        "optimizer_per_layer_ms": _ms(line.optimizer.per_layer) if line.optimizer else None,
        "optimizer_fixed_ms": _ms(line.optimizer.fixed) if line.optimizer else None,
        "residual_ms": round(line.residual_s * 1e3, 3),
        "speedup_per_layer": round(faster.value, 3) if faster else float("nan"),
        "speedup_per_layer_low": round(faster.low, 3) if faster else None,
        "speedup_per_layer_high": round(faster.high, 3) if faster else None,
        "pair_gpu": devices.together(*base.runs, *line.runs) if base and base is not line else None,
        "differs": _differing(base or line, line),
        "not_recorded": unproved_of(runs),
        "gpu_shared": any(gpu.shared for each in runs for gpu in devices.records(each)),
        "label": run.label("step_time"),
    }


def _differing(base: Depth, line: Depth) -> list[str]:
    """Return what the runs of two lines computed with otherwise, beside precision and depth: the
    lines' first, and those of one line.
    """
    pairs = [
        (base.runs[0], line.runs[0]),
        *((line.runs[0], run) for run in line.runs[1:]),
        *((base.runs[0], run) for run in base.runs[1:]),
    ]
    recorded = [recorded_differences(*pair) for pair in pairs]
    return list(
        dict.fromkeys(
            [
                *beside_precision(*pairs[0]),
                *(text for found in recorded for text in (*found.named, *found.speed)),
            ]
        )
    )


def _ms(seconds: Array) -> float:
    return round(float(seconds[0]) * 1e3, 3)


def figure(lines: Sequence[Depth], what: str) -> Figure:
    """Step time over depth with the fitted lines."""
    title = f"Step time over depth, {what}"
    drawing, (axis,) = axes(title, "layers", "seconds a step")
    for line in lines:
        reach = np.array([0, max(line.layers)])
        axis.plot(
            reach,
            line.fixed_s + line.per_layer_s * reach,
            color=COLOURS.get(line.precision),
            lw=1.2,
            label=line.precision,
        )
        axis.plot(line.layers, line.step_time_s, "o", color=COLOURS.get(line.precision), ms=5)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    caption = (
        "Points: medians of runs at true width. The slope is a layer's time; where the line starts"
        " is what a step costs without any layer."
    )
    return Figure("depth", title, caption, drawing)
