"""How many FP8 GEMMs a plan implies; that each command refuses a run with another number."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.compare import main as compare
from analysis.report import main as report
from analysis.throughput import main as throughput
from recipes.compose.tree import compose_plan
from recipes.estimate.fp8_gemms import fp8_gemms, refusal
from recipes.measure.memory import main as validation
from recipes.plan import Plan
from recipes.run_folder import read_plan, rows_of

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
WHOLE = RESULTS / "llama3_8b_h200"


def plan_of(*overrides: str) -> Plan:
    return compose_plan(["gpu=h100", "data=mock", *overrides])


LLAMA_8B = (
    "model=llama3_8b",
    "mapping=single",
    "mapping.micro_batch=1",
    "mapping.cp=2",
    "num_gpus=8",
)
LLAMA_8B = (*LLAMA_8B, "mapping.recompute_layers=32", "mapping.global_batch=32")
GPT_405B = ("model=llama31_405b", "precision=fp8_current", "experiment=throughput")
CASES = [
    # 32 layers, 4 data-parallel ranks with 8 micro-batches each, every layer recomputed
    ((*LLAMA_8B, "precision=bf16"), 0, 0),
    ((*LLAMA_8B, "precision=fp8_delayed"), 0, 4 * 32 * 8 * 4),
    ((*LLAMA_8B, "precision=fp8_current"), 0, 4 * 30 * 8 * 4),
    # The first layer is recomputed and in BF16
    ((*LLAMA_8B, "precision=fp8_current", "mapping.recompute_layers=1"), 0, 4 * 30 * 8 * 3),
    (
        (*LLAMA_8B, "precision=fp8_current", "mapping.recompute_layers=3"),
        0,
        4 * (28 * 3 + 2 * 4) * 8,
    ),
]
STAGES = ("mapping.pp=4", "mapping.cp=1", "mapping.recompute_layers=2", "precision=fp8_current")
CASES += [
    # 8 layers a stage; two data-parallel ranks with 16 micro-batches each
    ((*LLAMA_8B, *STAGES), 0, 4 * (6 * 3 + 1 * 4) * 16),
    ((*LLAMA_8B, *STAGES), 1, 4 * (6 * 3 + 2 * 4) * 16),
    ((*LLAMA_8B, *STAGES), 3, 4 * (5 * 3 + 2 * 4) * 16),
    # 2 chunks of 4 layers, each of which recomputes 2; layer 0 is in BF16
    ((*LLAMA_8B, *STAGES, "mapping.vp=2"), 0, 4 * (2 * 3 + 1 * 4 + 2 * 3 + 2 * 4) * 16),
]


@pytest.mark.parametrize(("overrides", "stage", "gemms"), CASES)
def test_a_plan_implies_a_number(overrides: tuple[str, ...], stage: int, gemms: int) -> None:
    plan = plan_of(*overrides)
    assert fp8_gemms(plan, stage) == gemms
    assert refusal(plan, gemms, stage) is None
    for other in {0, 1, gemms - 1, gemms + 1, 2 * gemms} - {gemms}:
        wrong = refusal(plan, other, stage)
        assert wrong and f"{other:,} FP8 GEMMs where the plan implies {gemms:,}" in wrong


def test_a_stage_that_holds_the_embedding_has_a_layer_less() -> None:
    """405B: embedding and loss count as layers, 126 + 2 in 8 stages of 8 chunks of 2."""
    plan = plan_of(*GPT_405B)
    m = plan.mapping
    assert (m.pp, m.vp, m.recompute_layers) == (8, 8, 0)
    micro_batches = m.global_batch // plan.data_parallel
    layers = [fp8_gemms(plan, stage) / (4 * 3 * micro_batches) for stage in range(8)]
    assert layers == [15, 16, 16, 16, 16, 16, 16, 15]


@pytest.mark.parametrize("folder", sorted(p.parent for p in RESULTS.rglob("plan.json")), ids=str)
def test_every_shipped_run_ran_what_its_plan_implies(folder: Path) -> None:
    plan = read_plan(folder)
    counted = [row["fp8_gemms"] for row in rows_of(folder / "metrics.jsonl") if "loss" in row]
    assert [refusal(plan, gemms) for gemms in counted] == [None] * len(counted)
    assert all(refusal(plan, gemms - 1) and refusal(plan, gemms + 1) for gemms in counted)


def test_the_step_that_records_cuda_graphs_runs_each_layer_four_times_more() -> None:
    """Measured on an H200: step 1 shows 576 FP8 GEMMs and the others 288."""
    folder = RESULTS / "tuning_h200" / "fp8_current.graphs"
    counted = [row["fp8_gemms"] for row in rows_of(folder / "metrics.jsonl")]
    assert counted == [576] + 11 * [288]
    plan = read_plan(folder)
    assert plan.mapping.cuda_graphs and refusal(plan, 2 * 288 + 48)
    no_graphs = plan.mapping.model_copy(update={"cuda_graphs": False})
    assert refusal(plan.model_copy(update={"mapping": no_graphs}), 576)


def test_with_a_pipeline_a_graph_is_recorded_for_each_micro_batch_in_flight() -> None:
    plan = plan_of("model=llama3_70b", "precision=fp8_delayed", "experiment=throughput")
    mapping = plan.mapping.model_copy(update={"cuda_graphs": True, "tp_overlap": False})
    plan = plan.model_copy(update={"mapping": mapping})
    planned, layers = fp8_gemms(plan), plan.model.num_layers // mapping.pp
    micro_batches = planned // (12 * layers)
    recorded = [n for n in range(2 * layers * micro_batches) if not refusal(plan, planned + 48 * n)]
    assert recorded == [0, *range(layers, layers * micro_batches + 1)]


def one_gemm_a_step(folder: Path, into: Path) -> Path:
    """Copy a run folder, with one FP8 GEMM in each step."""
    changed = Path(shutil.copytree(folder, into / folder.name))
    rows = [{**row, "fp8_gemms": 1} for row in rows_of(changed / "metrics.jsonl")]
    (changed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return changed


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare,
    "throughput": throughput,
    "validation": validation,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_one_gemm_per_step_is_refused(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = WHOLE / "llama3_8b.bf16.layers32.gbs4"
    changed = one_gemm_a_step(WHOLE / "llama3_8b.fp8_current.layers32.gbs4", tmp_path)
    arguments = [str(changed)] if command != "compare" else [str(base), str(changed)]
    assert COMMANDS[command](arguments) == 2
    error = capsys.readouterr().err
    assert "1 FP8 GEMMs where the plan implies 1,536" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_report_names_a_run_with_one_gemm_per_step(tmp_path: Path) -> None:
    demo = [RESULTS / "demo" / f"llama3_tiny.{name}.cpu.seed1" for name in ("bf16", "mxfp8")]
    changed = one_gemm_a_step(RESULTS / "demo" / "llama3_tiny.fp8_current.cpu.seed1", tmp_path)
    page = tmp_path / "page.html"
    assert report([*map(str, demo), str(changed), "--out", str(page)]) == 0
    assert "1 FP8 GEMMs where the plan implies 24" in page.read_text()
