"""Broken plans: overrides of any type and range, hostile site files, a Slurm that refuses or
babbles, a launcher that is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from launch import status
from launch.__main__ import main
from tests.faults.commands import PROJECT, REFUSED, call, what_came_out
from tests.faults.elsewhere import elsewhere
from tests.faults.folders import planned, recorded
from tests.faults.load import SLURM, WITH_PYTHON, pretended_slurm, stub_python, whole
from tests.faults.mutations import HOSTILE, quoted
from tests.faults.registry import Outcome, fault

AREA = "Plans"
CELLS = (
    [],
    ["precision=mxfp8"],
    ["model=llama3_8b", "precision=fp8_delayed", "gpu=gb200"],
    ["model=llama3_70b", "precision=fp8_current", "gpu=h100", "experiment=throughput"],
)
LITERALS = (
    *(
        "null",
        "true",
        "false",
        "0",
        "1",
        "-1",
        "2",
        "3",
        "7",
        "1000000",
        "1" + "0" * 12,
        "9" * 83,
        "9" * 400,
        "9" * 5000,
    ),
    *("1_0", "0x10", "1:30", ".5", "0.0", "1e-320", "1e30"),
    *(
        "1e308",
        "-1e308",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "''",
        "x",
        "' '",
        "'a\\nb'",
        "é漢",
        "\udcff",
        "a" * 5000,
        "~",
        "*",
        "/",
        "../x",
        "@x",
        "???",
    ),
    *(
        "[]",
        "[1,2]",
        "[[]]",
        "{}",
        "{a: 1}",
        "{a: {b: c}}",
        "[a",
        "}",
        "[" * 3000 + "]" * 3000,
        "a,b",
        "glob(*)",
        "choice(1,2)",
        "range(1,5)",
    ),
    *(
        '"${seed}"',
        '"${nope}"',
        '"${oc.env:HOME}"',
        '"${oc.env:NOPE}"',
        '"${oc.decode:[}"',
        '"${run_name}"',
    ),
)
WHOLE_ARGUMENTS = (
    *(
        "=",
        "-",
        "--x",
        "a=",
        "=b",
        "a==b",
        "+",
        "~",
        "++",
        "@",
        "",
        " ",
        "a@b=c",
        "model@x=llama3_8b",
        "hydra.run.dir=x",
        "hydra=default",
        "+a/b=c",
    ),
    *(
        "+hydra.job.chdir=true",
        "experiment=[demo,throughput]",
        "model=../model/llama3_8b",
        "model=/etc/passwd",
        "cluster/x=y",
        "config=x",
        "_self_=1",
    ),
    *(
        "~model",
        "~train",
        "model=llama3_8b model=llama3_70b",
        "-m",
        "--json",
        "seed=1,2,3",
        "seed=range(1,4)",
        "precision=glob(*)",
    ),
)


def _leaves(plan: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a plan by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in plan.items():
        name = f"{prefix}{key}"
        found.update(_leaves(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return found


def _likely(value: Any, draw: random.Random) -> str:
    """Return a value of the same type as the composed one."""
    if isinstance(value, bool) or value is None:
        return draw.choice(["true", "false", "null", "1", "x"])
    if isinstance(value, int | float):
        return str(
            draw.choice(
                [value, value + 1, value * 2, value / 2, value // 2, -value, 1, 2, 8, 10**6]
            )
        )
    return (
        quoted(draw.choice([value, value + "x", value[:-1], ""]))
        if isinstance(value, str)
        else draw.choice(["[a]", "[]", "[1]", "{A: b}", "{A: 1}"])
    )


@fault(
    AREA,
    "every key of the plan overridden with every type and range, and malformed overrides: `launch …"
    " dry_run=true`",
    small=60,
    full=1600,
)
def overrides_of_any_kind(count: int, folder: Path) -> Outcome:
    """Every key of the plans is walked in turn, so that `count` above their number misses none."""
    outcome, values = Outcome(), [_leaves(planned(cell)) for cell in CELLS]
    keys = [(at, key) for at, plan in enumerate(values) for key in plan]
    random.Random(0).shuffle(keys)
    for seed in range(count):
        draw = random.Random(seed)
        at, key = keys[seed % len(keys)]
        value = (
            _likely(values[at][key], draw)
            if draw.random() < 0.4
            else draw.choice([*LITERALS, *map(quoted, HOSTILE)])
        )
        one = draw.choice(
            [f"{key}={value}"] * 4
            + [f"+{key}={value}", f"++{key}={value}", f"+{key}.x={value}", f"~{key}"]
        )
        one = draw.choice(WHOLE_ARGUMENTS) if draw.random() < 0.04 else one
        command = [
            *draw.choice([[], [], [], ["-m"], ["--json"]]),
            *CELLS[at],
            one,
            f"runs_dir={folder}/runs",
            "dry_run=true",
        ]
        ended = call(main, command)
        wrong = ended.wrong((0,)) or (
            None if not (folder / "runs").exists() else "something was written"
        )
        shutil.rmtree(folder / "runs", ignore_errors=True)
        outcome.add(
            "plan printed" if ended.code == 0 else REFUSED, lost=wrong and f"{one[:100]}: {wrong}"
        )
    outcome.measured.append(f"{len(keys)} keys of {len(CELLS)} cells")
    return outcome


SITES = (
    "cluster: !!python/object/apply:os.system ['touch owned']",
    "account: !!python/name:os.system ''",
    "account: &a [*a]",
    "account: {a: &x [1], b: *x}",
    "account: *nothing",
    "account: [",
    "account: \x00",
    "\tindented: by a tab",
    "- a list\n- not a mapping",
    "just text",
    "account: a\naccount: b",
    "account: 1",
    "account: 2026-11-25",
    "account: <script>alert(1)</script>",
    "account: ${oc.env:HOME}",
    "account: ${nope}",
    "account: ???",
    "accuont: a",
    "environment: [A, B]",
    "environment: {A: 1}",
    "environment: {'A B': x}",
    "environment: {A: 'x\\ny'}",
    'environment: {A: "x\\ny"}',
    "token_files: {HF_TOKEN: null}",
    "mounts: {a: b}",
    "mounts: /data",
    "python: ''",
    "name: ../../x",
    "defaults: [/model: nowhere]",
    "? [a, b] : c",
    "<<: {account: a}",
    "1: 2",
    "2026-11-25: x",
    "environment: {2026-11-25: x}",
    "true: x",
    "null: x",
)


@fault(
    AREA,
    "hostile and malformed site files (YAML tags, anchors, wrong types, other encodings): `launch …"
    " dry_run=true`",
    small=10,
    full=50,
)
def hostile_site_files(count: int, folder: Path) -> Outcome:
    """The project lies elsewhere with the site's file; a command in the file would leave the file
    `owned`.
    """
    outcome, contents = Outcome(), [f"# @package cluster\n{text}\n".encode() for text in SITES]
    contents += [
        SITES[0].encode("utf-16"),
        b"\xff\xfe\x00",
        b"# @package cluster\naccount: \xe9\n",
        b"# @package ../x\na: b\n",
        b"# @package _global_\nseed: x\n",
        b"",
    ]
    with elsewhere(folder / "project") as project:
        for content in contents[:count]:
            (project.root / "conf/local/site.yaml").write_bytes(content)
            ended = project.launch([f"runs_dir={folder}/runs", "dry_run=true"])
            run = [*folder.rglob("owned")]
            wrong = ended.wrong((0,)) or ("code of the file was run" if run else None)
            outcome.add(
                "composed" if ended.code == 0 else REFUSED, lost=wrong and f"{content!r}: {wrong}"
            )
    return outcome


REFUSALS = {
    "refuses": "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1",
    "refuses without a word": "exit 1",
    "says nothing": "exit 0",
    "babbles": "echo 'Submitted batch job 12'",
    "no text": "printf '\\377\\376\\0' ; printf '\\377' >&2; exit 1",
    "not text, and code 0": "printf '\\377\\376'",
    "killed": "kill -9 $$",
    "a page of errors": 'for i in 1 2 3 4 5; do echo "sbatch: error: line $i" >&2; done; exit 1',
    "terminal codes": "printf '\\033[2J\\007error' >&2; exit 1",
    "a script that cannot start": None,
}


@fault(AREA, "an sbatch that refuses, babbles, is killed or cannot start", small=3, full=10)
def sbatch_that_fails(count: int, folder: Path) -> Outcome:
    """One line, exit code 2, and a job folder that is whole: the same command submits it once Slurm
    is well.
    """
    outcome = Outcome()
    for n, (kind, does) in enumerate(list(REFUSALS.items())[:count]):
        head = "#!/bin/sh\n" + 'case "$*" in *--version*) exit 0;; esac\n'
        env = pretended_slurm(folder / str(n), f"{head}{does}\n" if does else "#!/nowhere/sh\n")
        run = folder / f"runs{n}" / "one"
        command = [*SLURM, f"runs_dir={run.parent}", "run_name=one"]
        with mock.patch.dict(os.environ, env):
            ended = call(main, command)
        written = run.exists()
        wrong = ended.wrong(()) or (
            f"half-written: {sorted(p.name for p in run.iterdir())}"
            if written and not whole(run)
            else None
        )
        pretended_slurm(folder / str(n))
        with mock.patch.dict(os.environ, env):
            wrong = (
                wrong
                or call(main, command).wrong((0,))
                or (None if whole(run) else "not whole when launched again")
            )
        outcome.add(
            f"{REFUSED}, submitted when launched again", lost=wrong and f"sbatch {kind}: {wrong}"
        )
    return outcome


@fault(AREA, "the launcher killed (-9) at a random moment, and launched again", small=1, full=100)
def launcher_killed(count: int, folder: Path) -> Outcome:
    """A script in a job folder means that all of it is there; launched again, the folder is whole
    and submitted once.
    """
    outcome = Outcome()
    for n in range(count):
        env = {**os.environ, **pretended_slurm(folder / f"slurm{n}")}
        run = folder / f"runs{n}" / "one"
        command = [sys.executable, "-m", "launch", *SLURM, f"runs_dir={run.parent}", "run_name=one"]
        process = subprocess.Popen(
            command, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _kill_while_it_writes(process, run, random.Random(n).uniform(0, 0.25))
        half = (run / "job/job.sbatch").exists() and not whole(run)
        again = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)
        mended = again.returncode == 0 and whole(run)
        what = "launched again, whole" if mended else None
        outcome.add(
            what or "",
            lost=(
                None
                if mended and not half
                else (
                    f"run {n}: half-written before: {half}, after: {not mended},"
                    f" {again.stderr[-200:]}"
                )
            ),
        )
    return outcome


def _kill_while_it_writes(process: subprocess.Popen[bytes], run: Path, delay: float) -> None:
    deadline = time.monotonic() + 60
    while not run.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@fault(
    AREA,
    "runs_dir that is a file, read-only, a link to nothing, or too long a name",
    small=5,
    full=5,
)
def places_that_cannot_be_written(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at" / "all")
    (folder / "loop").symlink_to("loop")
    with mock.patch.dict(os.environ, pretended_slurm(folder)):
        for place in [
            folder / "file",
            folder / "dangling",
            folder / "loop",
            folder / ("x" * 300),
            Path("/proc/nowhere"),
        ][:count]:
            ended = call(main, [*SLURM, f"runs_dir={place}", "run_name=one"])
            outcome.add(
                what_came_out(ended), lost=(wrong := ended.wrong(())) and f"{place}: {wrong}"
            )
    return outcome


def shown(run: Path) -> str:
    """Return the status that `python -m launch.status` prints."""
    return str(json.loads(call(status.main, [run, "--json"]).out)[0]["status"])


@fault(
    AREA,
    "a run on this machine whose processes are killed (-9), the launcher first: `launch.status`",
    small=1,
    full=5,
)
def local_run_killed(count: int, folder: Path) -> Outcome:
    """The launcher's death leaves the run running; after its own its last word is still "running",
    and status says that it is not.
    """
    outcome = Outcome()
    for n in range(count):
        run = folder / f"runs{n}" / "one"
        does = f"""case "$*" in *preflight*) exit 0;; esac
echo $$ > {run}/pid
echo '{{"status": "running", "reason": "", "step": 1}}' > {run}/status.json; exec sleep 60"""
        stub = stub_python(folder / f"stub{n}", does)["STUB"]
        command = [
            sys.executable,
            "-c",
            WITH_PYTHON,
            stub,
            f"runs_dir={run.parent}",
            "run_name=one",
        ]
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while (
            not ((run / "status.json").exists() and recorded(run) == "running")
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        said = [shown(run)]
        for pid in (process.pid, int((run / "pid").read_text())):
            os.kill(pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
            said.append(shown(run))
        outcome.add(
            "said to be gone",
            lost=None if said == ["running", "running", "failed"] else f"status said {said}",
        )
    return outcome
