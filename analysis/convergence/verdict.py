"""Does the loss hold?  Pass, fail, or undecided, and on how much evidence.

The gap is candidate minus BF16, step by step on the same batches, which takes the noise between
batches out.  It is compared with a tolerance that was set before the run.

One pair of runs (`judge`).  Three windows: the whole run, which is reported; the tail, which
decides; its last fifth, the end, which shows a divergence that is small in a mean.

    pass        the tail's interval lies inside the tolerance, and the end's mean too
    fail        the interval of the tail, or of the end, lies outside, and beyond seed noise
    undecided   anything else, with what would decide it

The interval allows for a gap that wanders slowly (analysis/stats/low_frequency.py).  It does not
know what another seed would do.  Seed noise is estimated where BF16 was run with other seeds: where
training is unsettled, the last bit of a sum drives two runs of one seed as far apart as two seeds,
and a gap that another seed of BF16 could have is no failure.  It lets nothing pass.

Several pairs of one recipe, each with its own seed (`judge_seeds`).  The tail's gaps of k pairs are
k independent draws, whatever happens within a run, so Student's t over them holds: two one-sided
tests (Schuirmann 1987) as for clinical equivalence.  Where the gaps of seeds are about Gaussian, a
pass is wrong in at most 2.5 % of cases.  So is a fail, and in 0.5 % more by the mean over the ends,
which can fail a recipe too.  A statement about a recipe needs this evidence.

A loss that was printed with few digits (an imported console log) may be off by half of the last
one, always in the same direction at worst: that much, for both runs, is added to either side of the
interval, and no length of run removes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from analysis.runs.load import Run
from analysis.runs.pairing import (
    Differences,
    check_pair,
    layout_label,
    plan_differences,
    platform_differences,
    precision_differences,
    run_differences,
)
from analysis.stats.series import Array, Mean, end_with_interval, mean_with_interval, spikes
from recipes.errors import InputError
from recipes.plan import Bar

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
END_OF_TAIL = 0.2
MOST_RUNS = 20  # how much longer than it was a run is worth making to settle an undecided verdict
MIN_STEPS = 20  # common steps, below which no curve is judged
SEEDS_CONFIDENCE = 0.95  # of intervals over seeds, both sides together
END_CONFIDENCE = 0.99  # of the interval of the ends over seeds, which can only add fails
MOST_SEEDS = 30  # how many seeds of a recipe are worth running to settle an undecided verdict


@dataclass(frozen=True)
class Gap:
    """The mean gap over a window in nats and the mean BF16 loss there.

    `median`: that of the gap over the window, in nats.  `rounding`: by how much the digits of
    printed losses widened each side of the interval, in nats.
    """

    nats: Mean
    median: float
    base_loss: float
    rounding: float = 0.0

    @property
    def wanders(self) -> bool:
        """Whether it is likelier than not that the gap moves as slowly as the window is long."""
        return self.nats.slow > 0.5

    @property
    def relative(self) -> Mean:
        """The gap over the BF16 loss."""
        return self.nats.scaled(1 / self.base_loss)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; gaps by window ("run", "tail", "end"), `heldout` the last
    evaluation's gap in nats.

    `noise_floor`: the largest distance in nats of any two BF16 runs over the tail.
    `seed_noise`: the gap in nats that BF16 with yet another seed could have; None without other
    seeds.  `within_noise`: the candidate's is outside the tolerance, and no larger than that.
    """

    base: Run
    candidate: Run
    verdict: str
    by_limit: dict[str, str]
    gaps: dict[str, Gap]
    heldout: float | None
    heldout_base: float | None
    noise_floor: float | None
    seed_noise: float | None
    within_noise: bool
    tokens_to_decide: float | None
    spikes: int
    base_spikes: int
    layout: str
    asked: list[str]
    platform: list[str]
    differs: Differences


def limits_in_nats(bar: Bar, base_loss: float) -> dict[str, float]:
    """Return each limit of the bar as a gap in nats at a BF16 loss."""
    return {
        "relative": bar.relative * base_loss,
        "perplexity": math.log1p(bar.perplexity),
        "absolute": bar.absolute,
    }


