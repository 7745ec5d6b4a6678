"""BF16 against FP8 on the same held-out text and the same questions, from what
`recipes.evaluation.evaluate` left in the run folders.

Two accuracies of 2,000 questions each have standard errors of a point, so two tables side by side
show little.  But both models answered the same questions, and most of the answers agree; only the
questions on which exactly one is right say anything about the difference.  Its interval is Tango's
score interval for paired proportions (Statistics in Medicine 17, 1998), which stays honest with few
or no disagreements, where the usual one has no width.  The verdict is that interval against a bar
for accuracy that was set when the runs were evaluated; McNemar's exact test is reported beside it.

    pass       the interval of the difference lies inside the bar
    fail       it lies wholly outside
    undecided  anything else, with the questions that would decide it if the answers went on as they
               do
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from analysis.convergence.verdict import FAIL, PASS, UNDECIDED, Verdict
from analysis.runs.load import Run, first_problem
from recipes.errors import InputError
from recipes.files import read_file
from recipes.manifest_record import Line
from recipes.run_folder import read_json

# Of the interval, both sides together: a verdict is wrong in about 1 % of the cases at worst
CONFIDENCE = 0.99
MOST_TIMES = 1000.0  # more questions than so many times those asked are not worth naming
FILE = "evaluation.json"
ALL = "all tasks"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SHOWN_DIGITS = 4


@dataclass(frozen=True)
class Answers:
    """A task's questions in order: what they are (hashes of document and prompt), and whether each
    was answered right (0 or 1).
    """

    questions: tuple[tuple[int, str, str], ...]
    correct: NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What one run's evaluation found: the contents of evaluation.json, and the answers by task."""

    folder: Path
    facts: dict[str, Any]
    answers: dict[str, Answers]


@dataclass(frozen=True)
class Paired:
    """Two models on the same `n` questions: right in both `both`, in the candidate alone `won`, in
    the base alone `lost`.

    Counts are floats, so that they can be scaled.
    """

    n: float
    both: float
    won: float
    lost: float

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the base."""
        return (self.won - self.lost) / self.n

    @property
    def stderr(self) -> float:
        """Standard error of the difference."""
        return (
            math.sqrt(max(0.0, self.won + self.lost - (self.won - self.lost) ** 2 / self.n))
            / self.n
        )

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the ends of Tango's score interval of the difference."""
        from scipy.optimize import brentq
        from scipy.stats import norm

        z, edge = float(norm.ppf(0.5 + confidence / 2)), 1 - 1e-12
        low = (
            -1.0
            if self.difference <= -edge
            else float(brentq(lambda d: self._score(d) - z, -edge, self.difference))
        )
        high = (
            1.0
            if self.difference >= edge
            else float(brentq(lambda d: self._score(d) + z, self.difference, edge))
        )
        return low, high

    def _score(self, delta: float) -> float:
        """Return the score statistic of the hypothesis that the difference is `delta`: about
        standard normal where it holds.
        """
        n, b, c = self.n, self.won, self.lost
        linear = -b - c + (2 * n - b + c) * delta
        lost_rate = (math.sqrt(max(0.0, linear**2 + 8 * n * c * delta * (1 - delta))) - linear) / (
            4 * n
        )
        variance = n * (2 * lost_rate + delta * (1 - delta))
        distance = b - c - n * delta
        return 0.0 if distance == 0 else distance / math.sqrt(max(variance, 1e-300))

    def mcnemar(self) -> float:
        """Return the p-value of McNemar's exact test: how often chance alone parts the
        disagreements so unevenly.
        """
        from scipy.stats import binomtest

        disagreements = int(self.won + self.lost)
        return float(binomtest(int(self.won), disagreements, 0.5).pvalue) if disagreements else 1.0

    def scaled(self, factor: float) -> Paired:
        """Return the counts of `factor` times as many questions that are answered alike."""
        return Paired(self.n * factor, self.both * factor, self.won * factor, self.lost * factor)


def pair(base: Answers, candidate: Answers) -> Paired:
    """Return the counts of two sets of answers to the same questions."""
    right, ours = base.correct.astype(bool), candidate.correct.astype(bool)
    return Paired(
        len(right),
        int((right & ours).sum()),
        int((ours & ~right).sum()),
        int((right & ~ours).sum()),
    )


def decide(found: Paired, bar: float) -> str:
    """Return the verdict on a paired difference at a bar in absolute accuracy."""
    low, high = found.interval()
    if -bar <= low and high <= bar:
        return PASS
    return FAIL if low > bar or high < -bar else UNDECIDED


def more_questions(found: Paired, bar: float) -> int | None:
    """Return about how many further questions would decide an undecided difference; None if too
    many to be worth naming.
    """
    for factor in np.geomspace(1.0, MOST_TIMES, 121).tolist():
        if decide(found.scaled(factor), bar) != UNDECIDED:
            return math.ceil(found.n * (float(factor) - 1))
    return None


