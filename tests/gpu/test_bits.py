"""This project's numerics against Transformer Engine's on a CUDA GPU: every difference has a cause,
ordinary tensors have none.
"""

from pathlib import Path

import pytest
import torch

from analysis.convergence.te_parity import gemms, load, refusals, table
from recipes.measure.gpu import casts
from recipes.measure.gpu.byte_differences import (
    BEYOND_FP32,
    EXPONENT_0,
    FP32_LIMIT,
    KEEPS_LARGE,
    NAN,
    SKIPS_NAN,
    ZERO,
)
from recipes.measure.te_parity import main
from recipes.te_parity_rows import (
    AS_CHOSEN,
    COLUMN_WISE,
    OUTPUT,
    PRECISE,
    ROLES,
    ROW_WISE,
    STATE,
    Row,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]
WITH_NAN = {"NaN elements", "all NaN"}
AT_THE_ENDS = {
    "subnormal",
    "small groups",
    "every finite BF16",
}  # of FP32's range, where scales or values overflow
COPIES = {ROW_WISE, COLUMN_WISE}
OF_NAN = {NAN, SKIPS_NAN}
OF_LIMITS = {KEEPS_LARGE, FP32_LIMIT, BEYOND_FP32, EXPONENT_0}


@pytest.fixture(scope="module")
def rows(transformer_engine: str) -> list[Row]:
    return list(casts.run(large=False))


def _causes(row: Row) -> set[str]:
    return set(row.explained) | set(row.scales_explained)


def _made(rows: list[Row], what: set[str]) -> list[Row]:
    found = [row for row in rows if row.what in what and not row.refused]
    assert found
    return found


def test_only_what_the_gpu_cannot_do_is_refused(rows: list[Row]) -> None:
    capability = torch.cuda.get_device_capability()
    allowed = {"mxfp8"} if capability < (10, 0) else {"fp8_subchannel, FP32 scales"}
    refused = [
        row
        for row in rows
        if row.refused
        and not (
            row.recipe in allowed and ("capability" in row.refused or "power of two" in row.refused)
        )
    ]
    if capability >= (10, 0):  # there is no transposed copy where GEMMs take both layouts
        refused = [row for row in refused if "makes no transpose" not in row.refused]
    assert not refused


def test_every_recipe_and_operand_is_compared_in_both_copies(rows: list[Row]) -> None:
    here = {row.recipe for row in rows if not row.refused}
    assert {"fp8_delayed", "fp8_current", "fp8_subchannel"} <= here
    compared = {(row.recipe, row.operand) for row in _made(rows, {ROW_WISE})}
    assert compared >= {(recipe, role) for recipe in here for role in ROLES}


def test_casts_of_ordinary_and_of_extreme_finite_tensors_are_the_same_bits_but_for_the_sign_of_zero(
    rows: list[Row],
) -> None:
    for row in _made(rows, COPIES):
        if row.case not in WITH_NAN | AT_THE_ENDS:
            assert _causes(row) <= {ZERO} and row.unexplained == 0, row
            assert row.scales_identical == 1 and row.largest == 0, row


def test_casts_at_the_ends_of_the_range_and_of_nan_differ_for_known_causes_only(
    rows: list[Row],
) -> None:
    for row in _made(rows, COPIES):
        assert row.unexplained == 0, row
        assert _causes(row) <= {ZERO} | (OF_NAN if row.case in WITH_NAN else set()) | (
            OF_LIMITS if row.case in AT_THE_ENDS else set()
        ), row


def test_delayed_scaling_keeps_the_same_history_and_scale(rows: list[Row]) -> None:
    for row in _made(rows, {STATE}):
        assert row.unexplained == 0 and _causes(row) <= {SKIPS_NAN}, row
        assert row.case != "linear layer" or (row.share == row.scales_identical == 1), row


def test_gemms_differ_by_the_order_of_additions_and_the_split_accumulator_brings_them_closer(
    rows: list[Row],
) -> None:
    found = {
        (row.recipe, row.accumulation, row.operand, row.shape): row for row in _made(rows, {OUTPUT})
    }
    for row in found.values():
        assert row.unexplained == 0 and row.our_error is not None and 0.24 < row.our_error < 0.26, (
            row
        )
    for (recipe, accumulation, gemm, shape), row in found.items():
        if accumulation == AS_CHOSEN:
            assert found[(recipe, PRECISE, gemm, shape)].share >= row.share - 0.01, row


def test_the_command_writes_what_analysis_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--small", "--out", str(tmp_path)]) == 0
    found = load(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == len(found)
    assert found["device"].iloc[0] == torch.cuda.get_device_name()
    assert (table(found)["same value"] > 0.9).all() and not gemms(found).empty
    assert set(refusals(found)["recipe"]) <= {
        "mxfp8",
        "fp8_subchannel, FP32 scales",
        "fp8_delayed",
        "fp8_current",
    }
