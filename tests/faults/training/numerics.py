"""NaN and Inf in loss or gradients, and FP8 that is none: an event or a refusal, never a number."""

from __future__ import annotations

from pathlib import Path

from recipes.exit_codes import EXIT_WRONG_INPUT
from tests.faults.folders import recorded, rows_in
from tests.faults.registry import Outcome, fault
from tests.faults.training import sabotage
from tests.faults.training.process import Ranks
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    FP8,
    STEPS,
    finish,
    numbers,
    precision_of,
    prepared,
    refusal,
    step_of,
    unbroken,
)

# Of 4 layers (fp8_current keeps two of them in BF16), 2 micro-batches.
GEMMS = {"fp8_delayed": 96, "fp8_current": 48, "fp8_subchannel": 96, "mxfp8": 96}
POISON = ("nan_in_gradients", "inf_in_gradients", "nan_in_loss", "inf_in_loss")


@fault(
    AREA,
    "NaN or Inf in loss or gradients of a step, `train.on_non_finite=stop`; one and two processes",
    small=1,
    full=16,
    nemo=True,
)
def non_finite_stops(count: int, folder: Path) -> Outcome:
    """The run ends, with an event; the step is never a number, and without the fault the run
    continues as if it had not been.
    """
    outcome = Outcome()
    for n in range(count):
        processes, precision, what = (
            2 if n % 4 == 3 else 1,
            precision_of(n),
            POISON[(n + n // len(POISON)) % len(POISON)],
        )
        if processes == 2:
            what = POISON[n // 4 % 2]  # of the other rank's loss, rank 0 knows the mean
        run = prepared(folder / f"run{n}", precision, processes=processes)
        ranks = Ranks(run, processes, sabotage=what)
        ranks.until(lambda ranks=ranks: not all(process.is_alive() for process in ranks.processes))
        codes = ranks.wait(20)
        found = [
            row
            for row in rows_in(run / "events.jsonl")
            if str(row["event"]).startswith("non_finite")
        ]
        row = next(
            (
                row
                for row in numbers(run / "metrics.jsonl")
                if row["step"] == sabotage.STEP and "loss" in row
            ),
            {"loss": "NaN"},
        )
        wrong = None
        if (
            0 in codes
            or not found
            or found[0]["step"] != sabotage.STEP
            or step_of(run) > sabotage.STEP
        ):
            wrong = f"{what}: {codes}, {found}, step {step_of(run)}"
        elif row["loss"] not in ("NaN", float("inf")):
            wrong = f"{what}: the step stands as {row}"
        outcome.add(
            f"ended, an event in the run folder; {EQUAL}",
            lost=wrong or finish(run, precision, processes),
        )
    return outcome


@fault(
    AREA,
    "NaN in gradients of a step where Megatron-Core does not look,"
    " `settings.check_gradients=false`",
    small=0,
    full=4,
    nemo=True,
)
def non_finite_unchecked(count: int, folder: Path) -> Outcome:
    """The run ends in that step, with an event, and without the fault it continues as if it had not
    been.
    """
    outcome = Outcome()
    for n in range(count):
        precision = precision_of(n)
        run = prepared(folder / f"run{n}", precision, "settings.check_gradients=false")
        codes = Ranks(run, sabotage="nan_in_gradients").wait()
        found = [
            row["step"]
            for row in rows_in(run / "events.jsonl")
            if row["event"] == "non_finite_gradients"
        ]
        right = recorded(run) == "failed" and 0 not in codes and sabotage.STEP in found
        outcome.add(
            "ended, an event in the run folder",
            lost=None if right else f"{recorded(run)} {codes} {found}",
        )
    return outcome


@fault(AREA, "the same with the check, `train.on_non_finite=skip`", small=0, full=12, nemo=True)
def non_finite_is_skipped(count: int, folder: Path) -> Outcome:
    """The update is left out, all other steps are trained, and a comparison refuses the run, for a
    step is no number.
    """
    outcome = Outcome()
    for n in range(count):
        precision, what, processes = precision_of(n), POISON[n % 2], 2 if n % 3 == 2 else 1
        run = prepared(
            folder / f"run{n}", precision, "train.on_non_finite=skip", processes=processes
        )
        Ranks(run, processes, sabotage=what).wait()
        rows = [row for row in numbers(run / "metrics.jsonl") if "loss" in row]
        bad = [row["step"] for row in rows if "NaN" in (row["loss"], row["grad_norm"])]
        said = [
            row["step"] for row in rows_in(run / "events.jsonl") if row["event"] == "skipped_update"
        ]
        right = (
            recorded(run) == "done"
            and [row["step"] for row in rows] == list(range(1, STEPS + 1))
            and bad == said == [sabotage.STEP]
        )
        before = [
            row
            for row in numbers(unbroken(precision, processes) / "metrics.jsonl")
            if "loss" in row
        ][: sabotage.STEP - 1]
        right = (
            right
            and rows[: sabotage.STEP - 1] == before
            and "no finite number" in refusal(run, processes)
        )
        outcome.add(
            "skipped, an event in the run folder; analysis refuses the run",
            lost=None if right else f"{what}: {recorded(run)} {bad} {said}",
        )
    return outcome


@fault(
    AREA,
    "FP8 layers that are BF16 from the start, or from a step on",
    small=1,
    full=8,
    nemo=True,
)
def silent_bf16(count: int, folder: Path) -> Outcome:
    """The run ends in the first step that ran other FP8 GEMMs than the plan implies."""
    outcome = Outcome()
    for n in range(count):
        precision, what = FP8[n // 2 % len(FP8)], ("no_fp8", "fp8_lost_at_a_step")[n % 2]
        run = prepared(folder / f"run{n}", precision)
        codes, step = Ranks(run, sabotage=what).wait(), 1 if what == "no_fp8" else sabotage.STEP
        words = (
            f"error: step {step} of rank 0 ran 0 FP8 GEMMs where the plan implies"
            f" {GEMMS[precision]} "
        )
        right = recorded(run) == "failed" and words in (run / "log.txt").read_text()
        right = right and codes == [EXIT_WRONG_INPUT] and step_of(run) == step - 1
        wrong = f"{what} in {precision}: {recorded(run)}, {codes}, step {step_of(run)}"
        outcome.add("ended in that step, with both numbers", lost=None if right else wrong)
    return outcome
