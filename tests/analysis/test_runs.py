"""What is refused, with which line; and that no cut of a file becomes a number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.compare import main as compare
from analysis.convergence.comparison import notes, row
from analysis.convergence.verdict import judge
from analysis.runs.load import load_run
from analysis.runs.timing import loss_matched, speedup
from recipes.errors import InputError
from recipes.run_folder import set_status
from tests.analysis.conftest import Maker, curve, own_noise, write

STEPS = 200


def rewrite(folder: Path, change: Any) -> Path:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    return folder


def at(step: int, **values: Any) -> Any:
    return lambda rows: [{**r, **values} if r["step"] == step and "loss" in r else r for r in rows]


def from_step(step: int, **values: Any) -> Any:
    return lambda rows: [{**r, **values} if r["step"] >= step and "loss" in r else r for r in rows]


UNSOUND = [
    (at(17, loss=float("nan")), "first at step 17"),
    (from_step(100, loss=float("nan")), "101 step(s)"),
    (at(17, loss=float("inf")), "loss is no finite"),
    (at(17, grad_norm=float("nan")), "grad_norm"),
    (at(17, grad_norm=0.0), "nothing was trained"),
    (lambda rows: [r for r in rows if r["step"] != 17], "step 17 is missing"),
    (lambda rows: [*rows[:17], rows[16], *rows[17:]], "repeated"),
    (lambda rows: rows[::-1], "out of order"),
    (lambda rows: [r for r in rows if r["step"] <= 150], "ends at step 150 of 200"),
    (lambda rows: [*rows, rows[-1]], "held-out losses are repeated"),
    (
        from_step(1, fp8_gemms=0),
        "200 step(s), first in step 1: 0 FP8 GEMMs where the plan implies 48",
    ),
    (
        from_step(1, fp8_gemms=1),
        "200 step(s), first in step 1: 1 FP8 GEMMs where the plan implies 48",
    ),
    (at(17, fp8_gemms=24), "1 step(s), first in step 17: 24 FP8 GEMMs where the plan implies 48"),
    (at(17, fp8_gemms=49), "49 FP8 GEMMs"),
    (at(17, fp8_gemms=float("nan")), "no number of FP8 GEMMs"),
    (lambda rows: [{k: v for k, v in r.items() if k != "fp8_gemms"} for r in rows], "no fp8_gemms"),
    (
        lambda rows: [{**r, "loss": "low"} if "loss" in r else r for r in rows],
        "differ in what they hold",
    ),
    (lambda rows: [], "wrote no training step"),
]


@pytest.mark.parametrize(("change", "says"), UNSOUND)
def test_unsound_runs_are_refused_with_the_reason(
    change: Any, says: str, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    base, bad = make("bf16", curve(STEPS), "bf16"), rewrite(make("fp8", curve(STEPS)), change)
    assert compare([str(base), str(bad)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_bf16_run_with_fp8_gemms_is_refused(make: Maker) -> None:
    with pytest.raises(InputError, match=r"96 FP8 GEMMs where the plan implies 0 \(BF16\)"):
        load_run(rewrite(make("bf16", curve(STEPS), "bf16"), at(3, fp8_gemms=96)))


@pytest.mark.parametrize("status", ["running", "paused", "failed"])
def test_a_run_that_is_not_done_is_refused(status: str, make: Maker) -> None:
    folder = make("fp8", curve(STEPS))
    set_status(folder, status)
    with pytest.raises(InputError, match=status):
        load_run(folder)


PAIRS = [
    ({"overrides": ("data.seed=2",)}, "data.seed"),
    ({"order_sha256": "2"}, "order of the batches"),
    ({"data": {"sha256": {"train.bin": "9"}}}, "differ in the data"),
    ({"overrides": ("train.max_lr=2.0e-4",)}, "train.max_lr"),
    ({"overrides": ("mapping.global_batch=16",)}, "mapping.global_batch"),
    ({"overrides": ("model.num_layers=3",)}, "model.num_layers"),
]


@pytest.mark.parametrize(("difference", "says"), PAIRS)
def test_runs_that_saw_other_batches_or_another_schedule_are_refused(
    difference: dict[str, Any], says: str, make: Maker
) -> None:
    base, other = make("bf16", curve(STEPS), "bf16"), make("fp8", curve(STEPS), **difference)
    from analysis.convergence.comparison import compare as compare_runs

    with pytest.raises(InputError, match=says):
        compare_runs([load_run(base), load_run(other)])


def test_compare_says_pass_fail_and_undecided_by_exit_code(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("bf16", curve(), "bf16")
    good = make("good", curve() + own_noise(1, size=0.002))
    bad = make("bad", curve() + 0.05)
    open_ = make("open", curve() + 0.0055 + own_noise(2, size=0.05))
    assert compare([str(good), str(base)]) == 0
    assert compare([str(base), str(good), str(bad)]) == 1
    assert compare([str(base), str(good), str(open_)]) == 3
    capsys.readouterr()
    assert compare(["--json", str(base), str(bad)]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["verdict"] == "fail" and row["labels"] == {
        "loss": "emulated",
        "step_time": "measured",
        "device": "cpu",
    }


def test_unsteady_step_times_give_no_speedup(make: Maker) -> None:
    base, run = (
        load_run(make(name, curve(), name, **MEASURED)) for name in ("bf16", "fp8_subchannel")
    )
    assert row(judge(base, run))["speedup_over_bf16"]
    times = run.steps["step_time_s"]
    times[-len(times) // 5 :] *= 1.2
    assert row(judge(base, run))["speedup_over_bf16"] is None
    assert "no speedup, since of fp8_subchannel the last third" in " ".join(notes(judge(base, run)))


MEASURED = {
    "labels": {"loss": "measured", "step_time": "measured"},
    "overrides": ("gpu=h200", "stack=nemo_25_04_te_2_11", "executor=local"),
}


def test_speedups_are_of_measured_runs_and_emulated_fp8_has_none(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make("bf16", curve(), "bf16", **MEASURED)
    runs = {
        "hardware": make("hardware", curve(), "fp8_subchannel", **MEASURED),
        "stack": make(
            "stack",
            curve(),
            "mxfp8",
            **{**MEASURED, "overrides": ("gpu=h200", "stack=emulated", "executor=local")},
        ),
        "label": make(
            "label",
            curve(),
            "fp8_subchannel",
            **{**MEASURED, "labels": {"loss": "emulated", "step_time": "measured"}},
        ),
    }
    assert compare(["--json", str(base), *map(str, runs.values())]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["hardware"]["speedup_over_bf16"]["value"] == pytest.approx(1.25, rel=0.02)
    for name in ("stack", "label"):
        assert (
            rows[name]["speedup_over_bf16"] is None and rows[name]["loss_matched_speedup"] is None
        )
    for name, says in (("hardware", (True, False)), ("stack", (False, True))):
        assert compare([str(base), str(runs[name])]) == 0
        text = capsys.readouterr().out
        assert ("1.25x" in text, "FP8 is emulated" in text) == says


def test_the_loss_matched_speedup_pays_for_the_steps_to_the_same_loss(make: Maker) -> None:
    """A run whose loss is that of BF16 a tenth of the steps earlier needs 1/9 more steps; the curve
    is straight.
    """
    steps = np.arange(1, 401)
    base = load_run(make("bf16", 4 - steps * 0.005, "bf16"))
    late = load_run(make("fp8", 4 - (steps - 40) * 0.005))
    faster = speedup(base, late)
    matched = loss_matched(base, faster, judge(base, late).gaps["tail"].nats, 100)
    assert matched and matched.value == pytest.approx(faster.value / 1.1)
    flat = load_run(make("flat", np.full(400, 2.0), "bf16"))
    assert (
        loss_matched(
            flat,
            faster,
            judge(flat, load_run(make("flat8", np.full(400, 2.0)))).gaps["tail"].nats,
            100,
        )
        is None
    )


@pytest.mark.parametrize("arguments", [["nowhere"], ["{base}"], ["{fp8}"], ["{base}", "nowhere"]])
def test_wrong_arguments_are_one_line(
    arguments: list[str], make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"base": make("bf16", curve(STEPS), "bf16"), "fp8": make("fp8", curve(STEPS))}
    assert compare([a.format(**folders) for a in arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_cut_at_any_byte_is_refused_until_every_step_is_there(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = write(tmp_path_factory.mktemp("cut") / "fp8", curve(24), "fp8_current", [])
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    last_evaluation = whole.rstrip(b"\n").rfind(b"\n") + 1  # the file ends with a held-out loss
    cuts = [end for end in range(len(whole)) if end != last_evaluation]
    for end in cuts:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            load_run(folder)
    print(f"{len(cuts)} cuts, all refused")
    path.write_bytes(whole[:last_evaluation])
    assert len(load_run(folder).steps["loss"]) == 24


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("junk") / "fp8", curve(24), "fp8_current", [])


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 5000), junk=st.binary(min_size=1, max_size=12))
def test_junk_in_a_file_is_refused_or_changes_no_number(
    place: int, junk: bytes, sound: Path
) -> None:
    path = sound / "metrics.jsonl"
    whole, before = path.read_bytes(), load_run(sound)
    place %= len(whole)
    path.write_bytes(whole[:place] + junk + whole[place:])
    try:
        found = load_run(sound)
    except InputError:
        return
    finally:
        path.write_bytes(whole)
    assert len(found.steps["loss"]) == 24
    assert np.isfinite(found.steps["loss"]).all()
    assert set(found.steps) == set(before.steps)


def test_analysis_imports_nothing_heavy_and_no_launch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, analysis.compare, analysis.report;print(sorted({m.split('.')[0] for m in"
        " sys.modules} & {'torch', 'nemo', 'megatron', 'lightning', 'launch',"
        " 'transformer_engine'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
