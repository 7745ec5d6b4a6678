"""The launch commands: what they print, write and refuse, without a Slurm."""

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import status
from launch.__main__ import main
from launch.job import snapshot, write_job
from launch.matrix import main as matrix
from launch.matrix import options
from launch.slurm import refusal
from recipes.code import PROJECT, code
from recipes.compose.tree import compose_plan
from recipes.run_folder import SESSION, append_line, event, set_status
from tests.launch.standins import Standins

CELL = ["model=llama31_405b", "precision=fp8_current", "gpu=h100", "experiment=throughput"]
SECRET = "hf_" + secrets.token_hex(16)  # not in any file, not even this one


def test_dry_run_prints_the_job_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CELL, "dry_run=true", f"runs_dir={tmp_path}/runs"]) == 0
    said = capsys.readouterr()
    assert "#SBATCH --nodes=128" in said.out and "#SBATCH --ntasks-per-node=8" in said.out
    assert "1024 x h100 on 128 node(s)" in said.err and "global batch 512" in said.err
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_where_throughput_settings_differ_from_those_that_train_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*CELL, "dry_run=true", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    differs = job["summary"]["differs_from_convergence"]
    assert differs["settings.grad_reduce_in_fp32"] == [True, False] and differs["data.kind"] == [
        "text",
        "mock",
    ]
    assert differs["precision.fp8.first_layers_bf16"] == [1, 0] and differs[
        "settings.checkpoints"
    ] == [True, False]
    assert job["summary"]["memory_gb_per_gpu"]["predicted"] > 0 and job["plan"]["num_gpus"] == 1024


