"""Which steps an import holds: runs that were resumed, intervals that change, gaps, and logs that
lack losses or step times.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis.compare import main as compare
from analysis.import_logs import main
from analysis.runs.load import load_run
from analysis.throughput import main as throughput
from recipes.errors import InputError
from recipes.run_folder import status_of
from tests.analysis.conftest import curve
from tests.analysis.foreign import LLAMA3_8B, arguments, command, losses, megatron, write
from tests.analysis.test_import_logs import tensorboard

TINY = ("model=llama3_tiny", "precision=bf16", "gpu=cpu")
Parts = Sequence[Sequence[int]]


def nemo_events(folder: Path, parts: Parts) -> list[str]:
    """Event files as NeMo 2 under Lightning leaves them, one a start: global_step counts from 0,
    Lightning's step as well.
    """
    files = []
    for number, steps in enumerate(parts):
        tags = {
            "reduced_train_loss": [10 - step / 100 for step in steps],
            "global_step": [float(step - 1) for step in steps],
            "train_step_timing in s": [0.84] * len(steps),
        }
        place = tensorboard(folder / f"{number}", tags, 0)
        files += [str(next(place.iterdir()))]
    return files


RESUMED = {
    "F08: off the grid by one after the resume": [range(10, 251, 10), range(251, 492, 10)],
    "more after the resume than before": [range(10, 101, 10), range(101, 492, 10)],
    "three resumes": [
        range(10, 101, 10),
        range(101, 202, 10),
        range(207, 288, 10),
        range(290, 491, 10),
    ],
    "an interval that changes": [range(10, 101, 10), range(101, 491, 1)],
    "a resume that goes back": [range(10, 201, 10), range(151, 492, 10)],
    "a resume after one line": [range(10, 101, 10), [101], range(105, 496, 10)],
}


@pytest.mark.parametrize("parts", RESUMED.values(), ids=RESUMED.keys())
def test_every_point_of_a_resumed_run_comes_through(parts: Parts, tmp_path: Path) -> None:
    files = nemo_events(tmp_path / "events", parts)
    assert main([*files, "--out", str(tmp_path / "run"), "--set", *TINY]) == 0
    run = load_run(tmp_path / "run")
    wanted = [
        step
        for i, part in enumerate(parts)
        for step in part
        if all(step < min(later) for later in parts[i + 1 :])
    ]
    assert run.steps["step"].tolist() == wanted
    assert run.steps["loss"] == pytest.approx([10 - step / 100 for step in wanted])
    assert status_of(tmp_path / "run") == "done" and run.plan.train.max_steps == wanted[-1]


@pytest.mark.parametrize("parts", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("form", ["one table", "parts", "downloads", "JSON downloads"])
def test_tables_of_a_resumed_run_hold_the_later_run(
    form: str, parts: Parts, tmp_path: Path
) -> None:
    rows = [(i, step) for i, part in enumerate(parts) for step in part]
    points = [[1.7e9, step, 10 - step / 100 + i] for i, step in rows]
    files = [tmp_path / "run-tag-loss.csv"]
    if form == "one table":
        lines = ["step,loss", *(f"{step},{loss}" for _, step, loss in points)]
        files[0].write_text("\n".join(lines))
    elif form == "downloads":
        lines = ["Wall time,Step,Value", *(f"{t},{step},{loss}" for t, step, loss in points)]
        files[0].write_text("\n".join(lines))
    elif form == "JSON downloads":
        files = [tmp_path / "run-tag-loss.json"]
        files[0].write_text(json.dumps(points))
    else:
        files = [tmp_path / f"{i}.csv" for i in range(len(parts))]
        for i, file in enumerate(files):
            lines = [f"{step},{10 - step / 100 + i}" for step in parts[i]]
            file.write_text("\n".join(["step,loss", *lines]))
    out = tmp_path / "run"
    assert main([*map(str, files), "--out", str(out), "--set", *TINY]) == 0
    wanted = [
        (step, 10 - step / 100 + i)
        for i, step in rows
        if all(step < min(later) for later in parts[i + 1 :])
    ]
    run = load_run(out)
    assert run.steps["step"].tolist() == [step for step, _ in wanted]
    assert run.steps["loss"] == pytest.approx([loss for _, loss in wanted])


BROKEN = [
    ([range(1, 21), range(31, 61)], (), "steps 21 to 30 are missing"),
    ([range(1, 21), range(22, 61)], (), "step 21 is missing"),
    ([range(10, 101, 10), range(120, 301, 10)], (), "step 110 is missing"),
    ([range(10, 101, 10), range(125, 306, 10)], (), "is missing"),
    ([range(401, 501)], (), "steps 1 to 400 are missing"),
    (
        [range(1, 11), range(21, 31), range(41, 51)],
        (),
        "steps 11 to 20 are missing; steps 31 to 40 are missing",
    ),
    ([range(10, 251, 10)], ("train.max_steps=491",), "the log ends at step 250 of 491"),
    (
        [range(10, 251, 10), range(251, 482, 10)],
        ("train.max_steps=500",),
        "the log ends at step 481 of 500",
    ),
]


@pytest.mark.parametrize(("parts", "sets", "says"), BROKEN)
def test_a_run_with_gaps_or_without_its_end_is_not_done_and_the_gaps_are_named(
    parts: Parts,
    sets: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = nemo_events(tmp_path / "events", parts)
    assert main([*files, "--out", str(tmp_path / "run"), "--set", *TINY, *sets]) == 0
    assert says in capsys.readouterr().out and status_of(tmp_path / "run") == "failed"
    with pytest.raises(InputError, match=says[:10]):
        load_run(tmp_path / "run")


def test_a_stretch_that_was_taken_out_of_an_imported_run_is_noticed(tmp_path: Path) -> None:
    files = nemo_events(tmp_path / "events", [range(10, 101, 10), range(101, 202, 10)])
    assert main([*files, "--out", str(tmp_path / "run"), "--set", *TINY]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(InputError, match="step 60 is missing"):
        load_run(tmp_path / "run")


def test_two_runs_in_one_file_are_refused_and_a_start_from_scratch_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = megatron(8, 0.1712)
    assert main(command(write(tmp_path / "two", [*whole, *whole]), tmp_path / "run", TINY)) == 2
    assert (
        "holds two runs: one ends at step 40 of 40, and steps begin anew at 1; split it"
        in capsys.readouterr().err
    )
    assert (
        main(command(write(tmp_path / "again", [*whole[:20], *whole]), tmp_path / "run", TINY)) == 0
    )
    assert len(load_run(tmp_path / "run").steps["loss"]) == 40


def test_losses_without_step_times_are_compared_and_tables_say_why_they_leave_the_run_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F09: a W&B panel exports one metric."""
    for name, loss in (("bf16", curve()), ("fp8", curve() * 1.0001)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_ALL)
            rows.writerow(
                [
                    "trainer/global_step",
                    "oak-3 - reduced_train_loss",
                    "oak-3 - reduced_train_loss__MIN",
                    "oak-3 - reduced_train_loss__MAX",
                ]
            )
            rows.writerows([i, value, value, value] for i, value in enumerate(loss.tolist()))
    gpu = ("model=llama3_8b", "gpu=h100")
    assert (
        main(
            command(
                tmp_path / "bf16.csv",
                tmp_path / "bf16",
                [*gpu, "precision=bf16"],
                "--same-data",
                "a",
            )
        )
        == 0
    )
    assert (
        main(
            command(
                tmp_path / "fp8.csv",
                tmp_path / "fp8",
                [*gpu, "precision=fp8_current"],
                "--same-data",
                "a",
                "--assert-fp8",
            )
        )
        == 0
    )
    assert (
        "the log holds no step time: tables of throughput leave it out" in capsys.readouterr().out
    )
    runs = [str(tmp_path / "bf16"), str(tmp_path / "fp8")]
    assert compare([*runs, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["verdict"] == "pass" and (
        row["step_time_s"],
        row["speedup_over_bf16"],
        row["tokens_per_s_per_gpu"],
    ) == (None, None, None)
    assert compare(runs) == 0 and "no speedup" in capsys.readouterr().out
    assert throughput(runs) == 2 and "its log holds no step time" in capsys.readouterr().err


def test_means_over_an_interval_are_not_compared_with_single_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron-LM's console prints the mean of ten steps, its TensorBoard the tenth step's loss."""
    log = write(tmp_path / "log", megatron(64, 0.84, steps=300, every=10))
    tags = {"lm loss": losses(300)[9::10], "iteration-time": [0.84] * 30, "batch-size": [64.0] * 30}
    events = tensorboard(tmp_path / "events", tags, 10, 10)
    fp8 = ["model=llama3_tiny", "precision=fp8_current", "gpu=cpu"]
    for source, name, sets in ((log, "console", TINY), (events, "board", fp8), (log, "again", fp8)):
        vouched = ["--same-data", "a", *(["--assert-fp8"] if sets is fp8 else [])]
        assert main(command(source, tmp_path / name, sets, *vouched)) == 0
    runs = [str(tmp_path / name) for name in ("console", "board", "again")]
    capsys.readouterr()
    assert compare(runs[:2]) == 2
    assert "holds means over its logging interval" in capsys.readouterr().err
    assert compare(runs[::2]) in (0, 1, 3), capsys.readouterr().err


def test_step_times_without_losses_are_tabulated_and_comparing_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = np.random.default_rng(0).normal(7.4, 0.01, 40)
    path = tmp_path / "times.csv"
    path.write_text(
        "\n".join(
            ["Step,run - iteration-time", *(f"{i},{value}" for i, value in enumerate(times, 1))]
        )
        + "\n"
    )
    sets = [
        "model=llama3_8b",
        "precision=bf16",
        "gpu=h100",
        "num_gpus=8",
        "mapping.global_batch=64",
    ]
    assert main(command(path, tmp_path / "run", sets, "--same-data", "a")) == 0
    assert "the log holds no loss: losses cannot be compared" in capsys.readouterr().out
    assert throughput([str(tmp_path / "run"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["step_time_s"] == pytest.approx(7.4, rel=1e-2) and row[
        "tokens_per_s_per_gpu"
    ] == pytest.approx(8192 * 64 / 8 / 7.4, rel=1e-2)
    log = write(
        tmp_path / "log",
        [
            *arguments(**LLAMA3_8B, world_size=8, fp8="hybrid", fp8_recipe="tensorwise"),
            *megatron(64, 7.4),
        ],
    )
    assert (
        main(
            command(
                log,
                tmp_path / "fp8",
                ["model=llama3_8b", "gpu=h100"],
                "--same-data",
                "a",
                "--assert-fp8",
            )
        )
        == 0
    )
    assert compare([str(tmp_path / "run"), str(tmp_path / "fp8")]) == 2
    assert "holds no loss, which is what is compared" in capsys.readouterr().err


def test_a_log_is_what_it_was_after_being_cut_in_parts(tmp_path: Path) -> None:
    lines = megatron(8, 0.1712, steps=200, every=5)
    parts = [
        write(tmp_path / f"{i}.log", lines[start:end])
        for i, (start, end) in enumerate([(0, 20), (18, 30), (25, 40)])
    ]
    assert main([*map(str, parts), "--out", str(tmp_path / "run"), "--set", *TINY]) == 0
    run = load_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(5, 201, 5)) and run.steps[
        "loss"
    ] == pytest.approx(losses(200)[4::5], abs=1e-6)


def test_an_evaluation_after_a_resume_counts_for_the_one_before(tmp_path: Path) -> None:
    def evaluated(loss: float) -> str:
        words = f"validation loss at iteration 20 | lm loss value: {loss:.6E} | lm loss PPL: 1.0 |"
        return f" {words}\n" * 2  # as two ranks print it

    lines = megatron(8, 0.84)
    first, second = [*lines[:20], evaluated(5.1), *lines[20:25]], [*lines[15:20], evaluated(5.2)]
    file = tmp_path / "run.log"
    file.write_text("".join(line.rstrip() + "\n" for line in (*first, *second, *lines[20:])))
    assert main([str(file), "--out", str(tmp_path / "run"), "--set", *TINY]) == 0
    assert load_run(tmp_path / "run").heldout["heldout_loss"].tolist() == [5.2]
    rows = [{"step": step, "lm loss": 10 - step / 100} for step in range(1, 26)]
    rows[19:20] = [rows[19], {"step": 20, "lm loss validation": 5.1}]
    again = [{"step": step, "lm loss": 9 - step / 100} for step in range(16, 61)]
    again[4:5] = [again[4], {"step": 20, "lm loss validation": 5.2}]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *again)))
    assert main([str(table), "--out", str(tmp_path / "rows"), "--set", *TINY]) == 0
    assert load_run(tmp_path / "rows").heldout["heldout_loss"].tolist() == [5.2]


def test_a_held_out_loss_that_is_nan_is_no_sound_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = megatron(8, 0.84)
    lines[20:20] = [" validation loss at iteration 20 | lm loss value: NAN | lm loss PPL: NAN |"]
    file = write(tmp_path / "run.log", lines)
    assert main(command(file, tmp_path / "run", TINY)) == 0
    assert "the held-out loss is no finite number at step 20" in capsys.readouterr().out
    assert status_of(tmp_path / "run") == "failed"


@pytest.mark.parametrize(
    "words", ["at iteration 50 on validation set", "at the end of training for val data"]
)
def test_an_evaluation_after_the_last_printed_line_keeps_its_step(
    words: str, tmp_path: Path
) -> None:
    lines = megatron(8, 0.84, 50, every=20)
    last = f" validation loss {words} | lm loss value: 3.333333E+00 | lm loss PPL: 2.8E+01 |"
    file = write(tmp_path / "run.log", [*lines, last])
    assert main(command(file, tmp_path / "run", TINY)) == 0
    run = load_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [20, 40]
    assert run.heldout["step"].tolist() == [50]
    assert run.heldout["tokens"].tolist() == [50 * run.plan.tokens_per_step]
