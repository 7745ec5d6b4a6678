"""Load: many steps, many runs, many jobs, two launches at once; with the time and the memory that
they took.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.analysis.conftest import curve, own_noise, write
from tests.analysis.test_import_logs import nemo_log
from tests.faults.commands import PROJECT, REFUSED, Ended
from tests.faults.folders import jobs, replan, rows_in
from tests.faults.logs import SET
from tests.faults.mutations import fresh
from tests.faults.registry import Outcome, Unavailable, fault
from tests.faults.run_folders import DEMO
from tests.launch.slurm import install
from tests.launch.slurm.cluster import Slurm

AREA = "Load"
# Runs a module as `python -m` does and says the peak of its memory at the end; VmHWM, for ru_maxrss
# begins with the parent's.
MEASURE = """
import atexit, re, runpy, sys
atexit.register(lambda: print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""  # noqa: E501
MOST_GB = 2.0


def measured(
    module: str, *arguments: object, env: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Run a command as its user would; return how it ended, its seconds and its peak memory in
    GB.
    """
    start = time.monotonic()
    command = [sys.executable, "-c", MEASURE, module, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env={**os.environ, **(env or {})}
    )
    seconds, peaks = (
        time.monotonic() - start,
        [line for line in done.stderr.splitlines() if line.startswith("PEAK ")],
    )
    return done, seconds, int(peaks[-1].split()[1]) * 1024 / 1e9 if peaks else 0.0


def said(what: str, seconds: float, gigabytes: float) -> str:
    """Return a measurement in words."""
    return f"{what}: {seconds:.1f} s, {gigabytes:.2f} GB at most (measured)"


@fault(
    AREA,
    "a pair of runs of so many steps each: `analysis.compare` and `analysis.report`",
    small=5000,
    full=1_000_000,
)
def many_steps(count: int, folder: Path) -> Outcome:
    outcome, loss = Outcome(), curve(count)
    runs = [
        write(folder / "bf16", loss, "bf16", []),
        write(folder / "fp8", loss + own_noise(1, count, 0.002), "fp8_current", []),
    ]
    for module, options in (
        ("analysis.compare", []),
        ("analysis.report", ["--out", str(folder / "report.html")]),
    ):
        done, seconds, peak = measured(module, *runs, *options)
        wrong = (
            done.stderr[-300:]
            if done.returncode
            else None
            if peak < MOST_GB
            else f"{peak:.2f} GB of memory"
        )
        outcome.add("compared", lost=wrong and f"{module}: {wrong}")
        outcome.measured.append(said(f"{module}, 2 x {count:,} rows", seconds, peak))
    return outcome


@fault(AREA, "so many run folders in one report", small=4, full=1000)
def many_folders(count: int, folder: Path) -> Outcome:
    outcome, loss = Outcome(), curve(200)
    first = write(folder / "run0", loss, "fp8_current", [])
    runs = [write(folder / "bf16", loss, "bf16", []), first]
    for n in range(1, count - 1):
        runs.append(fresh(first, folder / f"run{n}"))
        replan(runs[-1], run_name=f"run{n}")
    out = folder / "report.html"
    done, seconds, peak = measured("analysis.report", *runs, "--out", out)
    page = out.read_text() if out.exists() else ""
    for run in runs:
        outcome.add(
            "in the report",
            lost=(
                None
                if f"<td>{run.name}</td>" in page
                else f"{run.name} is missing: {done.stderr[-200:]}"
            ),
        )
    outcome.measured.append(
        said(f"{count:,} runs of 200 steps, page of {len(page) / 1e6:.1f} MB", seconds, peak)
    )
    return outcome


SBATCH = """#!/bin/sh
case "$*" in *--version*) echo "slurm 24.05"; exit 0;; esac
n=1; while ! mkdir "$JOBS/$n" 2> /dev/null; do n=$((n + 1)); done
umask > "$JOBS/$n/umask"
echo "$n"
"""
SQUEUE = """#!/bin/sh
for job in "$JOBS"/*; do [ -e "$job" ] && echo "${job##*/}|PENDING|None|0"; done; true
"""


def pretended_slurm(folder: Path, sbatch: str = SBATCH) -> dict[str, str]:
    """Write stand-ins for sbatch and squeue, whose jobs wait for ever; return the environment that
    finds them.
    """
    tools, jobs = folder / "tools", folder / "jobs"
    tools.mkdir(parents=True, exist_ok=True)
    jobs.mkdir(exist_ok=True)
    nothing = "#!/bin/sh\n"
    for name, text in (
        ("sbatch", sbatch),
        ("squeue", SQUEUE),
        ("sacct", nothing),
        ("scancel", nothing),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "JOBS": str(jobs)}


# `python -m launch` with another interpreter for its runs.
WITH_PYTHON = (
    "import sys; sys.executable = sys.argv[1]; from launch.__main__ import main;"
    " sys.exit(main(sys.argv[2:]))"
)
SLURM = ["executor=slurm", "cluster.mpi=null", "cluster.container_runtime=none", "gpu=cpu"]


@fault(
    AREA,
    "a sweep of so many jobs, planned and submitted to a stand-in for sbatch",
    small=4,
    full=200,
)
def many_jobs(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    env = pretended_slurm(folder)
    seeds = f"seed={','.join(str(n) for n in range(1, count + 1))}"
    done, seconds, peak = measured(
        "launch", "-m", *SLURM, seeds, f"runs_dir={folder}/runs", env=env
    )
    for n in range(1, count + 1):
        run = folder / "runs" / f"llama3_tiny.bf16.cpu.seed{n}"
        sent = len(jobs(run))
        wrong = (
            None if sent == 1 and whole(run) else f"{run.name}: {sent} jobs, {done.stderr[-200:]}"
        )
        outcome.add("submitted once, job folder whole", lost=wrong)
    outcome.measured.append(said(f"{count} jobs planned and submitted", seconds, peak))
    _, seconds, peak = measured("launch.status", folder / "runs", env=env)
    outcome.measured.append(said(f"`launch.status` of {count} jobs", seconds, peak))
    return outcome


@fault(
    AREA,
    "a sweep of so many jobs, submitted to a real Slurm of four nodes that runs them at once",
    small=0,
    full=200,
    slurm=True,
)
def many_jobs_on_slurm(count: int, folder: Path) -> Outcome:
    """The jobs end as soon as they start, for their interpreter is `true`; accounting knows each of
    them once.
    """
    if reason := install.missing():
        raise Unavailable(reason)
    outcome = Outcome()
    seeds = f"seed={','.join(str(n) for n in range(1, count + 1))}"
    site = ["cluster.account=research", "cluster.partition=batch", "cluster.python=/bin/true"]
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as short,
        Slurm(Path(short) / "slurm") as slurm,
    ):  # Unix sockets want short paths
        env = {name: slurm.env[name] for name in ("SLURM_CONF", "PATH")}
        done, seconds, peak = measured(
            "launch", "-m", *SLURM, *site, seeds, f"runs_dir={folder}/runs", env=env
        )
        for n in range(1, count + 1):
            ids = jobs(folder / "runs" / f"llama3_tiny.bf16.cpu.seed{n}")
            ended = f"{len(ids)} jobs: {done.stderr[-200:]}"
            if len(ids) == 1:
                ended = slurm.wait(str(ids[0]), "COMPLETED", timeout=120)
            outcome.add(
                "submitted once, run by Slurm",
                lost=None if ended == "COMPLETED" else f"seed {n}: {ended}",
            )
    outcome.measured.append(
        said(f"{count} jobs planned and submitted to a real Slurm", seconds, peak)
    )
    return outcome


def whole(run: Path) -> bool:
    """Whether a job folder has its plan, its script to the last line, and its copy of the code."""
    scripts = [
        script for name in ("job.sbatch", "local.sh") if (script := run / "job" / name).exists()
    ]
    ends = all(
        script.read_text().rstrip().endswith(('exit "$code_of_step"', '"$run_folder"'))
        or "recipes.training.run" in script.read_text()
        for script in scripts
    )
    plan = json.loads((run / "plan.json").read_text())
    return (
        bool(scripts)
        and ends
        and (run / "job/code/code.json").exists()
        and plan["run_name"] == run.name
        and not list(run.rglob("*.part*"))
    )


@fault(
    AREA,
    "a folder of so many runs, and a run of a million steps: `launch.status`",
    small=20,
    full=5000,
)
def status_of_many_runs(count: int, folder: Path) -> Outcome:
    """The time and the bytes grow with the runs; of a run the ends of its files are read."""
    outcome = Outcome()
    for n in range(count):
        fresh(DEMO[n % len(DEMO)], folder / "runs" / f"run{n}")
    long, steps = fresh(DEMO[0], folder / "long"), 200 * count
    line = rows_in(long / "metrics.jsonl")[0]
    with (long / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({**line, "step": step}) + "\n" for step in range(1, steps + 1))
    for place, rows, what in (
        (folder / "runs", count, f"{count:,} runs"),
        (long, 1, f"a run of {steps:,} steps"),
    ):
        done, seconds, peak = measured("launch.status", place, "--json")
        found = json.loads(done.stdout or "[]")
        right = len(found) == rows and peak < 0.5 and (rows > 1 or found[0]["step"] == steps)
        outcome.add(
            "every run named",
            lost=(
                None if right else f"{what}: {len(found)} rows, {peak:.2f} GB: {done.stderr[-200:]}"
            ),
        )
        outcome.measured.append(said(f"`launch.status` of {what}", seconds, peak))
    return outcome


@fault(
    AREA,
    "a compressed log that ends in so many megabytes of zeros: `analysis.import_logs`",
    small=16,
    full=1024,
)
def log_of_zeros(count: int, folder: Path) -> Outcome:
    """Imported or refused, without the memory of its longest line."""
    outcome, log = Outcome(), folder / "zeros.log.gz"
    with gzip.open(log, "wb", 1) as file:
        file.write(("\n".join(nemo_log([9 - i / 20 for i in range(60)])) + "\n").encode())
        for _ in range(count):
            file.write(bytes(1 << 20))
    done, seconds, peak = measured("analysis.import_logs", log, "--out", folder / "run", *SET)
    err = "".join(
        line for line in done.stderr.splitlines(keepends=True) if not line.startswith("PEAK ")
    )
    wrong = Ended(done.returncode, done.stdout, err).wrong((0,)) or (
        None if peak < MOST_GB / 4 else f"{peak:.2f} GB"
    )
    outcome.add("imported" if done.returncode == 0 else REFUSED, lost=wrong)
    outcome.measured.append(
        said(f"a log of {count:,} MB, {log.stat().st_size / 1e6:.1f} MB compressed", seconds, peak)
    )
    return outcome


@fault(
    AREA,
    "two launches of one experiment at the same moment, submitted to a stand-in for sbatch",
    small=1,
    full=20,
)
def two_launches(count: int, folder: Path) -> Outcome:
    """Each run is submitted once, by whichever came first, and its job folder is whole."""
    outcome = Outcome()
    for n in range(count):
        env = {**os.environ, **pretended_slurm(folder / f"slurm{n}")}
        command = [
            sys.executable,
            "-m",
            "launch",
            *SLURM,
            f"runs_dir={folder}/runs{n}",
            "run_name=one",
        ]
        together([command] * 2, env)
        run = folder / f"runs{n}" / "one"
        sent = (len(jobs(run)), len(list((folder / f"slurm{n}" / "jobs").iterdir())))
        right = sent == (1, 1) and whole(run)
        outcome.add(
            "one job, job folder whole", lost=None if right else f"{sent} jobs; whole: {whole(run)}"
        )
    return outcome


@fault(AREA, "two launches of one experiment at the same moment, on this machine", small=1, full=10)
def two_local_launches(count: int, folder: Path) -> Outcome:
    """One runs, the other is refused with one line.

    The run is a stand-in that writes a line and waits until one has ended.
    """
    outcome = Outcome()
    for n in range(count):
        stub = stub_python(
            folder / f"stub{n}", 'echo started >> "$STARTS"; until [ -e "$GO" ]; do sleep 0.1; done'
        )
        go = folder / f"go{n}"
        env = {**os.environ, **stub, "STARTS": str(folder / f"starts{n}"), "GO": str(go)}
        command = [
            sys.executable,
            "-c",
            WITH_PYTHON,
            env["STUB"],
            f"runs_dir={folder}/runs{n}",
            "run_name=one",
        ]
        ends = together([command] * 2, env, go)
        starts = (folder / f"starts{n}").read_text().count("started")
        refused = [
            err
            for status, err in ends
            if status == 2 and err.startswith("error: ") and err.count("\n") == 1
        ]
        right = (
            len(refused) == 1 and starts == 2 and whole(folder / f"runs{n}" / "one")
        )  # preflight and training, once each
        outcome.add(
            "one runs, the other refused with one line",
            lost=None if right else f"{starts} starts, {ends}",
        )
    return outcome


def stub_python(folder: Path, does: str) -> dict[str, str]:
    """Write an "interpreter" that does something else; return the environment that names it as
    STUB.
    """
    folder.mkdir(parents=True)
    stub = folder / "python"
    stub.write_text(f"#!/bin/bash\n{does}\n")
    stub.chmod(0o755)
    return {"STUB": str(stub)}


def together(
    commands: Sequence[list[str]], env: dict[str, str], go: Path | None = None
) -> list[tuple[int, str]]:
    """Return exit code and errors of commands that run at once; `go` appears when one has ended, or
    none does for minutes.
    """
    started = [
        subprocess.Popen(
            c, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for c in commands
    ]
    deadline = time.monotonic() + 300
    while go and all(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    if go:
        go.touch()
    ends = [process.communicate()[1] for process in started]
    return [(process.returncode, err) for process, err in zip(started, ends, strict=True)]
