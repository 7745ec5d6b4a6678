"""Well-formed numbers that cannot be true: each is refused with one line, in every command that
reads runs; real runs are not.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from analysis import compare, report, throughput, tuning
from analysis.post import training
from analysis.post.__main__ import main as post
from analysis.predictor.calibration import published_steps as predictor_rows
from analysis.runs.load import folders_of, load_all, load_run, load_runs
from analysis.speed import full_depth_table, layouts
from recipes.errors import InputError
from recipes.measure import memory
from recipes.run_folder import sha256

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "analysis" / "results"
H200 = RESULTS / "llama3_8b_h200"
BASE, FP8 = H200 / "llama3_8b.bf16.layers32.gbs4", H200 / "llama3_8b.fp8_current.layers32.gbs4"
DEMO = RESULTS / "demo"
DEMO_FP8 = DEMO / "llama3_tiny.fp8_current.cpu.seed1"
LONG_STEPS = RESULTS / "kernels_h200_b" / "llama3_8b.fp8_current.layers32.gbs8"
TWO_GPUS = RESULTS / "layouts_h200" / "fp8_current.dp2"
Row = dict[str, Any]
Edit = Callable[[Path], None]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(change: Callable[[Row], Row], steps: range = range(1, 10**6)) -> Edit:
    """Return an edit of the training lines of some steps."""

    def edit(run: Path) -> None:
        path = run / "metrics.jsonl"
        put(
            path,
            [
                row | change(row) if "loss" in row and row["step"] in steps else row
                for row in read(path)
            ],
        )

    return edit


def times(key: str, factor: float, steps: range = range(1, 10**6)) -> Edit:
    return train(lambda row: {key: row[key] and row[key] * factor}, steps)


def paced(factor: float) -> Edit:
    """Return an edit of all times, which leaves no contradiction between the columns."""
    return train(
        lambda row: {
            "step_time_s": row["step_time_s"] * factor,
            "optimizer_time_s": row.get("optimizer_time_s", 0.0) * factor,
            "tokens_per_s_per_gpu": row["tokens_per_s_per_gpu"] / factor,
        }
    )


def heldout(change: Callable[[Row], Row]) -> Edit:
    def edit(run: Path) -> None:
        path = run / "metrics.jsonl"
        put(path, [row | change(row) if "heldout_loss" in row else row for row in read(path)])

    return edit


def manifest(**facts: Any) -> Edit:
    def edit(run: Path) -> None:
        path = run / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return edit


def events(*rows: tuple[str, int, float], **of_last: Any) -> Edit:
    """Return an edit that writes events: kind, step, seconds after the first."""

    def edit(run: Path) -> None:
        begin = datetime.fromisoformat("2026-11-25T09:00:00+00:00")
        put(
            run / "events.jsonl",
            [
                {
                    "time": (begin + timedelta(seconds=after)).isoformat(),
                    "event": kind,
                    "step": step,
                    **(of_last if (kind, step, after) == rows[-1] else {}),
                }
                for kind, step, after in rows
            ],
        )

    return edit


def column(key: str, source: Path) -> Edit:
    """Return an edit that puts in another run's column, as far as it goes."""

    def edit(run: Path) -> None:
        values = {row["step"]: row[key] for row in read(source / "metrics.jsonl") if key in row}
        path = run / "metrics.jsonl"
        put(
            path,
            [
                row | ({key: values[row["step"]]} if key in row and row["step"] in values else {})
                for row in read(path)
            ],
        )

    return edit


def again(row: Row) -> Row:
    """Return the loss of 40 steps before."""
    return {
        "loss": next(
            line["loss"]
            for line in read(DEMO_FP8 / "metrics.jsonl")
            if "loss" in line and line["step"] == row["step"] - 40
        )
    }


