"""The comparison with Transformer Engine, as far as it needs no GPU: bytes, causes of differences,
layouts, refusals and tables.

What needs a GPU and Transformer Engine is in tests/gpu/test_bits.py.
"""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.convergence import te_parity as analysis
from recipes.compose.tree import CONF
from recipes.errors import InputError
from recipes.measure.gpu import byte_differences as numbers
from recipes.measure.gpu import casts, linear_layers, sample_tensors
from recipes.measure.gpu.byte_differences import Copy
from recipes.measure.te_parity import main
from recipes.te_parity_rows import (
    AS_CHOSEN,
    COLUMN_WISE,
    OUTPUT,
    ROLES,
    ROW_WISE,
    STATE,
    Difference,
    Row,
    facts,
)
from recipes.training.fp8 import scaling
from recipes.training.fp8.formats import E4M3, E5M2, Format
from recipes.training.fp8.recipe import format_of, quantiser

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
ML_DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
RECIPES = {recipe.name: recipe for recipe in casts.recipes()}
TILE_ROW = (1, 4)


def _fp8(values: list[float], fmt: Format = E4M3) -> Tensor:
    return torch.tensor(np.array([values], np.float32).astype(ML_DTYPES[fmt.name]).view(np.uint8))


def _compared(x: list[float], ours: Tensor, theirs: Tensor, their_scale: float = 1.0) -> Difference:
    scale, other = torch.ones(1, 1), torch.tensor([[their_scale]])
    rules = [
        numbers.Rule("", scale, scale.reciprocal()),
        numbers.Rule("doubles", scale * 2, (scale * 2).reciprocal()),
    ]
    return numbers.difference(
        torch.tensor([x]),
        Copy(ours, scale.reciprocal()),
        Copy(theirs, other.reciprocal()),
        rules,
        TILE_ROW,
        E4M3,
    )


@FORMATS
def test_every_value_of_the_grid_becomes_its_byte(fmt: Format) -> None:
    every = np.arange(256, dtype=np.uint8)
    values = torch.tensor(every.view(ML_DTYPES[fmt.name]).astype(np.float32))
    found = numbers.to_bytes(values[None], fmt)[0].numpy()
    finite = values.isfinite().numpy()
    np.testing.assert_array_equal(found[finite], every[finite])
    assert numbers._is_nan(torch.tensor(found), fmt)[values.isnan()].all()


@FORMATS
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**127, 1.0, 447.3, 1e-3])
def test_values_that_were_divided_by_their_scale_give_back_their_bytes(
    fmt: Format, scale: float
) -> None:
    grid = torch.arange(0x7B, dtype=torch.uint8).view(fmt.dtype).float()[None]
    values = grid * torch.tensor(scale).reciprocal()
    assert torch.equal(
        numbers.descaled_to_bytes(values, torch.tensor(scale), fmt), numbers.to_bytes(grid, fmt)
    )


def test_what_is_not_on_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 values are not on the grid of e4m3"):
        numbers.to_bytes(torch.tensor([[1.0, 1.01]]), E4M3)
    with pytest.raises(ValueError, match="over their scale"):
        numbers.descaled_to_bytes(torch.tensor([[1.0, 1.01]]), torch.tensor(3.0), E4M3)


def test_equal_copies_have_no_difference() -> None:
    found = _compared([1.0, 2.0, 3.0, 4.0], _fp8([1, 2, 3, 4]), _fp8([1, 2, 3, 4]))
    assert (found.identical, found.scales_identical, found.largest, found.unexplained) == (
        4,
        1,
        0,
        0,
    ) and not found.explained


def test_the_sign_of_a_zero_and_the_bits_of_a_nan_are_told_apart() -> None:
    ours, theirs = _fp8([0.0, math.nan, 1.0, 2.0]), _fp8([-0.0, math.nan, 1.0, 2.0])
    theirs[0, 1], ours[0, 1] = 0x7F, 0xFF
    found = _compared([-1e-9, math.nan, 1.0, 2.0], ours, theirs)
    assert (
        found.explained == {numbers.ZERO: 1, numbers.NAN: 1}
        and found.unexplained == found.largest == 0
    )