class _Set(BaseModel, strict=True):
    loss: Positive
    perplexity: Positive
    tokens: Annotated[int, Field(gt=0, lt=2**53)]
    sha256: str


class _Items(BaseModel, strict=True):
    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    sha256: str


class _Facts(BaseModel, strict=True):
    """What analysis reads of evaluation.json, with the types that it must have; what else stands
    there is left out.
    """

    run: Line
    precision: Line
    step: Annotated[int, Field(ge=0, lt=2**53)]
    sets: dict[Line, _Set]
    tasks: dict[str, Any]
    accuracy_bar: Annotated[float, Field(gt=0, lt=1)]
    label: Line
    items: _Items


class _Item(BaseModel, strict=True):
    task: Line
    doc_id: Annotated[int, Field(ge=0, lt=2**53)]
    doc_sha256: str
    prompt_sha256: str
    correct: Annotated[int, Field(ge=0, le=1)] | None


def load_evaluation(folder: Path) -> Evaluation:
    """Return the evaluation in a run folder; InputError where it is missing, changed, or not of
    this form.
    """
    path = folder / FILE
    try:
        facts = _Facts.model_validate(read_json(path))
        content = read_file(folder / facts.items.file)
        if hashlib.sha256(content).hexdigest() != facts.items.sha256:
            raise InputError(
                f"{folder}: the answers are not those that {FILE} names (sha256); evaluate the run"
                " again"
            )
        answers = _answers(
            [_Item.model_validate_json(line) for line in content.splitlines()], folder
        )
    except OSError as error:
        raise InputError(
            f"{folder}: {FILE} or its answers cannot be read ({error.strerror}); run python -m"
            " recipes.evaluation.evaluate"
        ) from None
    except ValidationError as error:
        raise InputError(
            f"{path} is no evaluation of this version ({first_problem(error)}); evaluate the run"
            " again"
        ) from None
    except ValueError as error:
        raise InputError(
            f"{path} is no evaluation of this version ({error}); evaluate the run again"
        ) from None
    return Evaluation(folder, facts.model_dump(), answers)


def _answers(items: list[_Item], folder: Path) -> dict[str, Answers]:
    """Return the answers by task, without tasks whose questions have no right or wrong."""
    by_task: dict[str, list[_Item]] = {}
    for item in items:
        if item.correct is not None:
            by_task.setdefault(item.task, []).append(item)
    found = {}
    for task, rows in by_task.items():
        rows.sort(key=lambda row: row.doc_id)
        questions = tuple((row.doc_id, row.doc_sha256, row.prompt_sha256) for row in rows)
        if len({number for number, *_ in questions}) != len(rows):
            raise InputError(f"{folder}: {task} repeats a question; evaluate the run again")
        found[task] = Answers(questions, np.array([row.correct for row in rows], dtype=np.int64))
    return found


def check_same(base: Evaluation, candidate: Evaluation) -> None:
    """Raise InputError where two evaluations did not ask the same at the same step, or not by the
    same bar.
    """
    where = f"{candidate.folder} and {base.folder}"
    for key, what in (
        ("step", "the step of the checkpoint"),
        ("accuracy_bar", "the bar for accuracy"),
    ):
        if base.facts[key] != candidate.facts[key]:
            raise InputError(
                f"{where} differ in {what} ({base.facts[key]} and {candidate.facts[key]}); evaluate"
                " both alike"
            )
    ours, theirs = (
        {name: s["sha256"] for name, s in e.facts["sets"].items()} for e in (candidate, base)
    )
    if ours != theirs:
        raise InputError(
            f"{where} were evaluated on other sets, or other text under one name; evaluate both"
            " alike"
        )
    if {t: a.questions for t, a in base.answers.items()} != {
        t: a.questions for t, a in candidate.answers.items()
    }:
        raise InputError(
            f"{where} were asked other questions (task, document or prompt); evaluate both with the"
            " same --tasks and --limit"
        )


def set_rows(base: Evaluation, candidate: Evaluation) -> list[dict[str, Any]]:
    """Return a row a set: losses in nats a token, their difference, perplexity and tokens."""
    check_same(base, candidate)
    rows = []
    for name, theirs in base.facts["sets"].items():
        ours = candidate.facts["sets"][name]
        gap = ours["loss"] - theirs["loss"]
        rows.append(
            {
                **_who(base, candidate),
                "set": name,
                "tokens": ours["tokens"],
                "loss": ours["loss"],
                "base_loss": theirs["loss"],
                "gap_nats": gap,
                "gap_relative": gap / theirs["loss"],
                "perplexity": ours["perplexity"],
                "base_perplexity": theirs["perplexity"],
            }
        )
    return rows