def judge(base: Run, candidate: Run, others: Sequence[Run] = ()) -> Verdict:
    """Return the verdict on `candidate` against `base`, whose tolerance holds; `others` are BF16
    runs with other seeds.
    """
    check_pair(base, candidate)
    bar = base.plan.bar
    gaps = gaps_of(
        base.steps["loss"],
        candidate.steps["loss"],
        bar.tail_fraction,
        base.rounding() + candidate.rounding(),
    )
    limits = limits_in_nats(bar, gaps["tail"].base_loss)
    seeds = seed_gaps(base, others, gaps["tail"].nats.count)
    by_limit = {
        name: decide(gaps, limit, seed_noise(seeds) or 0.0) for name, limit in limits.items()
    }
    decides = bar.decides
    within_noise = by_limit[decides] == UNDECIDED and decide(gaps, limits[decides]) == FAIL
    heldout = heldout_gaps(base, candidate)
    return Verdict(
        base=base,
        candidate=candidate,
        verdict=by_limit[decides],
        by_limit=by_limit,
        gaps=gaps,
        heldout=float(heldout[1][-1]) if heldout[0].size else None,
        heldout_base=float(base.heldout["heldout_loss"][-1]) if heldout[0].size else None,
        noise_floor=float(np.ptp([0.0, *seeds])) if len(seeds) else None,
        seed_noise=seed_noise(seeds),
        within_noise=within_noise,
        tokens_to_decide=(
            _tokens_to_decide(gaps["tail"], limits[decides], candidate)
            if by_limit[decides] == UNDECIDED and not within_noise
            else None
        ),
        spikes=spikes(candidate.steps["loss"]),
        base_spikes=spikes(base.steps["loss"]),
        layout=layout_label(base, candidate),
        asked=precision_differences(base, candidate),
        platform=platform_differences(base, candidate),
        differs=run_differences(base, candidate),
    )


def gaps_of(
    base: Array, candidate: Array, tail_fraction: float, rounding: Array | None = None
) -> dict[str, Gap]:
    """Return the gap between two loss curves (a value a step) over the run, its tail, and the end
    of the tail.

    `rounding`: by how much each gap may be off in nats, for the digits that the losses were printed
    with.
    """
    steps = len(base)
    if steps < MIN_STEPS:
        raise InputError(
            f"{steps} common steps say nothing about a loss curve; run at least {MIN_STEPS}"
        )
    tail = max(1, round(steps * tail_fraction))
    end = max(1, round(tail * END_OF_TAIL))
    gap = candidate - base
    means = {
        "run": mean_with_interval(gap),
        "tail": mean_with_interval(gap, tail),
        "end": end_with_interval(gap, tail, end),
    }
    found = {}
    for name, mean in means.items():
        off = 0.0 if rounding is None else float(rounding[-mean.count :].mean())
        window = slice(-mean.count, None)
        median, loss = float(np.median(gap[window])), float(base[window].mean())
        found[name] = Gap(mean.widened(off), median, loss, off)
    return found


def decide(gaps: dict[str, Gap], limit: float, noise: float = 0.0) -> str:
    """Return the verdict of one pair at a limit in nats.

    `noise`: up to so many nats the gap could be that of BF16 with another seed.  The end fails a
    run only if half of its steps lie outside too: a spike is no divergence.
    """
    tail, end = gaps["tail"].nats, gaps["end"].nats
    outside = max(limit, noise)
    if tail.low > outside or tail.high < -outside:
        return FAIL
    middle = gaps["end"].median
    if min(end.low, middle) > outside or max(end.high, middle) < -outside:
        return FAIL
    if -limit <= tail.low and tail.high <= limit and abs(end.value) + gaps["end"].rounding <= limit:
        return PASS
    return UNDECIDED


def _tokens_to_decide(gap: Gap, limit: float, candidate: Run) -> float | None:
    """Return the further tokens after which an interval that shrinks with the root of the steps
    would clear the limit.

    None where there is no interval, where the gap wanders as slowly as the run is long, and where
    it lies so near the limit that it would take MOST_RUNS runs or more.
    """
    distance = (
        abs(limit - abs(gap.nats.value)) - gap.rounding
    )  # longer runs do not print more digits
    if not np.isfinite(gap.nats.half_width) or distance <= 0 or gap.wanders:
        return None
    tokens = candidate.steps["tokens"][-1]
    runs = max(0.0, ((gap.nats.half_width - gap.rounding) / distance) ** 2 - 1)
    return float(tokens * runs) if runs < MOST_RUNS else None


def seed_gaps(base: Run, others: Sequence[Run], tail: int) -> Array:
    """Return the mean gaps in nats over the last `tail` steps of BF16 with other seeds to `base`.

    One gap per seed, of the run whose plan differs least from the base's: a repeat of a seed, in
    any layout, is no further draw of seed noise.
    """
    by_seed = dict[int, Run]()
    for other in sorted(others, key=lambda other: len(plan_differences(base, other))):
        check_pair(base, other)
        by_seed.setdefault(other.plan.seed, other)
    by_seed.pop(base.plan.seed, None)
    gaps = [(other.steps["loss"] - base.steps["loss"])[-tail:] for other in by_seed.values()]
    return np.array([gap.mean() for gap in gaps])