def test_a_tie_that_went_the_other_way_is_named_and_another_step_is_not() -> None:
    tie = _compared([1.0625, 1.0, 1.0, 1.0], _fp8([1.0, 1, 1, 1]), _fp8([1.125, 1, 1, 1]))
    assert tie.explained == {numbers.TIE: 1} and tie.unexplained == 0 and tie.largest == 1
    step = _compared([1.07, 1.0, 1.0, 1.0], _fp8([1.125, 1, 1, 1]), _fp8([1.0, 1, 1, 1]))
    assert not step.explained and step.unexplained == 1
    far = _compared([1.0, 1.0, 1.0, 1.0], _fp8([1.0, 1, 1, 1]), _fp8([-1.0, 1, 1, 1]))
    assert far.unexplained == 1 and far.largest == 2 * 0x38


def test_a_rule_names_a_difference_only_where_it_gives_the_other_sides_bits() -> None:
    found = _compared([1.0, 2.0, 3.0, 4.0], _fp8([1, 2, 3, 4]), _fp8([2, 4, 6, 8]), 2.0)
    assert (
        found.explained == {"doubles": 4}
        and found.scales_explained == {"doubles": 1}
        and found.unexplained == 0
    )
    wrong = _compared([1.0, 2.0, 3.0, 4.0], _fp8([1, 2, 3, 4]), _fp8([2, 4, 6, 9]), 2.0)
    assert wrong.explained == {"doubles": 3} and wrong.unexplained == 1
    unknown = _compared([1.0, 2.0, 3.0, 4.0], _fp8([1, 2, 3, 4]), _fp8([4, 8, 12, 16]), 4.0)
    assert not unknown.explained and unknown.unexplained == 5


def test_a_scale_that_is_off_by_one_ulp_is_named_with_the_elements_that_it_moves() -> None:
    x, one, stored = (
        torch.tensor([[1.1875, 1.0, 1.0, 1.0]]),
        torch.ones(1, 1),
        torch.tensor([[1 + 2.0**-23]]),
    )
    ours, theirs = Copy(_fp8([1.25, 1, 1, 1]), one), Copy(_fp8([1.125, 1, 1, 1]), stored)
    found = numbers.difference(x, ours, theirs, [numbers.Rule("", one, one)], TILE_ROW, E4M3)
    assert (
        found.scales_explained == found.explained == {numbers.NEIGHBOUR: 1}
        and found.unexplained == 0
    )


def test_values_whose_descaled_number_overflows_fp32_are_named() -> None:
    x, scale = torch.tensor([[3.35e38, 1e38, 0.0, 0.0]]), torch.tensor([[2.0**-120]])
    values = numbers.quantise(x, scale, E4M3).view(E4M3.dtype).float() * scale.reciprocal()
    assert values[0, 0] == math.inf
    rule = numbers.Rule("", scale, scale.reciprocal())
    ours = Copy(numbers.descaled_to_bytes(values, scale, E4M3), rule.stored)
    found = numbers.difference(
        x, ours, Copy(numbers.quantise(x, scale, E4M3), rule.stored), [rule], TILE_ROW, E4M3
    )
    assert found.explained == {numbers.BEYOND_FP32: 1} and found.unexplained == 0


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        _compared([1.0, 2.0], _fp8([1, 2]), _fp8([1, 2, 3]))


