"""Does the loss hold?  Pass, fail, or undecided.

The gap is candidate minus BF16, step by step on the same batches, which takes the noise between batches out.  It is
held to a bar that was set before the run.  Three windows are looked at: the whole run, which is reported; the tail,
which decides; and its last fifth, the end, which can only spoil a pass: a gap that opens late is small in a mean.

    pass        the tail's interval lies inside the bar, and the end's mean too
    fail        the interval of the tail, or of the end, lies wholly outside, and beyond what luck does to BF16
    undecided   anything else, with the tokens that would decide it if the gap stayed as it is

The noise floor is how far apart BF16 runs of other seeds lie.  It lets nothing pass: a candidate shares its seed with its base,
so it is held to more than luck.  But where training is unsettled the last bit of a sum is enough to send two runs of one seed
as far apart as two seeds, and then a gap that another seed of BF16 could have says nothing of the recipe: it is undecided, however
narrow its interval, which knows the noise within a run and not that between runs.  How large such a gap may be is reckoned from the
seeds that there are (`luck`): by the largest distance seen, luck alone would fail one recipe in k + 1 where k other seeds were run.

A loss that was printed with few digits (an imported console log) may be off by half of the last one, always in the same
direction at worst: that much, for both runs, is added to either side of the interval, and no length of run removes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t

from analysis.pairing import check_pair, layout_label, platform_differences, precision_differences
from analysis.runs import Run
from analysis.statistics import Array, Mean, last_block_with_interval, mean_with_interval, spikes
from recipes.errors import InputError
from recipes.plan import Bar

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
END_OF_TAIL = 0.2
MOST_RUNS = 20  # how much longer than it was a run is worth making to settle an undecided verdict
MIN_STEPS = 20  # common steps, below which no curve is judged
LUCK = 0.95  # of BF16 runs with other seeds lie no further apart than `luck` says


@dataclass(frozen=True)
class Gap:
    """The mean gap over a window in nats and the mean BF16 loss there.

    `rounding`: by how much the digits of printed losses widened each side of the interval, in nats.
    """

    nats: Mean
    base_loss: float
    rounding: float = 0.0

    @property
    def relative(self) -> Mean:
        """The gap over the BF16 loss."""
        return self.nats.scaled(1 / self.base_loss)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found; gaps by window ("run", "tail", "end"), `heldout` the last evaluation's gap in nats.

    `noise_floor`: the largest distance in nats of any two BF16 runs over the tail.
    `luck`: the gap in nats that BF16 with yet another seed could have; None without other seeds.  `within_noise`: the candidate's is
    outside the bar, and no larger than that.
    """

    base: Run
    candidate: Run
    verdict: str
    by_limit: dict[str, str]
    gaps: dict[str, Gap]
    heldout: float | None
    heldout_base: float | None
    noise_floor: float | None
    luck: float | None
    within_noise: bool
    tokens_to_decide: float | None
    spikes: int
    base_spikes: int
    layout: str
    asked: list[str]
    platform: list[str]


def limits_in_nats(bar: Bar, base_loss: float) -> dict[str, float]:
    """Return each limit of the bar as a gap in nats at a BF16 loss."""
    return {"relative": bar.relative * base_loss, "perplexity": math.log1p(bar.perplexity), "absolute": bar.absolute}


def judge(base: Run, candidate: Run, others: Sequence[Run] = ()) -> Verdict:
    """Return the verdict on `candidate` against `base`; `others` are BF16 runs with other seeds."""
    check_pair(base, candidate)
    gaps = gaps_of(base.steps["loss"], candidate.steps["loss"], candidate.plan.bar.tail_fraction, base.rounding() + candidate.rounding())
    limits = limits_in_nats(candidate.plan.bar, gaps["tail"].base_loss)
    seeds = seed_gaps(base, others, gaps["tail"].nats.count)
    by_limit = {name: decide(gaps, limit, luck(seeds) or 0.0) for name, limit in limits.items()}
    decides = candidate.plan.bar.decides
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
        luck=luck(seeds),
        within_noise=within_noise,
        tokens_to_decide=_tokens_to_decide(gaps["tail"], limits[decides], candidate) if by_limit[decides] == UNDECIDED and not within_noise else None,
        spikes=spikes(candidate.steps["loss"]),
        base_spikes=spikes(base.steps["loss"]),
        layout=layout_label(base, candidate),
        asked=precision_differences(base, candidate),
        platform=platform_differences(base, candidate),
    )


