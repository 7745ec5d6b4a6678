"""The list of faults: `@fault` puts a function on it, `FAULTS` is what the table and the tests go
through.

    @fault("Training", "kill -9 of a rank at a random step", small=2, full=50, nemo=True)
    def killed_rank(count: int, folder: Path) -> Outcome:
        outcome = Outcome()
        for n in range(count):
            ...
            outcome.add("resumed, losses equal", lost=None if same else f"run {n}: step 17 differs")
        return outcome

`folder` is an empty directory of the fault's own.  `small` is the count in CI, 0 for what
CI has no time for; `full` is that of `make faults`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """What came of a fault: how often what came out, what was lost (a line each; none is what is
    wanted), what was measured.
    """

    came_out: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many inputs were tried."""
        return self.came_out.total() + len(self.lost)

    def add(self, what: str, lost: str | None = None) -> None:
        """Count one input: `what` came out, or `lost` says what went wrong."""
        if lost is None:
            self.came_out[what] += 1
        else:
            self.lost.append(lost)


class Unavailable(Exception):
    """What a fault needs is not on this machine; it says what.

    The table names the fault below itself, a test skips it.
    """


Injection = Callable[[int, Path], Outcome]


@dataclass(frozen=True)
class Fault:
    """An injection with its place in the table; `nemo`: it trains; `slurm`: on a real Slurm.

    Its test is marked so.
    """

    area: str
    what: str
    small: int
    full: int
    inject: Injection
    nemo: bool = False
    slurm: bool = False

    @property
    def name(self) -> str:
        """The function's name, by which --only and the tests call it."""
        return self.inject.__name__


FAULTS: list[Fault] = []


def fault(
    area: str, what: str, small: int, full: int, nemo: bool = False, slurm: bool = False
) -> Callable[[Injection], Injection]:
    """Put the decorated function on the list."""

    def register(inject: Injection) -> Injection:
        FAULTS.append(Fault(area, what, small, full, inject, nemo, slurm))
        return inject

    return register


def load() -> list[Fault]:
    """Import every module of this package, so that all faults are on the list, and return it."""
    package = importlib.import_module("tests.faults")
    for module in pkgutil.walk_packages(package.__path__, "tests.faults."):
        if not module.name.rpartition(".")[2].startswith(("test_", "_")):
            importlib.import_module(module.name)
    return FAULTS