def test_skipping_nan_is_the_cause_where_the_scale_is_that_of_the_other_elements() -> None:
    x = torch.tensor([[math.nan, 1.5, -3.0, 0.25]])
    rules = numbers.tensor_or_block_rules(x, TILE_ROW, E4M3, False)
    theirs = scaling.scale_from_amax(torch.tensor([[3.0]]), E4M3)
    ours = Copy(numbers.quantise(x, rules[0].scale, E4M3), rules[0].stored)
    found = numbers.difference(
        x, ours, Copy(numbers.quantise(x, theirs, E4M3), theirs.reciprocal()), rules, TILE_ROW, E4M3
    )
    assert rules[0].scale.item() != theirs.item(), (
        "ours skips NaN too: the rule has nothing to name any more"
    )
    assert (
        found.explained == {numbers.SKIPS_NAN: 3}
        and found.scales_explained == {numbers.SKIPS_NAN: 1}
        and found.unexplained == 0
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [kind for kind in sample_tensors.KINDS if "NaN" not in kind])
def test_our_bytes_times_their_scales_are_our_values(name: str, role: str, kind: str) -> None:
    recipe, shape = RECIPES[name], (96, 160)
    fmt = format_of(recipe.fp8, role)
    x = sample_tensors.make(kind, shape, fmt, "cpu").float()
    operand = quantiser(recipe.fp8)(x, role, False)
    for what, values in ((ROW_WISE, operand.row), (COLUMN_WISE, operand.col)):
        block = recipe.block(role, what, shape)
        if name == "mxfp8":
            rule = numbers.mx_rules(x, block, fmt, "up")[0]
        else:
            rule = numbers.tensor_or_block_rules(x, block, fmt, recipe.fp8.power_of_two_scales)[0]
        found = casts.our_copy(operand, what, rule, block, fmt)
        scale_inv = scaling.exp2_biased(found.stored) if name == "mxfp8" else found.stored
        back = found.data.view(fmt.dtype).float() * (
            1 if recipe.per_tensor else numbers.spread(scale_inv, block, shape)
        )
        assert torch.equal(back, values)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]), value=9)


@pytest.mark.parametrize("what", [ROW_WISE, COLUMN_WISE])
def test_transformer_engines_layouts_come_to_the_operands_rows_and_columns(what: str) -> None:
    """The layouts of pytorch/tensor/float8_tensor.py, float8_blockwise_tensor.py (get_scale_shape)
    and mxfp8_tensor.py at 2.11.
    """
    shape, side = (272, 400), {ROW_WISE: "rowwise", COLUMN_WISE: "columnwise"}[what]
    data = torch.arange(shape[0] * shape[1]).view(shape).remainder(251).to(torch.uint8)
    transposed = data if what == ROW_WISE else data.t().contiguous()
    # Groups by the operand's rows and columns, whether stored transposed, and the padded shape in
    # memory
    stored_as = {
        ("input", ROW_WISE): ((272, 4), True, (4, 272)),
        ("input", COLUMN_WISE): ((3, 400), False, (3, 400)),
        ("weight", ROW_WISE): ((3, 4), False, (3, 4)),
        ("weight", COLUMN_WISE): ((3, 4), True, (4, 4)),
    }
    for role in ("input", "weight"):
        groups, is_transposed, in_memory = stored_as[(role, what)]
        stored = torch.rand(groups)
        kept = _padded(stored.t() if is_transposed else stored, *in_memory)
        quantized = SimpleNamespace(**{f"_{side}_data": transposed, f"_{side}_scale_inv": kept})
        found = casts.te_copy(quantized, what, role, RECIPES["fp8_subchannel"], shape)
        assert torch.equal(found.data, data) and torch.equal(found.stored, stored)
    exponents = torch.randint(
        0, 255, (272, 13) if what == ROW_WISE else (9, 400), dtype=torch.uint8
    )
    kept = _padded(exponents, 384, 16) if what == ROW_WISE else _padded(exponents, 12, 512)
    found = casts.te_copy(
        SimpleNamespace(**{f"_{side}_data": data, f"_{side}_scale_inv": kept}),
        what,
        "input",
        RECIPES["mxfp8"],
        shape,
    )
    assert torch.equal(found.data, data) and torch.equal(found.stored, exponents.int())
    per_tensor = SimpleNamespace(
        _data=data, _transpose=data.t().contiguous(), _scale_inv=torch.tensor([0.5])
    )
    found = casts.te_copy(per_tensor, what, "grad", RECIPES["fp8_current"], shape)
    assert torch.equal(found.data, data) and found.stored.tolist() == [[0.5]]


