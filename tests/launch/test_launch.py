"""The launch command: what it prints, what it refuses, and one real run of each kind through NeMo."""

import json
from pathlib import Path

import pytest

from launch.__main__ import main
from recipes.run_folder import rows_of

SHORT = ["train.max_steps=4", "train.warmup_steps=1", "train.eval_interval=2", "train.eval_batches=1", "train.checkpoint_interval=2"]


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precision=mxfp8", "dry_run=true", f"runs_dir={tmp_path}/runs"]) == 0
    assert '"scaling": "mxfp8"' in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", ["modle=x", "precision=fp7", "seed=-1", "gpu=h100", "mapping.global_batch=3"])
def test_wrong_input_is_one_line_and_code_2(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong, f"runs_dir={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_two_plans_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "train.max_steps=20,30", f"runs_dir={tmp_path}/runs"]) == 2
    assert "run_name" in capsys.readouterr().err


@pytest.mark.nemo
@pytest.mark.parametrize("precision", ["bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8"])
def test_a_paused_run_continues_to_the_losses_of_an_unbroken_one(precision: str, tmp_path: Path) -> None:
    base = [*SHORT, f"precision={precision}", "executor.max_parallel=2"]
    assert main([*base, f"runs_dir={tmp_path}/whole"]) == 0
    assert main([*base, f"runs_dir={tmp_path}/cut", "train.stop_after=2"]) == 0
    assert main([*base, f"runs_dir={tmp_path}/cut"]) == 0
    whole, cut = (rows_of(next((tmp_path / kind).iterdir()) / "metrics.jsonl") for kind in ("whole", "cut"))
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in rows if "loss" in r] for rows in (whole, cut)]
    assert [step for step, *_ in losses[1]] == [1, 2, 3, 4]
    assert losses[0] == losses[1]
    evidence = json.loads((next((tmp_path / "whole").iterdir()) / "fp8.json").read_text())
    assert bool(evidence) == (precision != "bf16")
    assert all(calls == {"fprop": 8, "dgrad": 8, "wgrad": 8} for calls in evidence.values())
