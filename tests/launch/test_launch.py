"""The launch command: what it prints and what it refuses."""

from pathlib import Path

import pytest

from launch.__main__ import main


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precision=mxfp8", "dry_run=true", f"runs_dir={tmp_path}/runs"]) == 0
    assert '"scaling": "mxfp8"' in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "modle=x",
        "precision=fp7",
        "seed=-1",
        "gpu=h100",
        "mapping.global_batch=3",
        "mapping.tp=2",
        "model=llama3_70b",
        "num_gpus=two",
        "train.max_steps=0",
        "train.max_lr=nan",
        "data=indexed",
        "data.root=null",
        "run_name=../../etc",
        "=",
    ],
)
def test_wrong_input_is_one_line_and_code_2(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong, f"runs_dir={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_two_plans_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "train.max_steps=20,30", f"runs_dir={tmp_path}/runs"]) == 2
    assert "run_name" in capsys.readouterr().err