def task_rows(base: Evaluation, candidate: Evaluation) -> list[dict[str, Any]]:
    """Return a row a task, and one over all questions where there are several tasks."""
    check_same(base, candidate)
    pairs = {task: pair(answers, candidate.answers[task]) for task, answers in base.answers.items()}
    if len(pairs) > 1:
        pairs[ALL] = Paired(
            *(
                sum(getattr(found, field) for found in pairs.values())
                for field in ("n", "both", "won", "lost")
            )
        )
    return [
        {**_who(base, candidate), "task": task, **_row(found, candidate.facts["accuracy_bar"])}
        for task, found in pairs.items()
    ]


def _who(base: Evaluation, candidate: Evaluation) -> dict[str, Any]:
    names = {
        "run": candidate.facts["run"],
        "base": base.facts["run"],
        "precision": candidate.facts["precision"],
    }
    return {**names, "step": candidate.facts["step"], "label": candidate.facts["label"]}


def _row(found: Paired, bar: float) -> dict[str, Any]:
    low, high = found.interval()
    verdict = decide(found, bar)
    accuracy, base_accuracy = (
        (found.both + found.won) / found.n,
        (found.both + found.lost) / found.n,
    )
    return {
        "n": int(found.n),
        "accuracy": accuracy,
        "stderr": _stderr(accuracy, found.n),
        "base_accuracy": base_accuracy,
        "base_stderr": _stderr(base_accuracy, found.n),
        "difference": found.difference,
        "difference_stderr": found.stderr,
        "low": low,
        "high": high,
        "won": int(found.won),
        "lost": int(found.lost),
        "mcnemar_p": found.mcnemar(),
        "bar": bar,
        "verdict": verdict,
        "more_questions": more_questions(found, bar) if verdict == UNDECIDED else None,
    }


def _stderr(accuracy: float, n: float) -> float | None:
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None


# For the report


@dataclass(frozen=True)
class Section:
    """What the report shows: rows for sets and tasks, or the one line that says why there are
    none.
    """

    sets: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    problem: str | None = None

    @property
    def shown_sets(self) -> list[dict[str, str]]:
        """The rows of sets as the columns that people read."""
        return [
            {
                "precision": r["precision"],
                "set": r["set"],
                "tokens": f"{r['tokens']:,}",
                "loss": f"{r['loss']:.{SHOWN_DIGITS}f}",
                "BF16": f"{r['base_loss']:.{SHOWN_DIGITS}f}",
                "gap nats": f"{r['gap_nats']:+.{SHOWN_DIGITS}f}",
                "gap %": f"{r['gap_relative'] * 100:+.2f}",
                "perplexity": f"{r['perplexity']:.2f}",
            }
            for r in self.sets
        ]

    @property
    def shown_tasks(self) -> list[dict[str, str]]:
        """The rows of tasks as the columns that people read; shares in points of a hundred."""
        return [
            {
                "precision": r["precision"],
                "task": r["task"],
                "verdict": r["verdict"],
                "questions": f"{r['n']:,}",
                "accuracy %": _with_error(r["accuracy"], r["stderr"]),
                "BF16 %": _with_error(r["base_accuracy"], r["base_stderr"]),
                "difference": f"{r['difference'] * 100:+.2f}",
                "99 % interval": f"{r['low'] * 100:+.2f} to {r['high'] * 100:+.2f}",
                "only FP8 right": str(r["won"]),
                "only BF16 right": str(r["lost"]),
                "McNemar p": f"{r['mcnemar_p']:.3f}",
            }
            for r in self.tasks
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader should know beside the rows, as sentences."""
        said = [self.problem] if self.problem else []
        for r in self.tasks:
            if r["verdict"] == UNDECIDED:
                more = r["more_questions"]
                about = (
                    "the difference lies too near the bar for any reasonable number"
                    if more is None
                    else f"about {more:,} more questions would decide"
                )
                said.append(f"{r['run']}, {r['task']}: accuracy undecided; {about}")
        return said


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value * 100:.1f}" + ("" if stderr is None else f" ± {stderr * 100:.1f}")


def section(bases: Sequence[Run], verdicts: Sequence[Verdict]) -> Section | None:
    """Return the report's section on evaluation; None unless every compared run was evaluated."""
    runs = [*bases, *(verdict.candidate for verdict in verdicts)]
    if not all((run.folder / FILE).exists() for run in runs):
        return None
    try:
        found = {run.folder: _of_run(run) for run in runs}
        pairs = [
            (found[verdict.base.folder], found[verdict.candidate.folder]) for verdict in verdicts
        ]
        return Section(
            [row for two in pairs for row in set_rows(*two)],
            [row for two in pairs for row in task_rows(*two)],
        )
    except InputError as error:
        return Section([], [], str(error))


def _of_run(run: Run) -> Evaluation:
    found = load_evaluation(run.folder)
    if (found.facts["run"], found.facts["precision"]) != (run.name, run.plan.precision.name):
        raise InputError(f"{run.folder}: {FILE} is that of {found.facts['run']}; evaluate this run")
    return found
