"""Which GPU a run was on: a pair of several GPUs is named and gets a wider interval, and energy,
clocks and power are in table and page.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import throughput
from analysis.report import main as report
from analysis.runs.devices import BETWEEN_GPUS
from analysis.runs.load import load_run
from analysis.runs.timing import speedup
from analysis.speed import full_depth_table
from analysis.throughput import main as command
from tests.analysis.conftest import Maker, curve
from tests.analysis.test_depth import ALONE, BF16, CURRENT, edit, lines_of, named
from tests.analysis.test_throughput import ON_H100, run_of

OTHER = [{**ALONE[0], "uuid": "GPU-2"}]
SHARED = [{**ALONE[0], "others_during": {"processes": 1, "memory_gb": 3.0}}]
UNSEEN = [{"rank": 0, "uuid": "GPU-1"}]
CASES = {
    "same GPU": {"gpus": ALONE},
    "other GPU": {"gpus": OTHER},
    "shared GPU": {"gpus": SHARED},
    "GPU not recorded": {"gpus": UNSEEN},
    "GPU not recorded, old": {"gpus": []},
    "other GPU, resumed": {"gpus": ALONE, "gpus_before": ["GPU-2"]},
    "GPU not recorded, resumed": {"gpus": ALONE, "gpus_before": ["not recorded"]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_pair_that_may_be_of_two_gpus_or_shared_one_is_named_and_its_interval_is_wider(
    case: str, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [run_of(make, "bf16", 12.0), run_of(make, "fp8_delayed", 9.0, **CASES[case])]
    assert command([*map(str, folders), "--json"]) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)[1]
    name = case.split(",")[0]
    alone = speedup(*map(load_run, folders))
    assert row["pair_gpu"] == name and row["speedup_over_bf16"] == pytest.approx(alone.value)
    wider = 1.0 if name == "same GPU" else 1 + BETWEEN_GPUS
    assert (row["speedup_low"], row["speedup_high"]) == pytest.approx(
        (alone.low / wider, alone.high * wider)
    )
    assert ("0.7%" in printed.err and "fp8_delayed" in printed.err) == (name != "same GPU")
    assert throughput.cells(row)["pair"] == f"iso-mapping, {name}"


def test_of_two_equal_bases_that_on_the_same_gpu_is_taken(make: Maker) -> None:
    bases = [
        run_of(named(make, uuid), "bf16", 12.0, gpus=[{**ALONE[0], "uuid": uuid}])
        for uuid in ("GPU-0", "GPU-1", "GPU-2")
    ]
    rows = throughput.rows(
        [load_run(folder) for folder in (*bases, run_of(make, "fp8_delayed", 9.0))]
    )
    assert rows[-1]["base"] == "GPU-1.bf16" and rows[-1]["pair_gpu"] == "same GPU"


def test_a_layers_speedup_of_two_gpus_is_wider_by_what_the_difference_of_two_steps_magnifies(
    make: Maker,
) -> None:
    lines = lines_of(make)
    same = full_depth_table.rows(lines)[1]
    for run in lines[1].runs:
        run.manifest["gpus"] = OTHER
    other = full_depth_table.rows(lines)[1]
    magnified = max(
        line.step_time_s[-1] / (line.step_time_s[-1] - line.step_time_s[0]) for line in lines
    )
    assert magnified > 1 and (same["pair_gpu"], other["pair_gpu"]) == ("same GPU", "other GPU")
    for what in ("speedup_per_layer", "speedup_whole"):
        assert other[f"{what}_high"] == pytest.approx(
            same[f"{what}_high"] * (1 + BETWEEN_GPUS * magnified), abs=2e-3
        )
    assert any(
        "another GPU" in note and "fp8_current" in note
        for note in full_depth_table.layers_table([same, other]).notes
    )
    assert not any("another GPU" in note for note in full_depth_table.layers_table([same]).notes)
    assert BF16 != CURRENT


def with_power(folder: Path, energy_j: float) -> Path:
    """Add what rank 0's GPU wrote; the first timed step was too short for a sample."""
    sampled = {"gpu_power_w": 690.0, "gpu_sm_clock_mhz": 1500.0}
    return edit(
        folder,
        lambda i: {"gpu_energy_j": energy_j, **(dict.fromkeys(sampled) if i == 3 else sampled)},
    )


KNOWN: dict[str, Any] = {
    "gpus": [{**ALONE[0], "power_limit_w": 700.0, "max_sm_clock_mhz": 1980.0, "driver": "580.1"}],
    "cudnn": {"torch": "9.19.0"},
}


def test_energy_clock_and_power_are_in_the_table_by_hand(make: Maker, tmp_path: Path) -> None:
    folders = [
        with_power(run_of(make, name, 10.0, **KNOWN), joules)
        for name, joules in (("bf16", 6000.0), ("fp8_delayed", 4000.0))
    ]
    made = throughput.table([*folders, run_of(named(make, "old"), "fp8_current", 9.0)])
    row = next(row for row in made.rows if row["precision"] == "fp8_delayed")
    assert (row["energy_per_step_j"], row["power_w"], row["sm_clock_mhz"]) == (
        8 * 4000,
        690,
        1500,
    )  # 8 GPUs, rank 0's for each
    assert row["energy_per_token_j"] == pytest.approx(8 * 4000 / (128 * 8192))
    shown = {line["precision"]: line for line in made.shown}
    assert (shown["fp8_delayed"]["J/step"], shown["fp8_delayed"]["J/token"]) == ("32,000", "0.0305")
    assert shown["fp8_delayed"]["clock, power"] == "1,500 of 1,980 MHz, 690 of 700 W"
    assert {shown["fp8_current"][column] for column in ("J/step", "J/token", "clock, power")} == {
        "–"
    }
    assert any("rank 0's GPU" in note for note in made.notes)
    without = throughput.table([run_of(named(make, "none"), "bf16", 12.0)])
    assert "J/token" not in without.columns and not any("NVML" in note for note in without.notes)


def test_the_page_names_gpus_and_what_recipes_save_in_energy(make: Maker, tmp_path: Path) -> None:
    measured = {"labels": {"loss": "measured", "step_time": "measured"}}
    runs = [
        ("bf16", 6000.0, curve(400)),
        ("fp8_delayed", 4000.0, curve(400)),
        ("fp8_current", None, curve(400)),
    ]
    folders = []
    for name, joules, loss in runs:
        folder = make(
            name,
            loss,
            name,
            ON_H100,
            device="NVIDIA H100 80GB HBM3",
            **measured,
            **({} if joules is None else KNOWN),
        )
        edit(folder, lambda i: {"step_time_s": 10 + i % 5 / 100})
        folders.append(folder if joules is None else with_power(folder, joules))
    page = tmp_path / "page.html"
    assert report([*map(str, folders), "--out", str(page)]) == 0
    text = page.read_text()
    assert (
        "GPU: GPU-1; other processes on it: none seen; driver: 580.1; cuDNN: torch 9.19.0" in text
    )
    assert "GPU: not recorded; other processes on it: not recorded" in text
    assert "<td>1.50x</td>" in text and "<th>J/token</th>" in text and "fp8_current" in text
