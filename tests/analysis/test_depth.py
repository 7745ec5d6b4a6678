"""A step taken apart: planted layers, vocabulary and optimizer come back, whole models add up by
hand, and what was published stands beside.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.runs import published
from analysis.runs.load import Run, load_run
from analysis.speed import depth, full_depth, full_depth_table
from analysis.speed.depth import Depth
from analysis.speed.full_depth_table import main as command
from recipes.errors import InputError
from tests.analysis.conftest import Maker, curve

STEPS = 20
ON_H200 = (
    "gpu=h200",
    "stack=nemo_25_04_te_2_11",
    "experiment=throughput",
    "executor=local",
    "settings.precision_aware_optimizer=false",
)
ALONE = [
    {
        "rank": 0,
        "uuid": "GPU-1",
        "others_at_start": {"processes": 0},
        "others_at_end": {"processes": 0},
    }
]
MEASURED = {"labels": {"loss": "measured", "step_time": "measured"}, "gpus": ALONE}
Parts = tuple[float, float, float, float]  # a, b, c, d of t = N (a + b L) + (c + d L)
BF16, CURRENT = (0.030, 0.020, 0.004, 0.003), (0.031, 0.014, 0.005, 0.0032)


def overrides(layers: int, batch: int = 8, model: str = "llama3_8b", *more: str) -> tuple[str, ...]:
    return (
        *ON_H200,
        f"model={model}",
        "mapping=single",
        "mapping.micro_batch=1",
        f"mapping.global_batch={batch}",
        f"model.num_layers={layers}",
        *more,
    )


def planted(
    make: Maker,
    precision: str,
    layers: int,
    parts: Parts,
    batch: int = 8,
    noise: float = 0.0,
    more: tuple[str, ...] = (),
) -> Path:
    """Write a run whose steps take N (a + b L) + (c + d L) seconds; N is the batch, for a
    micro-batch is one sequence.
    """
    model = next((word.split("=")[1] for word in more if word.startswith("model=")), "llama3_8b")
    folder = make(
        f"{model}.{precision}.layers{layers}",
        curve(STEPS),
        precision,
        overrides(layers, batch, model, *more),
        device="NVIDIA H200",
        **MEASURED,
    )
    a, b, c, d = parts
    luck = np.random.default_rng(layers).normal(1, noise, STEPS) if noise else np.ones(STEPS)
    return edit(
        folder,
        lambda i: {
            "optimizer_time_s": (c + d * layers) * luck[i],
            "step_time_s": (batch * (a + b * layers) + c + d * layers) * luck[i],
        },
    )


def named(make: Maker, prefix: str) -> Maker:
    """Return a maker whose runs are called otherwise, for a second set in one test."""
    return lambda name, *args, **said: make(f"{prefix}.{name}", *args, **said)


def edit(folder: Path, values: Any) -> Path:
    """Change the training lines of a run's metrics: `values` takes the number of a step, from 0;
    the rate follows its step time.
    """
    path = folder / "metrics.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    changed = [{**row, **values(i)} for i, row in enumerate(rows)]
    for row, new in zip(rows, changed, strict=True):
        if "tokens_per_s_per_gpu" in row:
            new["tokens_per_s_per_gpu"] *= row["step_time_s"] / new["step_time_s"]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return folder


def lines_of(make: Maker, depths: tuple[int, ...] = (2, 4), **more: Any) -> list[Depth]:
    runs = [
        load_run(planted(make, name, n, parts, **more))
        for name, parts in (("bf16", BF16), ("fp8_current", CURRENT))
        for n in depths
    ]
    return depth.fit(runs)


def test_the_parts_of_a_step_come_back(make: Maker) -> None:
    for line, (a, b, c, d) in zip(lines_of(make), (BF16, CURRENT), strict=True):
        assert line.passes and line.optimizer
        assert (line.passes.fixed[0], line.passes.per_layer[0]) == pytest.approx((a, b), abs=1e-9)
        assert (line.optimizer.fixed[0], line.optimizer.per_layer[0]) == pytest.approx(
            (c, d), abs=1e-9
        )
        assert line.residual_s == pytest.approx(0, abs=1e-9) and line.per_layer_s == pytest.approx(
            8 * b + d, abs=1e-9
        )


def test_depths_may_have_other_numbers_of_micro_batches_where_the_optimizer_was_timed(
    make: Maker,
) -> None:
    runs = [
        load_run(planted(make, "bf16", layers, BF16, batch)) for layers, batch in ((2, 16), (4, 8))
    ]
    (line,) = depth.fit(runs)
    assert line.passes and line.passes.per_layer[0] == pytest.approx(BF16[1], abs=1e-9)
    for run in runs:
        rows = [
            {k: v for k, v in json.loads(text).items() if k != "optimizer_time_s"}
            for text in (run.folder / "metrics.jsonl").open()
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"mapping\.global_batch 16 → 8"):
        depth.fit([load_run(run.folder) for run in runs])


def test_the_residual_is_the_distance_from_the_line(make: Maker) -> None:
    folders = [planted(make, "bf16", layers, BF16) for layers in (2, 4, 6)]
    middle = load_run(folders[1]).steps["step_time_s"][0]
    edit(folders[1], lambda i: {"step_time_s": middle + 0.03})
    (line,) = depth.fit([load_run(folder) for folder in folders])
    assert line.residual_s == pytest.approx(
        0.02, abs=1e-9
    )  # 0.03 off in the middle of three: least squares leave two thirds


def test_runs_without_the_optimizers_time_give_the_line_of_the_step_alone(make: Maker) -> None:
    folders = [
        make(f"bf16.layers{n}", curve(STEPS), "bf16", overrides(n), device="NVIDIA H200")
        for n in (2, 4)
    ]
    for folder, seconds in zip(folders, (0.5, 0.7), strict=True):
        edit(folder, lambda i, seconds=seconds: {"step_time_s": seconds})
    (line,) = depth.fit([load_run(folder) for folder in folders])
    assert line.passes is None and (line.per_layer_s, line.fixed_s) == pytest.approx((0.1, 0.3))
    assert full_depth.assemble(line) is None
    (row,) = full_depth_table.rows([line])
    assert (
        row["split"] is False
        and row["whole_step_time_s"] is None
        and "(step)" in full_depth_table.layers_table([row]).markdown()
    )
    with pytest.raises(InputError, match="no whole model"):
        full_depth_table.whole_table([row])


def test_a_whole_model_is_one_gpus_share_of_its_parts(make: Maker) -> None:
    """Llama 3 8B on 8 H100s, cp 2, dp 4: 32 micro-batches; 70B on 64, tp 4 pp 4 cp 2, dp 2: 64, the
    vocabulary cut to a quarter.
    """
    bf16, current = lines_of(make)
    a, b, c, d = BF16
    made = full_depth.assemble(bf16)
    assert made and made.micro_batches == 32
    assert made.step_time_s == pytest.approx((32 * (a + 32 * b) + (c + 32 * d) / 4) / 2)
    row = full_depth_table.rows([bf16, current])[1]
    ours = (32 * (CURRENT[0] + 32 * CURRENT[1]) + (CURRENT[2] + 32 * CURRENT[3]) / 4) / 2
    assert row["speedup_whole"] == pytest.approx(made.step_time_s / ours, abs=1e-3)
    assert row["speedup_per_layer"] == pytest.approx(0.020 / 0.014, abs=1e-3)


def test_a_vocabulary_cut_to_one_gpus_share_is_said_and_scaled_up(make: Maker) -> None:
    cut = ("model=llama3_70b", "model.vocab_size=32064", "gpu.memory_gb=2000")
    parts = a, b, c, d = 0.030, 0.080, 0.004, 0.003
    (line,) = depth.fit([load_run(planted(make, "bf16", n, parts, more=cut)) for n in (2, 4)])
    made = full_depth.assemble(line)
    assert made and made.step_time_s == pytest.approx(
        (64 * (4 * a + 80 * b) + (4 * c + 80 * d) / 2) / 32
    )
    assert (
        "llama3_70b 32064 of 128256 (1/4)"
        in full_depth_table.layers_table(full_depth_table.rows([line])).markdown()
    )


def test_goals_are_computed(make: Maker) -> None:
    row = full_depth_table.rows(lines_of(make))[1]
    assert (row["goal_per_layer"], row["goal_per_layer_met"]) == (1.36, True)  # planted: 1.43
    assert (row["goal_whole"], row["goal_whole_met"]) == (1.30, True)
    slower = CURRENT[0], BF16[1] / 1.35, *CURRENT[2:]
    runs = [
        load_run(planted(named(make, "slow"), name, n, parts))
        for name, parts in (("bf16", BF16), ("fp8_current", slower))
        for n in (2, 4)
    ]
    row = full_depth_table.rows(depth.fit(runs))[1]
    assert (
        row["goal_per_layer_met"] is False
        and "1.36x missed" in full_depth_table.layers_table([row]).markdown()
    )


def test_what_was_published_stands_beside_the_same_work_a_gpu(make: Maker) -> None:
    bf16, current = full_depth_table.rows(lines_of(make))
    assert (bf16["published_step_time_s"], bf16["published_num_gpus"]) == (12.27, 8)
    assert (current["post_speedup"], current["published_step_time_s"]) == (
        1.30,
        None,
    )  # the published steps are of delayed scaling
    delayed = full_depth.reference("llama3_70b", "fp8_delayed", "h100")
    assert delayed
    made = full_depth.Whole(delayed, published.layout_of(delayed), 64, np.ones(1))
    step = full_depth.published_step(made, "fp8_delayed")
    base = step and full_depth.published_base(step)
    assert step and base and (step.step_time_s, base.step_time_s) == (9.86, 14.66)
    assert (step.layout.pp, base.layout.pp) == (8, 4)


def test_the_interval_holds_the_planted_speedup_and_shrinks_with_the_noise(make: Maker) -> None:
    rows = [
        full_depth_table.rows(lines_of(named(make, str(noise)), noise=noise))[1]
        for noise in (0.001, 0.02)
    ]
    for row in rows:
        assert row["speedup_per_layer_low"] < 0.020 / 0.014 < row["speedup_per_layer_high"]
    quiet, loud = (row["speedup_per_layer_high"] - row["speedup_per_layer_low"] for row in rows)
    assert quiet < loud / 5


def test_runs_of_one_line_differ_in_depth_alone_and_their_clocks_hold(make: Maker) -> None:
    folders = [
        planted(make, "bf16", 2, BF16),
        planted(make, "bf16", 4, BF16, more=("mapping.recompute_layers=1",)),
    ]
    with pytest.raises(InputError, match=r"mapping\.recompute_layers 0 → 1.*no line"):
        depth.fit([load_run(folder) for folder in folders])
    edit(folders[0], lambda i: {"optimizer_time_s": 99.0})
    other = load_run(planted(named(make, "again"), "bf16", 4, BF16))
    with pytest.raises(InputError, match="part of the step"):
        depth.fit([load_run(folders[0]), other])


def test_what_differs_beside_precision_is_named(make: Maker) -> None:
    runs = [
        load_run(planted(make, name, n, BF16)) for name in ("bf16", "fp8_current") for n in (2, 4)
    ]
    assert depth.beside_precision(runs[0], runs[2]) == []
    more = ("settings.precision_aware_optimizer=true",)
    other = load_run(planted(named(make, "aware"), "fp8_current", 2, BF16, more=more))
    assert depth.beside_precision(runs[0], other) == [
        "settings.precision_aware_optimizer False → True"
    ]


def folders(make: Maker) -> list[str]:
    runs: list[Run] = [run for line in lines_of(make) for run in line.runs]
    return [str(run.folder) for run in runs]


def test_the_command_prints_and_writes_the_tables(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folders(make)
    for suffix in ("md", "html", "csv"):
        assert command([*runs, "--out", str(tmp_path / f"t.{suffix}"), "--png", str(tmp_path)]) == 0
    assert (tmp_path / "fig3.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "t.md").read_text(), (tmp_path / "t.html").read_text()):
        assert (
            "1.36x met" in text
            and "12.27" in text
            and "without communication" in text
            and "NVIDIA H200" in text
        )
    assert (
        (tmp_path / "t.csv")
        .read_text()
        .splitlines()[0]
        .startswith("model,precision,gpu,device,layers")
    )
    assert command([*runs, "--json"]) == 0
    assert [row["precision"] for row in json.loads(capsys.readouterr().out)] == [
        "bf16",
        "fp8_current",
    ]


def test_wrong_input_is_one_line(
    make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folders(make)
    for words, said in (
        ([runs[0]], "two depths"),
        ([*runs, "--out", str(tmp_path / "t.pdf")], "suffixes"),
        ([str(tmp_path / "none")], "no run folder"),
    ):
        assert command(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error
