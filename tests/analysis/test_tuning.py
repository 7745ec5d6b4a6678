"""The tuning table: a change is named, and called faster only where its interval says so."""

from pathlib import Path

import numpy as np
import pytest

from analysis import tuning
from analysis.tuning import main as command
from tests.analysis.conftest import Maker, curve
from tests.analysis.test_depth import MEASURED, edit
from tests.analysis.test_throughput import ON_H100, STEPS


def run_of(
    make: Maker, name: str, share: float, *overrides: str, precision: str = "fp8_current"
) -> Path:
    """Write a run whose steps take a share of the 12 s that 8 H100s take in BF16."""
    folder = make(
        name,
        curve(STEPS),
        precision,
        (*ON_H100, *overrides),
        **{"device": "NVIDIA H100 80GB HBM3", **MEASURED},
    )
    luck = np.random.default_rng(len(name)).normal(1, 0.002, STEPS)
    return edit(
        folder,
        lambda i: {"step_time_s": 12 * share * luck[i], "optimizer_time_s": 0.1, "memory_gb": 60.0},
    )


def test_what_differs_is_named_and_judged_by_its_interval(make: Maker) -> None:
    base = run_of(make, "base", 1.0)
    faster = run_of(make, "margin", 0.9, "+cluster.environment.NVTE_FWD_LAYERNORM_SM_MARGIN=0")
    slower = run_of(make, "params", 1.1, "precision.fp8.param_gather=false")
    same = run_of(
        make, "graphs", 1.0, "mapping.cuda_graphs=true", "settings.count_zero_gradients=false"
    )
    found = tuning.table([base, faster, slower, same])
    judged = {line["change"]: line["is"] for line in found.shown}
    assert judged == {
        "base": "–",
        "NVTE_FWD_LAYERNORM_SM_MARGIN=0": "faster",
        "precision.fp8.param_gather True → False": "slower",
        "mapping.cuda_graphs False → True, settings.count_zero_gradients True → False": (
            "no difference"
        ),
    }
    assert (
        found.rows[1]["speedup_over_base"] == pytest.approx(1 / 0.9, rel=0.005)
        and found.rows[1]["optimizer_time_s"] == 0.1
    )


def test_each_precision_has_its_own_base(make: Maker) -> None:
    runs = [
        run_of(make, "a", 1.0),
        run_of(make, "b", 2.0, precision="bf16"),
        run_of(make, "c", 2.0, "mapping.cuda_graphs=true", precision="bf16"),
    ]
    assert [line["precision"] for line in tuning.table(runs).shown] == [
        "fp8_current",
        "bf16",
        "bf16",
    ]
    assert tuning.table(runs).shown[2]["is"] == "no difference"


def test_a_run_alone_is_refused_in_one_line(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command([str(run_of(make, "a", 1.0)), str(run_of(make, "b", 1.0, precision="bf16"))]) == 2
    )
    assert capsys.readouterr().err.startswith("error: no two runs of one precision")


def test_runs_that_do_other_work_are_no_changes_of_one_another(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command(
            [str(run_of(make, "a", 1.0)), str(run_of(make, "deeper", 2.0, "model.num_layers=4"))]
        )
        == 2
    )
    assert "the same work a step" in capsys.readouterr().err
