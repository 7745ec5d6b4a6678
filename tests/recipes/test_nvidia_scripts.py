"""Do today's plans and recipes ask for what NVIDIA's performance scripts ask for, but for what is
meant?

NVIDIA_NEMO names the folder of a NeMo source tree of the installed version, whose scripts one test
executes.
"""

import os
from pathlib import Path

import pytest

from recipes.upstream.nvidia_scripts import deliberate, listed, main, reason, shipped

SCRIPT = """
import nemo_run as run
from nemo.collections.llm.recipes.llama3_8b import pretrain_recipe

recipe = pretrain_recipe(performance_mode=True)
recipe.trainer.strategy.tensor_model_parallel_size = 2
executor = run.SlurmExecutor(env_vars={"NCCL_NVLS_ENABLE": "0", "NEW_VARIABLE": "1"}, srun_args=["--mpi=pmix", "numactl $((SLURM_LOCALID/4))"])
with run.Experiment("test") as experiment:
    experiment.add(recipe, executor=executor, name="test", plugins=[])
    experiment.dryrun()
"""  # noqa: E501


def tree(folder: Path) -> Path:
    """Write a source tree with one script, of a model that this project knows."""
    files = {
        "nemo/package_info.py": "MAJOR = 2\nMINOR = 3\nPATCH = 2\n",
        "scripts/performance/__init__.py": "",
        "scripts/performance/argument_parser.py": "",
        "scripts/performance/llm/__init__.py": "",
        "scripts/performance/llm/pretrain_llama3_8b.py": SCRIPT,
        "scripts/performance/recommended_model_configs/model_configs_h100.csv": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow
def test_todays_plans_are_nvidias_but_for_what_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell of both versions of the scripts; without NeMo."""
    assert main([]) == 0, capsys.readouterr().err
    assert "115 cell(s) compared" in capsys.readouterr().out


def test_the_list_covers_the_models_gpus_and_formats_of_the_scripts() -> None:
    cells = {
        version: {tuple(cell.split(".")) for cell in found} for version, found in listed().items()
    }
    assert {version: len(found) for version, found in cells.items()} == {"2.3.2": 55, "2.4.0": 60}
    for found in cells.values():
        assert {model for model, *_ in found} == {
            "llama3_8b",
            "llama3_70b",
            "llama31_405b",
            "nemotron4_15b",
            "nemotron4_340b",
        }
        assert {gpu for *_, gpu in found} == {"h100", "b200", "gb200"}


def test_every_shipped_difference_is_meant_and_every_reason_is_used() -> None:
    reasons = {reason(difference) for difference in shipped()}
    assert reasons == {entry.name for entry in deliberate()}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model=llama3_70b", "gpu=gb200", "precision=bf16", "mapping.tp=2"],
            "trainer.strategy.tensor_model_parallel_size: NVIDIA 1, here 2",
        ),
        (
            ["model=llama3_70b", "gpu=gb200", "precision=mxfp8", "mapping.micro_batch=2"],
            "data.micro_batch_size: NVIDIA 1, here 2",
        ),
        (
            [
                "model=llama3_8b",
                "gpu=h100",
                "precision=bf16",
                "stack=nemo_25_07",
                "settings.check_gradients=true",
            ],
            "ddp.check_for_nan_in_grad: NVIDIA False, here True",
        ),
        (
            ["model=llama3_8b", "gpu=h100", "precision=bf16", "settings=convergence"],
            "trainer.plugins.grad_reduce_in_fp32: NVIDIA False, here True",
        ),
        (
            ["model=nemotron4_340b", "gpu=h100", "precision=bf16", "stack.scripts.variables=[]"],
            "environment.NVTE_NORM_FWD_USE_CUDNN: NVIDIA 1, here -",
        ),
        (
            ["model=llama3_8b", "gpu=h100", "precision=bf16", "cluster.environment.NCCL_ALGO=Ring"],
            "environment.NCCL_ALGO: NVIDIA -, here Ring",
        ),
    ],
)
def test_a_setting_that_deviates_is_named(
    overrides: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry that covers a field of a cell does not hide a value that nobody compared (MXFP8's
    layout on GB200).
    """
    assert main(overrides) == 1
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=llama3_tiny"], "no cell has these names"),
        (["--nemo", "/nowhere"], "holds no nemo/package_info.py"),
        (["--write"], "--write needs --nemo"),
        (["model=llama3_8b", "mapping.tp=3"], "llama3_8b"),
    ],
)
def test_a_wrong_input_gets_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


@pytest.mark.nemo
def test_a_tree_without_scripts_or_of_another_nemo_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo/package_info.py").write_text("MAJOR = 2\nMINOR = 3\nPATCH = 2\n")
    assert main(["--nemo", str(tmp_path)]) == 2 and "holds no scripts" in capsys.readouterr().err
    tree(tmp_path)
    (tmp_path / "nemo/package_info.py").write_text("MAJOR = 2\nMINOR = 4\nPATCH = 0\n")
    assert main(["--nemo", str(tmp_path), "precision=bf16"]) == 2
    assert "is NeMo 2.4.0 and NeMo 2.3.2 is installed" in capsys.readouterr().err


@pytest.mark.nemo
def test_a_trees_scripts_are_executed_and_what_deviates_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--nemo", str(tree(tmp_path)), "precision=bf16"]) == 1
    error = capsys.readouterr().err
    assert (
        "trainer.strategy.tensor_model_parallel_size: NVIDIA 2, here 1 (NeMo 2.3.2:"
        " llama3_8b.bf16.h100)" in error
    )
    assert (
        "environment.NEW_VARIABLE: NVIDIA 1, here -" in error
        and "environment.NVTE_FUSED_ATTN: NVIDIA -, here 1" in error
    )


@pytest.mark.skipif("NVIDIA_NEMO" not in os.environ, reason="NVIDIA_NEMO names no NeMo source tree")
def test_nvidias_own_scripts_differ_only_where_it_is_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(
            [
                "--nemo",
                os.environ["NVIDIA_NEMO"],
                "model=llama31_405b,nemotron4_15b",
                "gpu=gb200,h100",
            ]
        )
        == 0
    ), capsys.readouterr().err
