"""Planted gaps: each must be judged as it should, and the rates of wrong verdicts are printed."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import ttest_1samp

from analysis.compare import main as compare_main
from analysis.convergence.comparison import all_notes, compare, headline, notes, row, shown
from analysis.convergence.error_rates import KINDS, rates
from analysis.convergence.error_rates import main as error_rates
from analysis.convergence.verdict import gaps_of, judge, judge_seeds, seed_noise
from analysis.runs.load import Array, load_run
from analysis.stats.series import mean_with_interval, spikes
from recipes.plan import Bar
from tests.analysis.conftest import STEPS, Maker, curve, own_noise

SEEDS = range(20)
SHIPPED = Path(__file__).parents[2] / "analysis" / "results" / "error_rates" / "rates.csv"


def shipped() -> list[dict[str, str]]:
    with SHIPPED.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def late(steps: int = STEPS) -> Array:
    """A gap that opens over the last 4 % of the run."""
    return np.maximum(0.0, np.arange(steps) - 0.96 * steps) / (0.04 * steps) * 0.2


def spike(steps: int = STEPS) -> Array:
    """A jump of 3 nats at half time that is gone after 20 steps."""
    gap = np.zeros(steps)
    gap[steps // 2 : steps // 2 + 20] = np.linspace(3, 0, 20)
    return gap


PLANTED: dict[str, tuple[Array, str]] = {
    "none": (np.zeros(STEPS), "pass"),
    "+0.02": (np.full(STEPS, 0.02), "fail"),
    "-0.02": (np.full(STEPS, -0.02), "fail"),
    "late divergence": (late(), "fail"),
    "slow drift": (np.linspace(0, 0.02, STEPS), "undecided"),
    "a spike that recovers": (spike(), "pass"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_gaps_are_judged_as_they_should(name: str, make: Maker) -> None:
    gap, expected = PLANTED[name]
    found = Counter[str]()
    for seed in SEEDS:
        base = load_run(make(f"bf16.{seed}", curve(seed=seed), "bf16"))
        verdict = judge(
            base,
            load_run(make(f"fp8.{seed}", curve(seed=seed) + gap + own_noise(seed, size=0.006))),
        )
        found[verdict.verdict] += 1
        assert (verdict.spikes > verdict.base_spikes) == (name == "a spike that recovers")
    print(f"{name}: {dict(found)}")
    assert found[expected] >= len(SEEDS) - (2 if expected == "pass" else 0)
    assert set(found) <= {expected, "undecided"}


def test_too_few_steps_are_undecided_and_say_how_many_would_do(make: Maker) -> None:
    steps = 120
    undecided = 0
    for seed in SEEDS:
        base = load_run(make(f"bf16.{seed}", curve(steps, seed), "bf16"))
        verdict = judge(
            base,
            load_run(
                make(f"fp8.{seed}", curve(steps, seed) + 0.005 + own_noise(seed, steps, 0.03))
            ),
        )
        undecided += verdict.verdict == "undecided"
        assert verdict.verdict != "fail"
        assert verdict.tokens_to_decide is None or verdict.tokens_to_decide > 0
    print(f"+0.005 over {steps} steps: {undecided} of {len(SEEDS)} undecided")
    assert undecided >= len(SEEDS) - 1


@pytest.mark.parametrize("kind", ["white", "AR 0.998", "AR 0.999", "random walk"])
def test_a_wander_of_one_tolerance_hardly_ever_gives_a_wrong_verdict(kind: str) -> None:
    """With the interval of a block bootstrap, 8 to 16 % of these verdicts were wrong."""
    rate = rates(kind, 2000, 1, 200)
    assert rate.fail_at_0 + rate.pass_at_2 <= 0.02
    if kind == "white":
        assert rate.pass_at_0 > 0.95 and rate.fail_at_2 > 0.95


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_student_over_seeds_is_wrong_as_rarely_as_it_says(seeds: int) -> None:
    """2.5 % at the tolerance itself, also where each seed has a level of its own."""
    rate = rates("level by seed", 500, seeds, 1500)
    assert rate.pass_at_102 <= 0.035 and rate.fail_at_098 <= 0.04


def test_the_table_of_error_rates_is_made_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error_rates(["--pairs", "0"]) == 2 and "from 1 on" in capsys.readouterr().err
    monkeypatch.setattr("analysis.convergence.error_rates.KINDS", {"white": KINDS["white"]})
    assert error_rates(["--pairs", "2", "--out", str(tmp_path / "rates.csv")]) == 0
    lines = (tmp_path / "rates.csv").read_text().splitlines()
    assert lines[0].startswith("noise,steps,seeds,pairs,pass_at_0") and len(lines) == 7
    assert error_rates(["--pairs", "1"]) == 0 and "Error rates" in capsys.readouterr().out


def test_the_shipped_error_rates_hold_the_claims_of_the_docs() -> None:
    """One pair: at most 1 % wrong at 0 and 2 tolerances, save where levels differ by seed.

    Seeds: passes wrong in at most 2.5 %, fails in at most 3 %, and 1 % for chance in 1,000 pairs.
    Spikes in the tail are the exception that the docs state.
    """
    for line in shipped():
        rate = {key: float(value) for key, value in line.items() if key != "noise"}
        if line["noise"] == "late divergence":
            assert max(rate["pass_at_0"], rate["pass_at_102"], rate["pass_at_2"]) == 0, line
        elif line["noise"] == "spikes":
            assert rate["pass_at_102"] <= 0.025 and rate["fail_at_098"] <= 0.12, line
        elif rate["seeds"] > 1:
            assert rate["pass_at_102"] <= 0.035 and rate["fail_at_098"] <= 0.04, line
        elif line["noise"] != "level by seed":
            assert max(rate["fail_at_0"], rate["pass_at_2"]) <= 0.01, line


def test_gap_and_limits_are_those_of_the_curves(make: Maker) -> None:
    loss = curve()
    base, candidate = load_run(make("bf16", loss, "bf16")), load_run(make("fp8", loss * 1.001))
    gap = gaps_of(base.steps["loss"], candidate.steps["loss"], 0.25)["tail"]
    assert gap.nats.value == pytest.approx(0.001 * loss[900:].mean())
    assert gap.relative.value == pytest.approx(0.001)
    verdict = judge(base, candidate)
    assert verdict.by_limit == {"relative": "pass", "perplexity": "pass", "absolute": "pass"}
    assert verdict.heldout == pytest.approx(0.001 * loss[-1], abs=1e-8)  # as_run rounds


def test_each_limit_judges_for_itself(make: Maker) -> None:
    base = load_run(make("bf16", curve(), "bf16"))
    verdict = judge(base, load_run(make("fp8", curve() + 0.0053 + own_noise(3, size=0.001))))
    assert verdict.by_limit == {"relative": "pass", "perplexity": "fail", "absolute": "pass"}


def test_the_noise_floor_is_the_distance_of_bf16_seeds(make: Maker) -> None:
    runs = [
        load_run(make(f"bf16.{s}", curve() + s * 0.003, "bf16", (f"seed={s}",))) for s in (1, 2)
    ]
    verdict = judge(
        runs[0], load_run(make("fp8", curve() + 0.003, overrides=("seed=1",))), runs[1:]
    )
    assert verdict.noise_floor == pytest.approx(0.003)
    either_side = [
        load_run(make(f"bf16.{s}", curve() + apart, "bf16", (f"seed={s}",)))
        for s, apart in ((3, 0.005), (4, -0.003))
    ]
    assert judge(
        runs[0], load_run(make("fp8.2", curve(), overrides=("seed=1",))), either_side
    ).noise_floor == pytest.approx(0.008)


def test_a_repeat_of_a_bf16_seed_is_no_further_draw_of_seed_noise(make: Maker) -> None:
    seeds = (1, 2, 2, 1)
    runs = [
        load_run(make(f"bf16.{n}", curve() + seed * 0.003, "bf16", (f"seed={seed}",)))
        for n, seed in enumerate(seeds)
    ]
    candidate = load_run(make("fp8", curve() + 0.03, overrides=("seed=1",)))
    once, repeated = judge(runs[0], candidate, runs[1:2]), judge(runs[0], candidate, runs[1:])
    assert once.seed_noise == pytest.approx(0.003 * 12.706, rel=1e-3)
    assert (repeated.verdict, repeated.seed_noise) == (once.verdict, once.seed_noise)
    alone = judge(runs[0], candidate, runs[3:])
    assert alone.noise_floor is None and alone.seed_noise is None


@pytest.mark.parametrize(("apart", "verdict"), [(0.01, "undecided"), (0.002, "fail")])
def test_a_gap_that_bf16_with_another_seed_could_have_fails_nobody(
    make: Maker, apart: float, verdict: str
) -> None:
    runs = [
        load_run(make(f"bf16.{s}", curve() + s * apart, "bf16", (f"seed={s}",))) for s in (1, 2)
    ]
    found = judge(
        runs[0], load_run(make("fp8", curve() + apart + 0.03, overrides=("seed=1",))), runs[1:]
    )
    assert found.verdict == verdict and found.within_noise == (verdict == "undecided")
    if found.within_noise:
        assert found.tokens_to_decide is None and "another seed" in " ".join(notes(found))


@pytest.mark.parametrize("others", [1, 2, 4])
def test_seed_noise_is_exceeded_in_less_than_one_case_in_twenty(others: int) -> None:
    losses = np.random.default_rng(others).normal(size=(4000, others + 2))
    beyond = [abs(row[-1] - row[0]) > seed_noise(row[1:-1] - row[0]) for row in losses]
    assert 0.02 < np.mean(beyond) < 0.05
    assert (
        np.mean([abs(row[-1] - row[0]) > np.abs(row[1:-1] - row[0]).max() for row in losses]) > 0.15
    )  # the largest gap is no bound


def test_a_recipe_with_several_seeds_gets_a_row_a_seed_and_the_mean_over_them(make: Maker) -> None:
    gaps = {1: 0.06, 2: -0.09, 3: 0.0}
    runs = [load_run(make(f"bf16.{s}", curve(), "bf16", (f"seed={s}",))) for s in gaps]
    runs += [
        load_run(make(f"fp8.{s}", curve() + gap, "fp8_current", (f"seed={s}",)))
        for s, gap in gaps.items()
    ]
    found = compare([*runs, load_run(make("mx", curve(), "mxfp8", ("seed=1",)))])
    lines = shown(found.rows)
    names = ["fp8_current s1", "fp8_current s2", "fp8_current s3", "fp8_current", "mxfp8"]
    assert [line["precision"] for line in lines] == names
    assert [line["seeds"] for line in lines] == ["1", "1", "1", "3", "1"]
    assert headline(found.rows).endswith("s1: seed 1") and "s1" not in headline(found.rows[-1:])
    together = judge_seeds(
        [v for v in found.verdicts if v.candidate.plan.precision.name == "fp8_current"]
    )
    expected = np.array([verdict.gaps["tail"].relative.value for verdict in together.verdicts])
    interval = ttest_1samp(expected, 0).confidence_interval(0.95)
    mean = together.gap
    assert (mean.value, mean.low, mean.high) == pytest.approx((expected.mean(), *interval))
    assert (
        found.rows[0]["over_seeds"]["seeds"] == [1, 2, 3] and found.rows[-1]["over_seeds"] is None
    )
    texts = all_notes(found)
    assert any(
        note.startswith("fp8_current: undecided over 3 seeds; more than 30") for note in texts
    )
    assert any(note.startswith("1 seed: ") for note in texts)


def test_a_repeat_to_the_last_bit_counts_once_over_seeds(make: Maker) -> None:
    pairs = [
        load_run(make(f"{name}.{seed}", curve(seed=seed), precision, (f"seed={seed}",)))
        for seed in (1, 2, 3)
        for name, precision in (("bf16", "bf16"), ("fp8", "fp8_current"))
    ]
    folder = pairs[1].folder
    again = load_run(shutil.copytree(folder, folder.with_name("again")))
    once, found = compare(pairs), compare([*pairs, again])
    assert found.outcomes == once.outcomes == ["pass"]
    assert [row["over_seeds"] for row in found.rows] == [once.rows[0]["over_seeds"]] * 4
    said = " ".join(all_notes(found))
    assert f"{again.folder}: repeats {folder} to the last bit" in said
    assert "1 seed: the verdict" not in said
    other = load_run(make("other", curve(seed=1) + 1e-6, overrides=("seed=1",)))
    assert compare([*pairs, other]).over_seeds == []


@pytest.mark.parametrize(
    ("gaps", "verdict", "code"),
    [
        ((0.0, 0.001, -0.001), "pass", 0),
        ((0.03, 0.032, 0.031), "fail", 1),
        ((0.0, 0.012, -0.012), "undecided", 3),
    ],
)
def test_seeds_decide_what_a_pair_cannot(
    gaps: tuple[float, ...],
    verdict: str,
    code: int,
    make: Maker,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A gap that drifts to its end is undecided in each pair, and decided over three seeds."""
    runs = []
    for seed, gap in enumerate(gaps, 1):
        drift = np.linspace(0, gap, STEPS) + own_noise(seed, size=0.002)
        runs.append(make(f"bf16.{seed}", curve(), "bf16", (f"seed={seed}",)))
        runs.append(make(f"fp8.{seed}", curve() + drift, "fp8_current", (f"seed={seed}",)))
    assert compare_main([*map(str, runs), "--json"]) == code
    rows = json.loads(capsys.readouterr().out)
    assert {row["over_seeds"]["verdict"] for row in rows} == {verdict}
    assert compare_main([*map(str, runs)]) == code and verdict in capsys.readouterr().out


