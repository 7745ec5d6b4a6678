"""The GEMM measurement: which shapes, what a layer's training adds up to, and that it refuses a
machine without a GPU.

What needs a GPU is in tests/gpu/test_gemm.py.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.speed import gemm as analysis
from recipes.compose.tree import CONF, compose_plan
from recipes.errors import InputError
from recipes.estimate.sizes import Shape, layer_parameters, linear_layers, training_gemms
from recipes.gemm_rows import (
    BLOCKS,
    OPERANDS,
    ROLES,
    TE_ACCUMULATION,
    TILES,
    Cast,
    Gemm,
    layer_rows,
)
from recipes.measure.gemm import MODELS, main, relabelled, shapes, summary
from recipes.measure.gpu.gemm import bytes_of_cast, channel_cast, kinds

LAYER = Shape("toy linear_fc1", 256, 512, 128, "toy", "linear_fc1")
SECONDS = {"bf16": 6.0, "fast": 2.0, "precise": 3.0}


def _gemms() -> list[Gemm]:
    """BF16 takes 6 s a GEMM; FP8 2 s fast, 3 s precise, and 4 s with tiles in both operands."""
    rows = []
    for shape in training_gemms(LAYER):
        for kind in kinds(shape.role, every=False):
            seconds = (
                SECONDS["bf16"]
                if kind.precision == "bf16"
                else 4.0
                if kind.granularity == TILES
                else SECONDS[kind.accumulation]
            )
            named = {
                "precision": kind.precision,
                "granularity": kind.granularity,
                "accumulation": kind.accumulation,
            }
            rows.append(Gemm(**asdict(shape), **named, seconds=(0.0, seconds, 9.0)))
    return rows


def _casts(
    granularities: tuple[str, ...] = (
        "tensor, delayed",
        "tensor, current",
        "channel",
        "sub-channel",
    ),
) -> list[Cast]:
    """Input 0.5 s, weight 0.8 s, gradient 0.7 s."""
    times = dict(zip(OPERANDS, (0.5, 0.8, 0.7), strict=True))
    where = {
        "name": LAYER.name,
        "model": "toy",
        "layer": "linear_fc1",
        "rows": 1,
        "columns": 1,
        "made_by": "hand",
    }
    return [
        Cast(**where, operand=o, granularity=g, seconds=(0.0, t, 9.0), bytes=10)
        for g in granularities
        for o, t in times.items()
    ]


@pytest.mark.parametrize("model", MODELS)
def test_the_layers_shapes_hold_all_of_its_weights(model: str) -> None:
    plan = compose_plan([f"model={model}", "gpu=b200", "experiment=throughput"])
    found = linear_layers(plan.model, plan.seq_length)
    norms = 2 * (
        2 if model.startswith("nemotron") else 1
    )  # Nemotron's are LayerNorms, with a bias each
    assert (
        sum(s.n * s.k for s in found)
        == layer_parameters(plan.model) - norms * plan.model.hidden_size
    )
    assert {s.m for s in found} == {4096 if model.startswith("nemotron") else 8192}


@pytest.mark.parametrize("tp", [2, 8])
def test_tensor_parallel_ranks_share_the_weights_and_keep_the_tokens(tp: int) -> None:
    model = compose_plan(["model=llama3_70b", "gpu=b200", "experiment=throughput"]).model
    whole, share = linear_layers(model, 8192), linear_layers(model, 8192, tp)
    assert [(s.m, s.n * s.k * tp) for s in share] == [(s.m, s.n * s.k) for s in whole]
    assert [s.layer for s in share if s.k == model.hidden_size] == [
        "linear_qkv",
        "linear_fc1",
    ]  # cut along their output


def test_tensor_parallelism_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match=r"of 3 does not divide llama3_8b"):
        shapes(["llama3_8b"], [], 3)


def test_training_multiplies_three_times_with_the_same_work() -> None:
    found = training_gemms(LAYER)
    assert [(s.role, s.m, s.n, s.k) for s in found] == [
        ("fprop", 256, 512, 128),
        ("dgrad", 256, 128, 512),
        ("wgrad", 512, 128, 256),
    ]


def test_the_sweep_is_that_of_the_post_and_comes_before_the_five_models() -> None:
    assert {(s.m, s.n) for s in shapes([], [1024, 2048])} == {(4096, 4096)}
    assert [s.name for s in shapes(["llama3_8b", "all"], [1024])][:2] == [
        "K sweep",
        "llama3_8b linear_qkv",
    ]
    assert len(shapes(["llama3_8b", "all"], [])) == 20


def test_every_role_has_the_kinds_that_training_needs() -> None:
    found = {role: {kind.granularity for kind in kinds(role, every=False)} for role in ROLES}
    assert found["fprop"] == found["dgrad"] == {"-", "tensor", "channel", BLOCKS} and found[
        "wgrad"
    ] == {"-", "tensor", "channel", TILES}


def test_a_layer_is_the_sum_of_its_gemms_and_casts_and_shares_the_weights_cast() -> None:
    rows = {
        (r.granularity, r.accumulation): r for r in layer_rows(_gemms(), _casts(), micro_batches=4)
    }
    base, mixed, blocks = (
        rows[("-", "precise")],
        rows[("tensor, delayed", TE_ACCUMULATION)],
        rows[("sub-channel", "precise")],
    )
    assert (base.seconds, base.seconds_with_casts, base.speedup_with_casts, base.cast_seconds) == (
        18,
        18,
        1,
        {},
    )
    assert mixed.gemm_seconds == {"fprop": 2, "dgrad": 3, "wgrad": 3}
    assert (mixed.seconds, mixed.seconds_with_casts) == (8, 8 + 0.5 + 0.8 + 0.7)
    assert mixed.seconds_weights_amortised == pytest.approx(8 + 0.5 + 0.7 + 0.8 / 4)
    assert (mixed.speedup, mixed.speedup_with_casts) == (18 / 8, 18 / 10)
    assert blocks.gemm_seconds == {
        "fprop": 3,
        "dgrad": 3,
        "wgrad": 4,
    } and blocks.cast_bytes == dict.fromkeys(OPERANDS, 10)
    assert len(rows) == 1 + 3 * 3 + 1


def test_one_micro_batch_shares_nothing() -> None:
    for row in layer_rows(_gemms(), _casts(), 1):
        assert row.seconds_weights_amortised == row.seconds_with_casts


def test_a_cast_that_is_refused_leaves_the_gemms_and_the_reason() -> None:
    refused = [
        Cast(LAYER.name, o, 1, 1, "channel", "hand", refused="cast: no compiler") for o in OPERANDS
    ]
    rows = {
        r.granularity: r
        for r in layer_rows(_gemms(), _casts(("tensor, current", "sub-channel")) + refused, 8)
    }
    assert (
        rows["channel"].speedup == 18 / 8
        and rows["channel"].speedup_with_casts is None
        and rows["channel"].refused == "cast: no compiler"
    )
    assert rows["tensor, delayed"].seconds_with_casts is None  # nothing was measured for it
    assert "channel 2.25/-/-" in summary(list(rows.values()))


def test_a_gemm_that_is_refused_leaves_its_recipe_without_a_sum() -> None:
    without = [
        (
            Gemm(**{**asdict(g), "seconds": None, "refused": "no blocks"})
            if g.granularity == BLOCKS
            else g
        )
        for g in _gemms()
    ]
    row = layer_rows(without, _casts(), 8)[-1]
    assert (
        row.seconds is None
        and row.speedup is None
        and row.refused == "no blocks"
        and row.gemm_seconds == {"wgrad": 4}
    )


def test_measurements_are_passed_on_to_a_layer_of_the_same_sizes() -> None:
    other = Shape("other linear_proj", 256, 512, 128, "other", "linear_proj")
    gemms, casts = relabelled((_gemms(), _casts()), other)
    assert {(r.name, r.model, r.layer) for r in (*gemms, *casts)} == {
        ("other linear_proj", "other", "linear_proj")
    }
    assert [g.seconds for g in gemms] == [g.seconds for g in _gemms()]


def test_the_cast_by_row_and_column_is_right_in_both_copies_and_counts_its_bytes() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 384, dtype=torch.bfloat16) * torch.logspace(-3, 3, 384)
    result = channel_cast(x.view(2, 128, 3, 128).bfloat16())
    by_row, row_scale, by_column, column_scale = (t.float() for t in result)
    for copy, exact in (
        (by_row.view(256, 384) * row_scale.view(256, 1), x),
        (by_column.view(384, 256).t() * column_scale.view(1, 384), x),
    ):
        assert (copy - exact).norm() / exact.norm() < 2**-4  # E4M3 has three bits behind the point
    near = (by_column.view(384, 256).t() * column_scale.view(1, 384) - x).abs().amax(
        0
    ) / x.abs().amax(0)
    assert near.max() < 2**-4  # a scale a column serves the smallest column as it does the largest
    assert bytes_of_cast("channel", x.bfloat16(), result) == 256 * 384 * (2 * 2 + 2) + 4 * (
        256 + 384
    )


def _folder(path: Path) -> Path:
    rows = [asdict(row) for row in layer_rows(_gemms(), _casts(), 4)]
    small = [
        row | {"layer": "linear_proj", **{k: row[k] / 3 for k in analysis.SPEEDUPS}} for row in rows
    ]
    slow = [
        row | ({} if row["precision"] == "bf16" else {k: row[k] * 2 for k in analysis.SPEEDUPS})
        for row in small
    ]
    written = {
        "gemm": [asdict(g) | {"tflops": 1.0} for g in _gemms()],
        "casts": [asdict(c) for c in _casts()],
        "layers": rows + slow,
    }
    for name, values in written.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    (path / "manifest.json").write_text(json.dumps({"device": "a test"}))
    return path


def test_a_models_speedup_weighs_its_layers_by_time(tmp_path: Path) -> None:
    layers = analysis.load_more(_folder(tmp_path), "layers")
    recipe = ("tensor, delayed", TE_ACCUMULATION)
    assert analysis.by_layer(layers).loc[("toy", "linear_fc1", *recipe), "GEMMs alone"] == 18 / 8
    whole = analysis.by_model(layers).loc[("toy", *recipe)]
    assert whole["GEMMs alone"] == pytest.approx((18 + 6) / (8 + 8 / 3 * 2), abs=1e-3)
    assert (
        whole["all casts"] == pytest.approx((18 + 6) / (10 + 10 / 3 * 2), abs=1e-3)
        and whole["BF16 ms"] == 24000
    )


def test_a_model_with_a_layer_that_was_refused_has_no_speedup(tmp_path: Path) -> None:
    layers = analysis.load_more(_folder(tmp_path), "layers")
    layers.loc[
        (layers["layer"] == "linear_fc1") & (layers["granularity"] == "channel"), "seconds"
    ] = None
    found = analysis.by_model(layers)["GEMMs alone"]
    assert (
        pd.isna(found.loc[("toy", "channel", "fast")])
        and found.loc[("toy", "tensor, current", "fast")] > 1
    )


def test_the_models_figure_has_a_bar_for_each_recipe_and_none_without_models(
    tmp_path: Path,
) -> None:
    layers = analysis.load_more(_folder(tmp_path), "layers")
    drawn = analysis.models_figure(layers)
    assert (
        drawn
        and drawn.name == "gemm_models"
        and "4 micro-batches" in drawn.caption
        and "a test" in drawn.title
    )
    heights = {round(bar.get_height(), 3) for bar in drawn.drawing.axes[0].patches}
    assert heights >= set(
        analysis.by_model(layers).xs(TE_ACCUMULATION, level="accumulation")["all casts"]
    )
    assert analysis.models_figure(layers[layers["model"] == ""]) is None


def test_folders_from_before_the_layers_are_read_and_others_are_refused(tmp_path: Path) -> None:
    old = CONF.parent / "analysis/results/gemm_h100"
    assert set(analysis.load(old)["role"]) == {"fprop"} and len(analysis.sweep(analysis.load(old)))
    assert (
        analysis.load_more(tmp_path, "layers").empty
        and analysis.by_model(analysis.load_more(tmp_path, "layers")).empty
    )
    (tmp_path / "layers.jsonl").write_text(json.dumps({"model": "x"}) + "\n")
    with pytest.raises(InputError, match=r"layers\.jsonl has no name; measure it again"):
        analysis.load_more(tmp_path, "layers")


def test_asking_for_help_needs_no_torch() -> None:
    code = (
        "import sys; import recipes.measure.gemm as g; g.shapes(['llama3_8b'], []); print('torch'"
        " in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU, so nothing is refused")
def test_without_a_gpu_it_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: recipes.measure.gemm measures a CUDA GPU")
    )


def test_counts_below_one_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--micro-batches", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --rounds and --micro-batches count from 1")
