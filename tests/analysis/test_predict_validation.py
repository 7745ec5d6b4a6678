"""Published rows and the fit: traps of the tables, what a fit may know, and how far off the shipped constants are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from analysis.predictor import stored
from analysis.predictor.fitting import fit, step_time
from analysis.predictor.price import NAMES, PRIOR
from analysis.predictor.rows import Row, own_rows, pairs, rows
from analysis.predictor.step import predict
from analysis.predictor.stored import constants, fits, ratio_interval, step_time_interval, write
from analysis.predictor.validation import GOALS, Validation, residuals, summary, tables, validate
from analysis.runs import load_run
from analysis.speed import step_time as step_time_of
from recipes.compose import compose_plan

MEASURED = Path(__file__).parents[2] / "analysis" / "results" / "llama3_8b_h100"


@pytest.fixture(scope="module")
def found() -> Validation:
    return validate()


def fitted() -> list[Row]:
    return [row for row in rows() if row.held == "fit"]


@pytest.mark.parametrize("run", sorted(MEASURED.iterdir()), ids=lambda path: path.name)
def test_our_own_measured_steps(run: Path) -> None:
    """Llama 3 8B cut to 2 and 6 layers on one H100: no published row, no fitted one.

    Writing FP8 parameters was read off the per-tensor runs; BF16 and sub-channel runs are predicted from nothing of theirs.
    """
    measured = load_run(run)
    h100 = compose_plan(["model=llama3_8b", "gpu=h100", "experiment=throughput"]).gpu  # when it ran, plans had no bandwidths
    assert predict(measured.plan.model_copy(update={"gpu": h100}), constants()).step_time_s == pytest.approx(step_time_of(measured).value, rel=0.05)


def test_steps_that_were_measured_afterwards_meet_the_goals_and_are_counted_apart(found: Validation) -> None:
    own = next(row for row in (dict(row) for row in tables(found)[2].rows) if row["set"] == "own")
    assert own["rows"] == len(own_rows()) == 46 and own["pairs"] == 34
    assert own["step_time_error"] < GOALS["step time"] and own["speedup_error"] < GOALS["speedup"]
    assert not {row.held for row in own_rows()} & {line.row.held for line in found.lines}


def test_traps_of_the_tables() -> None:
    held = {row.held for row in rows()}
    assert held == {"fit", "other release", "set aside", "fewer layers", "recipe not stated"}
    cut = [row for row in rows() if row.held == "fewer layers"]
    assert {row.plan.model.num_layers for row in cut} == {7, 8, 21, 30, 42, 62} and all(row.model == "llama31_405b" for row in cut)
    assert all(row.plan.model.num_layers == 126 for row in rows() if row.model == "llama31_405b" and row.held != "fewer layers")
    assert {row.release for row in rows() if row.held == "recipe not stated"} == {"24.07", "25.02"}
    assert not [row for row in rows() if "first text" in row.release]
    stray = next(row for row in cut if row.plan.num_gpus == 96 and row.plan.precision.name == "bf16" and row.release == "24.09")
    assert stray.step_time_s == 8.75
    assert sum(row.model == "nemotron4_340b" and "v25.03" in row.source for row in rows()) == 0  # repeats v24.11.1
    chunks = {row.plan.mapping.vp for row in rows() if row.model == "nemotron4_340b"}
    assert chunks == {12}, "one README does not state vp; NVIDIA's layout has 12"


def test_step_times_agree_with_the_throughput_beside_them() -> None:
    for row in rows():
        assert row.step_time_s > 0 and row.plan.num_gpus % (row.plan.mapping.tp * row.plan.mapping.pp * row.plan.mapping.cp) == 0
        assert row.plan.mapping.global_batch % (row.plan.mapping.micro_batch * row.plan.data_parallel) == 0, row


def test_flags_that_tables_do_not_state_come_from_the_recommended_layout() -> None:
    small = next(row for row in fitted() if (row.model, row.gpu, row.release) == ("llama3_8b", "gb200", "25.04"))
    assert small.plan.mapping.cuda_graphs and not small.plan.mapping.fsdp
    large = next(row for row in fitted() if (row.model, row.gpu, row.release) == ("llama3_70b", "gb200", "25.04"))
    assert large.plan.mapping.fsdp and not large.plan.mapping.cuda_graphs


def test_pairs_are_of_one_table_and_scale() -> None:
    for base, fp8 in pairs(rows()):
        assert base.plan.precision.fp8 is None and fp8.plan.precision.fp8 is not None
        assert (base.release, base.source, base.plan.num_gpus) == (fp8.release, fp8.source, fp8.plan.num_gpus)


def test_a_fit_without_rows_keeps_what_was_known() -> None:
    assert asdict(fit([]).constants) == pytest.approx(asdict(PRIOR))


def test_a_fit_finds_the_constants_that_made_the_rows() -> None:
    """Steps made by known constants: the fit predicts them to 1 %, although what was known beforehand pulls the other way."""
    made = replace(PRIOR, sustained=0.8, memory=0.6, blackwell=0.85, gap=4.0, attention=0.6)
    synthetic = [replace(row, step_time_s=step_time(row, made)) for row in fitted()]
    constants = fit(synthetic).constants
    errors = [abs(step_time(row, constants) / row.step_time_s - 1) for row in synthetic]
    assert sum(errors) / len(errors) < 0.01
    assert sum(abs(step_time(row, PRIOR) / row.step_time_s - 1) for row in synthetic) / len(errors) > 0.05


def test_left_out_rows_do_not_reach_their_own_prediction(found: Validation) -> None:
    """Every 15B step four times as long: its predictions without its model do not move, the others' do."""
    slow = [replace(row, step_time_s=row.step_time_s * (4 if row.model == "nemotron4_15b" else 1)) for row in fitted()]
    again = {(*line.row.cell, line.row.plan.num_gpus, line.row.source): line for line in validate(slow).lines}
    for line in found.lines:
        if line.without_model is not None:
            other = again[(*line.row.cell, line.row.plan.num_gpus, line.row.source)].without_model
            same = other == pytest.approx(line.without_model, rel=1e-6)
            assert same if line.row.model == "nemotron4_15b" else not same


