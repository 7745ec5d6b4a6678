"""What do tests leave behind?  A process or a thread that outlives the session fails it, and is
named with its test.

pytest prints its summary and then waits for threads that are no daemons and for processes of
`multiprocessing`; CI waits for whatever still holds its output.  Both have kept a finished run from
ending.  Every process that a test starts, also through others, inherits a variable of this session
and pytest's own PYTEST_CURRENT_TEST, so /proc tells which is whose.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import thread as pools
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest

T = TypeVar("T")
MARK = "PYTEST_SESSION_MARK"
PATIENCE_S = 20  # for what is ending: a killed process on a busy machine, the workers' own helpers
HELPERS = (
    "multiprocessing.forkserver",
    "multiprocessing.resource_tracker",
)  # end with the process that started them
_started_by = dict[threading.Thread, str]()
_threads = list[str]()


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):
        os.environ[MARK] = uuid4().hex


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Note which test started a thread."""
    before = set(threading.enumerate())
    result = yield
    for thread in set(threading.enumerate()) - before:
        _started_by[thread] = item.nodeid
    return result


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _threads.extend(
        f"a thread, {thread.name}, of {_started_by.get(thread, 'no test')}"
        for thread in _waited_for(_lasting_threads)
    )
    if _is_worker(session.config):
        session.config.workeroutput["threads"] = _threads  # type: ignore[attr-defined]
        return
    processes = _waited_for(_processes)
    found = [
        *_threads,
        *(f"process {pid}, {command[:200]}, of {test}" for pid, command, test in processes),
    ]
    for pid, _, _ in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        for line in [
            "",
            "left behind at the end of the tests; stop it, or wait for it, in its test:",
            *found,
        ]:
            reporter.write_line(line, red=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take over what a worker of pytest-xdist has found."""
    _threads.extend(getattr(node, "workeroutput", {}).get("threads", []))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End in spite of a thread that lasts."""
    if _lasting_threads() and not _is_worker(config):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _waited_for(find: Callable[[], list[T]]) -> list[T]:
    """Return what `find` still finds when there has been time for it to end."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _lasting_threads() -> list[threading.Thread]:
    """Return the threads for which the interpreter waits when it exits, without those of pools,
    which it tells to end.
    """
    pooled = set(pools._threads_queues)  # type: ignore[attr-defined]
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    return [thread for thread in others if not thread.daemon and thread not in pooled]


def _processes() -> list[tuple[int, str, str]]:
    """Return process id, command and test of what the tests of this session have started and what
    lives on.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = dict(
                line.partition("=")[::2]
                for line in (folder / "environ").read_text(errors="replace").split("\0")
            )
            if variables.get(MARK) != os.environ[MARK] or int(folder.name) == os.getpid():
                continue
            command = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != os.getpid() or not any(helper in command for helper in HELPERS):
                found.append(
                    (int(folder.name), command, variables.get("PYTEST_CURRENT_TEST", "no test"))
                )
    return found