def test_pairs_that_share_a_base_are_no_seeds_of_a_recipe(make: Maker) -> None:
    runs = [load_run(make("bf16", curve(), "bf16", ("seed=1",)))]
    runs += [load_run(make(f"fp8.{s}", curve(), "fp8_current", (f"seed={s}",))) for s in (1, 2, 3)]
    found = compare(runs)
    assert not found.over_seeds and found.outcomes == [v.verdict for v in found.verdicts]


def test_the_noise_floor_lets_nothing_pass(make: Maker) -> None:
    runs = [load_run(make(f"bf16.{s}", curve() + s * 0.5, "bf16", (f"seed={s}",))) for s in (1, 2)]
    found = judge(
        runs[0],
        load_run(make("fp8", curve() + 0.5 + 0.00575 + own_noise(3), overrides=("seed=1",))),
        runs[1:],
    )
    assert found.verdict == "undecided" and not found.within_noise


def test_another_stack_is_named_and_is_no_other_layout(make: Maker) -> None:
    one = ("gpu=h200", "mapping=single", "num_gpus=1", "cluster.container_runtime=none")
    base = load_run(make("bf16", curve(), "bf16", (*one, "stack=nemo_25_04_te_2_11")))
    found = compare([base, load_run(make("mxfp8", curve(), "mxfp8", (*one, "stack=emulated")))])
    named = "stack nemo_25_04_te_2_11 → emulated"
    (verdict,) = found.verdicts
    assert (
        verdict.layout == "iso-mapping"
        and verdict.platform == [named]
        and any(named in note for note in all_notes(found))
    )
    assert row(verdict)["differs"][-1] == named and "on h200, iso-mapping: " in headline(
        [row(verdict)]
    )
    wider = judge(
        base,
        load_run(
            make("wider", curve(), "fp8_current", (*one, "num_gpus=2", "stack=nemo_25_04_te_2_11"))
        ),
    )
    assert wider.layout == "best-mapping (num_gpus 1 → 2)" and not wider.platform
    assert "iso-mapping: mxfp8; best-mapping: fp8_current" in headline([row(verdict), row(wider)])


