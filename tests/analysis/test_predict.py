"""The command: what it prints and writes, how it sweeps and searches, and that wrong input is one
line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.predict import main
from analysis.predictor.figures import stacked
from analysis.predictor.forecast import compose, compose_any_layout, forecast
from analysis.predictor.model.step import TERMS
from analysis.predictor.search import candidates, search
from recipes.compose.fit import fits
from recipes.compose.layout_rules import MAPPING_RULES
from recipes.compose.rules import check

CELL = ["model=llama3_70b", "precision=fp8_current", "gpu=h100"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, object]]:
    assert main([*argv, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_json_of_one_plan(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed(capsys, *CELL)
    assert row["label"] == "predicted" and row["settings"] == "throughput"
    terms = row["terms_s"]
    assert isinstance(terms, dict) and sum(terms.values()) == pytest.approx(row["step_time_s"])
    assert row["step_time_low_s"] < row["step_time_s"] < row["step_time_high_s"]  # type: ignore[operator]
    rate = 128 * 8192 / 64 / float(str(row["step_time_s"]))
    assert row["tokens_per_s_per_gpu"] == pytest.approx(rate)
    assert (
        row["flops_convention"] == "full attention"
        and row["peak"] == "h100 FP8 dense"
        and row["peak_tflops"] == 1979
    )
    assert row["speedup_over_bf16_low"] < row["speedup_over_bf16"] < row["speedup_over_bf16_high"]  # type: ignore[operator]
    (causal,) = printed(capsys, *CELL, "--causal")
    assert (
        causal["tflops_per_gpu"] < row["tflops_per_gpu"]
        and causal["step_time_s"] == row["step_time_s"]
    )  # type: ignore[operator]


def test_an_architecture_that_no_row_has_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """And it costs: Gemma 2's scores go through memory, a window leaves fewer of them."""
    eight = ["gpu=b200", "precision=bf16", "num_gpus=8", "mapping.tp=2", "mapping.global_batch=64"]
    (gemma,), (mistral,), (llama,) = (
        printed(capsys, f"model={name}", *eight)
        for name in ("gemma2_9b", "mistral_7b", "llama3_8b")
    )
    assert "none of them has attention with a softcap, norms behind attention and MLP" in str(
        gemma["interval"]
    )
    assert "a sliding window" in str(mistral["interval"]) and "none of them" not in str(
        llama["interval"]
    )
    plan = compose(["model=mistral_7b", *eight])
    whole = plan.model_copy(
        update={"model": plan.model.model_copy(update={"sliding_window": None})}
    )
    attention = [forecast(p).prediction.terms["attention"] for p in (plan, whole)]
    assert attention[0] == pytest.approx(
        0.75 * attention[1]
    )  # 4096 - 4096^2 / (2 x 8192) keys, of 4096


def test_both_speedups_are_named_and_differ_where_layouts_do() -> None:
    """70B on H100: FP8 is recommended in another layout than BF16; 8B in the same."""
    large, small = (
        forecast(compose(overrides), overrides)
        for overrides in (CELL, ["model=llama3_8b", *CELL[1:]])
    )
    assert (
        large.iso
        and large.best
        and large.iso.plan.mapping == large.plan.mapping != large.best.plan.mapping
    )
    assert (
        large.iso.plan.precision.fp8 is None and large.iso.plan.settings == large.best.plan.settings
    )
    assert (
        large.speedup_iso
        and large.speedup_best
        and large.speedup_iso.value != large.speedup_best.value
    )
    assert (
        small.speedup_iso
        and small.speedup_best
        and small.speedup_iso.value == pytest.approx(small.speedup_best.value)
    )
    base = forecast(compose(["model=llama3_8b", "gpu=h100"]))
    assert base.iso is base.best is base.speedup_iso is None


