"""Paired accuracy: planted differences are found, few questions decide nothing, and verdicts are
seldom wrong.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.convergence.tasks import Paired, decide, load_evaluation, more_questions, task_rows
from analysis.report import main as report
from recipes.errors import InputError
from tests.analysis.conftest import Maker, curve, own_noise

BAR = 0.01
DISAGREE = 0.06  # share of questions on which exactly one model is right


def draw(rng: np.random.Generator, n: int, difference: float) -> Paired:
    """Return the counts of two models whose true accuracies differ by `difference`."""
    won, lost = (DISAGREE + difference) / 2, (DISAGREE - difference) / 2
    w, x, both, _ = rng.multinomial(n, [won, lost, 0.5, 0.5 - won - lost])
    return Paired(n, int(both), int(w), int(x))


def rates(n: int, difference: float, draws: int = 1000) -> dict[str, float]:
    rng = np.random.default_rng(7)
    found = [decide(draw(rng, n, difference), BAR) for _ in range(draws)]
    return {verdict: found.count(verdict) / draws for verdict in ("pass", "fail", "undecided")}


def test_planted_differences_get_their_verdict_and_wrong_ones_are_rare() -> None:
    cases = {
        "equal, 20,000 questions": (rates(20_000, 0.0), "pass", 0.99),
        "5 points worse, 4,000 questions": (rates(4_000, -0.05), "fail", 0.99),
        "equal, 200 questions": (rates(200, 0.0), "undecided", 0.99),
        "5 points worse, 50 questions": (rates(50, -0.05), "undecided", 0.95),
    }
    for name, (found, wanted, share) in cases.items():
        print(f"{name}: {found}")
        assert found[wanted] >= share, (name, found)
    for n in (2_000, 20_000):
        for difference in (
            -BAR,
            BAR,
        ):  # the hardest truth: on the bar itself, any verdict is wrong on one side
            found = rates(n, difference)
            print(f"on the bar ({difference:+}), {n:,} questions: {found}")
            assert found["pass"] <= 0.012 and found["fail"] <= 0.012, (n, found)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    for n, difference in ((60, 0.0), (400, -0.03), (3_000, 0.02)):
        missed = 0
        for _ in range(1000):
            low, high = draw(rng, n, difference).interval()
            missed += not low <= difference <= high
        print(
            f"99 % interval, {n} questions, difference {difference:+}: misses {missed / 1000:.1%}"
        )
        assert missed <= 20


def test_no_disagreement_is_no_certainty() -> None:
    z2 = 2.5758293035489004**2
    low, high = Paired(50, 20, 0, 0).interval()
    assert (low, high) == pytest.approx(
        (-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9
    )  # Tango's closed form
    assert (
        decide(Paired(50, 20, 0, 0), BAR) == "undecided"
        and decide(Paired(5_000, 20, 0, 0), BAR) == "pass"
    )
    assert Paired(30, 0, 30, 0).interval()[1] == 1.0 and Paired(30, 0, 0, 30).interval()[0] == -1.0


def test_the_questions_that_would_decide_do_decide() -> None:
    for found in (Paired(50, 20, 0, 0), Paired(300, 100, 8, 9), Paired(200, 100, 2, 12)):
        more = more_questions(found, BAR)
        assert more
        assert decide(found.scaled(1 + more / found.n), BAR) != "undecided"
        assert decide(found.scaled(1 + more / found.n * 0.8), BAR) == "undecided"
    assert more_questions(Paired(1000, 500, 20, 30), BAR) is None  # one point: on the bar itself


def test_mcnemar_agrees_with_statsmodels() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    for won, lost in ((0, 0), (3, 9), (40, 22), (0, 6)):
        theirs = 1.0 if won + lost == 0 else mcnemar([[50, lost], [won, 10]], exact=True).pvalue
        assert Paired(60 + won + lost, 50, won, lost).mcnemar() == pytest.approx(theirs)


def evaluate(folder: Path, precision: str, correct: list[int], loss: float, **facts: Any) -> None:
    """Write what recipes.evaluation.evaluate writes, made up."""
    rows = [
        {"task": "t", "doc_id": i, "doc_sha256": str(i), "prompt_sha256": str(i), "correct": c}
        for i, c in enumerate(correct)
    ]
    items = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "evaluation_items.jsonl").write_text(items)
    sets = {
        "heldout": {
            "loss": loss,
            "stderr": 0.01,
            "perplexity": float(np.exp(loss)),
            "tokens": 4096,
            "sha256": "0",
        }
    }
    found = {
        "run": folder.name,
        "precision": precision,
        "step": 400,
        "label": "emulated",
        "sets": sets,
        "tasks": {"t": {}},
        "accuracy_bar": BAR,
    }
    found["items"] = {
        "file": "evaluation_items.jsonl",
        "sha256": hashlib.sha256(items.encode()).hexdigest(),
    }
    (folder / "evaluation.json").write_text(json.dumps({**found, **facts}))


@pytest.fixture
def two(make: Maker) -> tuple[Path, Path]:
    base, candidate = (
        make("bf16", curve(400), "bf16"),
        make("fp8", curve(400) + own_noise(1, 400, 0.002)),
    )
    evaluate(base, "bf16", [1, 1, 0, 0] * 100, 2.50)
    evaluate(candidate, "fp8_current", [1, 0, 1, 0] + [1, 1, 0, 0] * 99, 2.51)
    return base, candidate


def test_rows_hold_the_paired_counts(two: tuple[Path, Path]) -> None:
    (row,) = task_rows(*map(load_evaluation, two))
    assert (row["n"], row["won"], row["lost"], row["difference"], row["verdict"]) == (
        400,
        1,
        1,
        0.0,
        "undecided",
    )
    assert row["accuracy"] == row["base_accuracy"] == 0.5 and row["stderr"] == pytest.approx(
        0.5 / np.sqrt(399)
    )
    assert row["more_questions"] > 0


def test_evaluations_that_differ_are_refused_in_one_line(two: tuple[Path, Path]) -> None:
    base, candidate = two
    for change, word in (
        ({"step": 300}, "step"),
        ({"accuracy_bar": 0.05}, "bar"),
        ({"sets": {}}, "sets"),
    ):
        evaluate(candidate, "fp8_current", [1, 0] * 200, 2.5, **change)
        with pytest.raises(InputError, match=word):
            task_rows(load_evaluation(base), load_evaluation(candidate))
    evaluate(candidate, "fp8_current", [1, 0] * 100, 2.5)
    with pytest.raises(InputError, match="other questions"):
        task_rows(load_evaluation(base), load_evaluation(candidate))
    (candidate / "evaluation_items.jsonl").write_text("")
    with pytest.raises(InputError, match="sha256"):
        load_evaluation(candidate)
    for broken in ("[]", "{", '{"items": {"file": "../x", "sha256": ""}}'):
        (candidate / "evaluation.json").write_text(broken)
        with pytest.raises(InputError, match="evaluat"):
            load_evaluation(candidate)


def test_the_report_shows_evaluations_only_when_every_run_has_one(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert report([*map(str, two), "--out", str(out)]) == 0
    page = out.read_text()
    assert (
        "<h2>Evaluation</h2>" in page
        and "+0.0100" in page
        and "more questions would decide" in page
    )
    evaluate(two[1], "fp8_current", [1] * 400, 2.5, step=1)
    assert report([*map(str, two), "--out", str(out)]) == 0
    assert "differ in the step of the checkpoint" in out.read_text()
    (two[1] / "evaluation.json").unlink()
    assert report([*map(str, two), "--out", str(out)]) == 0
    assert "<h2>Evaluation</h2>" not in out.read_text()
