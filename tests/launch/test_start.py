"""The start of a job on many nodes: its script runs as Slurm would run it, with stand-ins for
Slurm's commands.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType

import pytest

from launch.job import write_job
from launch.script import render
from recipes.code import PROJECT
from recipes.compose.tree import compose_plan
from recipes.run_folder import PORT_TAKEN, SESSION

pytestmark = pytest.mark.xdist_group("slurm")  # holds ports that a Slurm may be about to take
STARTS = int(
    os.environ.get("STARTS", "40")
)  # of each size; `make faults` has 200, which show failures of 1 %
HELD_PORTS = 500
# As the real one: beyond a pipe's buffer of names it writes again, when a reader of the first line
# has gone.
SCONTROL = '[ "$1 $2" = "show hostnames" ] && exec seq -f "gpu-node-%05.0f" 1 "$NODES"'
SRUN = 'echo "met at $MASTER_ADDR:$MASTER_PORT"'


@pytest.fixture(scope="module")
def held_ports() -> Iterator[set[int]]:
    """Ports of which a script may choose none: other programs of this machine listen there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * HELD_PORTS)), hard))
    with ExitStack() as stack:
        held = set[int]()
        for port in range(20000, 30000, 10000 // HELD_PORTS):
            listener = stack.enter_context(socket.socket())
            with suppress(OSError):  # somebody else has it
                listener.bind(("127.0.0.1" if port % 40 else "", port))
                listener.listen()
            held.add(port)
        yield held


def start(
    folder: Path,
    nodes: int,
    *more: str,
    times: int = 1,
    scontrol: str = SCONTROL,
    srun: str = SRUN,
    getent: str = "exit 0",
    name: str = "run",
    env: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[int], str]:
    """Run the script of a job on so many nodes, so often; return the exit codes and all output."""
    size = [
        f"run_name={name}",
        f"num_gpus={8 * nodes}",
        f"mapping.global_batch={8 * nodes}",
        f"runs_dir={folder}/runs",
    ]
    script = write_job(
        compose_plan(["model=llama3_8b", "gpu=h100", "experiment=throughput", *size, *more])
    )
    tools = folder / "tools"
    tools.mkdir(parents=True, exist_ok=True)
    for name, does in (("scontrol", scontrol), ("srun", srun), ("getent", getent)):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    job = {
        "RUN": str(script.parents[1]),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": f"gpu-node-[00001-{nodes:05}]",
        "NODES": str(nodes),
    }
    env = {**os.environ, **job, **env, "PATH": f"{tools}:{os.environ['PATH']}"}
    loop = 'for _ in $(seq "$2"); do bash "$1"; echo "code $?"; done'
    done = subprocess.run(
        ["bash", "-c", loop, "-", str(script), str(times)], env=env, capture_output=True, text=True
    )
    return [
        int(code) for code in re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE)
    ], done.stdout + done.stderr


@pytest.mark.parametrize("nodes", [64, 512, 2048])
def test_every_start_finds_the_first_node_and_a_free_port(
    nodes: int, tmp_path: Path, held_ports: set[int]
) -> None:
    codes, log = start(tmp_path, nodes, times=STARTS)
    met = re.findall(r"^met at (.+):(\d+)$", log, re.MULTILINE)
    assert codes == [0] * STARTS and len(met) == STARTS
    assert {first for first, _ in met} == {"gpu-node-00001"}
    ports = {int(port) for _, port in met}
    assert not ports & held_ports and len(ports) > STARTS // 2
    assert log.count(SESSION) == STARTS  # what stands before it in a log is of an earlier job


