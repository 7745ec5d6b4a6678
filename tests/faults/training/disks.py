"""Disks that are full or read-only, and lines that a crash has cut."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.__main__ import main as launch
from tests.faults.commands import REFUSED, call
from tests.faults.folders import append, recorded
from tests.faults.registry import Outcome, Unavailable, fault
from tests.faults.training.process import Ranks, run_to_end
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    STEPS,
    copied,
    finish,
    numbers,
    paused,
    precision_of,
    prepared,
    refusal,
    short,
    shown,
    step_of,
    unbroken,
)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size at `folder`."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable(f"a small file system needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@fault(
    AREA,
    "a disk that fills up, with a checkpoint or with a line of metrics; room is made and the run"
    " continued",
    small=1,
    full=12,
    nemo=True,
)
def full_disk(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for n in range(count):
        draw, precision = random.Random(n), precision_of(n)
        with small_disk(folder / f"disk{n}", 400) as disk:
            run = prepared(disk / f"run{n}", precision)
            ranks, step = (
                Ranks(run),
                draw.randint(1, STEPS // 2),
            )  # later, and the run may end before the disk is full
            ranks.until(lambda run=run, step=step: step_of(run) >= step)
            _fill(disk / "ballast", 0 if n % 2 else draw.randrange(12_000_000))
            codes = ranks.wait()
            why = shown(run)
            (disk / "ballast").unlink()
            wrong = None if codes == [1] or codes == [2] else f"ended with {codes} on a full disk"
            if recorded(run) == "done":
                wrong = wrong or "done on a full disk"
            wrong = wrong or finish(run, precision)
            outcome.add(
                f"ended with an error; {EQUAL}",
                lost=wrong and f"run {n}, full after step {step}: {wrong} {why}",
            )
    return outcome


def _fill(ballast: Path, leave: int) -> None:
    """Write until no byte is left, then give some back."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


@fault(
    AREA,
    "a read-only run folder: `launch`, and the training process itself",
    small=2,
    full=10,
    nemo=True,
)
def read_only_folder(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    with small_disk(folder / "disk", 100) as disk:
        run = prepared(disk / "run", "bf16")
        (run / "log.txt").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for n in range(count):
            if n % 2:
                ended = call(launch, short(run, "bf16"))
                outcome.add(
                    REFUSED,
                    lost=ended.wrong(())
                    or (None if ended.code == 2 else f"exit code {ended.code}"),
                )
                continue
            log = folder / f"log{n}"
            codes = Ranks(run, log=log).wait()
            lines = log.read_text().splitlines()
            right = (
                codes == [2]
                and [line for line in lines if line.startswith("error: ")]
                and not any("Traceback" in line for line in lines)
            )
            outcome.add(REFUSED, lost=None if right else f"{codes} {lines[-3:]}")
    return outcome


@fault(
    AREA,
    "metrics.jsonl with a line cut in the middle, or lines beyond the checkpoint, when a run is"
    " continued",
    small=1,
    full=20,
    nemo=True,
)
def torn_metrics(count: int, folder: Path) -> Outcome:
    outcome, stopped = Outcome(), paused("fp8_delayed", 7)
    for n in range(count):
        draw, run = random.Random(n), copied(stopped, folder / f"run{n}")
        path = run / "metrics.jsonl"
        for step in range(8, 8 + draw.randrange(4)):
            append(path, {"step": step, "loss": 1.0})
        if n % 2 == 0:
            with path.open("ab") as file:
                file.write(b'{"step": 8, "lo')
        outcome.add(EQUAL, lost=finish(run, "fp8_delayed"))
    return outcome


@fault(
    AREA,
    "metrics.jsonl cut at any byte before the checkpoint's step, when a run is continued",
    small=1,
    full=16,
    nemo=True,
)
def metrics_cut_and_continued(count: int, folder: Path) -> Outcome:
    """Every whole line is kept and every step after the checkpoint is written; the hole is seen."""
    outcome, stopped = Outcome(), paused("fp8_delayed", 7)
    whole = (stopped / "metrics.jsonl").read_bytes()
    for n in range(count):
        run, end = copied(stopped, folder / f"run{n}"), random.Random(n).randrange(len(whole))
        (run / "metrics.jsonl").write_bytes(whole[:end])
        kept = numbers(run / "metrics.jsonl")
        run_to_end(run)
        found = numbers(run / "metrics.jsonl")
        after = [
            row for row in numbers(unbroken("fp8_delayed", 1) / "metrics.jsonl") if row["step"] > 7
        ]
        wrong = (
            None
            if found == [*kept, *after]
            else f"{len(found)} lines for {len(kept)} + {len(after)}"
        )
        wrong = wrong or (None if refusal(run) else "compared without its steps")
        what = "whole lines kept, the rest as without the fault; analysis refuses the run"
        outcome.add(what, lost=wrong and f"cut at byte {end}: {wrong}")
    return outcome
