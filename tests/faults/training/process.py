"""Training processes to be killed: the real `recipes.training.run`, forked from a server that has
imported NeMo once.

Importing takes twenty seconds, a short run three; so a fault can be injected a hundred times.  A
process may be told to die at a place in the code, which no clock can hit.  About half of the runs,
by their names, write their steps as on a GPU, each while the next is under way
(recipes/training/deferred.py), which on a CPU nothing asks for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 900  # a run of seconds that takes longer hangs, on a busy machine too
HERE = "tests.faults.training.process"
CHANGES = "tests.faults.training.sabotage"


@dataclass(frozen=True)
class Place:
    """A call of a function, before or after which a process kills itself with SIGKILL; `rank` None:
    every rank.
    """

    target: str  # module:name or module:Class.name
    call: int = 1
    after: bool = False
    rank: int | None = None

    def __str__(self) -> str:
        """Say where it is."""
        return (
            f"{'after' if self.after else 'before'} call {self.call} of"
            f" {self.target.rpartition(':')[2]}"
        )


class Ranks:
    """The processes of a run, one a rank."""

    def __init__(
        self,
        folder: Path,
        processes: int = 1,
        dies: Place | None = None,
        sabotage: str | None = None,
        log: Path | None = None,
    ) -> None:
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            shared = {
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port.getsockname()[1]),
            }
        shared |= {
            "TORCHELASTIC_RUN_ID": "fault",
            "GROUP_RANK": "0",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.folder = folder
        self.processes = [
            _context().Process(
                target=_train,
                args=(
                    str(folder),
                    str(log or folder / "log.txt"),
                    {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    dies,
                    sabotage,
                ),
            )
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            if pid and self.processes[rank].is_alive():
                os.kill(pid, number)

    @property
    def alive(self) -> bool:
        """Whether any rank lives."""
        return any(process.is_alive() for process in self.processes)

    def until(self, condition: Callable[[], bool], timeout: float = LIMIT_S) -> bool:
        """Wait for a condition while the run lives; return whether it came."""
        deadline = time.monotonic() + timeout
        while self.alive and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.005)
        return condition()

    def wait(self, timeout: float = LIMIT_S) -> list[int | None]:
        """Wait for the end and return the exit codes; a run that goes on is killed, and its code is
        None.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        for process in self.processes:
            process.join()
        return codes


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([HERE, "tests.faults.training._stack"])
    first = context.Process(target=_nothing)
    first.start()
    first.join()  # the server has imported NeMo: no time limit of a run counts that
    return context


def _nothing() -> None:
    """Train nothing."""


def _train(
    folder: str, log_file: str, env: dict[str, str], dies: Place | None, sabotage: str | None
) -> None:
    os.environ.update(env)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    from recipes.training import run

    if dies and dies.rank in (None, int(env["RANK"])):
        _die_at(dies)
    if zlib.crc32(Path(folder).name.encode()) % 2:
        _run_ahead()
    if sabotage:
        getattr(importlib.import_module(CHANGES), sabotage)()
    sys.exit(run.main(Path(folder)))


def wrap(target: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function at `target` by `made` of it."""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    holder: Any = functools.reduce(getattr, outer, importlib.import_module(module))
    found = inspect.getattr_static(holder, name)
    static = isinstance(found, staticmethod)
    changed = made(found.__func__ if static else found)
    setattr(holder, name, staticmethod(changed) if static else changed)


def _run_ahead() -> None:
    def made(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)  # NeMo-Run looks at the signature
        def ahead(self: Any, *args: Any, **kwargs: Any) -> None:
            function(self, *args, **kwargs)
            self.ahead = True

        return ahead

    wrap("recipes.training.callback:RunFolderCallback.__init__", made)


def _die_at(place: Place) -> None:
    calls = 0

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == place.call and not place.after:
                os.kill(os.getpid(), signal.SIGKILL)
            value = function(*args, **kwargs)
            if calls == place.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return deadly

    wrap(place.target, made)


def run_to_end(folder: Path, processes: int = 1) -> Sequence[int | None]:
    """Run a folder and return the exit codes."""
    return Ranks(folder, processes).wait()