@pytest.mark.parametrize(
    "scontrol",
    ["echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "exit 0"],
)
def test_a_job_whose_nodes_are_not_listed_ends_with_the_reason(
    scontrol: str, tmp_path: Path
) -> None:
    codes, log = start(tmp_path, 2, scontrol=scontrol)
    assert (
        codes == [1]
        and "error: scontrol does not list the nodes of this job (gpu-node-[00001-00002])" in log
    )
    assert "met at" not in log


NODE = (
    f'{SCONTROL}; [ "$1 $2 $3" = "show node gpu-node-00001" ] && echo "NodeName=gpu-node-00001'
    ' NodeAddr=10.0.0.7 Port=6818"'
)


@pytest.mark.parametrize(
    ("nodes", "scontrol", "known", "meet_at"),
    [
        (2, NODE, "gpu-node-00001", "gpu-node-00001"),
        (2, NODE, "10.0.0.7", "10.0.0.7"),
        (1, NODE, "nothing", "127.0.0.1"),
        (1, SCONTROL, "nothing", "127.0.0.1"),
        (2, NODE, "nothing", None),
        (2, SCONTROL, "nothing", "gpu-node-00001"),  # where Slurm tells no address
    ],
)
def test_a_first_node_whose_name_does_not_resolve(
    nodes: int, scontrol: str, known: str, meet_at: str | None, tmp_path: Path
) -> None:
    codes, log = start(tmp_path, nodes, scontrol=scontrol, getent=f'[ "$2" = {known} ]')
    met = re.findall(r"^met at (.+):\d+$", log, re.MULTILINE)
    assert codes == [0 if meet_at else 1] and met == [meet_at] * bool(meet_at)
    assert ("error: the first node's name gpu-node-00001 does not resolve" in log) == (
        meet_at is None
    )
    assert ("note: the node name gpu-node-00001" in log) == (
        meet_at is not None and known != "gpu-node-00001"
    )


def test_a_node_without_getent_starts_with_the_name(tmp_path: Path) -> None:
    no_getent = {"BASH_ENV": str(tmp_path / "env")}
    (tmp_path / "env").write_text(
        'command() { [ "$2" != getent ] && builtin command "$@"; }\ngetent() { return 127; }\n'
    )
    codes, log = start(tmp_path, 2, scontrol=NODE, env=no_getent)
    assert codes == [0] and "met at gpu-node-00001:" in log and "note:" not in log


# Rank 0 as a stand-in: it binds the port or leaves the file, and holds it until both jobs have met.
RANK_0 = """
import os, pathlib, socket, sys, time
run, jobs = pathlib.Path(os.environ["RUN"]), pathlib.Path(os.environ["JOBS"])
(run / "drawn").touch()
while os.environ["WAITS_FOR"] and not (jobs / os.environ["WAITS_FOR"]).exists():
    time.sleep(0.02)
port = socket.socket()
try:
    port.bind(("", int(os.environ["MASTER_PORT"])))
    port.listen()
except OSError:
    (run / os.environ["TAKEN"]).touch()
    sys.exit(1)
(jobs / run.name).touch()
while len(list(jobs.iterdir())) < 2:
    time.sleep(0.02)
print("met at node:" + os.environ["MASTER_PORT"])
"""


def seeded(folder: Path) -> Mapping[str, str]:
    """Return the environment in which every script draws the same ports."""
    (folder / "seed").write_text("RANDOM=18\n")
    (folder / "jobs").mkdir(exist_ok=True)
    return {
        "BASH_ENV": str(folder / "seed"),
        "JOBS": str(folder / "jobs"),
        "TAKEN": PORT_TAKEN,
        "WAITS_FOR": "",
    }


def test_two_jobs_of_one_node_that_draw_the_same_port_both_train(tmp_path: Path) -> None:
    """The second draws it before the first has it, and finds it taken."""
    same, srun = seeded(tmp_path), f"exec {sys.executable} - <<'END'\n{RANK_0}\nEND"
    with ThreadPoolExecutor() as pool:
        late = pool.submit(
            start, tmp_path / "b", 1, srun=srun, name="late", env={**same, "WAITS_FOR": "early"}
        )
        last = {"WAITS_FOR": "../b/runs/late/drawn"}
        early = pool.submit(start, tmp_path / "a", 1, srun=srun, name="early", env={**same, **last})
    (early_codes, early_log), (late_codes, late_log) = early.result(), late.result()
    assert early_codes == late_codes == [0]
    ports = [re.findall(r"met at node:(\d+)", log) for log in (early_log, late_log)]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]
    assert late_log.count("the step starts again with another port") == 1


def test_a_requeued_job_leaves_a_port_that_its_old_processes_hold(tmp_path: Path) -> None:
    same = seeded(tmp_path)
    draws = ["bash", "-c", "echo $((20000 + RANDOM % 10000))"]
    drawn = int(
        subprocess.run(draws, env={**os.environ, **same}, capture_output=True, text=True).stdout
    )
    start(tmp_path, 1, times=0)
    (tmp_path / "runs/run" / PORT_TAKEN).touch()  # left by the step that was killed
    with socket.socket() as old:
        with suppress(OSError):  # somebody else has it
            old.bind(("", drawn))
            old.listen()
        codes, log = start(tmp_path, 1, env={**same, "SLURM_RESTART_COUNT": "1"})
    (port,) = re.findall(r"met at gpu-node-00001:(\d+)", log)
    assert codes == [0] and int(port) != drawn


BEFORE = "before the time limit of job 76\n"


@pytest.mark.parametrize(
    ("left", "dated", "trains"),
    [
        ("", 1, False),
        ("please\n", 1, False),
        (BEFORE, 0, True),
        (BEFORE, 1, False),
        (None, 0, True),
    ],
)
def test_a_link_of_a_chain_after_a_stop_by_the_user_trains_nothing(
    left: str | None, dated: int, trains: bool, tmp_path: Path
) -> None:
    """The request that a script makes before its own time limit is for that job alone, unless its
    user touches it.
    """
    run = tmp_path / "runs" / "one"
    start(tmp_path, 2, times=0, name="one")
    if left is not None:
        (run / "stop").write_text(left)
        os.utime(run / "stop", (dated, dated))
    codes, log = start(tmp_path, 2, name="one")
    assert codes == [0] and ("met at" in log) == trains and ("the run was stopped" in log) != trains
    assert (run / "stop").exists() != trains


