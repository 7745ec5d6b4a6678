"""What a recipe buys: step times, and the speedup that is left when the losses are made equal.

A recipe that steps 1.3 times as fast and needs 10 % more steps to the same loss buys 1.18.  Near
its end a loss curve is nearly straight, so a gap of g nats costs g / slope steps; the interval of
the gap becomes one of the speedup.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.runs.load import Run
from analysis.stats.series import Array, Mean

WARM_UP = (
    0.1  # first part of the run whose steps are not timed: caches, autotuning, lazy initialisation
)
WARM_UP_STEPS = 3  # and at least so many, but never more than half of the run
RESAMPLES = 1000
MAX_TIMED = 4096
# Quartiles apart, as a share of the median, and the last third's median from the first's: beyond it
# clocks, neighbours or data were not stable.
MAX_SPREAD = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def wider(self, share: float) -> Interval:
        """Return it with both ends further away by a share of themselves."""
        return Interval(self.value, self.low / (1 + share), self.high * (1 + share))


def warm_up(count: int) -> int:
    """Return how many of a run's `count` steps are not timed."""
    return min(max(int(count * WARM_UP), WARM_UP_STEPS), count // 2)


def timed(run: Run, key: str = "step_time_s") -> Array:
    """Return the step times in seconds after the warm-up (or another column), thinned out evenly
    where there are very many.
    """
    times = run.steps[key][warm_up(len(run.steps[key])) :]
    return times[:: -(-len(times) // MAX_TIMED)]


def window(run: Run) -> tuple[int, int]:
    """Return the first and the last step that are timed."""
    steps = run.steps["step"]
    return int(steps[warm_up(len(steps))]), int(steps[-1])


def step_time(run: Run) -> Interval:
    """Return the median step time in seconds, between its quartiles."""
    low, median, high = np.percentile(timed(run), [25, 50, 75])
    return Interval(float(median), float(low), float(high))


def unsteady(run: Run) -> str | None:
    """Return why a run's step times are no measure of speed: they lie too far apart, or their pace
    changes; None if they are one.
    """
    if "step_time_s" not in run.steps:
        return "there is no step time in its log"
    times, time = timed(run), step_time(run)
    spread, third = (time.high - time.low) / time.value, len(times) // 3
    if spread > MAX_SPREAD:
        return f"the quartiles of its step time lie {spread:.1%} apart (limit {MAX_SPREAD:.0%})"
    change = float(np.median(times[-third:]) / np.median(times[:third]) - 1) if third else 0.0
    return (
        f"the last third of its timed steps takes {change:+.1%} against the first (limit"
        f" {MAX_SPREAD:.0%})"
        if abs(change) > MAX_SPREAD
        else None
    )


def speedup(base: Run, candidate: Run) -> Interval:
    """Return median step time of `base` over that of `candidate`, with a percentile bootstrap
    interval (seeded).
    """
    from scipy.stats import bootstrap

    def ratio(a: Array, b: Array, axis: int = -1) -> Array:
        return np.asarray(np.median(a, axis=axis) / np.median(b, axis=axis))

    samples = (timed(base), timed(candidate))
    found = bootstrap(
        samples,
        ratio,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
        batch=50,
    )
    low, high = found.confidence_interval
    return Interval(float(ratio(*samples)), float(low), float(high))


def loss_matched(base: Run, step_speedup: Interval, gap: Mean, tail: int) -> Interval | None:
    """Return the speedup to an equal loss; None where the BF16 loss no longer falls over its last
    `tail` steps.

    `gap` is that of the tail, in nats.  The interval joins those of the step time and of the gap.
    """
    from scipy.stats import linregress

    steps, loss = base.steps["step"][-tail:], base.steps["loss"][-tail:]
    fit = linregress(steps, loss)
    if not fit.slope < -2 * fit.stderr:
        return None
    total = float(steps[-1])

    def steps_ratio(nats: float) -> float:
        more = (
            nats / -fit.slope / total
        )  # steps to the same loss beyond those of the base, as a share of them
        return 1 / (1 + more) if more > -1 else np.inf

    ends = step_speedup.low * steps_ratio(gap.high), step_speedup.high * steps_ratio(gap.low)
    return Interval(step_speedup.value * steps_ratio(gap.value), *ends)
