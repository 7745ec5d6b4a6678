"""Broken run folders: what analysis makes of files that are cut, changed, foreign or written by two
at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import compare, report, throughput
from analysis.speed import full_depth_table
from launch import status
from tests.analysis.conftest import curve, write
from tests.analysis.test_evaluation import evaluate
from tests.faults.commands import PROJECT, REFUSED, Main, call, unlike_a_process, what_came_out
from tests.faults.folders import rows_in
from tests.faults.mutations import VALUES, broken, fresh
from tests.faults.registry import Outcome, fault

RESULTS = PROJECT / "analysis" / "results"
DEMO = [
    RESULTS / "demo" / f"llama3_tiny.{name}"
    for name in ("bf16.cpu.seed1", "bf16.cpu.seed2", "fp8_current.cpu.seed1")
]
H100 = [
    RESULTS / "llama3_8b_h100" / f"llama3_8b.{precision}.layers{n}"
    for precision in ("bf16", "fp8_current")
    for n in (2, 6)
]
AREA = "Analysis"
STEPS = 24
PROCESSES = 150  # each so many-th command of a fault is run as a process too


def demo(folder: Path) -> list[Path]:
    """Return copies of the demo's runs with an evaluation, which is what a run folder can hold at
    most.
    """
    runs = [fresh(run, folder / run.name) for run in DEMO]
    for run in runs:
        evaluate(run, "bf16" if ".bf16." in run.name else "fp8_current", [1, 0, 1, 1] * 50, 2.5)
    return runs


def _mutated(
    main: Main,
    whole: Sequence[Path],
    count: int,
    folder: Path,
    options: Callable[[random.Random], list[str]],
) -> Outcome:
    outcome = Outcome()
    for seed in range(count):
        draw = random.Random(seed)
        runs = [fresh(run, folder / run.name) for run in whole]
        done = broken(draw.choice(runs), draw)
        arguments = [*runs, *options(draw)]
        ended = call(main, arguments)
        wrong = ended.wrong()
        if (seed + 1) % PROCESSES == 0:
            wrong = wrong or unlike_a_process(main, arguments, ended)
        outcome.add(what_came_out(ended), lost=wrong and f"{done}: {wrong}")
    return outcome


@fault(
    AREA,
    "any file of a run folder cut, changed, retyped or replaced: `analysis.compare`",
    small=40,
    full=4000,
)
def compare_of_broken_folders(count: int, folder: Path) -> Outcome:
    return _mutated(
        compare.main,
        demo(folder / "whole"),
        count,
        folder,
        lambda draw: draw.choice([[], ["--json"]]),
    )


@fault(AREA, "the same: `analysis.report`", small=1, full=150)
def report_of_broken_folders(count: int, folder: Path) -> Outcome:
    return _mutated(
        report.main,
        demo(folder / "whole"),
        count,
        folder,
        lambda draw: ["--out", f"{folder}/report.html"],
    )


@fault(AREA, "the same: `analysis.throughput`", small=20, full=1000)
def throughput_of_broken_folders(count: int, folder: Path) -> Outcome:
    return _mutated(throughput.main, H100, count, folder, lambda draw: _form(draw, folder))


@fault(AREA, "the same: `analysis.speed.full_depth_table`", small=6, full=1000)
def fig3_of_broken_folders(count: int, folder: Path) -> Outcome:
    return _mutated(full_depth_table.main, H100, count, folder, lambda draw: _form(draw, folder))


@fault(AREA, "the same: `launch.status`", small=40, full=1000)
def status_of_broken_folders(count: int, folder: Path) -> Outcome:
    return _mutated(
        status.main,
        demo(folder / "whole"),
        count,
        folder,
        lambda draw: draw.choice([[], ["--json"]]),
    )


def _form(draw: random.Random, folder: Path) -> list[str]:
    return draw.choice(
        [
            [],
            ["--json"],
            *(["--out", f"{folder}/table{suffix}"] for suffix in (".html", ".csv", ".md")),
        ]
    )


@fault(AREA, "`metrics.jsonl` cut at every byte: `analysis.compare`", small=40, full=5000)
def metrics_cut_at_every_byte(count: int, folder: Path) -> Outcome:
    """A cut file is refused, unless all steps are there."""
    base, run = pair(folder)
    outcome, path = Outcome(), run / "metrics.jsonl"
    whole = path.read_bytes()
    last_evaluation = whole.rstrip(b"\n").rfind(b"\n") + 1
    ends = [*range(0, last_evaluation, max(1, len(whole) // count)), last_evaluation]
    for end in ends:
        path.write_bytes(whole[:end])
        ended = call(compare.main, [base, run])
        taken = "taken for whole" if ended.code in JUDGED and end != last_evaluation else None
        wrong = ended.wrong(JUDGED) or taken
        what = "compared without its last line" if end == last_evaluation else REFUSED
        outcome.add(what, lost=wrong and f"cut at byte {end}: {wrong}")
    return outcome


JUDGED = (0, 1, 3)  # exit codes of a comparison: pass, fail, undecided


def pair(folder: Path) -> tuple[Path, Path]:
    """Return a run in BF16 and one in FP8 that can be compared."""
    base = write(folder / "base", curve(STEPS), "bf16", [])
    run = write(folder / "run", curve(STEPS), "fp8_current", [])
    assert call(compare.main, [base, run]).code in JUDGED
    return base, run


SCALARS = [value for value in VALUES if not isinstance(value, dict | list)]
JSON = st.recursive(
    st.floats(1e-3, 10) | st.sampled_from(SCALARS) | st.floats() | st.integers(),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
KEYS = st.sampled_from(
    ["step", "loss", "tokens", "step_time_s", "fp8_gemms", "heldout_loss", "grad_norm", "lr"]
)


@fault(AREA, "`metrics.jsonl` of any rows (hypothesis): `analysis.compare`", small=40, full=5000)
def any_rows(count: int, folder: Path) -> Outcome:
    """Whatever rows there are: refused, or compared over all steps with a finite gap."""
    (base, run), outcome = pair(folder), Outcome()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(lines) - 1), KEYS, JSON), max_size=3),
        swap=st.integers(0, 40),
        extra=st.sampled_from(["", "", "", "{", "[]", "null", "\x00"]),
    )
    def tried(changes: list[tuple[int, str, object]], swap: int, extra: str) -> None:
        rows = [json.loads(line) for line in lines]
        for at, key, value in changes:
            rows[at] |= {key: value} if key in rows[at] else {}
        if swap < len(rows) - 1:
            rows[swap : swap + 2] = rows[swap : swap + 2][::-1]
        path.write_text(
            "\n".join([json.dumps(row) for row in rows] + ([extra] if extra else []) + [""]),
            "utf-8",
            "replace",
        )
        ended = call(compare.main, [base, run, "--json"])
        wrong = ended.wrong(JUDGED)
        if ended.code in JUDGED:
            gap = json.loads(ended.out)[0]["gap_nats"]["run"]
            wrong = (
                None if gap["steps"] == STEPS and np.isfinite(gap["value"]) else "taken for a run"
            )
        came = "compared over all steps" if ended.code in JUDGED else REFUSED
        outcome.add(came, lost=wrong and f"{changes}: {wrong}")

    tried()
    return outcome


DRIFT_STEPS, TOLERANCE = 500, 0.0075  # nats: 0.25 % of a loss of 3
PERSISTENCE = (0.0, 0.9, 0.99, 0.998, 0.999, 1.0)  # per step; 1: a random walk


def _gap(kind: int, true: float, rng: np.random.Generator) -> np.ndarray:
    """Return a gap of `true` tolerances with white noise and a wander of about one tolerance."""
    phi, steps = PERSISTENCE[kind], DRIFT_STEPS
    size = np.sqrt(1 - phi**2) if phi < 1 else 1 / np.sqrt(steps)
    draws = rng.standard_normal(steps) * size * (phi > 0)
    wander = np.zeros(steps)
    for i in range(1, steps):
        wander[i] = phi * wander[i - 1] + draws[i]
    return (true + wander) * TOLERANCE + rng.standard_normal(steps) * 0.01


@fault(
    AREA,
    "a gap between BF16 and FP8 that wanders up to a random walk, truly 0 or 2 tolerances:"
    " `analysis.compare`",
    small=12,
    full=240,
)
def wandering_gaps(count: int, folder: Path) -> Outcome:
    """No verdict is wrong; docs/converging.md shows how often one is, 0.9 % at most at these
    gaps.
    """
    outcome, plain = Outcome(), np.full(DRIFT_STEPS, 3.0)
    base = write(folder / "base", plain, "bf16", [])
    run = write(folder / "run", plain, "fp8_current", [])
    rows = rows_in(run / "metrics.jsonl")
    for seed in range(count):
        true, kind = 2 * (seed % 2), seed // 2 % len(PERSISTENCE)
        loss = plain + _gap(kind, true, np.random.default_rng(seed))
        changed = [{**row, "loss": loss[row["step"] - 1]} if "loss" in row else row for row in rows]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        ended = call(compare.main, [base, run])
        verdict = {0: "pass", 1: "fail", 3: "undecided"}.get(ended.code or 0, "")
        wrong = ended.wrong(JUDGED) or (
            f"a wrong {verdict}" if verdict == ("fail", "pass")[true // 2] else None
        )
        outcome.add(
            "undecided" if verdict == "undecided" else "decided, rightly",
            lost=wrong and f"seed {seed}, gap {true}: {wrong}",
        )
    return outcome