@pytest.mark.parametrize(
    ("before", "after", "requeued"),
    [("", "", True), ('touch "$RUN/stop"; ', "", False), ("", 'touch "$RUN/stop"; ', False)],
    ids=["time limit alone", "a user before", "a user after"],
)
def test_before_its_time_limit_a_job_queues_itself_again_unless_its_user_stopped_it(
    before: str, after: str, requeued: bool, tmp_path: Path
) -> None:
    paused = """echo '{"status": "paused"}' > "$RUN/status.json" """
    warned = (
        f'{before}kill -USR1 "$PPID"; while [ ! -e "$RUN/stop" ]; do sleep 0.05; done; sleep 0.2;'
        f" {after}{paused}"
    )
    queue = f'[ "$1" = requeue ] && {{ echo "queued again"; kill -9 "$PPID"; }}; {SCONTROL}'
    _, log = start(tmp_path, 2, scontrol=queue, srun=warned)
    assert ("queued again\n" in log) == requeued and (
        "not queued again: the run was stopped" in log
    ) != requeued


# What rank 0 does where another process was faster, and what srun's exit code then is: that of the
# ranks which are killed.
TAKEN = 'touch "$RUN/{file}"; exit 137'


def test_a_step_whose_port_is_taken_starts_again_with_another(tmp_path: Path) -> None:
    twice = 'echo step >> "$RUN/steps"; [ "$(wc -l < "$RUN/steps")" -gt 2 ] || {{ {taken}; }}'
    codes, log = start(
        tmp_path, 64, srun=f"{SRUN}; {twice.format(taken=TAKEN.format(file=PORT_TAKEN))}"
    )
    ports = re.findall(r"^met at gpu-node-00001:(\d+)$", log, re.MULTILINE)
    assert (
        codes == [0]
        and len(ports) == 3
        and log.count("the step starts again with another port") == 2
    )
    assert len(set(ports)) > 1


@pytest.mark.parametrize(
    ("ends", "code", "steps"),
    [(TAKEN.format(file=PORT_TAKEN), 137, 10), ("exit 137", 137, 1), ("exit 0", 0, 1)],
)
def test_a_step_that_ends_otherwise_or_never_finds_a_port_ends_the_job(
    ends: str, code: int, steps: int, tmp_path: Path
) -> None:
    codes, log = start(tmp_path, 2, srun=f"{SRUN}; {ends}")
    assert codes == [code] and log.count("met at") == steps


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_rank_0_leaves_a_port_that_is_taken(alone: bool, tmp_path: Path) -> None:
    """Before anything else: the folder is no run folder.  A process alone needs no certain port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "1" if alone else "2",
            "MASTER_PORT": str(other.getsockname()[1]),
        }
        command = [sys.executable, "-m", "recipes.training.run", str(tmp_path)]
        done = subprocess.run(
            command, env={**os.environ, **ranks}, cwd=PROJECT, capture_output=True, text=True
        )
    assert (done.returncode, (tmp_path / PORT_TAKEN).exists()) == (
        (2, False) if alone else (1, True)
    )
    assert (
        "is no run folder" if alone else f"port {ranks['MASTER_PORT']} of this node is taken"
    ) in done.stderr


@pytest.mark.parametrize(
    ("sudo", "warns"),
    [("exit 0", 0), ("echo 'sudo: a password is required' >&2; exit 1", 1), ("exit 127", 1)],
)
def test_a_node_that_refuses_vboost_trains_without_it(
    sudo: str, warns: int, tmp_path: Path
) -> None:
    srun = f'case "$*" in *sudo*) {sudo} ;; esac; {SRUN}'
    codes, log = start(tmp_path, 2, "cluster.vboost=true", srun=srun)
    assert codes == [0] and log.count("met at") == 1
    assert log.count("warning: vboost is off on some node") == warns
    assert "sudo" not in log  # launch.status looks for the cause of a failure there
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "vboost.txt").read_text() == (
        "sudo: a password is required\n" if "password" in sudo else ""
    )


PIPE = re.compile(r"(?<!\|)\|(?!\|)")


def test_no_script_has_a_pipeline_whose_reader_may_leave_early() -> None:
    """Under pipefail the writer's SIGPIPE ends the script; a script of a job has no pipeline at
    all.
    """
    scripts = [render(compose_plan(["num_gpus=2"])), render(compose_plan())]
    for more in (
        [],
        ["cluster.vboost=true", "+cluster.token_files.HF_TOKEN=/f"],
        ["executor.max_restarts=0"],
    ):
        scripts.append(
            render(compose_plan(["model=llama3_8b", "gpu=h100", "experiment=throughput", *more]))
        )
    scripts.append((PROJECT / ".ci/run").read_text())
    for script in scripts:
        lines = [
            line.partition("   # ")[0] for line in script.splitlines() if not line.startswith("#")
        ]
        assert not [line for line in lines if PIPE.search(line)]
    assert PIPE.search('first="$(scontrol show hostnames | head -n 1)"')
