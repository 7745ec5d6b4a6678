"""Runs that are asked to stop, and runs that hang: both leave in time, with a checkpoint or with a
reason.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.folders import recorded
from tests.faults.registry import Outcome, fault
from tests.faults.training import sabotage
from tests.faults.training.process import LIMIT_S, Ranks
from tests.faults.training.runs import (
    AREA,
    EQUAL,
    EVALUATED_EVERY,
    events,
    finish,
    precision_of,
    prepared,
    shown,
    step_of,
)

ASKED: dict[str, Callable[[Ranks], object]] = {
    "SIGTERM": lambda ranks: ranks.kill(number=signal.SIGTERM),
    "SIGUSR1": lambda ranks: ranks.kill(number=signal.SIGUSR1),
    "the stop file": lambda ranks: (ranks.folder / "stop").touch(),
}


@fault(
    AREA,
    "SIGTERM, SIGUSR1 or the file `stop` at a random moment, from the start on; one and two"
    " processes",
    small=1,
    full=28,
    nemo=True,
)
def asked_to_stop(count: int, folder: Path) -> Outcome:
    """The run ends its step, saves and leaves; it evaluates nothing, and what was due then is
    evaluated when it goes on.
    """
    outcome, seconds, paused = Outcome(), [], 0
    for n in range(count):
        draw, precision, processes = random.Random(n), precision_of(n), 2 if n % 4 == 3 else 1
        run, how = (
            prepared(folder / f"run{n}", precision, processes=processes),
            list(ASKED)[n % len(ASKED)],
        )
        ranks, step = (
            Ranks(run, processes),
            (
                draw.choice([0, 1, EVALUATED_EVERY - 1, EVALUATED_EVERY, 5, 6, 8, 10])
                if n
                else EVALUATED_EVERY - 1
            ),
        )
        ranks.until(lambda run=run: "start" in events(run))
        ranks.until(lambda run=run, step=step: step_of(run) >= step)
        ASKED[how](ranks)
        start, codes = time.monotonic(), ranks.wait(300)
        seconds.append(time.monotonic() - start)
        wrong = (
            None
            if set(codes) == {0} and recorded(run) in ("paused", "done")
            else f"{codes}, {recorded(run)}"
        )
        paused += recorded(run) == "paused"
        (run / "stop").unlink(missing_ok=True)
        wrong = wrong or finish(run, precision, processes)
        outcome.add(
            f"saved and left; {EQUAL}",
            lost=wrong and f"{how} after step {step}, {processes} process(es): {wrong}",
        )
    outcome.measured.append(
        f"{paused} of {count} paused, the others were at their last step; {max(seconds):.1f} s at"
        " most until they had left"
    )
    return outcome


@fault(
    AREA,
    "a rank that hangs in a step (one process), or is stopped by SIGSTOP (one of two)",
    small=1,
    full=10,
    nemo=True,
)
def hung_rank(count: int, folder: Path) -> Outcome:
    """Noticed when the plan says, here after ten seconds without a step; what it waits for is in
    the log.
    """
    outcome, seconds = Outcome(), []
    for n in range(count):
        processes, precision = 1 + n % 2, precision_of(n)
        run = prepared(
            folder / f"run{n}", precision, "train.step_timeout_s=10", processes=processes
        )
        ranks = Ranks(run, processes, sabotage=None if n % 2 else "hang")
        ranks.until(lambda run=run: step_of(run) >= sabotage.STEP - 1)
        if n % 2:
            ranks.kill(1, number=signal.SIGSTOP)
        start = time.monotonic()
        ranks.until(lambda ranks=ranks: not all(process.is_alive() for process in ranks.processes))
        seconds.append(time.monotonic() - start)
        ranks.kill()  # as torchrun and srun do with the other ranks when one has ended
        ranks.wait()
        (run / "job").mkdir(exist_ok=True)
        (run / "job" / "lock").touch()  # as a launch leaves it
        found, why = shown(run)
        right = found == "failed" and "no step for 0:00:10" in why and seconds[-1] < LIMIT_S / 3
        wrong = None if right else f"{found}, {why!r}, after {seconds[-1]:.0f} s"
        outcome.add(
            f"ended with a reason; {EQUAL}", lost=wrong or finish(run, precision, processes)
        )
    outcome.measured.append(
        f"the hang was noticed after {max(seconds):.0f} s at most, of 10 s allowed"
    )
    return outcome
