"""An interpreter for tests that has imported NeMo already: `interpreter()` is a program to be
called as `python` is.

Importing NeMo takes twenty seconds of a processor, a short run three, and the tests train a hundred
runs.  Called as `-m recipes.training.run FOLDER`, the program has a server fork a process that
trains, with the caller's environment, directory and open files.  It passes signals on, ends as that
process does, and takes it along when it is killed. Called otherwise, it is Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
TRAINS = ["-m", "recipes.training.run"]
MOST_BYTES, MOST_FILES = 150_000, 100  # of a request
CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
words = sys.argv[1:]
if words[:-1] != {trains!r}:
    os.execv({python!r}, [{python!r}, *words])
files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
files = [file for file in files if os.path.lexists(f"/proc/self/fd/{{file}}")]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({path!r})
request = {{"folder": words[-1], "cwd": os.getcwd(), "env": dict(os.environ), "files": files}}
socket.send_fds(server, [json.dumps(request).encode()], files)
pid = int(server.recv(100))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(server.recv(100) or -9)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def interpreter() -> Iterator[str]:
    """Start the server and give the path of the program; the first run waits until NeMo is
    imported.
    """
    with tempfile.TemporaryDirectory(prefix="warm") as folder:  # Unix sockets want short paths
        path, program = Path(folder) / "socket", Path(folder) / "python"
        program.write_text(CLIENT.format(python=sys.executable, trains=TRAINS, path=str(path)))
        program.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen(64)
        command = [sys.executable, "-m", "tests.warm", str(listener.fileno())]
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen(
                command,
                cwd=PROJECT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        listener.close()
        try:
            yield str(program)
        finally:
            server.communicate()  # closes its input, at which it ends


class Server:
    """Forks a process for each caller, until its input ends."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.callers = dict[int, socket.socket]()  # by the process that trains

    def request(self) -> dict[str, Any] | None:
        """Return in a new process what it is to train; in the server None, when its input has
        ended.
        """
        while True:
            ready, _, _ = select.select(
                [sys.stdin, self.listener, *self.callers.values()], [], [], 0.05
            )
            if sys.stdin in ready:
                for pid in self.callers:
                    _kill(pid)
                return None
            for pid, caller in self.callers.items():
                if caller in ready:  # it was killed
                    _kill(pid)
            self._tell_who_ended()
            if self.listener in ready and (wanted := self._forked()):
                return wanted

    def _tell_who_ended(self) -> None:
        for pid, caller in list(self.callers.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    caller.send(str(os.waitstatus_to_exitcode(status)).encode())
                self.callers.pop(pid).close()

    def _forked(self) -> dict[str, Any] | None:
        caller, _ = self.listener.accept()
        data, files, _, _ = socket.recv_fds(caller, MOST_BYTES, MOST_FILES)
        pid = os.fork() if data else 0
        if pid or not data:
            for file in files:
                os.close(file)
            if pid:
                self.callers[pid] = caller
                caller.send(str(pid).encode())
            return None
        os.setsid()
        for each in (self.listener, caller, *self.callers.values()):
            each.close()
        request: dict[str, Any] = json.loads(data)
        for number, file in zip(request["files"], files, strict=True):
            if number <= 2:
                os.dup2(file, number)
        return request


def _kill(pid: int) -> None:
    for end in (os.killpg, os.kill):  # the group is there a moment after the process
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


def main(descriptor: int) -> int:
    """Serve; in each process that is forked, train."""
    from tests.faults.training import _stack  # noqa: F401

    request = Server(socket.socket(fileno=descriptor)).request()
    if request is None:
        os._exit(0)  # without taking NeMo apart
    return train(request)


def train(request: dict[str, Any]) -> int:
    """Do what `python -m recipes.training.run FOLDER` does in the caller's place."""
    import torch

    from recipes.training import run

    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[1:] = [request["folder"]]
    if threads := os.environ.get("OMP_NUM_THREADS"):  # was read when PyTorch was imported
        torch.set_num_threads(int(threads))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return run.main(Path(request["folder"]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