GPU = {"rank": 0, "uuid": "GPU-1", "name": "NVIDIA H200"}
CASES: dict[str, tuple[Path, Edit, str]] = {
    "a thousandth": (
        FP8,
        paced(1e-3),
        r"step 1: step_time_s is 0\.005.* an MFU of 16605% of h200's peak of 1979 TFLOP/s",
    ),
    "a thousandth, one step": (
        FP8,
        times("step_time_s", 1e-3, range(7, 8)),
        r"step 7: step_time_s is .* MFU",
    ),
    "a thousandth on a CPU": (
        DEMO_FP8,
        paced(1e-3),
        r"steps 1 to \d+: step_time_s sums to .* no pauses explain",
    ),
    "longer than its session": (
        FP8,
        paced(1.5),
        r"steps 1 to 12: step_time_s sums to .* events\.jsonl has 30\.9 s",
    ),
    "less time than its energy takes": (
        LONG_STEPS,
        paced(0.45),
        r"gpu_energy_j is .* times what was sampled",
    ),
    "tokens": (
        FP8,
        times("tokens", 4),
        r"step 1: tokens is 131072 \(and 11 more steps\): the plan has 32,768",
    ),
    "tokens backwards": (
        FP8,
        train(lambda row: {"tokens": 10**9 - row["tokens"]}),
        "tokens is 999967232",
    ),
    "rate": (FP8, times("tokens_per_s_per_gpu", 0.1), r"tokens_per_s_per_gpu is 638.*gives 6,384"),
    "optimizer": (
        FP8,
        times("optimizer_time_s", 60),
        r"optimizer_time_s is .*: it is part of the step",
    ),
    "optimizer below 0": (
        FP8,
        times("optimizer_time_s", -1),
        "optimizer_time_s is -.*a number above 0",
    ),
    "memory": (
        FP8,
        train(lambda row: {"memory_gb": 500.0}),
        r"memory_gb is 500 .*h200 has 151\.4 GB at most",
    ),
    "little memory": (FP8, times("memory_gb", 1e-3), "weights and gradients alone"),
    "gemms": (
        FP8,
        train(lambda row: {"fp8_gemms": 1}),
        r"12 step\(s\), first in step 1: 1 FP8 GEMMs where the plan implies 1,536",
    ),
    "rate of learning": (
        FP8,
        times("lr", 2, range(5, 9)),
        r"step 5: lr is 0\.0005.* \(and 3 more steps\): the plan's schedule gives 0\.00025",
    ),
    "learning a step late": (
        DEMO_FP8,
        train(lambda row: {"lr": 0.0}, range(1, 2)),
        "step 1: lr is 0: ",
    ),
    "norm": (FP8, times("grad_norm", -1), "grad_norm is -13"),
    "another vocabulary": (
        FP8,
        column("loss", DEMO_FP8),
        r"step 1: loss is 6\.9.* vocabulary of 128,256, so the column is another run's",
    ),
    "above chance": (DEMO_FP8, column("loss", FP8), r"step 1: loss is 11\.9"),
    "losses of earlier steps again": (
        DEMO_FP8,
        train(again, range(41, 53)),
        "step 1: loss is .* stand at other steps too",
    ),
    "a peak of memory that falls": (
        FP8,
        times("memory_gb", 0.9, range(9, 10)),
        "step 9: memory_gb is .*since the process began",
    ),
    "clock": (
        TWO_GPUS,
        times("gpu_sm_clock_mhz", 1.2),
        r"gpu_sm_clock_mhz is .*manifest\.json has 1980 as its max_sm_clock_mhz",
    ),
    "power": (
        TWO_GPUS,
        times("gpu_power_w", 2),
        r"gpu_power_w is .*manifest\.json has 700 as its power_limit_w",
    ),
    "evaluated elsewhere": (
        DEMO_FP8,
        heldout(lambda row: {"step": row["step"] + 1}),
        "heldout_loss is .*the plan evaluates every",
    ),
    "held-out tokens": (
        DEMO_FP8,
        heldout(lambda row: {"tokens": row["tokens"] * 2}),
        "tokens is .*the plan has",
    ),
    "GPUs": (FP8, manifest(num_gpus=8), r"manifest\.json: num_gpus is 8, and the plan's is 1"),
    "device": (FP8, manifest(device="Tesla T4"), "device is Tesla T4, and the plan's is h200"),
    "device of a CPU run": (
        DEMO_FP8,
        manifest(device="NVIDIA H200"),
        "device is NVIDIA H200, and the plan's is cpu",
    ),
    "H20": (FP8, manifest(device="NVIDIA H20"), "device is NVIDIA H20, "),
    "a rank too many": (
        FP8,
        manifest(gpus=[GPU, GPU | {"rank": 1, "uuid": "GPU-2"}]),
        "gpus has ranks 0, 1, and the plan has 1",
    ),
    "a GPU's name": (
        FP8,
        manifest(gpus=[GPU | {"name": "NVIDIA H100 80GB HBM3"}]),
        "rank 0's GPU NVIDIA H100 80GB HBM3",
    ),
    "one GPU twice": (TWO_GPUS, manifest(gpus=[GPU, GPU | {"rank": 1}]), "one UUID for two ranks"),
    "ends before it starts": (
        FP8,
        events(("start", 0, 60), ("end", 12, 0)),
        r"events\.jsonl: event 2 \(end\): its time",
    ),
    "clocks back by an hour": (
        FP8,
        events(("start", 0, 3600), ("pause", 6, 3620), ("resume", 6, 0), ("end", 12, 40)),
        r"event 3 \(resume\)",
    ),
    "another file": (
        FP8,
        events(("start", 0, 0), ("end", 12, 31), metrics_sha256="0" * 64),
        "not the file that the run ended with",
    ),
}


