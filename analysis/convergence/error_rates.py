"""`python -m analysis.convergence.error_rates [--pairs N] [--out FILE]`: how often is a verdict
wrong?

Pairs of loss curves are made up: a true gap plus noise of a known kind.  The functions that judge
real runs (analysis/convergence/verdict.py) judge them, one pair or several seeds at a time.  A pass
is wrong where the true gap is beyond the tolerance, a fail where it is inside.  Two gaps lie at the
tolerance (0.98 and 1.02 of it), where errors are likeliest; at 0 and 2 a user wants a decision.

The random numbers have a fixed seed.  The constants of analysis/stats/low_frequency.py were chosen
on others (docs/converging.md).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.convergence.verdict import END_OF_TAIL, FAIL, PASS, Gap, decide, decide_seeds, gaps_of
from analysis.render.table import Table, write
from analysis.stats.low_frequency import Array
from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT

TOLERANCE, LOSS, NOISE = 0.0075, 3.0, 0.01  # nats; NOISE is a step's own, as a paired gap has it
TAIL = 0.25
STEPS, SEEDS, PAIRS = (500, 2000, 8000), (1, 2, 3, 5), 1000
GAPS = (0.0, 0.98, 1.02, 2.0)  # true gaps in tolerances
REPORTED_ON = 20261129  # seed of the random numbers


class Rate(NamedTuple):
    """How often verdicts on one kind of noise come out, as shares of so many pairs (0 to 1)."""

    noise: str
    steps: int
    seeds: int
    pairs: int
    pass_at_0: float
    fail_at_0: float
    fail_at_098: float
    pass_at_102: float
    pass_at_2: float
    fail_at_2: float


Maker = Callable[[np.random.Generator, int], Array]


def _white(rng: np.random.Generator, steps: int) -> Array:
    return np.asarray(rng.standard_normal(steps) * NOISE)


def _autoregressive(persistence: float) -> Maker:
    """Return noise with a stationary wander of one tolerance; `persistence` is per step of 2,000.

    Runs of another length wander as slowly in shares of the run.
    """
    from scipy.signal import lfilter

    def maker(rng: np.random.Generator, steps: int) -> Array:
        phi = max(0.0, 1 - (1 - persistence) * 2000 / steps)
        draws = rng.standard_normal(steps) * TOLERANCE * np.sqrt(1 - phi**2)
        draws[0] = rng.standard_normal() * TOLERANCE
        wander: Array = lfilter([1], [1, -phi], draws)
        return np.add(_white(rng, steps), wander)

    return maker


def _walk(rng: np.random.Generator, steps: int) -> Array:
    """A random walk from zero: its standard deviation at the last step is one tolerance."""
    walk: Array = np.cumsum(rng.standard_normal(steps)) * TOLERANCE / np.sqrt(steps)
    return _white(rng, steps) + walk


def _offset(rng: np.random.Generator, steps: int) -> Array:
    """Seed noise: each pair has a level of its own, with a standard deviation of one tolerance."""
    return _white(rng, steps) + rng.standard_normal() * TOLERANCE


def _heavy(rng: np.random.Generator, steps: int) -> Array:
    return np.asarray(rng.standard_t(2.5, steps) * NOISE)


def _spikes(rng: np.random.Generator, steps: int) -> Array:
    """Four spikes of half a nat, each gone after 20 steps: two of the candidate, two of BF16."""
    noise = _white(rng, steps)
    for start, sign in zip(rng.integers(0, steps, 4), (1, -1, 1, -1), strict=True):
        stretch = noise[start : start + 20]
        stretch += sign * np.linspace(0.5, 0, 20)[: len(stretch)]
    return noise


def _falling(rng: np.random.Generator, steps: int) -> Array:
    return _white(rng, steps) * np.linspace(3, 0.5, steps)


def _rising(rng: np.random.Generator, steps: int) -> Array:
    return _white(rng, steps) * np.linspace(0.5, 3, steps)


def _late(rng: np.random.Generator, steps: int) -> Array:
    """A divergence by ten tolerances over the last 4 % of the run: no pass is right."""
    ramp = np.maximum(0.0, np.arange(steps) / steps - 0.96) / 0.04
    return _white(rng, steps) + ramp * 10 * TOLERANCE


KINDS: dict[str, Maker] = {
    "white": _white,
    "AR 0.9": _autoregressive(0.9),
    "AR 0.99": _autoregressive(0.99),
    "AR 0.998": _autoregressive(0.998),
    "AR 0.999": _autoregressive(0.999),
    "random walk": _walk,
    "level by seed": _offset,
    "heavy tails": _heavy,
    "spikes": _spikes,
    "variance falls": _falling,
    "variance rises": _rising,
    "late divergence": _late,
}


def rates(kind: str, steps: int, seeds: int, pairs: int) -> Rate:
    """Return the rates over `pairs` verdicts on noise of one kind, each from so many seeds."""
    rng = np.random.default_rng([REPORTED_ON, list(KINDS).index(kind), steps, seeds])
    found = [_verdicts([KINDS[kind](rng, steps) for _ in range(seeds)]) for _ in range(pairs)]

    def share(gap: float, verdict: str) -> float:
        return sum(each[gap] == verdict for each in found) / pairs

    return Rate(
        noise=kind,
        steps=steps,
        seeds=seeds,
        pairs=pairs,
        pass_at_0=share(0.0, PASS),
        fail_at_0=share(0.0, FAIL),
        fail_at_098=share(0.98, FAIL),
        pass_at_102=share(1.02, PASS),
        pass_at_2=share(2.0, PASS),
        fail_at_2=share(2.0, FAIL),
    )


def _verdicts(noise: Sequence[Array]) -> dict[float, str]:
    """Return the verdict for each true gap, in tolerances, under this noise of one pair or several.

    A true gap moves means and intervals by itself, so the intervals are computed once.
    """
    steps = len(noise[0])
    if len(noise) == 1:
        base = np.full(steps, LOSS)
        found = gaps_of(base, base + noise[0], TAIL)
        return {
            gap: decide({k: _moved(v, gap) for k, v in found.items()}, TOLERANCE) for gap in GAPS
        }
    tail = round(steps * TAIL)
    windows = (tail, round(tail * END_OF_TAIL))
    tails, ends = (np.array([n[-w:].mean() for n in noise]) / TOLERANCE for w in windows)
    return {gap: decide_seeds(tails + gap, ends + gap) for gap in GAPS}


def _moved(gap: Gap, by: float) -> Gap:
    nats, shift = gap.nats, by * TOLERANCE
    moved = replace(nats, value=nats.value + shift, low=nats.low + shift, high=nats.high + shift)
    return replace(gap, nats=moved, median=gap.median + shift)


def all_rates(pairs: int) -> Iterator[Rate]:
    """Yield the rates of every kind of noise: one seed for each length, several for the middle
    one.
    """
    for kind in KINDS:
        for steps in STEPS:
            yield rates(kind, steps, 1, pairs)
        for seeds in SEEDS[1:]:
            yield rates(kind, STEPS[1], seeds, pairs)


def load(path: Path) -> Table:
    """Return the table of a CSV file that this command wrote."""
    types = Rate.__annotations__
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    kinds = {"noise": str, "steps": int, "seeds": int, "pairs": int}
    return table(
        [Rate(**{key: kinds.get(key, float)(line[key]) for key in types}) for line in lines]
    )


def table(found: Sequence[Rate]) -> Table:
    """Return the rates as percentages."""
    pairs = found[0].pairs
    cells = [_cells(rate) for rate in found]
    note = (
        f"{pairs} made-up pairs a row; rates in %; gaps in tolerances; wanders and levels have a "
        "standard deviation of one tolerance. A rate of 0 means less than "
        f"{3 / pairs:.1%} with 95 % confidence."
    )
    rows = [rate._asdict() for rate in found]
    return Table("Error rates of the verdict", cells, rows, [note], frozenset(["noise"]))


WORDS = {
    "pass_at_0": "gap 0: pass",
    "fail_at_0": "gap 0: wrong fail",
    "fail_at_098": "gap 0.98: wrong fail",
    "pass_at_102": "gap 1.02: wrong pass",
    "pass_at_2": "gap 2: wrong pass",
    "fail_at_2": "gap 2: fail",
}


def _cells(rate: Rate) -> dict[str, str]:
    facts = {"noise": rate.noise, "steps": str(rate.steps), "seeds": str(rate.seeds)}
    return facts | {word: f"{getattr(rate, key) * 100:.1f}" for key, word in WORDS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(prog="python -m analysis.convergence.error_rates", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"verdicts a row (default {PAIRS})"
    )
    parser.add_argument("--out", type=Path, help="write .csv, .md or .html instead of printing")
    args = parser.parse_args(argv)
    try:
        if args.pairs < 1:
            raise InputError(f"--pairs {args.pairs}: give a whole number from 1 on")
        made = table(list(all_rates(args.pairs)))
        if args.out:
            write(args.out, made)
        else:
            made.print()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    command(main)
