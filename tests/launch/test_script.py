"""The text of jobs: golden scripts, quoting, containers and nodes; shellcheck reads every legal
cell's script.
"""

import difflib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.matrix import GPUS, MODELS, PRECISIONS, cell
from launch.script import image, nodes, render, segment, srun_flags, tasks_per_node
from recipes.compose.tree import compose_plan

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = {
    "llama3_8b.fp8_current.h100": [
        "model=llama3_8b",
        "precision=fp8_current",
        "gpu=h100",
        "cluster.account=research",
        "cluster.vboost=true",
    ],
    "llama31_405b.fp8_delayed.gb200": [
        "model=llama31_405b",
        "precision=fp8_delayed",
        "gpu=gb200",
        "experiment=throughput",
        "mapping=iso",
    ],
    "nemotron4_15b.bf16.b200": [
        "model=nemotron4_15b",
        "gpu=b200",
        "experiment=throughput",
        "cluster.container_runtime=none",
        "cluster.gpus_flag=gres",
        "executor.max_restarts=0",
        "+cluster.token_files.HF_TOKEN=/home/me/.hf",
        "+cluster.environment.NCCL_DEBUG=INFO",
    ],
}
# What a shell would run or expand if it were not quoted.
HOSTILE = "$(touch /tmp/owned); `id` 'x' \"y\" & | > < * ? # \\ ~ !"


@pytest.fixture(autouse=True)
def in_a_fixed_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts hold the working folder's path."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/project"))
    monkeypatch.setattr(
        Path, "absolute", lambda self: self if self.is_absolute() else Path("/project") / self
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    file, found = GOLDEN / f"{name}.sbatch", render(compose_plan(SCRIPTS[name]))
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
    expected = file.read_text() if file.exists() else ""
    assert found == expected, "\n".join(
        difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(file), "now", lineterm="", n=0
        )
    )


def checked(script: str) -> str:
    """Return what shellcheck has to say of a script, warnings and worse."""
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [str(shellcheck), "--severity=warning", "-"], input=script, capture_output=True, text=True
    )
    return done.stdout


def test_shellcheck_accepts_the_script_of_every_legal_cell() -> None:
    scripts = {}
    for model in MODELS:
        for precision in PRECISIONS:
            for gpu in GPUS:
                axes = [
                    f"model={model}",
                    f"precision={precision}",
                    f"gpu={gpu}",
                    "experiment=throughput",
                ]
                if cell("nemo_25_04", model, precision, gpu, ["experiment=throughput"])["runs"]:
                    scripts[model, precision, gpu] = render(compose_plan(axes))
    assert len(scripts) == 55
    assert {name: said for name, script in scripts.items() if (said := checked(script))} == {}
    assert checked(render(compose_plan(["num_gpus=2"]))) == ""


def test_values_with_shell_metacharacters_reach_the_job_as_text(tmp_path: Path) -> None:
    overrides = [
        "model=llama3_8b",
        "gpu=h100",
        "cluster.container_runtime=none",
        "cluster.mpi=null",
        "executor.time_limit='60'",
    ]
    plan = compose_plan(overrides)
    cluster = plan.cluster.model_copy(
        update={
            "environment": {"TEXT": HOSTILE},
            "extra_srun": (HOSTILE,),
            "account": HOSTILE,
            "python": HOSTILE,
        }
    )
    script = render(
        plan.model_copy(
            update={"cluster": cluster, "runs_dir": str(tmp_path / HOSTILE.replace("/", "_"))}
        )
    )
    assert checked(script) == ""
    exports = next(line for line in script.splitlines() if line.startswith("export TEXT="))
    assert shlex.split(exports, comments=True) == ["export", f"TEXT={HOSTILE}"]
    done = subprocess.run(
        ["bash", "-c", f'{exports}\nprintf %s "$TEXT"'], capture_output=True, text=True, check=True
    )
    assert done.stdout == HOSTILE
    account = next(line for line in script.splitlines() if "--account" in line)
    assert shlex.split(account.removeprefix("#SBATCH "), comments=True) == [f"--account={HOSTILE}"]
    steps = script[script.index("step=(") : script.index("# --- Train")]
    done = subprocess.run(
        ["bash", "-c", steps + '\nprintf "%s\\n" "${step[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert HOSTILE in done.stdout and not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    "wrong", ["cluster.account='a\nb'", 'executor.time_limit="1; rm -rf /"', "run_name='a b'"]
)
def test_values_that_could_break_a_line_are_refused(wrong: str) -> None:
    from recipes.errors import InputError

    with pytest.raises(InputError):
        compose_plan([wrong])


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "expected"),
    [
        ("h100", 64, (8, 8, None)),
        ("gb200", 64, (16, 4, None)),
        ("gb200", 128, (32, 4, 16)),
        ("b200", 4, (1, 4, None)),
    ],
)
def test_nodes_tasks_and_segments(
    gpu: str, num_gpus: int, expected: tuple[int, int, int | None]
) -> None:
    plan = compose_plan(
        [
            "model=llama3_8b",
            f"gpu={gpu}",
            f"num_gpus={num_gpus}",
            "mapping.global_batch=512",
            "experiment=throughput",
        ]
    )
    assert (nodes(plan), tasks_per_node(plan), segment(plan)) == expected


def test_ranks_are_bound_to_the_processor_beside_their_gpu() -> None:
    """NeMo 25.04 divides by 4 everywhere, which puts all four ranks of a GB200 node on its first
    processor.
    """
    divisors = {
        gpu: render(compose_plan(["model=llama3_8b", f"gpu={gpu}", "experiment=throughput"]))
        for gpu in ("h100", "gb200")
    }
    assert "SLURM_LOCALID / 4" in divisors["h100"] and "SLURM_LOCALID / 2" in divisors["gb200"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("null", "nvcr.io#nvidia/nemo:25.04"),
        ("/images/nemo.sqsh", "/images/nemo.sqsh"),
        ("registry.site/nemo:1", "registry.site#nemo:1"),
        ("nemo", "nemo"),
    ],
)
def test_images_are_named_as_pyxis_takes_them(given: str, expected: str) -> None:
    assert (
        image(compose_plan(["model=llama3_8b", "gpu=h100", f"cluster.container_image={given}"]))
        == expected
    )


def test_every_variable_of_the_job_outlives_the_container() -> None:
    plan = compose_plan(
        [
            "model=llama3_70b",
            "gpu=h100",
            "+cluster.token_files.HF_TOKEN=/f",
            "+cluster.environment.NCCL_DEBUG=INFO",
        ]
    )
    kept = (
        next(flag for flag in srun_flags(plan) if flag.startswith("--container-env="))
        .partition("=")[2]
        .split(",")
    )
    assert {"HF_TOKEN", "NCCL_DEBUG", "CUDA_DEVICE_MAX_CONNECTIONS"} <= set(
        kept
    ) and "PYTHONPATH" not in kept
