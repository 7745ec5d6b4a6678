"""Jobs as they are launched, on a real Slurm: they train over two nodes, survive a time limit and a
lost node, and say what is wrong.

The nodes of the test cluster share one machine, so gpu=cpu jobs run over gloo on loopback, in the
fake container, through the script that a GPU job gets.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.importers.console import read as read_console
from launch import cancel, resume, status
from launch.__main__ import main
from launch.matrix import GPUS, MODELS, PRECISIONS, cell
from launch.script import nodes, render
from launch.state import submitted
from recipes.compose.tree import compose_plan
from recipes.run_folder import rows_of, status_of
from tests.launch.slurm.cluster import Slurm

pytestmark = pytest.mark.nemo

TRAIN = [
    "train.warmup_steps=1",
    "train.eval_interval=100",
    "train.eval_batches=1",
    "train.diagnostics_interval=100",
    "mapping=single",
]
TRAIN += ["mapping.micro_batch=1", "mapping.global_batch=4", "logger=none"]
SITE = ["executor=slurm", "executor.threads=1", "cluster.mpi=null", "cluster.account=research"]
SITE += [
    "cluster.partition=batch",
    "executor.time_limit='10'",
    "executor.stop_before_limit_s=60",
    "gpu.devices_per_node=2",
]
SECRET = "hf_" + secrets.token_hex(16)  # not in any file, not even this one


@pytest.fixture(scope="module", autouse=True)
def python(warm_python: str) -> Iterator[None]:
    """The runs need not import NeMo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        patch.setattr(sys.modules[__name__], "SITE", [*SITE, f"cluster.python={warm_python}"])
        yield