@pytest.mark.parametrize("scale", ["num_gpus=256", "mapping.global_batch=1024"])
def test_the_best_mapping_is_at_the_scale_that_was_chosen(scale: str) -> None:
    overrides = ["model=nemotron4_340b", "precision=mxfp8", "gpu=b200", scale]
    found = forecast(compose(overrides), overrides)
    assert found.best and found.best.plan.num_gpus == found.plan.num_gpus
    assert found.best.plan.mapping.global_batch == found.plan.mapping.global_batch
    assert found.speedup_best and found.speedup_best.value > 1


def test_text_names_error_memory_and_terms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CELL) == 0
    text = capsys.readouterr().out
    assert all(
        word in text
        for word in (
            "predicted",
            "iso-mapping",
            "best-mapping",
            "GEMMs of the linear layers",
            "fits",
            "--validate",
        )
    )
    assert text.count(
        "interval of fp8_delayed's pairs"
    ) == 2 and "90% of 102 published rows of its generation (with h100)" in " ".join(text.split())


def test_a_sweep_has_a_row_for_each_point_and_reasons_for_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = printed(
        capsys, *CELL, "--sweep", "mapping.micro_batch=1,2", "--sweep", "seq_length=4096,8192"
    )
    assert [(row["mapping"]["micro_batch"], row["seq_length"]) for row in rows] == [
        (1, 4096),
        (1, 8192),
        (2, 4096),
    ]  # type: ignore[index]
    assert main([*CELL, "--sweep", "mapping.micro_batch=1,3"]) == 0
    assert "mapping.micro_batch=3: refused" in capsys.readouterr().out


def test_weak_scaling_grows_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, *CELL, "--sweep", "num_gpus=64,128,1024", "--weak")
    assert [row["mapping"]["global_batch"] for row in rows] == [128, 256, 2048]  # type: ignore[index]
    times = [float(str(row["step_time_s"])) for row in rows]
    assert times == sorted(times) and times[-1] < 1.1 * times[0]


def test_search_finds_layouts_that_run_and_none_is_faster() -> None:
    plan = compose_any_layout(
        ["model=llama3_8b", "gpu=h100", "precision=fp8_delayed", "num_gpus=8"]
    )
    found = search(plan, 5)
    times = [prediction.step_time_s for _, prediction in found]
    assert len(found) == 5 and times == sorted(times)
    for candidate, _ in found:
        assert (
            fits(candidate)
            and check(candidate)
            and not any(rule(candidate) for rule in MAPPING_RULES)
        )
        assert (candidate.num_gpus, candidate.mapping.global_batch) == (
            plan.num_gpus,
            plan.mapping.global_batch,
        )
    asked = forecast(plan).prediction.step_time_s
    assert times[0] <= asked
    assert (
        len({(c.mapping.tp, c.mapping.pp, c.mapping.cp, c.mapping.fsdp) for c in candidates(plan)})
        > 10
    )


def test_a_search_does_not_need_the_asked_layout_to_be_possible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(
            [
                "model=llama3_70b",
                "gpu=h100",
                "num_gpus=48",
                "mapping.global_batch=48",
                "--search",
                "2",
            ]
        )
        == 0
    )
    assert "As asked: refused" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["html", "png", "csv", "md"])
def test_written_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "made" / f"prediction.{suffix}"
    assert main([*CELL, "--out", str(path)]) == 0
    content = path.read_bytes()
    assert b"<h2></h2>" not in content and b"## \n" not in content
    assert {"html": b"<svg", "png": b"PNG", "csv": b"terms_s.gemm", "md": b"| step time |"}[
        suffix
    ] in content


def test_the_figure_says_that_it_is_predicted_and_names_every_term_that_it_draws() -> None:
    terms = dict.fromkeys(TERMS, 0.0) | {"gemm": 1.0, "stragglers": 0.0001}
    figure = stacked("Llama", [("bf16", terms)])
    legend = figure.drawing.axes[0].get_legend()
    assert figure.title == "Llama (predicted)" and legend
    assert [text.get_text() for text in legend.get_texts()] == [TERMS["gemm"], TERMS["stragglers"]]


