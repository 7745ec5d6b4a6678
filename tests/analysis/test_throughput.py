"""The table of real runs: what is in it can be computed by hand, what is published is found, and
what is not sound stays out with its reason.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import throughput
from analysis.runs import soundness
from analysis.runs.load import load_run
from analysis.runs.timing import MAX_SPREAD, speedup, step_time, timed
from analysis.throughput import main as command
from recipes.estimate.flops import flops_per_token
from tests.analysis.conftest import Maker, curve
from tests.analysis.test_depth import MEASURED, ON_H200, edit, named

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
SHIPPED = sorted((RESULTS / "llama3_8b_h100").iterdir())
STEPS = 20
ON_H100 = (
    "gpu=h100",
    "experiment=throughput",
    "mapping=recommended",
    "model=llama3_8b",
    "settings.precision_aware_optimizer=false",
)


def run_of(
    make: Maker,
    precision: str,
    seconds: float,
    overrides: tuple[str, ...] = ON_H100,
    noise: float = 0.002,
    **manifest: Any,
) -> Path:
    """Write a run of 20 steps; the first three are slow, as they are on a GPU."""
    folder = make(
        f"{precision}",
        curve(STEPS),
        precision,
        overrides,
        **{"device": "NVIDIA H100 80GB HBM3", **MEASURED, **manifest},
    )
    luck = np.random.default_rng(7).normal(1, noise, STEPS)
    return edit(
        folder,
        lambda i: {
            "step_time_s": seconds * luck[i] * (10 if i < 3 else 1),
            "memory_gb": 60.0 if precision == "bf16" else 64.0,
        },
    )


def test_a_row_by_hand(make: Maker) -> None:
    runs = [load_run(run_of(make, "bf16", 12.0)), load_run(run_of(make, "fp8_delayed", 9.0))]
    bf16, fp8 = throughput.rows(runs)
    median = float(np.median(runs[1].steps["step_time_s"][3:]))
    assert (fp8["step_time_s"], fp8["first_timed_step"], fp8["last_timed_step"]) == (median, 4, 20)
    rate = 128 * 8192 / median / 8
    assert fp8["tokens_per_s_per_gpu"] == pytest.approx(rate)
    assert (
        fp8["speedup_over_bf16"] == pytest.approx(step_time(runs[0]).value / median)
        and fp8["speedup_low"] < fp8["speedup_over_bf16"]
    )
    assert (bf16["pair"], fp8["pair"], fp8["base"]) == ("its own base", "iso-mapping", "bf16")
    flops = flops_per_token(runs[1].plan.model, 8192, causal=False)
    assert fp8["tflops_per_gpu"] == pytest.approx(rate * flops / 1e12)
    assert fp8["mfu"] == pytest.approx(rate * flops / 1979e12) and (bf16["peak"], fp8["peak"]) == (
        "h100 BF16 dense",
        "h100 FP8 dense",
    )
    assert (fp8["memory_gb"], fp8["memory_gb_bf16"]) == (64.0, 60.0)


def test_the_convention_of_flops_is_named_and_changes_what_it_should(make: Maker) -> None:
    runs = [load_run(run_of(make, "bf16", 12.0))]
    (full,), (causal,) = throughput.rows(runs), throughput.rows(runs, causal=True)
    assert (full["flops_convention"], causal["flops_convention"]) == (
        "full attention",
        "causal attention",
    )
    assert (
        causal["tflops_per_gpu"] < full["tflops_per_gpu"]
        and causal["tokens_per_s_per_gpu"] == full["tokens_per_s_per_gpu"]
    )


def test_the_published_figure_of_the_same_cell_and_of_no_other(make: Maker) -> None:
    """dgxc-benchmarking v25.04.01: Llama 3 8B on 8 H100s, BF16 12.27 s and FP8 (delayed) 9.33 s a
    step.
    """
    runs = [
        load_run(run_of(make, name, seconds))
        for name, seconds in (("bf16", 12.0), ("fp8_delayed", 9.33), ("fp8_current", 9.33))
    ]
    bf16, delayed, current = throughput.rows(runs)
    assert (
        bf16["published_tokens_per_s_per_gpu"] == 10682.4
        and "v25.04.01" in bf16["published_source"]
    )
    assert delayed["share_of_published"] == pytest.approx(1.0, abs=0.005)
    assert (
        current["published_tokens_per_s_per_gpu"] is None
    )  # pages give current scaling for other layouts
    others = (
        ("layout", (*ON_H100, "mapping.cp=1")),
        ("batch", (*ON_H100, "mapping.global_batch=64")),
        ("depth", (*ON_H100, "model.num_layers=30")),
    )
    for name, overrides in others:
        (row,) = throughput.rows(
            [load_run(run_of(named(make, name), "bf16", 12.0, (*overrides, "gpu.memory_gb=2000")))]
        )
        assert row["published_source"] is None, name


def test_rows_that_were_found_later_are_published_too(make: Maker) -> None:
    """dgxc-benchmarking v25.05.05: Nemotron-4 340B on 128 GB200s in BF16, 2.189 s a step; 8B on
    B200s with MXFP8, Megatron-Bridge 25.09.
    """
    layout = (
        "mapping.tp=8",
        "mapping.pp=4",
        "mapping.cp=1",
        "mapping.vp=12",
        "mapping.micro_batch=1",
        "mapping.fsdp=false",
    )
    nemotron = (
        "gpu=gb200",
        "model=nemotron4_340b",
        "experiment=throughput",
        "num_gpus=128",
        "mapping.global_batch=32",
        *layout,
    )
    (row,) = throughput.rows(
        [load_run(run_of(make, "bf16", 2.189, nemotron, device="NVIDIA GB200"))]
    )
    assert (
        row["share_of_published"] == pytest.approx(1, abs=0.005)
        and "nemotron/README.md@v25.05.05" in row["published_source"]
    )
    llama = (
        "gpu=b200",
        "model=llama3_8b",
        "experiment=throughput",
        "num_gpus=8",
        "mapping.global_batch=128",
        "mapping.micro_batch=2",
    )
    (row,) = throughput.rows([load_run(run_of(make, "mxfp8", 4.46, llama, device="NVIDIA B200"))])
    assert throughput.cells(row)["of published"] == "100%" and row["published_source"].endswith(
        "NeMo 25.09"
    )


def test_a_pair_that_differs_in_more_than_precision_is_best_mapping_and_says_in_what(
    make: Maker,
) -> None:
    base = run_of(make, "bf16", 12.0)
    aware = run_of(make, "fp8_current", 9.0, (*ON_H100[:-1], "mapping.cp=1", "gpu.memory_gb=2000"))
    row = throughput.rows([load_run(base), load_run(aware)])[1]
    assert row["pair"].startswith("best-mapping (") and "mapping.cp 2 → 1" in row["pair"]
    assert any(
        "mapping.cp 2 → 1" in note and "fp8_current" in note
        for note in throughput.table([base, aware]).notes
    )


def test_a_run_is_compared_with_the_bf16_of_its_own_experiment_alone(make: Maker) -> None:
    base, fp8 = run_of(make, "bf16", 12.0), run_of(make, "fp8_current", 9.0)
    other = run_of(named(make, "shallow"), "bf16", 3.0, (*ON_H100, "model.num_layers=4"))
    rows = {
        row["run"]: row for row in throughput.rows([load_run(path) for path in (other, base, fp8)])
    }
    assert rows["fp8_current"]["base"] == "bf16"
    (alone,) = throughput.rows([load_run(fp8)])
    assert (
        alone["base"] is None
        and alone["speedup_over_bf16"] is None
        and "no BF16 run" in alone["pair"]
    )


def test_another_batch_is_compared_by_tokens(make: Maker) -> None:
    base, fp8 = (
        run_of(make, "bf16", 12.0),
        run_of(make, "fp8_current", 4.5, (*ON_H100, "mapping.global_batch=64")),
    )
    row = throughput.rows([load_run(base), load_run(fp8)])[1]
    assert (
        row["speedup_over_bf16"] == pytest.approx(12 / 9, rel=0.01)
        and "mapping.global_batch 128 → 64" in row["pair"]
    )


def unsound(make: Maker) -> dict[str, Path]:
    """Return a run for each reason to leave one out, by a word of the reason."""
    emulated = {"device": "NVIDIA H200", "labels": {"loss": "emulated", "step_time": "measured"}}
    found = {
        "unstable": run_of(named(make, "1"), "bf16", 12.0, noise=0.06),
        "it ran on a CPU": make("cpu", curve(STEPS), "bf16"),
        "emulated": run_of(
            named(make, "2"), "fp8_subchannel", 12.0, (*ON_H200, "mapping=single"), **emulated
        ),
        "FP8 GEMMs where": edit(
            run_of(named(make, "3"), "fp8_current", 9.0), lambda i: {"fp8_gemms": 1}
        ),
        "diverged": edit(
            run_of(named(make, "4"), "fp8_current", 9.0),
            lambda i: {"loss": float("nan") if i == 9 else 2.0},
        ),
    }
    short = edit(
        make("5.bf16", curve(9), "bf16", ON_H100, **MEASURED), lambda i: {"step_time_s": 12.0}
    )
    return {**found, "steps after the warm-up": short, "is no run folder": short.parent / "nowhere"}


def test_what_is_not_sound_is_left_out_with_the_reason(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = unsound(make)
    for reason, folder in bad.items():
        runs, left_out = soundness.sound([folder])
        assert runs == [] and len(left_out) == 1 and reason in left_out[0], (reason, left_out)
    good = run_of(make, "bf16", 12.0)
    assert command([str(good), *map(str, bad.values()), "--json"]) == 0
    said = capsys.readouterr()
    assert [row["run"] for row in json.loads(said.out)] == ["bf16"]
    assert said.err.count("Left out: ") == len(bad)
    assert command([str(path) for path in bad.values()]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: none of the runs")
        and error.count("\n") == 1
        and all(reason in error for reason in bad)
    )


@pytest.mark.parametrize(
    "pace",
    [lambda i: 1.6 if i > 6 else 1.0, lambda i: 1 + 0.08 * i / 8, lambda i: 1 - 0.08 * i / 8],
)
def test_a_run_whose_pace_changes_is_left_out(pace: Any, tmp_path: Path) -> None:
    """The last two of nine timed steps slower, and a steady change of 8 %: the quartiles of both
    lie close enough.
    """
    folder = tmp_path / "run"
    shutil.copytree(next(RESULTS.glob("llama3_8b_h200/*bf16*gbs8")), folder)
    assert len(timed(load_run(folder))) == 9 and soundness.unsound(load_run(folder)) is None
    second = (
        float(np.median(timed(load_run(folder)))) * 0.85
    )  # short enough for what the events have from start to end
    edit(folder, lambda i: {"step_time_s": second * pace(i - 3), "optimizer_time_s": 0.1})
    low, median, high = np.percentile(timed(load_run(folder)), [25, 50, 75])
    assert (high - low) / median <= MAX_SPREAD
    assert "the last third of its timed steps" in str(soundness.unsound(load_run(folder)))


def test_a_folder_named_twice_is_one_run(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(make, "bf16", 12.0)
    assert command([str(folder), str(folder / ".." / folder.name), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_the_spread_that_is_allowed_is_stated_and_holds(make: Maker) -> None:
    steps = load_run(run_of(make, "bf16", 12.0))
    folder = named(make, "edge")
    for share, kept in (
        (0.049, True),
        (0.051, False),
    ):  # quartiles so far apart, as a share of the median
        path = edit(
            run_of(named(folder, str(share)), "bf16", 12.0),
            lambda i, share=share: {"step_time_s": 12 + 12 * share * ((i % 4) - 1.5) / 2},
        )
        run = load_run(path)
        low, median, high = np.percentile(timed(run), [25, 50, 75])
        assert (soundness.unsound(run) is None) == kept == ((high - low) / median <= MAX_SPREAD)
    assert "5%" in throughput.notes(throughput.rows([steps]), [])[0]


def test_the_shipped_runs_make_a_table_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("csv", "md", "html"):
        assert command([*map(str, SHIPPED), "--out", str(tmp_path / f"t.{suffix}")]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("Step time measured") == 3
    )  # CSV holds values alone, so its notes are printed
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert (
        len(rows) == len(SHIPPED)
        and {row["label"] for row in rows} == {"measured"}
        and all(row["commit"] for row in rows)
    )
    runs = {run.name: run for run in map(load_run, SHIPPED)}
    for row in rows:
        if row["precision"] != "bf16":
            assert float(row["speedup_over_bf16"]) == pytest.approx(
                speedup(runs[row["base"]], runs[row["run"]]).value
            )
            assert (
                row["pair"] == "iso-mapping"
                and "settings.precision_aware_optimizer True → False" in row["also_differs"]
            )
    assert "iso-mapping, other settings" in (tmp_path / "t.md").read_text()
    for text in (printed, (tmp_path / "t.md").read_text(), (tmp_path / "t.html").read_text()):
        assert "(2 of" in text and "full attention" in text and "989" in text and "1979" in text
    assert command([str(SHIPPED[0]), "--out", str(tmp_path / "t.txt")]) == 2
    assert "suffixes" in capsys.readouterr().err


def test_text_of_a_run_is_no_markup(make: Maker, tmp_path: Path) -> None:
    run = run_of(make, "bf16", 12.0, device="NVIDIA H100 <script>alert(1)</script> | x")
    made = throughput.table([run])
    assert "<script>" not in made.html() and "<script>" not in made.markdown()
    assert all(
        line.count("|") - line.count("\\|") == len(made.columns) + 1
        for line in made.markdown().splitlines()
        if line.startswith("|")
    )