@pytest.mark.parametrize(
    ("overrides", "on", "why"),
    [
        ([*CELL, "settings=tuned"], False, "set cluster.vboost=true"),
        ([*CELL, "cluster.vboost=true"], True, None),
        ([*CELL, "cluster.vboost=true", "executor=local"], False, "executor=local"),
        (["model=llama3_8b", "gpu=h100"], False, None),
        (["model=llama3_tiny", "executor=slurm", "cluster.vboost=true"], False, None),
    ],
)
def test_a_plan_for_throughput_says_whether_vboost_is_on(
    overrides: list[str], on: bool, why: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*overrides, "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    found = job["summary"]["vboost"]
    assert found["on"] is on and ("sudo" in job["script"]) is on
    assert found["why_off"] is None if why is None else why in found["why_off"]
    assert main([*overrides, "dry_run=true"]) == 0
    assert ("vboost" in capsys.readouterr().err) is (why is not None)


def test_a_dry_run_needs_nothing_heavy() -> None:
    code = (
        "import sys; from launch.__main__ import main; import contextlib, io\nwith"
        " contextlib.redirect_stdout(io.StringIO()):"
        f" main({[*CELL, 'dry_run=true']!r})\nprint(sorted({{m.split('.')[0] for m in sys.modules}}"
        " & {'torch', 'nemo', 'megatron', 'transformer_engine', 'lightning', 'analysis'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        "modle=x",
        "precision=fp7",
        "seed=-1",
        "mapping.global_batch=3",
        "mapping.tp=2",
        "mapping=null",
        "model=llama3_70b",
        "num_gpus=two",
        "train.max_steps=0",
        "train.max_lr=nan",
        "data=indexed",
        "data.root=null",
        "run_name=../../etc",
        "executor.time_limit=soon",
        "executor=slurm",
        "settings=throughput",
        "=",
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm here
    assert main([wrong, f"runs_dir={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


SWEEPS = sorted(
    p.stem
    for p in (PROJECT / "conf/experiment").glob("*.yaml")
    if "sweeper:" in p.read_text() and "made_with" not in p.read_text()
)


@pytest.mark.parametrize("experiment", SWEEPS)
def test_an_experiment_that_sweeps_is_no_single_run(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [f"experiment={experiment}", f"runs_dir={tmp_path}/runs", "dry_run=true"]
    assert main(here) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: experiment={experiment} sweeps ")
        and "-m" in error
        and error.count("\n") == 1
    )
    one_each = error.strip().partition("as in ")[2].split()  # what the message says is right
    assert main([*here, *one_each]) == 0
    model, *_ = capsys.readouterr().err.partition("model ")[2].split(",")
    assert len(one_each) == 1 or f"model={model.strip()}" in one_each
    assert len(one_each) == 1 or main([*here, *one_each[1:]]) == 2


def test_two_plans_in_one_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "train.max_steps=20,30", f"runs_dir={tmp_path}/runs"]) == 2
    assert "run_name" in capsys.readouterr().err


def test_a_folder_with_another_plan_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(compose_plan([f"runs_dir={tmp_path}", "run_name=one"]))
    assert main([f"runs_dir={tmp_path}", "run_name=one", "seed=2"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "stack"), [([], "nemo_25_04"), (["--stack", "nemo_25_07"], "nemo_25_07")]
)
def test_the_matrix_answers_for_all_75_cells_of_a_stack(
    asked: list[str], stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix([*asked, "--json", "experiment=throughput"]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert len(cells) == 75 and {c["stack"] for c in cells} == {stack}
    refused = {(c["precision"], c["gpu"]) for c in cells if not c["runs"]}
    expected = {("mxfp8", "h100")}
    expected |= {
        ("fp8_subchannel", gpu)
        for gpu in (("h100", "b200", "gb200") if stack == "nemo_25_04" else ("b200", "gb200"))
    }
    assert refused == expected
    assert all(c["why"] and c["instead"] for c in cells if not c["runs"])


def cells(capsys: pytest.CaptureFixture[str], *asked: str) -> list[dict[str, Any]]:
    """Return the rows of the matrix for a command line."""
    assert matrix(["--json", *asked]) == 0
    return list(json.loads(capsys.readouterr().out))


CHOSEN = ["model=llama3_8b", "precision=bf16", "gpu=h100"]


def test_the_matrix_shows_the_stacks_that_are_named_or_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    two, every = ["nemo_25_07", "emulated"], options("stack")
    flags = [word for stack in two for word in ("--stack", stack)]
    for asked, stacks in (
        (flags, two),
        (["stack=nemo_25_07,emulated"], two),
        (["--stack", "all"], every),
    ):
        assert [c["stack"] for c in cells(capsys, *CHOSEN, *asked)] == stacks


AXES_OF_ROWS = [
    (
        ["precision=bf16,mxfp8", "model=nemotron4_15b"],
        {("nemotron4_15b", p, g) for p in ("bf16", "mxfp8") for g in ("h100", "b200", "gb200")},
    ),
    (
        ["gpu=h200", "model=llama3_tiny,llama3_8b", "precision=bf16"],
        {(m, "bf16", "h200") for m in ("llama3_tiny", "llama3_8b")},
    ),
]


@pytest.mark.parametrize(("asked", "expected"), AXES_OF_ROWS)
def test_overrides_of_an_axis_choose_the_rows_of_the_matrix(
    asked: list[str], expected: set[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = [(c["model"], c["precision"], c["gpu"]) for c in cells(capsys, *asked)]
    assert set(found) == expected and len(found) == len(expected)


def test_a_row_tells_its_own_models_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        c["model"]: c["num_gpus"]
        for c in cells(
            capsys, "model=llama3_70b,llama31_405b", *CHOSEN[1:], "experiment=throughput"
        )
    }
    assert sizes == {"llama3_70b": 64, "llama31_405b": 1024}


def test_files_of_the_users_own_appear_in_the_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(PROJECT / "conf", conf)
    for group, name in (("model", "llama3_8b"), ("precision", "bf16"), ("gpu", "b200")):
        text = (conf / group / f"{name}.yaml").read_text()
        (conf / group / "mine.yaml").write_text(text.replace(f"name: {name}", "name: mine"))
    monkeypatch.setattr("launch.matrix.CONF", conf)
    monkeypatch.setattr(
        "launch.matrix.compose_plan", lambda overrides: compose_plan(overrides, conf)
    )
    for own in range(3):
        asked = [*CHOSEN[:own], *CHOSEN[own + 1 :]]
        found = cells(capsys, *asked)
        axis = ("model", "precision", "gpu")[own]
        assert [c["runs"] for c in found if c[axis] == "mine"] == [
            axis != "model"
        ]  # 8 B parameters on one GPU
        assert len(found) > 3


WRONG_CHOICES = [
    "model=llama9",
    "gpu=h100,h101",
    "precision=",
    "+model=llama3_8b",
    "model={a: b}",
    "model=[llama3_8b]",
    "seed=1,2",
]


@pytest.mark.parametrize("wrong", WRONG_CHOICES)
def test_what_chooses_no_cells_is_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix(["--json", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and wrong.split("=")[0] in error and error.count("\n") == 1


# The job folder


def test_the_job_folder_holds_the_code_its_commit_and_its_changes(tmp_path: Path) -> None:
    script = write_job(compose_plan([f"runs_dir={tmp_path}", "run_name=one"]))
    job = tmp_path / "one" / "job"
    assert (
        script == job / "local.sh"
        and (job / "code/recipes/training/run.py").read_text()
        == (PROJECT / "recipes/training/run.py").read_text()
    )
    assert json.loads((job / "code/code.json").read_text()) == code()
    assert (job / "code/changes.diff").exists() and not list((job / "code").rglob("*.pyc"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "one", job, script)} == {
        0o700
    }


def test_a_local_job_finds_what_the_shell_that_launched_it_found(tmp_path: Path) -> None:
    folder, seen = tmp_path / "one", tmp_path / "seen"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH" >> {seen}\n')
    python.chmod(0o700)
    script = write_job(compose_plan([f"runs_dir={tmp_path}", "run_name=one"]))
    script.write_text(script.read_text().replace(sys.executable, str(python)))
    subprocess.run(["bash", script], env={**os.environ, "PYTHONPATH": "/stack"}, check=True)
    assert set(seen.read_text().split()) == {f"{folder}/job/code:/stack"}


def test_code_outside_a_checkout_is_copied_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(tmp_path / "first")
    monkeypatch.setattr("launch.job.PROJECT", tmp_path / "first")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    snapshot(tmp_path / "second")
    names = [
        sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in {".py", ".yaml"})
        for root in sorted(tmp_path.iterdir())
    ]
    assert names[0] == names[1] and "recipes/plan.py" in names[1]
    assert json.loads((tmp_path / "second/code.json").read_text()) == code()


def test_the_copy_of_the_code_composes_a_plan_by_itself(tmp_path: Path) -> None:
    snapshot(tmp_path / "code")
    command = (
        "import recipes.compose.tree as c; print(c.__file__); c.compose_plan(['precision=mxfp8'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "code"))


def test_a_secret_of_the_environment_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    (tmp_path / "token").write_text(SECRET)
    write_job(
        compose_plan(
            [*CELL, f"runs_dir={tmp_path}/runs", f"+cluster.token_files.HF_TOKEN={tmp_path}/token"]
        )
    )
    assert main([*CELL, "dry_run=true"]) == 0
    said = capsys.readouterr()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in said.out + said.err


# Status: the run folder, Slurm and the log are read together


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_job(compose_plan([f"runs_dir={tmp_path}", "run_name=one"]))
    append_line(tmp_path / "one/metrics.jsonl", {"step": 7, "loss": 3.25})
    append_line(tmp_path / "one/job/submitted.jsonl", {"job_id": 41})
    return tmp_path / "one"


OUTCOMES = [
    ("PENDING", "new", "", ("queued", "Resources")),
    ("RUNNING", "running", "", ("running", "")),
    ("RUNNING", "new", "", ("starting", "")),
    ("COMPLETED", "done", "", ("done", "")),
    ("CANCELLED", "running", "", ("cancelled", "user")),
    ("TIMEOUT", "running", "", ("failed", "time limit")),
    ("NODE_FAIL", "running", "", ("failed", "node failed")),
    ("OUT_OF_MEMORY", "running", "", ("failed", "host memory")),
    (
        "FAILED",
        "failed",
        "0: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
        ("failed", "GPU memory"),
    ),
    ("FAILED", "failed", "3: RuntimeError: found NaN in local grad norm", ("failed", "NaN")),
    (
        "FAILED",
        "failed",
        "1: error: n3: megatron-core is 0.13, nemo_25_04 has 0.12",
        ("failed", "megatron-core is 0.13"),
    ),
    ("FAILED", "failed", "1: FloatingPointError: the loss of step 7 is nan", ("failed", "NaN")),
    (
        "FAILED",
        "running",
        "3: Timeout (0:30:00)!\n3: Thread 0x7f (most recent call first):",
        ("failed", "no step for 0:30:00 hours"),
    ),
    (
        "FAILED",
        "running",
        "OSError: [Errno 28] No space left on device",
        ("failed", "disk is full"),
    ),
    (
        "FAILED",
        "failed",
        f"CUDA out of memory\n0: {SESSION}\nSegmentation fault",
        ("failed", "log.txt"),
    ),
    (
        "FAILED",
        "new",
        "srun: error: Invalid MPI type 'pmix', --mpi=list for acceptable types",
        ("failed", "cluster.mpi"),
    ),
    (
        "FAILED",
        "new",
        "slurmstepd: error: pyxis: failed to import docker image",
        ("failed", "cluster.container_image"),
    ),
    ("FAILED", "failed", "Segmentation fault", ("failed", "log.txt")),
]


@pytest.mark.parametrize(("state", "said", "log", "expected"), OUTCOMES)
def test_status_says_what_became_of_a_run_and_why(
    state: str,
    said: str,
    log: str,
    expected: tuple[str, str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if said != "new":
        set_status(run, said)
    (run / "log.txt").write_text(log)
    standins = Standins(tmp_path / "slurm", monkeypatch)
    standins.put(41, state, f"{run}/job/job.sbatch")
    monkeypatch.setenv("REASON", "Resources" if state == "PENDING" else "None")
    assert status.main([str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == expected[0] and expected[1] in found["why"]
    assert (found["step"], found["loss"], found["job_id"], found["restarts"]) == (7, 3.25, 41, 2)


def test_status_of_a_run_on_this_machine_comes_from_its_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "job/submitted.jsonl").unlink()
    set_status(run, "failed")
    event(run, "failed", reason="RuntimeError('disk')")
    assert status.main([str(run.parent), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["why"], row["max_steps"]) == ("failed", "RuntimeError('disk')", 100)
    assert status.main([str(run / "job")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            (
                "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission"
                " failed: Invalid partition name"
            ),
            "cluster.partition",
        ),
        (
            (
                "sbatch: error: Batch job submission failed: Invalid account or account/partition"
                " combination specified"
            ),
            "cluster.account",
        ),
        (
            (
                "sbatch: error: Batch job submission failed: Requested node configuration is not"
                " available"
            ),
            "num_gpus",
        ),
        ("sbatch: unrecognized option '--segment=16'", "cluster.segment=null"),
        (
            (
                "sbatch: error: fetch_config: DNS SRV lookup failed; fatal: Could not establish a"
                " configuration source"
            ),
            "SLURM_CONF",
        ),
        ("sbatch: error: something new", "by hand"),
    ],
)
def test_what_slurm_refuses_is_one_line_with_a_remedy(said: str, remedy: str) -> None:
    line = refusal(said)
    assert remedy in line and "\n" not in line and "sbatch: " not in line
