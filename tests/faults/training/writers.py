"""Several processes that train one run folder at the same moment: one writes, no line is torn."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.faults.registry import Outcome, fault
from tests.faults.training.process import Ranks
from tests.faults.training.runs import AREA, precision_of, prepared, step_of, unlike

WAITING = 3  # processes beside the one that writes


@fault(
    AREA,
    "several processes that train one run folder at the same moment",
    small=0,
    full=5,
    nemo=True,
)
def several_writers(count: int, folder: Path) -> Outcome:
    """One writes.  The others wait a minute for it: it has ended by then, or they are refused.

    Every second run is stopped for that minute, all at once.
    """
    outcome, runs = Outcome(), [prepared(folder / f"run{n}", precision_of(n)) for n in range(count)]
    first = [Ranks(run) for run in runs]
    for n, ranks in enumerate(first):
        ranks.until(lambda ranks=ranks: step_of(ranks.folder) >= 1)
        if n % 2:
            ranks.kill(number=signal.SIGSTOP)
    logs = [[folder / f"log{n}.{k}" for k in range(WAITING)] for n in range(count)]
    others = [[Ranks(run, log=log) for log in logs[n]] for n, run in enumerate(runs)]
    for n, ranks in enumerate(first):
        ends = [other.wait(180) for other in others[n]]
        ranks.kill(number=signal.SIGCONT)
        code = ranks.wait()
        told = [log.read_text() for log in logs[n]]
        right = code == [0] and _right(ends, told, stopped=n % 2 == 1)
        wrong = None if right else f"{code}, {ends}, {told}"
        wrong = wrong or unlike(runs[n], precision_of(n))
        came = "one wrote, every number as without the others"
        outcome.add(came, lost=wrong and f"run {n}: {wrong}")
    return outcome


def _right(ends: list[list[int | None]], told: list[str], stopped: bool) -> bool:
    if not stopped:
        return all(end in ([0], [2]) for end in ends)
    why = "another process trains this run"
    return all(end == [2] for end in ends) and all(why in text for text in told)
