"""Layouts of one recipe beside a single GPU, from the shipped runs."""

import json
import shutil
from pathlib import Path

import pytest

from analysis.speed.layouts import main

SHIPPED = Path(__file__).parents[2] / "analysis" / "results" / "layouts_h200"


def test_shipped_layouts_follow_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, sorted(SHIPPED.iterdir())), "--json"]) == 0
    rows = {(row["precision"], row["layout"]): row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 23 and rows["bf16", "1 GPU"]["largest_loss_difference"] == 0
    assert rows["bf16", "DP 2"]["largest_loss_difference"] < 0.001
    assert rows["fp8_current", "TP 2, overlap"]["fp8_gemms"] == 192


def test_wrong_runs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SHIPPED / "bf16.tp2")]) == 2
    assert "no run of bf16 on one GPU" in capsys.readouterr().err
    other = shutil.copytree(SHIPPED / "bf16.tp2", tmp_path / "other")
    plan = json.loads((other / "plan.json").read_text())
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines = [
        {**line, **{key: line[key] + 1e-6 for key in ("loss", "heldout_loss") if key in line}}
        for line in lines
    ]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other / "plan.json").write_text(json.dumps({**plan, "seed": 99}))
    assert (
        main([str(SHIPPED / "bf16.gpu1"), str(other)]) == 2
        and "one seed" in capsys.readouterr().err
    )
    (other / "plan.json").write_text(
        json.dumps({**plan, "model": {**plan["model"], "name": "nemotron4_15b"}})
    )
    assert (
        main([str(SHIPPED / "bf16.gpu1"), str(other)]) == 2
        and "model.name" in capsys.readouterr().err
    )
    again = shutil.copytree(SHIPPED / "bf16.gpu1", tmp_path / "again")
    assert (
        main([str(SHIPPED / "bf16.gpu1"), str(again)]) == 2
        and "both ran on one GPU" in capsys.readouterr().err
    )
    still = shutil.copytree(SHIPPED / "bf16.tp2", tmp_path / "still")
    lines = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "grad_norm": 0.0} if "loss" in line else line for line in lines]
    (still / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(still)]) == 2
    assert "nothing was trained" in capsys.readouterr().err
