"""The test cluster is a real Slurm: it schedules, refuses, signals, requeues and keeps accounts,
and its nodes can be lost.
"""

from __future__ import annotations

import socket
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import Slurm

BASH = "#!/bin/bash\n"


@pytest.fixture(scope="module")
def warned(slurm: Slurm) -> str:
    """A job to be signalled before its time limit.

    Slurm may take half a minute to do so: submitted early, looked at last.
    """
    script = BASH + "trap 'echo warned; exit 0' USR1\nsleep 300 & wait\n"
    return slurm.submit(
        script, "--partition=short", "--time=1", "--signal=B:USR1@55", "--nodelist=n3"
    )


def test_four_nodes_are_idle(slurm: Slurm) -> None:
    for name in slurm.nodes:
        slurm.wait_node(name, "IDLE")
    found = slurm.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t %c %G").stdout.splitlines()
    assert found == [f"n{k} idle 64 gpu:h100:8" for k in range(4)]


def test_a_job_runs_on_two_nodes(slurm: Slurm) -> None:
    script = (
        BASH + "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\nsrun bash -c 'echo $SLURMD_NODENAME"
        " $SLURM_PROCID'\n"
    )
    job = slurm.submit(script)
    slurm.wait(job, "COMPLETED")
    assert sorted(slurm.output(job).splitlines()) == ["n0 0", "n0 1", "n1 2", "n1 3"]


def test_a_job_sees_its_gpus_only(slurm: Slurm) -> None:
    script = BASH + "echo $CUDA_VISIBLE_DEVICES\nscontrol show hostnames $SLURM_JOB_NODELIST\n"
    whole, half = (
        slurm.submit(script, "--gpus-per-node=8", "--exclusive"),
        slurm.submit(script, "--gres=gpu:h100:4", "--nodelist=n2"),
    )
    for job in (whole, half):
        slurm.wait(job, "COMPLETED")
    assert slurm.output(whole).splitlines()[0] == "0,1,2,3,4,5,6,7"
    assert slurm.output(half).splitlines() == ["0,1,2,3", "n2"]


def test_pyxis_flags_reach_each_task(slurm: Slurm) -> None:
    step = (
        "srun --container-image=nvcr.io#nvidia/nemo:25.04 --container-mounts=/data:/data:ro,/runs"
        " --no-container-mount-home true\n"
    )
    job = slurm.submit(BASH + step, "--nodes=2", "--ntasks-per-node=2")
    slurm.wait(job, "COMPLETED")
    flags = [
        "container-image=nvcr.io#nvidia/nemo:25.04",
        "container-mounts=/data:/data:ro,/runs",
        "no-container-mount-home=",
    ]
    assert Counter(slurm.pyxis_flags(job)) == Counter(
        ("0", str(task), flag) for task in range(4) for flag in flags
    )


def test_pyxis_flags_of_sbatch_reach_the_batch_script_and_its_steps(slurm: Slurm) -> None:
    job = slurm.submit(BASH + "#SBATCH --container-image=image.sqsh\nsrun true\n")
    slurm.wait(job, "COMPLETED")
    assert sorted(slurm.pyxis_flags(job)) == [
        ("0", "0", "container-image=image.sqsh"),
        ("batch", "0", "container-image=image.sqsh"),
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--account=nobody", "Invalid account"),
        ("--partition=nowhere", "invalid partition specified: nowhere"),
        ("--nodes=9", "Node count specification invalid"),
        ("--time=5:00:00", "Requested time limit is invalid"),
        ("--gpus-per-node=9", "Requested node configuration is not available"),
        ("--gres=gpu:b200:8", "Requested node configuration is not available"),
        ("--container-immage=x", "unrecognized option"),
    ],
)
def test_what_slurm_refuses(slurm: Slurm, option: str, message: str) -> None:
    done = slurm.run("sbatch", option, stdin=BASH + "true\n", check=False)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_wait_for_a_state_that_cannot_come_fails_at_once(slurm: Slurm) -> None:
    job = slurm.submit(BASH + "echo broken; exit 3\n")
    with pytest.raises(AssertionError, match=r"FAILED, not COMPLETED(.|\n)*broken"):
        slurm.wait(job, "COMPLETED")


def test_accounting_has_the_job(slurm: Slurm) -> None:
    job = slurm.submit(BASH + "exit 3\n")
    assert slurm.job(job)["Account"] == "research"
    slurm.wait(job, "FAILED")
    slurm.until(lambda: slurm.history(job) == ["FAILED"], "sacct")


def test_a_lost_node_requeues_its_job(slurm: Slurm, warned: str) -> None:
    script = (
        BASH
        + 'echo run $SLURM_RESTART_COUNT on $SLURM_JOB_NODELIST\n[ -n "$SLURM_RESTART_COUNT" ] ||'
        ' srun bash -c "echo task; sleep 300"\n'
    )
    job = slurm.submit(script, "--requeue", "--open-mode=append", "--nodes=2", "--exclude=n3")
    slurm.until(
        lambda: slurm.output(job).count("task") == 2, "the tasks of the first run", timeout=60
    )
    slurm.kill_node("n0")
    slurm.wait(job, "COMPLETED", timeout=180)
    assert slurm.node_state("n0") == "DOWN"
    assert slurm.output(job).splitlines()[0] == "run on n[0-1]"
    assert slurm.output(job).splitlines()[-1] == "run 1 on n[1-2]"
    slurm.until(lambda: slurm.history(job) == ["NODE_FAIL", "COMPLETED"], "sacct")


def test_a_revived_node_takes_jobs(slurm: Slurm) -> None:
    slurm.kill_node("n1", noticed=True)
    assert slurm.node_state("n1") == "DOWN"
    for name in ("n0", "n1"):
        if slurm.node_state(name) == "DOWN":
            slurm.revive_node(name)
    job = slurm.submit(BASH + "srun true\n", "--nodelist=n[0-1]", "--nodes=2")
    slurm.wait(job, "COMPLETED")


def test_the_batch_script_is_warned_before_its_time_limit(slurm: Slurm, warned: str) -> None:
    slurm.wait(warned, "COMPLETED", timeout=120)
    assert "warned\n" in slurm.output(warned)


def test_a_second_cluster_of_another_gpu(slurm: Slurm) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as root,
        Slurm(Path(root) / "slurm", gpu="gb200", gpus_per_node=4) as other,
    ):
        job = other.submit(BASH + "echo $CUDA_VISIBLE_DEVICES; sleep 300\n", "--gres=gpu:gb200:4")
        other.until(lambda: other.output(job) == "0,1,2,3\n", "the job's GPUs")
        pids = other.pids()
    assert len(pids) > len(slurm.nodes)
    slurm.until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids),
        "the end of the other cluster",
    )
    assert socket.gethostbyname("n0")
    slurm.wait(slurm.submit(BASH + "srun true\n"), "COMPLETED")