def test_goals_out_of_sample(found: Validation) -> None:
    sums = {row["set"]: row for row in summary(found)}
    everything = sums["all, out of sample"]
    assert everything["rows"] == len(rows()) and everything["pairs"] == len(pairs(rows()))
    assert everything["step_time_error"] <= GOALS["step time"] and everything["speedup_error"] <= GOALS["speedup"]
    for name in ("fit", "other release", "set aside"):
        assert sums[name]["step_time_error"] <= GOALS["step time"]
    assert sums["fit"]["step_time_error_in_sample"] < sums["fit"]["step_time_error"] < sums["fit"]["step_time_error_gpu_left_out"]


def test_the_shipped_constants_are_those_of_a_fit_now(found: Validation, tmp_path: Path) -> None:
    write(found, tmp_path / "constants.json")
    fresh, shipped = (json.loads(path.read_text()) for path in (tmp_path / "constants.json", stored.STORED))
    assert fresh["fitted_to"] == shipped["fitted_to"] and fresh["gemms"] == shipped["gemms"]
    for name in NAMES:
        assert shipped["constants"][name]["value"] == pytest.approx(fresh["constants"][name]["value"], rel=1e-3, abs=1e-4)
    assert asdict(constants()) == pytest.approx(asdict(found.fit.constants), rel=1e-3, abs=1e-4)
    for name, errors in residuals(found).items():
        assert shipped["residuals"][name] == pytest.approx(errors, abs=2e-3)
    assert shipped["overhead"] == pytest.approx(fresh["overhead"], abs=1e-3) and max(line.overhead for line in found.lines) < 0.2
    for what in ("without_model", "without_gpu"):
        assert fresh[what].keys() == shipped[what].keys()
        for name, each in fresh[what].items():
            assert shipped[what][name] == pytest.approx(each, rel=2e-3, abs=1e-4)


def test_tables_of_the_shipped_fits_are_those_of_a_fit_now(found: Validation) -> None:
    again = validate(fits=fits())
    for ours, theirs in zip(again.lines, found.lines, strict=True):
        assert ours.row is theirs.row and ours.seconds == pytest.approx(theirs.seconds, rel=1e-3)
        assert ours.without_model == pytest.approx(theirs.without_model, rel=1e-3)
        assert ours.without_gpu == pytest.approx(theirs.without_gpu, rel=1e-3)


def test_a_ratio_of_gpus_is_less_certain_than_either() -> None:
    """Two published steps of one cell on a B200 and a GB200, none of them fitted, lie in the interval of their predicted ratio."""
    by_gpu = {gpu: [row for row in rows() if row.gpu == gpu] for gpu in ("b200", "gb200")}
    both = [
        (a, b) for a in by_gpu["b200"] for b in by_gpu["gb200"] if (a.model, a.plan.precision, a.release) == (b.model, b.plan.precision, b.release)
    ]
    assert len(both) >= 6
    for a, b in both:
        rates = [row.plan.tokens_per_step / row.plan.num_gpus / row.step_time_s for row in (a, b)]
        predicted = [predict(row.plan, constants()).tokens_per_s_per_gpu for row in (a, b)]
        ratio = ratio_interval(predicted[1] / predicted[0], b.plan.gpu, a.plan.gpu)
        assert ratio.low < rates[1] / rates[0] < ratio.high, (a.model, a.release)
        one = step_time_interval(1.0, b.plan.gpu)
        assert ratio.high / ratio.low > one.high / one.low


def test_intervals_hold_nine_of_ten_layouts(found: Validation) -> None:
    gpu = compose_plan(["model=llama3_8b", "gpu=h100", "experiment=throughput"]).gpu
    errors = residuals(found)["hopper"]
    time = step_time_interval(10.0, gpu)
    held = [time.low <= 10.0 / 2.718281828**e <= time.high for e in errors]
    assert 0.85 <= sum(held) / len(held) < 1
    unknown = step_time_interval(10.0, gpu.model_copy(update={"compute_capability": "8.0"}))
    assert unknown.high - unknown.low > 2 * (time.high - time.low)


def test_tables_hold_every_row_and_label_sets(found: Validation) -> None:
    lines, both, sums = tables(found)
    assert len(lines.shown) == len(rows()) and len(both.shown) == len(pairs(rows())) + 3 and len(sums.shown) == 8
    assert {row["in_sample"] for row in lines.rows if row["set"] == "fit"} == {True}
    assert {row["in_sample"] for row in lines.rows if row["set"] != "fit"} == {False}
    assert {row["pair"] for row in both.rows} == {"iso-mapping", "best-mapping"}
