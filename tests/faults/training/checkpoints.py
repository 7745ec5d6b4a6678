"""Checkpoints that were broken after they were written: the one before is used and the folder says
so; never are other weights loaded.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.faults.commands import REFUSED
from tests.faults.folders import recorded, rows_in
from tests.faults.registry import Outcome, fault
from tests.faults.training.process import run_to_end
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    copied,
    finish,
    numbers,
    paused,
    precision_of,
    saved,
)


def _file(draw: random.Random, checkpoint: Path) -> Path:
    return draw.choice(
        [
            path
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.parent.name == "weights"
        ]
    )


def _cut(draw: random.Random, checkpoint: Path) -> None:
    path = _file(draw, checkpoint)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _flipped(draw: random.Random, checkpoint: Path) -> None:
    path = _file(draw, checkpoint)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def _missing(draw: random.Random, checkpoint: Path) -> None:
    _file(draw, checkpoint).unlink()


def _emptied(draw: random.Random, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "weights")


def _record_cut(draw: random.Random, checkpoint: Path) -> None:
    path = next(checkpoint.glob("files.rank*.json"))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _gone(draw: random.Random, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


BROKEN = (_flipped, _cut, _missing, _emptied, _record_cut, _gone)


@fault(
    AREA,
    "the newest checkpoint cut, changed in a bit, without a file, empty or gone",
    small=1,
    full=48,
    nemo=True,
)
def broken_checkpoint(count: int, folder: Path) -> Outcome:
    """The one before it is used and the folder says so; a checkpoint that is gone leaves nothing to
    say.
    """
    outcome = Outcome()
    for n in range(count):
        draw, precision, change = random.Random(n), precision_of(n), BROKEN[n % len(BROKEN)]
        run = copied(paused(precision, 10), folder / f"run{n}")
        newest = saved(run)[-1]
        change(draw, newest)
        wrong = finish(run, precision)
        said = [
            row for row in rows_in(run / "events.jsonl") if row["event"] == "checkpoint_passed_over"
        ]
        line = [
            line
            for line in (run / "log.txt").read_text().splitlines()
            if line.startswith("warning: ") and newest.name in line
        ]
        if (
            not wrong
            and change is not _gone
            and not (
                len(said) == len(line) == 1
                and said[0]["checkpoint"] == newest.name
                and said[0]["why"]
            )
        ):
            wrong = f"not said once: {said} {line}"
        outcome.add(
            f"continued from the one before, and said so; {EQUAL.partition('; ')[2]}",
            lost=wrong and f"{change.__name__}, seed {n}: {wrong}",
        )
    return outcome


@fault(AREA, "every checkpoint broken", small=0, full=10, nemo=True)
def all_checkpoints_broken(count: int, folder: Path) -> Outcome:
    """Whether to train from the first step again is for the user to say."""
    outcome, stopped = Outcome(), paused("fp8_delayed", 7)
    for n in range(count):
        draw, run = random.Random(n), copied(stopped, folder / f"run{n}")
        before = numbers(run / "metrics.jsonl")
        for checkpoint in saved(run):
            draw.choice(BROKEN[:-1])(draw, checkpoint)
        refused = [_refused(run) for _ in range(2)]  # launched again, it must not begin anew either
        right = (
            all(refused) and numbers(run / "metrics.jsonl") == before and recorded(run) == "failed"
        )
        outcome.add(REFUSED, lost=None if right else f"run {n}: refused {refused}, {recorded(run)}")
    return outcome


def _refused(run: Path) -> bool:
    (run / "log.txt").unlink()
    codes = run_to_end(run)
    lines = [
        line for line in (run / "log.txt").read_text().splitlines() if line.startswith("error: ")
    ]
    return codes == [2] and len(lines) == 1 and "no whole checkpoint" in lines[0]