def test_spikes_are_counted_once_each() -> None:
    loss = curve()
    loss[300:304] += 2
    loss[700] += 2
    assert spikes(loss) == 2
    assert spikes(curve()) == 0


@pytest.mark.parametrize(("phi", "length"), [(0.0, 75), (0.5, 300), (0.9, 2000), (0.999, 2000)])
def test_the_interval_holds_the_truth_as_often_as_it_says(phi: float, length: int) -> None:
    """The interval is a 99.5 % one; over 400 autoregressive series the truth may be missed in 1
    %.
    """
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(400):
        series = lfilter([1], [1, -phi], rng.normal(size=length + 5000))[5000:]
        interval = mean_with_interval(series, length // 4)
        missed += not interval.low <= 0 <= interval.high
    print(f"autocorrelation {phi}, {length} steps: {missed / 4:.2f} % missed")
    assert missed <= 4


def test_equal_runs_have_a_gap_of_zero_and_equal_digits_no_spikes() -> None:
    mean = mean_with_interval(np.zeros(200), 50)
    assert (mean.low, mean.value, mean.high) == (0, 0, 0)
    printed = np.where(np.arange(2000) % 7 == 0, 0.001, 0.0)  # most gaps of printed losses are zero
    assert mean_with_interval(printed, 500).half_width > 0


def test_a_million_steps_are_no_matter(tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=10**6)
    assert mean_with_interval(series).value == pytest.approx(series.mean())


def test_the_bar_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="decides"):
        Bar(decides="luck", relative=0.1, perplexity=0.1, absolute=0.1, tail_fraction=0.5)  # type: ignore[arg-type]
