"""Processes that inject faults, so that two run at once and one that dies takes no other with it.

Faults that train share a process, because it has NeMo and the runs without a fault, to which
theirs are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from tests.faults.registry import Fault, Outcome, Unavailable, load

Task = tuple[Fault, int]
Done = Callable[[Fault, int, Outcome | str, float], None]


def inject(fault: Fault, count: int) -> Outcome | str:
    """Inject a fault in a folder of its own; where this machine cannot have it, return why.

    What libraries print meanwhile is dropped.
    """
    with tempfile.TemporaryDirectory(prefix="faults") as folder, _quiet():
        try:
            return fault.inject(count, Path(folder))
        except Unavailable as reason:
            return str(reason)


@contextmanager
def _quiet() -> Iterator[None]:
    sys.stdout.flush()
    kept, nothing = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


def inject_all(tasks: Sequence[Task], processes: int, done: Done) -> None:
    """Inject each fault so many times, in so many processes; `done` hears of one end at a time.

    The first process begins with the faults that train, the others with those that do not.
    """
    waiting, lock = deque(sorted(tasks, key=lambda task: not task[0].nemo)), threading.Lock()

    def work(first: bool) -> None:
        worker = _Worker()
        while True:
            with lock:
                if not waiting:
                    break
                fault, count = waiting.popleft() if first else waiting.pop()
            start = time.monotonic()
            found = worker.inject(fault, count)
            with lock:
                done(fault, count, found, time.monotonic() - start)
        worker.end()

    threads = [threading.Thread(target=work, args=(n == 0,), daemon=True) for n in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Worker:
    """A process that injects one fault after another; a new one is started after it has died."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def inject(self, fault: Fault, count: int) -> Outcome | str:
        self._pipe.send((fault.name, count))
        try:
            found: Outcome | str = self._pipe.recv()
            return found
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._start()
            return Outcome(lost=[f"the process that injects it ended with {code}"])

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection) -> None:
    faults = {fault.name: fault for fault in load()}
    while task := pipe.recv():
        name, count = task
        try:
            pipe.send(inject(faults[name], count))
        except Exception as error:
            pipe.send(Outcome(lost=[f"the fault itself failed: {error!r}"[:2000]]))
