"""What is made of measurements: lines over depth, GEMM speedups, diagnostics; and that the shipped
ones can be traced.
"""

import json
from pathlib import Path

import pytest

from analysis.convergence import numerics, numerics_figures
from analysis.report import main as report
from analysis.runs.load import load_all, load_run
from analysis.runs.measurements import device
from analysis.speed import depth, gemm
from recipes.errors import InputError
from tests.analysis.conftest import Maker, curve

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
RUNS = sorted(path.parent for path in RESULTS.rglob("plan.json"))


def with_step_time(folder: Path, seconds: float) -> Path:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps({**row, "step_time_s": seconds} if "loss" in row else row) + "\n"
            for row in rows
        )
    )
    return folder


def test_a_line_over_depth_gives_back_what_was_planted(make: Maker) -> None:
    runs = []
    for precision, layer in (("bf16", 0.04), ("fp8_current", 0.03)):
        for layers in (2, 3, 4):
            keep = () if precision == "bf16" else ("precision.fp8.first_layers_bf16=0",)
            folder = make(
                f"{precision}.{layers}", curve(40), precision, (f"model.num_layers={layers}", *keep)
            )
            runs.append(load_run(with_step_time(folder, 0.1 + layer * layers)))
    lines = depth.fit(runs)
    assert [line.precision for line in lines] == ["bf16", "fp8_current"]
    assert (lines[0].per_layer_s, lines[0].fixed_s, lines[0].residual_s) == pytest.approx(
        (0.04, 0.1, 0.0), abs=1e-9
    )
    assert depth.rows(lines)[1]["speedup_per_layer"] == pytest.approx(4 / 3, abs=1e-3)
    assert depth.fit(runs[:1]) == []


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_every_shipped_run_is_sound_and_can_be_traced(folder: Path) -> None:
    run = load_run(folder)
    assert (
        run.manifest["code"]["commit"]
        and run.manifest["device"]
        and run.label("step_time") == "measured"
    )
    assert run.label("loss") == ("emulated" if run.plan.emulated else "measured")
    assert (
        sum(path.stat().st_size for path in folder.rglob("*")) < 1_000_000
    )  # 900 steps, and operands looked at 19 times


def test_the_demos_runs_are_six_and_comparable() -> None:
    runs, left_out = load_all(sorted((RESULTS / "demo").iterdir()))
    assert (
        len(runs) == 6 and not left_out and len({run.manifest["order_sha256"] for run in runs}) == 1
    )


@pytest.mark.slow
def test_the_report_on_the_shipped_runs_shows_what_the_notebooks_show(tmp_path: Path) -> None:
    assert (
        report(
            [
                *map(str, sorted((RESULTS / "demo").iterdir())),
                "--out",
                str(tmp_path / "r.html"),
                "--png",
                str(tmp_path),
            ]
        )
        == 0
    )
    names = {"loss", "gap", "heldout", "step_time", "sqnr", "underflow", "saturation"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert (tmp_path / "r.html").read_text().count("<figcaption>") == len(names)


def test_gemm_speedups_are_those_of_the_rows() -> None:
    table = gemm.load(RESULTS / "gemm_h100")
    wide = gemm.speedups(table)
    rows = table[(table["granularity"] == "tensor") & (table["accumulation"] == "fast")]
    assert wide.loc[("tensor", "fast")].tolist() == pytest.approx(
        rows["speedup_over_bf16"].round(2).tolist()
    )
    assert (table["label"] == "measured").all() and "H100" in device(RESULTS / "gemm_h100")


def test_a_folder_without_measurements_or_without_a_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no gemm\.jsonl"):
        gemm.load(tmp_path)
    (tmp_path / "gemm.jsonl").write_text(json.dumps({"k": 1}) + "\n")
    with pytest.raises(InputError, match="measure it again"):
        gemm.load(tmp_path)
    with pytest.raises(InputError, match="cannot be traced"):
        device(tmp_path)


def test_diagnostics_name_layers_linears_and_roles() -> None:
    table = numerics.load(load_run(RESULTS / "demo/llama3_tiny.mxfp8.cpu.seed1"))
    assert set(table["linear"]) == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert set(table["layer"]) == {0, 1, 2, 3} and set(table["role"]) == set(numerics.ROLES)
    found = numerics.summary(table)
    assert len(found) == 3 and (found["sqnr_db"] > 20).all()
    by_layer = numerics.by_layer(
        numerics.after_first(table), "underflow"
    )  # each layer has as many linears: their mean is that of all
    assert by_layer.groupby("role")["underflow"].mean().tolist() == pytest.approx(
        found["underflow"].tolist()
    )


def test_runs_without_diagnostics_are_one_line_and_no_figure(make: Maker) -> None:
    run = load_run(make("bf16", curve(40), "bf16"))
    with pytest.raises(InputError, match=r"no fp8\.jsonl"):
        numerics.load(run)
    with pytest.raises(InputError, match="none of the runs"):
        numerics.load_all([run])
    assert numerics_figures.figures([run]) == []
    (run.folder / "fp8.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(InputError, match="not what this version writes"):
        numerics.load(run)
