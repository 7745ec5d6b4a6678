"""Runs on this machine side by side: who gets which GPU, and what happens to them when the launcher
is told to end.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from launch import gpus
from launch.local import Job, run_all
from recipes.code import PROJECT
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.run_folder import SESSION, open_folder, set_status, status_of

# What a script of the test does: it writes when it began, with which GPUs, and when it ended: not
# before another began, too.
SCRIPT = """
echo "$(date +%s.%N) begins ${CUDA_VISIBLE_DEVICES-none}" >> $FOLDER/said
for _ in {1..600}; do begun=($FOLDER/../*/said); (( ${#begun[@]} > 1 )) && break; sleep 0.1; done
echo "$(date +%s.%N) ends" >> $FOLDER/said
"""
DONE = """echo '{"status": "done", "reason": "", "step": 1}' > $FOLDER/status.json\n"""


def job(root: Path, name: str, num_gpus: int, *overrides: str, script: str = SCRIPT + DONE) -> Job:
    """Return a job whose script is the test's own."""
    device = (
        ["gpu=h100", "executor=local", "mapping=single", "data=mock", "mapping.global_batch=8"]
        if num_gpus
        else []
    )
    plan = compose_plan(
        [
            *device,
            f"num_gpus={num_gpus or 1}",
            *overrides,
            f"runs_dir={root}",
            f"run_name={name}",
            "executor.max_parallel=4",
        ]
    )
    folder = open_folder(plan)
    path = folder / "script.sh"
    path.write_text(f"FOLDER={folder}\n{script}")
    return Job(plan, folder, path, os.open(folder / "script.sh", os.O_RDONLY))


def said(jobs: Sequence[Job]) -> list[tuple[float, float, set[str]]]:
    """Return beginning, end and GPUs of each job."""
    found = []
    for one in jobs:
        begins, ends = (line.split() for line in (one.folder / "said").read_text().splitlines())
        found.append((float(begins[0]), float(ends[0]), set(begins[2].split(","))))
    return found


def test_runs_side_by_side_share_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["0", "GPU-5ab1", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    jobs = [job(tmp_path, f"run{n}", wanted) for n, wanted in enumerate((1, 2, 2, 1, 1))]
    assert run_all(jobs) == 0
    found = said(jobs)
    assert [len(got) for _, _, got in found] == [1, 2, 2, 1, 1] and set().union(
        *(got for _, _, got in found)
    ) == set(names)
    together = [
        (a, b) for n, a in enumerate(found) for b in found[n + 1 :] if a[0] < b[1] and b[0] < a[1]
    ]
    assert together and not [pair for pair in together if pair[0][2] & pair[1][2]]


def test_a_run_on_the_cpu_takes_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    jobs = [job(tmp_path, f"run{n}", 0) for n in range(2)]
    assert run_all(jobs) == 0
    first, second = said(jobs)
    assert first[2] == second[2] == {"3"}  # as it was: such a run looks at none
    assert second[0] < first[1]


def test_more_gpus_than_there_are_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    jobs = [job(tmp_path, "small", 1), job(tmp_path, "large", 2)]
    with pytest.raises(InputError, match=r"large: num_gpus=2, and 1 GPU\(s\) can be seen"):
        run_all(jobs)
    assert not (tmp_path / "small" / "said").exists()


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of these tests alone: the machine's GPUs are not theirs."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")


def names() -> list[str]:
    return [gpu.name for gpu in gpus.visible() or []]


NVIDIA_SMI = """#!/bin/sh
echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'
echo '  MIG 1g.10gb     Device  0: (UUID: MIG-2)'
echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-3)'
"""


def test_the_gpus_are_those_that_are_named_or_else_those_that_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 4, MIG-GPU-2/1/0")
    assert names() == ["4", "MIG-GPU-2/1/0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert names() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert names() == ["0", "1"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpus.visible() is None


FOUR_GPUS = """#!/bin/sh
case "$1" in
  -L) for i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-{token}-$i)"; done ;;
  --query-compute-apps*) echo "GPU-{token}-0, 4711, /usr/bin/somebody" ;;
esac
"""
LAUNCH = """import sys; sys.executable = sys.argv[1]; from launch.__main__ import main; raise SystemExit(main(sys.argv[2:]))"""  # noqa: E501
STUB = """#!/bin/sh
[ "$2" = launch.preflight ] && exit 0
echo "$CUDA_VISIBLE_DEVICES" >> "$GOT"; exec sleep 300
"""


def test_two_launches_take_different_gpus_and_a_third_is_told_who_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU of a run stays its own when its launcher is killed; the one on which another process
    computes is taken last.
    """
    tools, got, token = tmp_path / "tools", tmp_path / "got", uuid4().hex
    tools.mkdir()
    for name, text in (("nvidia-smi", FOUR_GPUS.replace("{token}", token)), ("stub", STUB)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "GOT": str(got)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    two = [
        "gpu=h100",
        "executor=local",
        "mapping=single",
        "data=mock",
        "mapping.global_batch=8",
        "num_gpus=2",
        f"runs_dir={tmp_path}/runs",
    ]

    def launch(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LAUNCH, str(tools / "stub"), *two, f"run_name={name}"]
        return subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    started = []
    try:
        for count, name in enumerate(("a", "b"), 1):
            started.append(launch(name))
            until(lambda count=count: got.exists() and len(got.read_text().split()) == count)
        assert got.read_text().split() == ["1,2", "3,0"]
        started[0].kill()
        started.append(launch("c"))
        assert (
            started[2].stderr
            and "runs/a (user" in (line := started[2].stderr.readline())
            and "c waits" in line
        )
        assert len(got.read_text().split()) == 2
    finally:
        for process in started:
            process.kill()
            process.wait()
        for pid in _holding(f"nemo-gpu-GPU-{token}"):
            os.kill(pid, signal.SIGKILL)
        for lock in Path("/tmp").glob(f"nemo-gpu-GPU-{token}*"):
            lock.unlink()


def test_a_lock_that_is_a_link_is_one_line(tmp_path: Path) -> None:
    token = uuid4().hex
    (tmp_path / "nvidia-smi").write_text(FOUR_GPUS.replace("{token}", token))
    (tmp_path / "nvidia-smi").chmod(0o755)
    one = ["gpu=h100", "executor=local", "mapping=single", "data=mock", "mapping.global_batch=8"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    links = [Path(f"/tmp/nemo-gpu-GPU-{token}-{gpu}.lock") for gpu in range(4)]
    try:
        for link in links:
            link.symlink_to(tmp_path / "elsewhere")
        command = [sys.executable, "-m", "launch", *one, f"runs_dir={tmp_path}/runs"]
        done = subprocess.run(
            command,
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        for link in links:
            link.unlink(missing_ok=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "locks a GPU for one run" in errors[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "elsewhere").exists()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _holding(name: str) -> list[int]:
    """Return the processes that hold a file of this name open."""
    found = set[int]()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if name in os.readlink(link):
                found.add(int(link.parts[2]))
    return sorted(found)


STUBBORN = "trap '' TERM\necho $$ > $FOLDER/pid\nwhile true; do sleep 0.1; done\n"
PAUSED = """echo '{"status": "paused", "step": 3}' > $FOLDER/status.json\n"""
WILLING = f"echo $$ > $FOLDER/pid\nwhile [ ! -e $FOLDER/stop ]; do sleep 0.1; done\n{PAUSED}"


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python leaves SIGINT ignored where it is when it starts, as in a job that a shell put into
    the background.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when_there(jobs: Sequence[Job], times: int) -> threading.Thread:
    """Interrupt this process, as Ctrl-C does, once each job's script runs, and again after a
    second.
    """

    def interrupt() -> None:
        until(lambda: all((one.folder / "pid").exists() for one in jobs))
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


def is_there(one: Job) -> bool:
    return Path("/proc", (one.folder / "pid").read_text().strip()).exists()


def test_interrupted_the_launcher_has_its_runs_save_and_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, f"run{n}", 0, script=WILLING) for n in range(2)]
    thread = interrupt_when_there(jobs, times=1)
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs)
    thread.join()
    assert {status_of(one.folder) for one in jobs} == {"paused"} and not any(map(is_there, jobs))
    assert "save a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("interrupts", "patience_s"), [(2, 300), (1, 2)], ids=["interrupted again", "after its time"]
)
def test_a_run_that_does_not_stop_is_killed(
    interrupts: int, patience_s: int, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, "run", 0, f"executor.stop_before_limit_s={patience_s}", script=STUBBORN)]
    thread, start = interrupt_when_there(jobs, interrupts), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs)
    thread.join()
    assert (
        not is_there(jobs[0]) and time.monotonic() - start < 200
    )  # of the 300 s that a second interrupt cuts short


HOLDER = "import sys, time; from pathlib import Path; from recipes.run_folder import only_writer\n"
HOLDER += "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


def test_a_folder_that_a_process_still_writes_is_left_alone(tmp_path: Path) -> None:
    one = job(tmp_path, "run", 0, script=f"echo began > $FOLDER/said\n{DONE}")
    set_status(one.folder, "running")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(one.folder)], stdout=subprocess.PIPE, cwd=PROJECT
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError, match="an earlier launch still trains it"):
            run_all([one])
        assert not (one.folder / "said").exists()
    finally:
        holder.kill()
        holder.wait()
    assert run_all([one]) == 0 and (one.folder / "log.txt").read_text().count(SESSION) == 1
