"""The memory rule beside the rows that NVIDIA published: what ran is not refused."""

from __future__ import annotations

import csv

from analysis.predictor.calibration.as_ran import plan_as_ran
from analysis.predictor.calibration.published_steps import Row, rows
from analysis.runs.published import REFERENCE
from recipes.compose.fit import state
from recipes.estimate.memory import estimate


def found(model: str, gpu: str, precision: str, release: str) -> list[Row]:
    return [
        row
        for row in rows()
        if (row.model, row.gpu, row.plan.precision.name, row.release)
        == (model, gpu, precision, release)
    ]


def test_no_published_row_is_refused() -> None:
    assert len(rows()) == 249
    assert [row for row in rows() if state(plan_as_ran(row)) == "refused"] == []


def test_what_the_tables_leave_out_decides_it() -> None:
    """Without offloading and the stack's properties, layouts that ran would be refused."""
    assert len([row for row in rows() if state(row.plan) == "refused"]) == 21
    (row,) = found("llama3_70b", "gb200", "fp8_current", "25.09")
    assert plan_as_ran(row).mapping.offload_layers == 40 and row.plan.mapping.offload_layers == 0


def test_every_line_of_offloaded_layers_is_of_a_published_row() -> None:
    with (REFERENCE / "offloaded_layers.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        cell = (line["model"], line["gpu"], line["precision"], int(line["num_gpus"]))
        ran = [
            plan_as_ran(row)
            for row in rows()
            if (row.model, row.gpu, row.plan.precision.name, row.plan.num_gpus) == cell
        ]
        assert any(plan.mapping.offload_layers == int(line["offload_layers"]) for plan in ran), cell
        assert line["source"]


def test_rows_take_the_properties_of_their_stack() -> None:
    """MXFP8 parameters and SwiGLU's offloaded input from 25.07 on; none before, nor MXFP8
    parameters under FSDP.
    """
    for row in rows():
        plan = plan_as_ran(row)
        newer = tuple(map(int, row.release.split(".")[:2])) >= (25, 7)
        assert plan.stack.name == ("nemo_25_07" if newer else "nemo_25_04")
        assert plan.stack.offloads_swiglu == newer
        fp8 = plan.precision.fp8
        if fp8 and fp8.scaling == "mxfp8":
            assert fp8.param_gather == (newer and not plan.mapping.fsdp)


def test_the_stack_that_offloads_swiglu_keeps_less() -> None:
    (row,) = found("llama31_405b", "gb200", "fp8_current", "25.07")
    plan = plan_as_ran(row)
    without = plan.model_copy(
        update={"stack": plan.stack.model_copy(update={"offloads_swiglu": False})}
    )
    width = 2 * 2 * 53248 / 2  # bytes a token: two BF16 outputs a hidden unit, over tp=2
    more = estimate(without).terms["activations"] - estimate(plan).terms["activations"]
    assert plan.mapping.offload_layers == 95 and more == 95 * 8192 * width


def test_the_row_of_70b_in_mxfp8_has_the_micro_batch_of_its_accumulation() -> None:
    (row,) = found("llama3_70b", "gb200", "mxfp8", "25.09")
    m = row.plan.mapping
    assert m.micro_batch == 1 and m.global_batch == 16 * m.micro_batch * row.plan.data_parallel
