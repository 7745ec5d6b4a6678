"""The harness cost: the blocks and their arithmetic, what is refused, and that a bare step is the
same step as the harness's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.measure.gpu.interleaved_steps import HookClock, Times, unwatched
from recipes.measure.gpu.overhead import cost_of, main, rows_of_blocks, steps_of
from recipes.run_folder import rows_of
from recipes.training.te_layers import Watched
from tests.recipes.test_evaluate import write_corpus

pytestmark = pytest.mark.nemo
ROUNDS, BLOCKS = 2, 3
ORDER = "hbbbh"  # a block's steps: harness, bare
SMALL = [
    "gpu=cpu",
    "settings=convergence",
    "model=llama3_tiny",
    "model.num_layers=2",
    "precision=fp8_delayed",
    "mapping.micro_batch=2",
    "mapping.global_batch=4",
    "train.warmup_steps=5",
    "train.max_lr=1e-2",
    "train.diagnostics_interval=1000",
]


def test_a_block_has_both_kinds_at_the_same_moment() -> None:
    order = ORDER * BLOCKS + "h"
    assert len(order) == steps_of(BLOCKS)
    places = {kind: [n for n, step in enumerate(ORDER) if step == kind] for kind in "hb"}
    assert sum(places["h"]) / 2 == sum(places["b"]) / 3 == 2


def test_the_cost_is_that_of_the_blocks_with_the_garbage_of_a_step() -> None:
    times = Times(
        harness=[[9.0, 9.0], [1.01, 1.03], [2.04, 2.12]],
        hooks=[[5.0, 5.0], [0.003, 0.004], [0.005, 0.008]],
        bare=[[1.0] * 3, [1.0] * 3, [2.0] * 3],
    )
    times.collection, times.collection_again, times.collection_steps, times.collection_interval = (
        0.14,
        0.1,
        10,
        100,
    )
    cost = cost_of(times, warm_up=1)
    assert (
        cost["rounds"] == 2
        and cost["bare_step_s"] == 1.5
        and cost["harness_step_s"] == pytest.approx(1.55)
    )
    assert cost["cost"] == pytest.approx(0.03)  # of 2 and 4 %: a slow block is slow on both sides
    assert cost["cost_interval_95"] == pytest.approx(
        [0.03 - 12.706 * 0.01, 0.03 + 12.706 * 0.01], rel=1e-4
    )  # Student, one degree of freedom
    assert (cost["added_ms"], cost["hooks_ms"], cost["garbage_ms_a_step"]) == pytest.approx(
        (50, 5, 5)
    )  # a hundredth of 0.1 s, a tenth of 0.04
    assert cost["with_garbage"] == pytest.approx(0.03 + 0.005 / 1.5)


def test_a_drift_of_all_steps_cancels() -> None:
    steps = [5.0 - 0.02 * n + 0.01 * (ORDER[n % 5] == "h") for n in range(20)]
    blocks = [steps[n : n + 5] for n in range(0, 20, 5)]
    cost = cost_of(
        Times(
            harness=[[b[0], b[4]] for b in blocks],
            hooks=[[0.0, 0.0]] * 4,
            bare=[b[1:4] for b in blocks],
        ),
        0,
    )
    assert cost["added_ms"] == pytest.approx(10) and cost["cost"] == pytest.approx(
        0.01 / cost["bare_step_s"], rel=1e-3
    )


def test_garbage_that_only_python_collects_is_in_the_steps_already() -> None:
    times = Times(
        harness=[[1.003] * 2, [1.004] * 2, [1.005] * 2],
        hooks=[[0.0] * 2] * 3,
        bare=[[1.0] * 3] * 3,
        collection=0.5,
    )
    assert cost_of(times, 0)["with_garbage"] == cost_of(times, 0)["cost"] == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("added", "verdict"),
    [
        ([0.001, 0.0012, 0.0008], "met"),
        ([0.01, 0.0102, 0.0098], "missed"),
        ([0.001, 0.009, 0.002], "undecided"),
        ([0.004, 0.007], "undecided"),
    ],
)
def test_the_verdict_is_the_intervals(added: list[float], verdict: str) -> None:
    times = Times(
        harness=[[1 + more] * 2 for more in added],
        hooks=[[0.0] * 2] * len(added),
        bare=[[1.0] * 3] * len(added),
    )
    assert cost_of(times, 0)["verdict"] == verdict


def test_garbage_counts_in_the_verdict() -> None:
    times = Times(
        harness=[[1.004] * 2, [1.0041] * 2, [1.0039] * 2],
        hooks=[[0.0] * 2] * 3,
        bare=[[1.0] * 3] * 3,
    )
    assert cost_of(times, 0)["verdict"] == "met"
    times.collection = times.collection_again = 0.2
    times.collection_steps, times.collection_interval = 5, 100
    assert cost_of(times, 0)["verdict"] == "missed"


SHIPPED = sorted(
    (Path(__file__).parents[2] / "analysis" / "results" / "harness_cost_h200").iterdir()
)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_cost_is_that_of_its_blocks(folder: Path) -> None:
    rows, shipped = (
        list(rows_of(folder / "blocks.jsonl")),
        json.loads((folder / "cost.json").read_text()),
    )
    times = Times(*([row[name] for row in rows] for name in ("harness_s", "hooks_s", "bare_s")))
    of = shipped["garbage_collection"]
    times.collection, times.collection_again, times.collection_steps, times.collection_interval = (
        of["s"],
        of["again_s"],
        of["of_steps"],
        of["interval"],
    )
    cost = cost_of(times)
    numbers = [name for name, value in cost.items() if isinstance(value, float)] + [
        "cost_interval_95"
    ]
    assert "cost" in numbers and all(
        shipped[name] == pytest.approx(cost[name], rel=1e-9) for name in numbers
    )
    assert (shipped["verdict"], shipped["rounds"]) == (cost["verdict"], cost["rounds"])


def test_a_row_is_a_block() -> None:
    rows = rows_of_blocks(
        Times(harness=[[1, 2], [3, 4]], hooks=[[0, 0], [0, 0]], bare=[[5, 6, 7], [8, 9, 10]])
    )
    assert [(r["block"], r["harness_s"], r["bare_s"]) for r in rows] == [
        (0, [1, 2], [5, 6, 7]),
        (1, [3, 4], [8, 9, 10]),
    ]


def test_bare_steps_are_not_watched_and_other_hooks_stay() -> None:
    layer, calls = nn.Linear(2, 2), []
    watched = Watched(layer, None)
    layer.register_forward_hook(watched.forward)
    layer.fp8 = True
    handle = layer.register_forward_hook(lambda *args: calls.append(1))
    with unwatched([watched]):
        layer(torch.ones(1, 2))
    assert watched.fp8_calls.fprop == 0 and len(calls) == 1
    layer(torch.ones(1, 2))
    assert watched.fp8_calls.fprop == 1 and len(calls) == 2
    handle.remove()
    layer(torch.ones(1, 2))
    assert watched.fp8_calls.fprop == 2 and len(calls) == 2


def test_the_clock_times_the_hooks_and_starts_anew_when_read() -> None:
    class Slow:
        def on_train_batch_start(self, seconds: float) -> None:
            time.sleep(seconds)

        on_before_optimizer_step = on_train_batch_end = on_train_batch_start

    slow = Slow()
    clock = HookClock(slow)
    slow.on_train_batch_start(0.02)
    slow.on_before_optimizer_step(0.01)
    slow.on_train_batch_end(0.01)
    assert clock.taken() >= 0.04 and clock.taken() == 0


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--rounds", "1"], "give 2 or more"),
        (["--rounds", "49"], "give at most 48"),
        (["gpu=cpu", "settings=convergence", "model=llama3_tiny"], "use data=text"),
        ([*SMALL, "data=text", "num_gpus=2"], "asks for 2; use mapping=single num_gpus=1"),
        (["precision=nothing"], "has no such option"),
        ([*SMALL, "data=text", "--profile"], "--profile reads a layer's kernels off a CUDA GPU"),
        pytest.param(
            [],
            "needs a CUDA GPU and Transformer Engine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_input_is_one_line(
    args: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and why in err


def test_a_folder_with_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cost.json").write_text("{}")
    assert main([*SMALL, "data=text", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*SMALL, "data=text", "--out", str(tmp_path / "cost.json")]) == 2
    assert "name a folder that can be written" in capsys.readouterr().err


def test_a_bare_step_is_the_same_step(tmp_path: Path, warm_python: str) -> None:
    """Losses of harness and bare steps, in turn, equal those of a run without bare steps: same
    data, FP8 state, clipping, schedule.
    """
    data = [
        f"data.sources=[{write_corpus(tmp_path / 'corpus')}]",
        f"data.root={tmp_path}/data",
        "data=text",
    ]
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [
        sys.executable,
        "-m",
        "recipes.measure.gpu.overhead",
        *SMALL,
        *data,
        "--rounds",
        str(ROUNDS),
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    cost = json.loads(done.stdout)  # nothing else on stdout
    assert cost["rounds"] == ROUNDS and cost["layers"] == 2 and cost["precision"] == "fp8_delayed"
    assert [
        (len(row["harness_s"]), len(row["bare_s"])) for row in rows_of(out / "blocks.jsonl")
    ] == [(2, 3)] * BLOCKS
    assert (
        min(
            value
            for row in rows_of(out / "blocks.jsonl")
            for value in row["harness_s"] + row["bare_s"] + row["hooks_s"]
        )
        > 0
    )

    plan = json.loads((out / "plan.json").read_text())
    plan["train"]["stop_after"] = None
    whole.mkdir()
    (whole / "plan.json").write_text(json.dumps(plan))
    subprocess.run(
        [warm_python, "-m", "recipes.training.run", str(whole)],
        capture_output=True,
        check=True,
        timeout=300,
    )
    harness, expected = (
        [row["loss"] for row in rows_of(folder / "metrics.jsonl") if "loss" in row]
        for folder in (out, whole)
    )
    bare = json.loads((out / "cost.json").read_text())["bare_losses"]
    taken = {"h": iter(harness), "b": iter(bare)}
    assert [next(taken[kind]) for kind in ORDER * BLOCKS + "h"] == expected[: steps_of(BLOCKS)]
    assert len(harness) == 2 * BLOCKS + 1 and len(set(expected)) == len(expected)