def seed_noise(seeds: Array) -> float | None:
    """Return the gap in nats that a further BF16 seed exceeds in 5 % of cases, from k others' gaps.

    Student's t with k degrees of freedom times their root mean square: 12.7 times for one, 4.3 for
    two, 2.3 for nine.  None without any.
    """
    if not len(seeds):
        return None
    return float(t.ppf((1 + SEEDS_CONFIDENCE) / 2, len(seeds)) * np.sqrt(np.mean(seeds**2)))


@dataclass(frozen=True)
class SeedsVerdict:
    """What the pairs of one recipe show together.

    `gap`: mean relative gap over the tail with Student's interval.  `further_seeds`: how many more
    would decide an undecided verdict if mean and spread stayed; None if more than MOST_SEEDS.
    """

    verdicts: list[Verdict]
    verdict: str
    gap: Mean
    further_seeds: int | None

    @property
    def seeds(self) -> list[int]:
        """The seeds in ascending order."""
        return sorted(verdict.candidate.plan.seed for verdict in self.verdicts)


def judge_seeds(verdicts: Sequence[Verdict]) -> SeedsVerdict:
    """Return the verdict on one recipe from two or more pairs, each of a seed of its own.

    The gaps are taken in units of each pair's own tolerance.  The mean over the ends has to lie
    inside the tolerance too.
    """
    tails = [verdict.gaps["tail"] for verdict in verdicts]
    in_limits = np.array([_in_limits(verdict, "tail") for verdict in verdicts])
    ends = np.array([_in_limits(verdict, "end") for verdict in verdicts])
    printed = float(
        np.mean([verdict.gaps["tail"].rounding / limit_of(verdict) for verdict in verdicts])
    )
    found = decide_seeds(in_limits, ends, printed)
    relative = student(np.array([gap.relative.value for gap in tails]))
    relative = relative.widened(float(np.mean([gap.rounding / gap.base_loss for gap in tails])))
    further = _further_seeds(in_limits) if found == UNDECIDED else None
    return SeedsVerdict(list(verdicts), found, relative, further)


def decide_seeds(tails: Array, ends: Array, rounding: float = 0.0) -> str:
    """Return the verdict from the mean gaps of k pairs over the tail and over its end.

    All in units of the tolerance.  `rounding`: by how much the mean may be off for the digits that
    losses were printed with.
    """
    mean = student(tails).widened(rounding)
    end = student(ends, END_CONFIDENCE).widened(rounding)
    if any(interval.low > 1 or interval.high < -1 for interval in (mean, end)):
        return FAIL
    inside = mean.low >= -1 and mean.high <= 1 and abs(float(ends.mean())) + rounding <= 1
    return PASS if inside else UNDECIDED


def _in_limits(verdict: Verdict, window: str) -> float:
    """Return the gap of a window in tolerances of its pair."""
    return verdict.gaps[window].nats.value / limit_of(verdict)


def limit_of(verdict: Verdict) -> float:
    """Return the tolerance that decides a pair, in nats."""
    bar = verdict.base.plan.bar
    return limits_in_nats(bar, verdict.gaps["tail"].base_loss)[bar.decides]


def student(values: Array, confidence: float = SEEDS_CONFIDENCE) -> Mean:
    """Return the mean of k independent values with Student's interval."""
    k, value = len(values), float(values.mean())
    reach = _reach(k, float(values.std(ddof=1)), confidence)
    return Mean(value, value - reach, value + reach, k)


def _reach(k: int, deviation: float, confidence: float = SEEDS_CONFIDENCE) -> float:
    return float(t.ppf((1 + confidence) / 2, k - 1)) * deviation / math.sqrt(k)


def _further_seeds(in_limits: Array) -> int | None:
    """Return how many more seeds would bring the interval clear of the tolerance on its side."""
    distance = abs(1 - abs(float(in_limits.mean())))
    deviation = float(in_limits.std(ddof=1))
    enough = (
        k for k in range(len(in_limits) + 1, MOST_SEEDS + 1) if _reach(k, deviation) < distance
    )
    total = next(enough, None)
    return None if total is None else total - len(in_limits)


def heldout_gaps(base: Run, candidate: Run) -> tuple[Array, Array]:
    """Return the steps at which both runs were evaluated and the gaps in nats there."""
    if not base.heldout or not candidate.heldout:
        return np.zeros(0), np.zeros(0)
    steps, ours, theirs = np.intersect1d(
        base.heldout["step"], candidate.heldout["step"], return_indices=True
    )
    return steps, candidate.heldout["heldout_loss"][theirs] - base.heldout["heldout_loss"][ours]