WRONG = [
    (["model=llama3_8b"], "no GPU is named"),
    (["gpu=cpu"], "gpu=cpu emulates"),
    (["gpu=h100", "model=nope"], "no such option"),
    (["gpu=h100", "precision=mxfp8", "model=llama3_8b"], "compute capability"),
    (
        [
            "gpu=h100",
            "model=llama31_405b",
            "num_gpus=128",
            "mapping.global_batch=128",
            "mapping.pp=1",
            "mapping.vp=1",
        ],
        "needs about",
    ),
    ([*CELL, "--sweep", "mapping.tp"], "no values"),
    ([*CELL, "--sweep", "mapping.tp=3,5"], "no point of the sweep can run"),
    ([*CELL, "--sweep", "num_gpus=a,b", "--weak"], "no whole number"),
    ([*CELL, "--weak"], "--weak"),
    (
        ["gpu=h100", "model=llama3_8b,llama3_70b"],
        "several values make a sweep; write --sweep model=llama3_8b,llama3_70b\n",
    ),
    ([*CELL, "--search", "0"], "1 or more"),
    ([*CELL, "--validate"], "no overrides"),
    ([*CELL, "--out", "made.gif"], ".csv, .md, .html"),
    ([*CELL, "--out", "/dev/null/made.html"], "cannot be written"),
    (["gpu=h100", "model=llama31_405b", "num_gpus=8", "--search"], "fits in memory with a margin"),
]


@pytest.mark.parametrize(("argv", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_wrong_input_is_one_line(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, analysis.predict; sys.exit(bool({'torch', 'nemo', 'transformer_engine'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


def test_a_stack_without_a_container_is_predicted_too() -> None:
    """Nothing is launched, so where the stack is installed has no bearing."""
    plan = compose(
        ["model=llama3_8b", "gpu=h200", "precision=fp8_subchannel", "stack=nemo_25_04_te_2_11"]
    )
    assert plan.stack.container is None and forecast(plan).step_time.value > 0


def test_a_batch_that_no_layout_divides_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama3_8b", "gpu=h100", "num_gpus=7", "--search"]) == 2
    assert (
        capsys.readouterr().err
        == "error: no layout of llama3_8b divides 7 GPUs and 128 sequences; change num_gpus or"
        " mapping.global_batch\n"
    )


CELL405 = ["model=llama31_405b", "precision=fp8_delayed", "gpu=h100"]
ODD = [
    ["model=llama3_tiny", "gpu=b200", "precision=mxfp8", "num_gpus=8"],
    [
        *CELL405,
        "num_gpus=1024",
        "mapping.global_batch=512",
        "mapping.tp=8",
        "mapping.pp=16",
        "mapping.vp=1",
        "mapping.cp=2",
    ],
    [
        "model=llama3_8b",
        "gpu=b200",
        "precision=mxfp8",
        "mapping.micro_batch=8",
        "mapping.cp=2",
        "mapping.tp=4",
    ],
    ["model=llama3_70b", "gpu=gb200", "precision=fp8_current"],
    ["model=llama3_8b", "gpu=gb300", "precision=mxfp8"],
    ["model=llama3_8b", "gpu=h100", "precision=fp8_current", "model.num_layers=1"],
    ["model=llama3_8b", "gpu=h100", "precision=fp8_current", "seq_length=128"],
    ["model=llama3_8b", "gpu=h100", "precision=fp8_current", "settings=convergence"],
    [
        "model=llama3_8b",
        "gpu=gb200",
        "precision=mxfp8",
        "num_gpus=144",
        "mapping.global_batch=288",
        "mapping.tp=8",
    ],
    ["experiment=fig2", "precision=fp8_current"],
]


@pytest.mark.parametrize("overrides", ODD, ids=" ".join)
def test_odd_plans_add_up_and_have_an_interval(overrides: list[str]) -> None:
    found = forecast(compose(overrides), overrides)
    assert min(found.prediction.terms.values()) >= 0
    assert sum(found.prediction.terms.values()) == pytest.approx(found.step_time.value)
    for interval in (found.step_time, found.speedup_iso):
        assert interval and 0 < interval.low < interval.value < interval.high < 4 * interval.value
