"""MXFP8 against a cast that is not ours (torchao), the fast path against the plain one, and the
diagnostics.
"""

import math

import pytest
import torch
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

from recipes.compose.tree import compose_plan
from recipes.training.fp8 import scaling
from recipes.training.fp8.formats import E4M3, E5M2, Format
from recipes.training.fp8.recipe import format_of, quantiser

FORMATS = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
ROUNDINGS = pytest.mark.parametrize(
    ("mode", "rounding"),
    [(ScaleCalculationMode.FLOOR, "ocp_floor"), (ScaleCalculationMode.RCEIL, "up")],
)
PRECISIONS = ["fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8"]


def ours(x: torch.Tensor, fmt: Format, rounding: str) -> torch.Tensor:
    return scaling.quantise_mx(scaling.Source.of(x), 1, fmt, rounding).values


def torchao(x: torch.Tensor, fmt: Format, mode: ScaleCalculationMode) -> torch.Tensor:
    scale, elements = to_mx(x, fmt.dtype, scaling.MX_BLOCK, mode)
    exponent = scale.view(torch.uint8).to(torch.int32).reshape(x.shape[0], -1, 1)
    return (
        elements.float().view(x.shape[0], -1, scaling.MX_BLOCK) * scaling.exp2_biased(exponent)
    ).view_as(x)


def numbers(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(512, 128)
    powers = {"normal": (0, 1), "wide": (-60, 60), "extreme": (-100, 120)}
    if kind in powers:
        return x * torch.exp2(torch.randint(*powers[kind], x.shape).float())
    special = {
        "zeros": 0.0,
        "largest": torch.finfo(torch.float32).max,
        "infinite": math.inf,
        "just above 448": 448.0 + 2**-15,
    }
    x[:, ::32] = special[kind]
    return x * (kind != "zeros")


@FORMATS
@ROUNDINGS
@pytest.mark.parametrize(
    "kind", ["normal", "wide", "extreme", "zeros", "largest", "infinite", "just above 448"]
)
def test_mxfp8_equals_torchao_bit_by_bit(
    fmt: Format, mode: ScaleCalculationMode, rounding: str, kind: str
) -> None:
    x = numbers(kind)
    got, expected = ours(x, fmt, rounding), torchao(x, fmt, mode)
    assert torch.equal(got, expected)


@FORMATS
@ROUNDINGS
def test_where_torchao_goes_another_way(
    fmt: Format, mode: ScaleCalculationMode, rounding: str
) -> None:
    """A NaN spoils its whole block there, but not in Transformer Engine; 2**-127, E8M0's smallest
    scale, is not used there.
    """
    x = torch.ones(1, 32)
    x[0, 5] = math.nan
    assert torchao(x, fmt, mode).isnan().all()
    assert ours(x, fmt, rounding).isnan().sum() == 1
    tiny = torch.full((1, 32), 2.0**-130)
    assert not torch.equal(torchao(tiny, fmt, mode), tiny)
    assert torch.equal(ours(tiny, fmt, rounding), tiny)


@FORMATS
@pytest.mark.parametrize("shape", [(64, 96), (33, 70), (1, 1), (300, 5)])
@pytest.mark.parametrize("kind", ["mx", "tiles", "blocks"])
def test_rounding_in_place_of_the_scale_changes_no_bit(
    fmt: Format, shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    x = (
        torch.randn(shape)
        * torch.exp2(torch.randint(-30, 30, shape).float())
        * (torch.rand(shape) > 0.2)
    )

    def quantised() -> list[torch.Tensor]:
        source = scaling.Source.of(x)
        if kind == "mx":
            return [scaling.quantise_mx(source, axis, fmt, "up").values for axis in (0, 1)]
        block = (1, 128) if kind == "tiles" else (128, 128)
        return [scaling.quantise_blocks(source, block, fmt, power_of_two=True).values]

    fast = quantised()
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "_is_ordinary", lambda amax: False)
        plain = quantised()
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_diagnostics_are_those_of_the_dequantised_tensor(precision: str) -> None:
    torch.manual_seed(2)
    recipe = quantiser(compose_plan([f"precision={precision}"]).precision.fp8)
    x = torch.randn(256, 256) * torch.exp2(torch.randint(-20, 1, (256, 256)).float())
    x[0, :10] = 0
    for _ in range(2):  # delayed scaling takes its scale from the first call
        recipe.diagnose = True
        operand = recipe(x, "input", True)
    seen = recipe.seen["input"]
    values = operand.row if operand.scale_inv is None else operand.row * operand.scale_inv
    noise = (x - values).double().square().sum()
    assert seen.amax == x.abs().max()
    assert seen.underflow == ((values == 0) & (x != 0)).sum().item() / (x != 0).sum().item() > 0
    assert seen.sqnr_db == pytest.approx(10 * math.log10(x.double().square().sum() / noise))
    assert 25 < seen.sqnr_db < 40  # three mantissa bits: about 6 dB a bit and 10 dB


def test_diagnostics_are_left_out_when_they_are_off() -> None:
    recipe = quantiser(compose_plan(["precision=mxfp8"]).precision.fp8)
    recipe(torch.randn(64, 64), "grad", True)
    assert recipe.seen["grad"].underflow is None and recipe.seen["grad"].sqnr_db is None


def test_gradients_are_e5m2_in_hybrid_recipes_only() -> None:
    hybrid, e4m3 = (
        compose_plan([f"precision={p}"]).precision.fp8 for p in ("fp8_current", "mxfp8")
    )
    assert [format_of(hybrid, role) for role in ("input", "weight", "grad")] == [E4M3, E4M3, E5M2]
    assert {format_of(e4m3, role) for role in ("input", "weight", "grad")} == {E4M3}