def test_a_copy_that_was_not_made_is_named() -> None:
    without = SimpleNamespace(
        _data=torch.zeros(2, 2, dtype=torch.uint8), _transpose=None, _scale_inv=torch.ones(1)
    )
    with pytest.raises(ValueError, match="makes no transpose on this GPU"):
        casts.te_copy(without, COLUMN_WISE, "input", RECIPES["fp8_current"], (2, 2))


def test_an_error_in_a_case_is_a_row_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(casts, "_cast", fails)
    monkeypatch.setattr(casts, "unavailable", lambda recipe: "")
    rows = list(casts.casts(RECIPES["fp8_current"], "input", "normal", (256, 512)))
    assert [row.refused for row in rows] == ["RuntimeError: first line"] * 2 and rows[
        0
    ].share is None


def test_states_are_compared_step_by_step() -> None:
    ours = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 0.0, math.nan])]
    theirs = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 0.0, 5.0])]
    clean = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 0.0, 5.0])]
    found = casts.state_difference(ours, clean, theirs)
    assert (found.identical, found.elements, found.scales_identical) == (
        3,
        4,
        2,
    ) and found.explained == {numbers.SKIPS_NAN: 1}
    near = [ours[0], torch.tensor([float(np.nextafter(np.float32(2), np.float32(3))), 0.0, 7.0])]
    found = casts.state_difference(near, near, theirs)
    assert found.scales_explained == {numbers.NEIGHBOUR: 1} and found.unexplained == 1


@FORMATS
def test_ties_are_ties_and_a_power_of_two_scales_every_group(fmt: Format) -> None:
    x = sample_tensors.make("ties", (128, 256), fmt, "cpu").float()
    assert (
        set(numbers.largest(x, (1, 32)).flatten().tolist())
        == {fmt.max}
        == set(numbers.largest(x, (32, 1)).flatten().tolist())
    )
    nearest = numbers.quantise(x, torch.ones(()), fmt).view(fmt.dtype).float()
    assert ((nearest != x).float().mean()) > 0.3


def test_tensors_are_the_same_again_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for kind in sample_tensors.KINDS:
        first, second = (
            sample_tensors.make(kind, (272, 400), E4M3, "cpu").view(torch.int16) for _ in range(2)
        )
        assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)


def test_gemms_differences_are_classed_by_their_distance_from_the_exact_product() -> None:
    magnitude = torch.full((1, 4), 40.0, dtype=torch.float64)
    boundary = 1 + 2.0**-8  # between two BF16 numbers
    found = linear_layers.Exact(
        torch.tensor([[boundary, boundary, boundary, 1.0]], dtype=torch.float64), magnitude, 64
    )
    low, high = 1.0, 1 + 2.0**-7
    ours, theirs = (
        torch.tensor([x], dtype=torch.bfloat16)
        for x in ([low, low, low, 1.0], [high, high + 2.0**-7, 1.5, 1.0])
    )
    got = linear_layers.difference(found, ours, theirs)
    assert (
        got.identical == 1
        and got.explained == {linear_layers.ORDER: 1, linear_layers.FEWER_BITS: 1}
        and got.unexplained == 1
    )
    assert got.largest == 0.5 * 2**7 and got.unit == "BF16 ULP"


def test_ulp_is_the_distance_of_neighbours_in_bf16() -> None:
    x = torch.tensor([1.0, 1.99, 2.0, 0.0, 1e-40, 3e38, 448.0])
    rounded = x.bfloat16()
    toward_zero = (rounded.view(torch.int16) & ~0x7F).view(torch.bfloat16)  # the power of two below
    expected = (
        (toward_zero.view(torch.int16) + 1).view(torch.bfloat16).double() - toward_zero.double()
    ).tolist()
    got = linear_layers.ulp(x.double()).tolist()
    assert (
        got[:3] == expected[:3] == [2.0**-7, 2.0**-7, 2.0**-6]
        and got[3:5] == [2.0**-133] * 2
        and got[5:] == expected[5:]
    )


