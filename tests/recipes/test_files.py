"""Paths that a user names, terminals and pipes: through commands, as processes of their own where
their streams matter.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from analysis import compare, report
from launch import status
from recipes.code import PROJECT
from tests.faults.mutations import fresh
from tests.faults.run_folders import DEMO, H100


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [fresh(run, tmp_path / "runs" / run.name) for run in (DEMO[0], DEMO[2])]


def report_to(out: Path, runs: list[Path]) -> int:
    return report.main([*map(str, runs), "--out", str(out)])


def test_out_follows_a_link_and_leaves_it(tmp_path: Path, runs: list[Path]) -> None:
    for name, target in (("there", "old.html"), ("dangling", "new.html")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "old.html").chmod(0o640)
    for name in ("there", "dangling"):
        assert report_to(tmp_path / name, runs) == 0 and (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    assert stat.S_IMODE((tmp_path / "old.html").stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".*"))


def test_out_writes_to_a_pipe_that_is_read_and_waits_for_none(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    assert report_to(pipe, runs) == 2 and "nothing reads the pipe" in capsys.readouterr().err
    reading = os.open(
        pipe, os.O_RDONLY | os.O_NONBLOCK
    )  # a reader is there before the writer comes
    os.set_blocking(reading, True)
    held = os.open(
        pipe, os.O_WRONLY | os.O_NONBLOCK
    )  # so that the reader sees no end before the report is there
    thread = threading.Thread(target=lambda: read.append(os.fdopen(reading, "rb").read()))
    thread.start()
    try:
        assert report_to(pipe, runs) == 0 and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(held)
        thread.join()
    assert read[0].startswith(b"<!doctype html>") and read[0].rstrip().endswith(b"</html>")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
@pytest.mark.parametrize(("minor", "code"), [(3, 0), (7, 2)], ids=["as /dev/null", "as /dev/full"])
def test_out_never_replaces_a_device(
    minor: int, code: int, tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        device.open("wb").close()
    except OSError as error:
        pytest.skip(f"no devices in {tmp_path}: {error.strerror}")
    assert report_to(device, runs) == code and stat.S_ISCHR(device.stat().st_mode)
    err = capsys.readouterr().err
    assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1)


@pytest.mark.parametrize(
    "name",
    ["status.json", "plan.json", "manifest.json", "metrics.jsonl", "events.jsonl", "log.txt"],
)
@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_a_pipe_or_a_device_in_a_run_folder_is_no_file(
    kind: str, name: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is waited for, nor read without end."""
    (runs[1] / name).unlink(missing_ok=True)
    os.mkfifo(runs[1] / name) if kind == "pipe" else (runs[1] / name).symlink_to("/dev/zero")
    codes = (0, 2) if name in ("events.jsonl", "log.txt") else (2,)
    for main in (compare.main, status.main):
        assert main([str(run) for run in runs]) in (codes if main is compare.main else (0, 2))
        err = capsys.readouterr().err
        assert err.count("\n") <= 1 and (not err or err.startswith("error: ") or "left out" in err)


def ended(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash with $PY and the demo's runs as $RUNS."""
    names = {
        "PY": sys.executable,
        "RUNS": " ".join(map(str, (DEMO[0], DEMO[2]))),
        "TABLE": " ".join(map(str, H100)),
    }
    env = {**os.environ, **names, **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=PROJECT, env=env, capture_output=True, timeout=120
    )


STREAMS: dict[str, tuple[str, dict[str, str], int, bytes]] = {
    "a full disk": (
        "$PY -m analysis.compare $RUNS > /dev/full",
        {},
        2,
        b"error: the output cannot be written (No space left on device)",
    ),
    "a reader that leaves": (
        "$PY -m analysis.compare --json $RUNS | true; exit ${PIPESTATUS[0]}",
        {},
        141,
        b"",
    ),
    "its table": ("$PY -m analysis.compare $RUNS | true; exit ${PIPESTATUS[0]}", {}, 141, b""),
    "closed input and output": ("$PY -m analysis.compare $RUNS <&- >&-", {}, 0, b""),
    "ASCII": (
        "$PY -m analysis.throughput $TABLE > /dev/null",
        {"PYTHONIOENCODING": "ascii"},
        0,
        b"",
    ),
    "C without UTF-8": (
        "$PY -m launch.matrix model=llama3_8b >/dev/null",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        0,
        b"",
    ),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_that_cannot_be_written_end_in_one_line_or_silence(stream: str) -> None:
    command, environment, code, says = STREAMS[stream]
    done = ended(command, **environment)
    assert (
        done.returncode == code
        and says in done.stderr
        and done.stderr.count(b"\n") == (1 if says else 0)
    ), done.stderr


def test_a_log_whose_last_line_never_ends_is_read_with_bounded_memory(tmp_path: Path) -> None:
    line = (
        "Training epoch 0, iteration {0}/59 | lr: 3e-05 | global_batch_size: 8 | global_step: {0} |"
        " reduced_train_loss: 9.{0:04}"
    )
    with gzip.open(tmp_path / "log.gz", "wb", 9) as file:
        file.write(
            "".join(f"{line.format(i)} | train_step_timing in s: 1.5\n" for i in range(60)).encode()
        )
        for _ in range(96):
            file.write(b"\0" * (1 << 20))
    code = (
        "import resource, sys; from analysis.import_logs import main;"
        " resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2); "
    )
    code += "sys.exit(main(sys.argv[2:]))"
    command = [
        sys.executable,
        "-c",
        code,
        str(600 << 20),
        str(tmp_path / "log.gz"),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--set", "model=llama3_8b", "precision=bf16", "gpu=h100"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 60


# The commit


def manifest_code(project: Path, **environment: str) -> dict[str, Any]:
    """Return what a copy of the project takes for its commit."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
        "PYTHONPATH": str(project),
        "PYTHONSAFEPATH": "1",
        **environment,
    }
    code = "import json; from recipes.code import code; print(json.dumps(code()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@here")
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", "-C", str(folder), *who, *args], capture_output=True, text=True, check=True, env=env
    ).stdout.strip()


def test_the_commit_is_this_projects_or_none(tmp_path: Path) -> None:
    """A copy inside another checkout, and git's variables that point to one, name no commit of the
    other's.
    """
    other, project = tmp_path / "other", tmp_path / "other" / "vendor" / "project"
    for part in ("recipes", "conf"):
        shutil.copytree(
            PROJECT / part,
            project / part,
            ignore=shutil.ignore_patterns("__pycache__", "training", "reference"),
        )
    git(tmp_path, "init", "-q", str(other))
    git(other, "commit", "-q", "--allow-empty", "-m", "theirs")
    theirs = git(other, "rev-parse", "HEAD")
    assert manifest_code(project) == {"commit": None, "dirty": None}
    assert (
        manifest_code(project, GIT_DIR=str(other / ".git"), GIT_WORK_TREE=str(other))["commit"]
        is None
    )
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "ours")
    ours = git(project, "rev-parse", "HEAD")
    for environment in ({}, {"GIT_DIR": str(other / ".git")}):
        assert (
            manifest_code(project, **environment) == {"commit": ours, "dirty": False}
            and ours != theirs
        )