@pytest.fixture
def site(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """The launch commands see the test cluster, with a secret in their environment."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(Path(__file__).parents[3])
    return slurm


def job_of(folder: Path) -> str:
    return str(submitted(folder)[-1].job_id)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in rows_of(folder / "metrics.jsonl") if "loss" in r]


def until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.2)


def has_step(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(number >= step for number, _ in losses(folder))


def events(folder: Path) -> list[str]:
    return [e["event"] for e in rows_of(folder / "events.jsonl")]


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


# An interpreter that is too late once: when rank 0 is about to start, another process of its node
# takes the port.
LATE = """#!/bin/bash
if [[ ${{RANK-}} == 0 && ! -e {mark} ]]; then
  {python} -c 'import socket, sys, time; s = socket.socket(); s.bind(("", int(sys.argv[1]))); s.listen(); open(sys.argv[2], "w"); time.sleep(300)' \
    "$MASTER_PORT" {mark} &
  until [[ -e {mark} ]]; do sleep 0.1; done
fi
exec {python} "$@"
"""  # noqa: E501


@pytest.mark.parametrize(("precision", "late"), [("bf16", False), ("fp8_current", True)])
def test_two_nodes_of_two_processes_train_to_the_losses_of_one(
    precision: str, late: bool, site: Slurm, tmp_path: Path
) -> None:
    """Also where the port that was free when the step started is taken when rank 0 wants it."""
    (tmp_path / "key").write_text(SECRET)
    (tmp_path / "late").write_text(LATE.format(python=sys.executable, mark=tmp_path / "mark"))
    (tmp_path / "late").chmod(0o755)
    interpreter = [f"cluster.python={tmp_path}/late"] if late else []
    common, runs = [*TRAIN, f"precision={precision}", "train.max_steps=5"], tmp_path / "runs"
    token = f"+cluster.token_files.WANDB_API_KEY={tmp_path}/key"
    assert (
        main(
            [
                *common,
                *SITE,
                *interpreter,
                "num_gpus=4",
                f"runs_dir={runs}",
                "run_name=cluster",
                token,
            ]
        )
        == 0
    )
    assert main([*common, "num_gpus=1", f"runs_dir={runs}", "run_name=here"]) == 0
    cluster, here = runs / "cluster", runs / "here"
    job = job_of(cluster)
    site.wait(job, "COMPLETED", timeout=240)
    assert status_of(cluster) == "done" and site.job(job)["NumNodes"] == "2"
    assert (cluster / "log.txt").read_text().count(
        "the step starts again with another port"
    ) == int(late)
    one, four = losses(here), losses(cluster)
    assert [step for step, _ in four] == [step for step, _ in one] == [1, 2, 3, 4, 5]
    assert one[0][1] == pytest.approx(
        four[0][1], rel=1e-6
    )  # before the first update only the sum over ranks differs
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in four], rel=2e-3)
    assert facts(cluster)["order_sha256"] == facts(here)["order_sha256"]
    printed = read_console(cluster / "log.txt").steps  # rank 0 alone prints, with srun's label
    assert [step for step, _ in four] == printed["step"].tolist()
    assert [loss for _, loss in four] == pytest.approx(printed["loss"].tolist(), rel=1e-6)
    flags = {flag for _, _, flag in site.pyxis_flags(job)}
    assert "container-image=nvcr.io#nvidia/nemo:25.04" in flags
    assert any(flag.startswith("container-mounts=") for flag in flags)
    (row,) = status.rows([cluster])
    assert (row.status, row.step, row.max_steps, row.job_id) == ("done", 5, 5, int(job))
    written = [path for path in runs.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of a run on this machine that nothing interrupts: what every interrupted one must
    come to.
    """
    runs = tmp_path_factory.mktemp("unbroken")
    one_thread = "executor.threads=1"  # as in SITE: sums over threads are rounded otherwise
    assert (
        main(
            [
                *TRAIN,
                one_thread,
                "train.max_steps=60",
                "precision=fp8_delayed",
                "num_gpus=1",
                f"runs_dir={runs}",
                "run_name=run",
            ]
        )
        == 0
    )
    return losses(runs / "run")


def interrupted(tmp_path: Path, *overrides: str) -> Path:
    """Submit the run of `unbroken` as a job of one process and return its folder."""
    common = [
        *TRAIN,
        "train.max_steps=60",
        "train.checkpoint_interval=5",
        "precision=fp8_delayed",
        *SITE,
        "num_gpus=1",
    ]
    assert main([*common, f"runs_dir={tmp_path}", "run_name=run", *overrides]) == 0
    return tmp_path / "run"


def test_a_time_limit_is_survived_by_a_checkpoint_and_a_requeue(
    site: Slurm, tmp_path: Path, unbroken: list[tuple[int, float]]
) -> None:
    folder = interrupted(tmp_path)
    job = job_of(folder)
    until(has_step(folder, 3), "three steps")
    site.run(
        "scancel", "--batch", "--signal=USR1", job
    )  # what Slurm sends executor.stop_before_limit_s before the limit
    until(lambda: "pause" in events(folder), "the pause")
    assert status.rows([folder])[0].status in ("running", "queued", "starting")
    site.wait(job, "COMPLETED", timeout=300)
    assert losses(folder) == unbroken
    assert events(folder) == ["submitted", "start", "pause", "resume", "end"]
    assert int(site.job(job)["Restarts"]) == 1


def test_a_lost_node_is_survived_by_slurms_own_requeue(
    site: Slurm, tmp_path: Path, unbroken: list[tuple[int, float]]
) -> None:
    folder = interrupted(tmp_path)
    job = job_of(folder)
    until(has_step(folder, 8), "eight steps")
    node = site.job(job)["NodeList"]
    site.kill_node(node, noticed=True)
    try:
        site.wait(job, "COMPLETED", timeout=300)
    finally:
        site.revive_node(node)
    assert losses(folder) == unbroken
    assert events(folder)[:3] == ["submitted", "start", "resume"] and events(folder)[-1] == "end"


def test_a_cancelled_run_is_resumed_in_the_same_folder(
    site: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(tmp_path, "train.max_steps=20")
    until(has_step(folder, 6), "six steps")
    assert (
        main(
            [
                *TRAIN,
                "train.max_steps=20",
                "train.checkpoint_interval=5",
                "precision=fp8_delayed",
                *SITE,
                "num_gpus=1",
                f"runs_dir={tmp_path}",
                "run_name=run",
            ]
        )
        == 0
    )
    assert "queued or running already" in capsys.readouterr().out and len(submitted(folder)) == 1
    assert cancel.main([str(folder)]) == 0
    until(lambda: status.rows([folder])[0].status == "cancelled", "the cancellation", 60)
    time.sleep(12)  # a requeue would have brought it back by now
    assert status.rows([folder])[0].status == "cancelled"
    assert resume.main([str(folder)]) == 0
    site.wait(job_of(folder), "COMPLETED", timeout=240)
    assert [step for step, _ in losses(folder)] == list(range(1, 21))
    assert len(submitted(folder)) == 2 and status.rows([folder])[0].status == "done"


def test_a_sweep_of_four_jobs_and_a_chain(site: Slurm, tmp_path: Path) -> None:
    sweep = [
        "-m",
        *TRAIN,
        *SITE,
        "num_gpus=1",
        "train.max_steps=2",
        "precision=bf16,mxfp8",
        "seed=1,2",
        f"runs_dir={tmp_path}",
    ]
    assert main(sweep) == 0
    chain = [
        *TRAIN,
        *SITE,
        "num_gpus=1",
        "train.max_steps=2",
        "executor.chain=2",
        "executor.max_restarts=0",
        f"runs_dir={tmp_path}",
        "run_name=chain",
    ]
    assert main(chain) == 0
    folders = status.runs_under(tmp_path)
    assert len(folders) == 5 and len(submitted(tmp_path / "chain")) == 2
    for folder in folders:
        for job in submitted(folder):
            site.wait(str(job.job_id), "COMPLETED", timeout=300)
    assert {row.status for row in status.rows(folders)} == {"done"}
    assert "the run is done already" in (tmp_path / "chain/log.txt").read_text()


def test_a_run_that_fails_says_why(site: Slurm, tmp_path: Path) -> None:
    wrong = "{nemo: '9.9', megatron_core: '0.12', transformer_engine: '2.2'}"
    assert (
        main(
            [
                *TRAIN,
                *SITE,
                "num_gpus=2",
                f"stack.versions={wrong}",
                f"runs_dir={tmp_path}",
                "run_name=run",
            ]
        )
        == 0
    )
    folder = tmp_path / "run"
    site.wait(job_of(folder), "FAILED", timeout=120)
    (row,) = status.rows([folder])
    assert (
        row.status == "failed" and "nemo-toolkit is" in row.why and "nemo_25_04 has 9.9" in row.why
    )


def test_sbatch_accepts_the_script_of_every_legal_cell(site: Slurm, tmp_path: Path) -> None:
    cells = [
        (m, p, g)
        for m in MODELS
        for p in PRECISIONS
        for g in GPUS
        if cell("nemo_25_04", m, p, g, ["experiment=throughput"])["runs"]
    ]
    refused = {}
    for model, precision, gpu in cells:
        axes = [f"model={model}", f"precision={precision}", f"gpu={gpu}", "experiment=throughput"]
        plan = compose_plan(
            [*axes, "cluster.account=research", f"cluster.partition={gpu}", f"runs_dir={tmp_path}"]
        )
        (tmp_path / "job.sbatch").write_text(render(plan))
        done = site.run("sbatch", "--test-only", str(tmp_path / "job.sbatch"), check=False)
        if (
            done.returncode or f"using {nodes(plan) * 144} processors" not in done.stderr
        ):  # whole nodes of 144
            refused[model, precision, gpu] = done.stderr
    assert len(cells) == 55 and refused == {}


REFUSED = [
    (["cluster.partition=nowhere"], "cluster.partition"),
    (["cluster.account=nobody"], "cluster.account"),
    (["num_gpus=16", "mapping.global_batch=16"], "num_gpus"),
    (["cluster.extra_sbatch=[--no-such-flag]"], "cluster.extra_sbatch"),
    (["cluster.partition=short", "executor.time_limit='30'"], "executor.time_limit"),
    (["cluster.reservation=none-such"], "reservation"),
]


@pytest.mark.parametrize(("wrong", "remedy"), REFUSED, ids=lambda v: str(v))
def test_what_slurm_refuses_is_one_clear_line(
    wrong: list[str], remedy: str, site: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, *SITE, "num_gpus=4", *wrong, f"runs_dir={tmp_path}", "run_name=run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch refused") and remedy in error and error.count("\n") == 1