@pytest.mark.parametrize("name", [name for name in RECIPES if name != casts.FP32_SCALES])
def test_the_exact_product_is_what_our_layer_rounds(name: str) -> None:
    fp8 = RECIPES[name].fp8
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(64, 96).bfloat16(),
        torch.randn(160, 96).bfloat16(),
        torch.randn(64, 160).bfloat16(),
    )
    recipe = quantiser(fp8)
    operands = {
        role: recipe(value.float(), role, False)
        for role, value in zip(ROLES, (x, weight, grad), strict=True)
    }
    outputs = linear_layers._step(recipe, x, weight, grad)
    for gemm, output in outputs.items():
        found = linear_layers.exact(gemm, operands)
        compared = linear_layers._compared(found, output, found.product.bfloat16())
        assert (
            compared["share"] > 0.99
            and compared["unexplained"] == 0
            and 0.23 < compared["our_error"] < 0.27
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU, so nothing is refused")
def test_without_a_gpu_it_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(
            "error: recipes.measure.te_parity compares with Transformer Engine on a CUDA GPU"
        )
    )


def test_without_transformer_engine_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(casts.te_quantizers, "version", lambda: None)
    with pytest.raises(InputError, match="needs Transformer Engine"):
        casts.check()


def test_asking_for_help_needs_no_torch() -> None:
    code = (
        "import sys; import recipes.measure.te_parity, analysis.convergence.te_parity;"
        " print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True
    )
    assert done.stdout.strip() == "False"


def _folder(path: Path) -> Path:
    cast = Row("normal", "fp8_current", "input", ROW_WISE, "e4m3", (2, 50))
    first = Difference(100, 90, 1, 1, explained={numbers.ZERO: 6}, unexplained=4)
    second = Difference(300, 300, 3, 2, scales_explained={numbers.NEIGHBOUR: 1})
    rows = [
        asdict(cast) | facts(first),
        asdict(cast) | facts(second) | {"what": COLUMN_WISE, "case": "uniform"},
        asdict(
            Row("normal", "mxfp8", "input", ROW_WISE, "e4m3", (2, 50)).refuse("not here\nat all")
        ),
        asdict(
            Row(
                "linear layer",
                "fp8_current",
                "fprop",
                OUTPUT,
                "e4m3 x e4m3",
                (4, 5, 6),
                AS_CHOSEN,
                te_error=0.3,
            )
        )
        | facts(Difference(24, 12)),
        asdict(Row("2 steps", "fp8_delayed", "grad", STATE, "e5m2", (64, 64)))
        | facts(Difference(8, 8, 2, 2)),
    ]
    (path / "bits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "manifest.json").write_text(json.dumps({"device": "a test"}))
    return path


def test_the_table_adds_up_tensors_and_says_why_bits_differ(tmp_path: Path) -> None:
    rows = analysis.load(_folder(tmp_path))
    found = analysis.table(rows)
    assert found.index.tolist() == [("fp8_current", "input")]
    line = found.iloc[0]
    assert (
        line["elements"],
        line["identical bytes"],
        line["same value"],
        line["identical scales"],
    ) == (400, 390 / 400, 396 / 400, 0.75)
    assert (
        line["unexplained"] == 4
        and line["causes"] == "sign of zero: 6; scale differs by one ULP: 1 scales"
    )
    assert analysis.states(rows)["identical bytes"].tolist() == [1.0]
    assert (
        analysis.gemms(rows).loc[("fp8_current", AS_CHOSEN, "fprop", "4 x 5 x 6"), "share"] == 0.5
    )
    assert analysis.refusals(rows)["refused"].tolist() == ["not here"]


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no bits\.jsonl; make one with python -m recipes\.measure\.te_parity"
    ):
        analysis.load(tmp_path)
    (tmp_path / "bits.jsonl").write_text(json.dumps({"case": "x"}) + "\n")
    with pytest.raises(InputError, match=r"bits\.jsonl has no recipe"):
        analysis.load(tmp_path)