def gaps_of(base: Array, candidate: Array, tail_fraction: float, rounding: Array | None = None) -> dict[str, Gap]:
    """Return the gap between two loss curves (a value a step) over the run, its tail, and the end of the tail.

    `rounding`: by how much each gap may be off in nats, for the digits that the losses were printed with.
    """
    steps = len(base)
    if steps < MIN_STEPS:
        raise InputError(f"{steps} common steps say nothing about a loss curve; run at least {MIN_STEPS}")
    tail = max(1, round(steps * tail_fraction))
    end = max(1, round(tail * END_OF_TAIL))
    gap = candidate - base
    means = {"run": mean_with_interval(gap), "tail": mean_with_interval(gap[-tail:]), "end": last_block_with_interval(gap, end)}
    off = {name: 0.0 if rounding is None else float(rounding[-mean.count :].mean()) for name, mean in means.items()}
    return {name: Gap(_widened(mean, off[name]), float(base[-mean.count :].mean()), off[name]) for name, mean in means.items()}


def _widened(mean: Mean, nats: float) -> Mean:
    return replace(mean, low=mean.low - nats, high=mean.high + nats)


def decide(gaps: dict[str, Gap], limit: float, luck: float = 0.0) -> str:
    """Return the verdict on the gaps of a run at a limit in nats; up to `luck` nats they could be those of BF16 with another seed."""
    tail, end = gaps["tail"].nats, gaps["end"].nats
    outside = max(limit, luck)
    if any(gap.low > outside or gap.high < -outside for gap in (tail, end)):
        return FAIL
    if -limit <= tail.low and tail.high <= limit and abs(end.value) + gaps["end"].rounding <= limit:
        return PASS
    return UNDECIDED


def _tokens_to_decide(gap: Gap, limit: float, candidate: Run) -> float | None:
    """Return the further tokens after which an interval that shrinks with the root of the steps would clear the limit.

    None where there is no interval, and where the gap lies so near the limit that it would take MOST_RUNS runs or more.
    """
    distance = abs(limit - abs(gap.nats.value)) - gap.rounding  # longer runs do not print more digits
    if not np.isfinite(gap.nats.half_width) or distance <= 0:
        return None
    tokens = candidate.steps["tokens"][-1]
    runs = max(0.0, ((gap.nats.half_width - gap.rounding) / distance) ** 2 - 1)
    return float(tokens * runs) if runs < MOST_RUNS else None


def seed_gaps(base: Run, others: Sequence[Run], tail: int) -> Array:
    """Return the mean gaps in nats over the last `tail` steps of BF16 runs with other seeds to `base`."""
    for other in others:
        check_pair(base, other)
    return np.array([(other.steps["loss"] - base.steps["loss"])[-tail:].mean() for other in others])


def luck(seeds: Array) -> float | None:
    """Return the gap in nats that a further BF16 seed exceeds in 1 - LUCK of cases, from the gaps of k others; None without any.

    Student's t with k degrees of freedom times their root mean square: 12.7 times for one, 4.3 for two, 2.3 for nine.
    """
    return float(t.ppf((1 + LUCK) / 2, len(seeds)) * np.sqrt(np.mean(seeds**2))) if len(seeds) else None


def over_seeds(verdicts: Sequence[Verdict]) -> Mean:
    """Return the mean relative gap of one recipe's runs, each of another seed and beside BF16 of that seed, with its 95 % interval.

    Student's t over the runs' gaps: the spread between seeds is in it, which the interval of a single run cannot know.
    """
    gaps = np.array([verdict.gaps["tail"].relative.value for verdict in verdicts])
    value, reach = float(gaps.mean()), float(t.ppf((1 + LUCK) / 2, len(gaps) - 1) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
    return Mean(value, value - reach, value + reach, len(gaps))


def heldout_gaps(base: Run, candidate: Run) -> tuple[Array, Array]:
    """Return the steps at which both runs were evaluated and the gaps in nats there."""
    if not base.heldout or not candidate.heldout:
        return np.zeros(0), np.zeros(0)
    steps, ours, theirs = np.intersect1d(base.heldout["step"], candidate.heldout["step"], return_indices=True)
    return steps, candidate.heldout["heldout_loss"][theirs] - base.heldout["heldout_loss"][ours]