def broken(name: str, folder: Path) -> Path:
    run, edit, _ = CASES[name]
    copy = shutil.copytree(run, folder / run.name)
    edit(copy)
    return copy


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_true_is_refused_with_its_file_step_and_key(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = broken(case, tmp_path)
    assert compare.main([str(run), str(BASE)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {run}")
        and error.count("\n") == 1
        and re.search(CASES[case][2], error)
    ), error


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("key", "value", "why"),
    [("memory_gb", math.inf, "has 151.4 GB at most"), ("step_time_s", 5e-324, "impossible")],
)
def test_a_number_that_overflows_is_refused_without_a_warning(
    key: str, value: float, why: str, tmp_path: Path
) -> None:
    run = shutil.copytree(FP8, tmp_path / "run")
    train(lambda _: {key: value})(run)
    _, left_out = load_all([run])
    assert f"{key} is" in left_out[0] and why in left_out[0]


@pytest.mark.parametrize("key", ["loss", "heldout_loss"])
def test_a_loss_that_is_another_runs_is_refused_in_both(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(DEMO_FP8, tmp_path / "run")
    base = DEMO / "llama3_tiny.bf16.cpu.seed1"
    column(key, base)(run)
    assert compare.main([str(base), str(run)]) == 2
    assert re.search(rf"values of {key} are those of .*to the last bit", capsys.readouterr().err)
    _, left_out = load_all([base, run])
    assert [
        f"{run}/metrics.jsonl:" in line or f"{base}/metrics.jsonl:" in line for line in left_out
    ] == [True, True]


REAL: dict[str, Edit] = {
    "killed and resumed": events(("start", 0, 0), ("resume", 5, 100), ("end", 12, 120)),
    "requeued on a host whose clock is behind": events(
        ("start", 0, 0), ("pause", 6, 40), ("resume", 6, -200), ("end", 12, -160)
    ),
    "a session that was repeated": events(
        ("start", 0, 0), ("pause", 8, 40), ("resume", 6, 50), ("end", 12, 65)
    ),
    "long evaluations and checkpoints": events(("start", 0, 0), ("end", 12, 1200)),
    "no times": lambda run: (run / "events.jsonl").unlink(),
    "less memory after a resume": lambda run: (
        events(("start", 0, 0), ("resume", 8, 20), ("end", 12, 40))(run),
        times("memory_gb", 0.9, range(9, 13))(run),
    )[0],
    "a slow first step": lambda run: (
        paced(0.9)(run),
        times("step_time_s", 2, range(1, 2))(run),
        times("tokens_per_s_per_gpu", 0.5, range(1, 2))(run),
    )[0],
    "digest": lambda run: put(
        run / "events.jsonl", [{"event": "end", "metrics_sha256": sha256(run / "metrics.jsonl")}]
    ),
}


@pytest.mark.parametrize("case", REAL)
def test_what_real_runs_do_is_not_refused(case: str, tmp_path: Path) -> None:
    run = shutil.copytree(FP8, tmp_path / "run")
    REAL[case](run)
    assert len(load_run(run).steps["loss"]) == 12


def test_every_shipped_run_can_be_true() -> None:
    for folder in RESULTS.iterdir():
        assert load_runs(folders_of([folder])) is not None


ARGUMENTS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "analysis/compare.py": (compare.main, []),
    "analysis/report.py": (report.main, ["--out", "{out}/report.html"]),
    "analysis/throughput.py": (throughput.main, []),
    "analysis/speed/full_depth_table.py": (full_depth_table.main, []),
    "analysis/tuning.py": (tuning.main, []),
    "analysis/speed/layouts.py": (layouts.main, []),
    "analysis/post/__main__.py": (
        lambda words: post(["fig3", "model=llama3_8b", *words]),
        ["--out", "{out}"],
    ),
    "recipes/measure/memory.py": (memory.main, []),
}
# Commands with a RUN that take no number of its metrics: they write one, read checkpoints, or its
# place in a queue.
OTHERS = {
    "analysis/import_logs.py",
    "recipes/evaluation/evaluate.py",
    "launch/resume.py",
    "launch/status.py",
    "launch/cancel.py",
}


def test_the_walk_over_commands_leaves_none_out() -> None:
    sources = [
        path
        for room in ("analysis", "launch", "recipes")
        for path in (PROJECT / room).rglob("*.py")
    ]
    takes_runs = {
        str(path.relative_to(PROJECT))
        for path in sources
        if re.search(r'metavar="RUN', path.read_text())
    }
    assert takes_runs == ARGUMENTS.keys() | OTHERS
    readers = {
        path.name
        for path in (PROJECT / "analysis").rglob("*.py")
        if "read_metrics(" in path.read_text()
    }
    assert readers == {"metrics.py", "load.py"}
    for notebook in (PROJECT / "analysis").glob("*.ipynb"):
        assert not re.search(r"metrics\.jsonl|read_metrics|rows_of", notebook.read_text()), notebook


@pytest.mark.parametrize("command", ARGUMENTS)
def test_every_command_that_reads_runs_says_so(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused as a whole, or left out of the table with the same line."""
    monkeypatch.setattr(
        training, "page", lambda *_: training.Page("", [])
    )  # the predictions take most of the time
    run = broken("a thousandth", tmp_path)
    main, options = ARGUMENTS[command]
    code = main([str(run), *(option.format(out=tmp_path) for option in options)])
    printed = capsys.readouterr()
    lines = [
        line
        for line in [*printed.out.splitlines(), *printed.err.splitlines()]
        if "an MFU of 16605%" in line
    ]
    assert len(lines) == 1 and f"{run}/metrics.jsonl: step 1: step_time_s" in lines[0], printed
    assert code == (0 if command.startswith("analysis/post") else 2)


def test_the_predictors_validation_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("a thousandth", tmp_path / "own")
    monkeypatch.setattr(predictor_rows, "RESULTS", tmp_path)
    monkeypatch.setattr(predictor_rows, "MEASURED", ("own",))
    with pytest.raises(InputError, match=r"a shipped run cannot be used: .*MFU"):
        predictor_rows.own_rows.__wrapped__()
