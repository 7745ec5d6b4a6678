"""A real Slurm on one machine, for the tests of what is submitted.

A script that "looks right" says little: Slurm ignores `#SBATCH` lines after the first command,
refuses an account only when it keeps accounts, and requeues a job only after a node was truly lost.
So the tests submit to a real one.  `Slurm` starts a private cluster under a directory of its own:
munge, MariaDB, slurmdbd, slurmctld and a slurmd for each of four virtual nodes, n0 to n3, with fake
GPUs (/dev/null) and a fake pyxis (fake_pyxis.c) that logs the container flags of each task.  The
nodes share this machine's processes, files and host name: inside a job only SLURMD_NODENAME tells
them apart.

    with Slurm(tmp_path, gpu="h100", gpus_per_node=8) as slurm:
        job = slurm.submit("#!/bin/bash\\n#SBATCH --nodes=2\\nsrun hostname\\n")
        slurm.wait(job, "COMPLETED")
        print(slurm.output(job))

Every process is a child of this one, is ended by its pid, and ends by itself when this process is
killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tests.launch.slurm.config import CLOUD, CLOUDS, MARIADB, NODE, SLURM_CONF, SLURMDBD_CONF
from tests.launch.slurm.install import PATH

HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# tests/launch/slurm"
PYXIS = Path(__file__).with_name("fake_pyxis.c")


@dataclasses.dataclass
class Slurm:
    """A cluster of virtual nodes under the directory `root`, which must be empty or not there."""

    root: Path
    gpu: str = "h100"
    gpus_per_node: int = 8
    nodes: tuple[str, ...] = ("n0", "n1", "n2", "n3")
    account: str = "research"
    _daemons: dict[str, subprocess.Popen[bytes]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _cleanup: contextlib.ExitStack = dataclasses.field(
        default_factory=contextlib.ExitStack, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        if len(str(self.root)) > 70:
            raise ValueError(
                f"{self.root} is too long: Unix sockets below it would not fit in 108 characters"
            )

    def __enter__(self) -> Slurm:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Starting and stopping

    def start(self) -> None:
        """Bring the cluster up; returns when every node is idle.

        To be called from the main thread: the daemons end with the thread that started them.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop_daemons)
            undo.enter_context(_names(self.nodes))
            self._write_files()
            self._start_guard()
            self._start_munge()
            self._start_accounting()
            self._start_slurm()
            self._cleanup = undo.pop_all()

    def stop(self) -> None:
        """End every process of the cluster, jobs included."""
        self._cleanup.close()

    def _write_files(self) -> None:
        for folder in ("munge", "state", "run", "log", "spool", "nodes", "dev", "jobs"):
            (self.root / folder).mkdir(parents=True)
        for k in range(self.gpus_per_node):
            (self.root / "dev" / f"nvidia{k}").symlink_to("/dev/null")
        host, ports = socket.gethostname(), _free_ports(2 + len(self.nodes))
        nodes = self._node_lines(host, ports[2:])
        clouds = "\n".join(
            CLOUD.format(name=name, nodes=count, gpus=gpus)
            for name, (count, gpus) in CLOUDS.items()
        )
        self._write("munge/key", secrets.token_hex(64))
        self._write(
            "slurm.conf",
            SLURM_CONF.format(
                root=self.root,
                host=host,
                ports=ports,
                nodes=nodes,
                clouds=clouds,
                last=len(self.nodes) - 1,
            ),
        )
        self._write("slurmdbd.conf", SLURMDBD_CONF.format(root=self.root, host=host, ports=ports))
        devices = f"{self.root}/dev/nvidia[0-{self.gpus_per_node - 1}]"
        self._write(
            "gres.conf",
            f"NodeName=n[0-{len(self.nodes) - 1}] Name=gpu Type={self.gpu} File={devices}\n",
        )
        self._write("plugstack.conf", f"required {self.root}/fake_pyxis.so log={self.pyxis_log}\n")

    def _node_lines(self, host: str, ports: list[int]) -> str:
        gres = f"gpu:{self.gpu}:{self.gpus_per_node}"
        each = enumerate(zip(self.nodes, ports, strict=True))
        return "\n".join(
            NODE.format(name=name, host=host, address=_address(k), port=port, gres=gres)
            for k, (name, port) in each
        )

    def _write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        (self.root / name).chmod(0o600)

    def _start_guard(self) -> None:
        """The daemons end with this process, but what they started for jobs would not: a child sees
        to that.
        """
        command = [sys.executable, "-m", "tests.launch.slurm.cluster", str(self.root), *self.nodes]
        self._daemons["guard"] = subprocess.Popen(
            command, cwd=PYXIS.parents[3], stdin=subprocess.PIPE, start_new_session=True
        )

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        files = [
            f"--{what}={folder}/{what.removesuffix('-file')}"
            for what in ("key-file", "pid-file", "log-file", "seed-file", "socket")
        ]
        # Forced, because pytest's directories are closed to other users and the cluster has one
        # user only.
        self._spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        self.until((folder / "socket").exists, "munged's socket")

    def _start_accounting(self) -> None:
        options = MARIADB.format(root=self.root).split()
        self.run(
            "mariadb-install-db",
            *options,
            "--skip-test-db",
            "--skip-name-resolve",
            "--auth-root-authentication-method=socket",
        )
        self._spawn("mariadbd", "mariadbd", *options)
        self.until((self.root / "run/db.sock").exists, "MariaDB's socket")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self.until(self._sees("sacctmgr", "-n", "show", "stats"), "slurmdbd")
        for what in (
            "add cluster tests",
            f"add account {self.account}",
            f"add user root account={self.account} defaultaccount={self.account}",
        ):
            self.run("sacctmgr", "-i", *what.split())

    def _start_slurm(self) -> None:
        self.run("gcc", "-shared", "-fPIC", "-o", f"{self.root}/fake_pyxis.so", str(PYXIS))
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
        self.until(self._sees("scontrol", "show", "node"), "slurmctld")
        for name in self.nodes:
            self._start_node(name)
        for name in self.nodes:
            self.wait_node(name, "IDLE", timeout=60)

    def _start_node(self, name: str) -> None:
        folder = self.root / "nodes" / name
        folder.mkdir(exist_ok=True)
        self._spawn(name, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"], cwd=folder)

    def _spawn(self, name: str, *command: str, cwd: Path | None = None) -> None:
        """Start a daemon in the foreground: our child, out of reach of Ctrl-C, and told to end when
        this process dies.
        """
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                env=self.env | {"MYSQL_UNIX_PORT": f"{self.root}/run/db.sock"},
                cwd=cwd or self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _stop_daemons(self) -> None:
        while self._daemons:
            _end(self._daemons.popitem()[1])
        _kill(self._steps())
        shutil.rmtree(self.root / "db", ignore_errors=True)

    def pids(self) -> list[int]:
        """The processes of the cluster: its daemons, and what runs its jobs."""
        return sorted({daemon.pid for daemon in self._daemons.values()} | set(self._steps()))

    # What a user of a cluster does

    @functools.cached_property
    def env(self) -> dict[str, str]:
        """The environment for commands of this cluster: this process's, without what another Slurm
        may have set.
        """
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))
        }
        return kept | {"PATH": PATH, "SLURM_CONF": f"{self.root}/slurm.conf"}

    def run(
        self, *command: str, check: bool = True, timeout: float = 60, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster, in its `jobs` folder; with `check`, a failure raises
        with what the command said.
        """
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.root / "jobs",
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise subprocess.SubprocessError(
                f"{' '.join(command)} exited {done.returncode}: {done.stderr or done.stdout}"
            )
        return done

    def submit(self, script: str | Path, *options: str) -> str:
        """Submit a script, given as its path or its text, and return its job id."""
        path, text = ([str(script.resolve())], "") if isinstance(script, Path) else ([], script)
        return (
            self.run("sbatch", "--parsable", *options, *path, stdin=text)
            .stdout.strip()
            .partition(";")[0]
        )

    def job(self, jobid: str) -> dict[str, str]:
        """What slurmctld knows of a job (of an array's first, given the array's id)."""
        return _fields(self.run("scontrol", "-o", "show", "job", jobid).stdout.partition("\n")[0])

    def state(self, jobid: str) -> str:
        return self.job(jobid)["JobState"]

    def wait(self, jobid: str, *states: str, timeout: float = 60) -> str:
        """Wait until a job is in one of these states, and return which; raises at once when it
        ended in another.
        """
        self.until(
            lambda: self._reached(jobid, states),
            f"job {jobid} being {' or '.join(states)}",
            timeout,
        )
        return self.state(jobid)

    def _reached(self, jobid: str, states: tuple[str, ...]) -> bool:
        job = self.job(jobid)
        ended = (
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "OUT_OF_MEMORY",
            "TIMEOUT",
        )
        if job["JobState"] in ended and job["JobState"] not in states:
            raise AssertionError(
                f"job {jobid} is {job['JobState']}, not {' or '.join(states)}:"
                f" {job}\n{self.output(jobid)[-2000:]}"
            )
        return job["JobState"] in states

    def output(self, jobid: str) -> str:
        """What a job's batch script has written so far."""
        path = Path(self.job(jobid)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def history(self, jobid: str) -> list[str]:
        """The states that accounting has of a job, one for each time it was started; accounting
        lags by a second or so.
        """
        return self.run(
            "sacct", "-n", "-P", "-X", "--duplicates", "-o", "State", "-j", jobid
        ).stdout.split("\n")[:-1]

    @property
    def pyxis_log(self) -> Path:
        return self.root / "pyxis.log"

    def pyxis_flags(self, jobid: str) -> list[tuple[str, str, str]]:
        """The pyxis flags that reached the tasks of a job, as (stepid, taskid, "flag=value"), in no
        particular order.
        """
        lines = self.pyxis_log.read_text().splitlines() if self.pyxis_log.exists() else []
        rows = (line.split(" ", 3) for line in lines)
        return [(step, task, flag) for job, step, task, flag in rows if job == jobid]

    # Nodes

    def node(self, name: str) -> dict[str, str]:
        """What slurmctld knows of a node."""
        return _fields(self.run("scontrol", "-o", "show", "node", name).stdout)

    def node_state(self, name: str) -> str:
        """A node's state: IDLE, MIXED, ALLOCATED or DOWN; UNKNOWN while a node that is not down
        does not respond.
        """
        state, *flags = self.node(name)["State"].split("+")
        return "UNKNOWN" if "NOT_RESPONDING" in flags and state != "DOWN" else state

    def wait_node(self, name: str, *states: str, timeout: float = 90) -> None:
        """Wait until a node is in one of these states."""
        self.until(
            lambda: self.node_state(name) in states, f"{name} being {' or '.join(states)}", timeout
        )

    def kill_node(self, name: str, *, noticed: bool = False) -> None:
        """Lose a node: its slurmd and all that runs on it die at once.

        slurmctld finds out by itself in about 20 s, or at once if it is `noticed` (an administrator
        says that the node is down).
        """
        slurmd = self._daemons.pop(name)
        slurmd.kill()
        slurmd.wait()
        _kill(self._steps(name))
        if noticed:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def revive_node(self, name: str, timeout: float = 60) -> None:
        """Start a lost node again; returns when it takes jobs."""
        before = self.node(name)["SlurmdStartTime"]
        self._start_node(name)
        self.until(
            lambda: self.node(name)["SlurmdStartTime"] != before, f"{name}'s new slurmd", timeout
        )
        self.wait_node(name, "IDLE", "MIXED", "ALLOCATED", timeout=timeout)

    def _steps(self, *names: str) -> list[int]:
        return _steps(self.root, names or self.nodes)

    # Waiting

    def _sees(self, *command: str) -> Callable[[], bool]:
        return lambda: self.run(*command, check=False).returncode == 0

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
        """Wait for a condition, and fail with the logs when it takes too long or a daemon has
        ended.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if dead := [
                name for name, daemon in self._daemons.items() if daemon.poll() is not None
            ]:
                raise RuntimeError(f"{', '.join(dead)} ended unasked\n{self._report()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for {what}\n{self._report()}")
            time.sleep(0.1)

    def _report(self) -> str:
        """The ends of the logs, for the reader of a failure."""
        logs = sorted(path for path in (self.root / "log").iterdir() if path.stat().st_size)
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs
        )


def _end(daemon: subprocess.Popen[bytes]) -> None:
    with daemon:
        daemon.terminate()
        try:
            daemon.wait(timeout=15)
        except subprocess.TimeoutExpired:
            daemon.kill()


def _kill(pids: list[int]) -> None:
    """End processes at once, in this order: a slurmstepd that outlives its tasks would report them
    as failed.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _steps(root: Path, nodes: Sequence[str]) -> list[int]:
    """The processes that run jobs on these nodes of a cluster: each slurmstepd, then its tasks and
    what they have left behind.
    """
    processes = {int(path.name): path for path in Path("/proc").glob("[0-9]*")}
    found = [pid for pid, path in processes.items() if _is_slurmstepd(path, root, nodes)]
    found += [pid for pid, path in processes.items() if _is_task(path, root, nodes)]
    parents = {pid: _parent(path) for pid, path in processes.items()}
    while more := [pid for pid, parent in parents.items() if parent in found and pid not in found]:
        found += more
    return found


def _is_slurmstepd(process: Path, root: Path, nodes: Sequence[str]) -> bool:
    """A slurmstepd stays in the folder that its node's slurmd was started in, and is a fork of that
    slurmd at first.
    """
    with contextlib.suppress(OSError):
        folder = Path(os.readlink(process / "cwd"))
        return (
            folder.parent == root / "nodes"
            and folder.name in nodes
            and (process / "comm").read_text() in ("slurmstepd\n", "slurmd\n")
        )
    return False


def _is_task(process: Path, root: Path, nodes: Sequence[str]) -> bool:
    """A task knows its cluster and its node, and keeps that knowledge when it outlives its job."""
    with contextlib.suppress(OSError):
        environ = (process / "environ").read_bytes().split(b"\0")
        return f"SLURM_CONF={root}/slurm.conf".encode() in environ and any(
            f"SLURMD_NODENAME={node}".encode() in environ for node in nodes
        )
    return False


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _fields(line: str) -> dict[str, str]:
    """What `scontrol -o show` prints, "Key=value Key=value", as a dictionary."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w:/]+=|\s*$)", line))


def _address(node: int) -> str:
    return f"127.0.1.{node + 1}"


def _free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on, below those that the kernel gives to outgoing
    connections.
    """
    while True:
        first = random.randrange(20000, 32000)
        ports = list(range(first, first + count))
        if all(map(_is_free, ports)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _names(nodes: tuple[str, ...]) -> Iterator[None]:
    """Let the nodes' names resolve: lines in /etc/hosts, which the last cluster on this machine
    takes out again.
    """
    with HOSTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        text = HOSTS.read_text()
        known = {name for line in text.splitlines() for name in line.partition("#")[0].split()[1:]}
        lines = [
            f"{_address(k)} {name} {HOSTS_MARK}\n"
            for k, name in enumerate(nodes)
            if name not in known
        ]
        with HOSTS.open("a") as hosts:
            hosts.write("" if not text or text.endswith("\n") else "\n")
            hosts.writelines(lines)
        try:
            yield
        finally:
            _forget_names(lock)


def _forget_names(lock: TextIO) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = [
            line for line in HOSTS.read_text().splitlines(keepends=True) if HOSTS_MARK not in line
        ]
        HOSTS.write_text("".join(kept))


def _guard(root: Path, nodes: Sequence[str]) -> None:
    """Wait until the process at the other end of stdin is no more, then end what its cluster's jobs
    left running.
    """
    sys.stdin.read()
    time.sleep(1)
    _kill(_steps(root, nodes))


if __name__ == "__main__":
    _guard(Path(sys.argv[1]), sys.argv[2:])
