"""FP8 bytes and scales side by side, and the cause of each difference, found by computing what a
cause would give.

This project keeps values on the FP8 grid as FP32 numbers, Transformer Engine as bytes.  Bytes are
made of ours exactly, or not at all.  A cause is a rule that differs from ours in one known point,
such as the largest |x| skipping NaN: where numbers by that rule are Transformer Engine's bit for
bit, it is the cause.  Signs of zero and the bits of a NaN carry no value and are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.te_parity_rows import Difference
from recipes.training.fp8 import scaling
from recipes.training.fp8.formats import FP32_BIAS, Format, round_saturate_

ZERO, NAN, TIE = "sign of zero", "NaN payload", "one FP8 step at a tie"
NEIGHBOUR = "scale differs by one ULP"
SKIPS_NAN = "the largest |x| skips NaN"
KEEPS_LARGE = "a scale beyond BF16's largest value is kept"
FP32_LIMIT = "the largest scale is FP32's, not BF16's"
BEYOND_FP32 = "beyond FP32's largest value once descaled"
EXPONENT_0 = "the E8M0 exponent 0 multiplies by 1, not 2**127"
MAGNITUDE = 0x7F


@dataclass(frozen=True)
class Rule:
    """A way to choose scales: `scale` multiplies the elements of each group, `stored` is what is
    kept for the GEMM (both FP32 or int).
    """

    cause: str
    scale: Tensor
    stored: Tensor


@dataclass(frozen=True)
class Copy:
    """An FP8 copy of a tensor (rows, columns): bytes (uint8) and what is stored of each group's
    scale, (row groups, column groups).
    """

    data: Tensor
    stored: Tensor


def to_bytes(on_grid: Tensor, fmt: Format) -> Tensor:
    """Return FP32 values of the FP8 grid as bytes; ValueError where one is not on the grid."""
    found = on_grid.to(fmt.dtype)
    back = found.float()
    if not bool(((back == on_grid) | (back.isnan() & on_grid.isnan())).all()):
        wrong = int(((back != on_grid) & ~on_grid.isnan()).sum())
        raise ValueError(f"{wrong} of {on_grid.numel()} values are not on the grid of {fmt.name}")
    return found.view(torch.uint8)


def descaled_to_bytes(values: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return values that were divided by their scale as bytes; ValueError where dividing them again
    does not give the same bits.
    """
    on_grid = (
        (values * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).float()
    )  # infinite: dividing by the scale overflowed
    back = on_grid * scale.reciprocal()
    if not bool(((back == values) | (back.isnan() & values.isnan())).all()):
        raise ValueError(
            f"{int((back != values).sum())} of {values.numel()} values are no values of {fmt.name}"
            " over their scale"
        )
    return to_bytes(on_grid, fmt)


def quantise(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return the bytes of FP32 `x` under `scale`, which broadcasts."""
    return to_bytes(round_saturate_(x * scale, fmt), fmt)


def spread(groups: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Return a value for each element of `shape` from one for each block."""
    return groups.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[
        :, : shape[1]
    ]


def largest(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return max |x| of each block, (row groups, column groups); NaN where there is one."""
    return scaling._blocked(x.abs(), block).amax((1, 3))


def tensor_or_block_rules(
    x: Tensor, block: tuple[int, int], fmt: Format, power_of_two: bool
) -> list[Rule]:
    """Return ours and what Transformer Engine 2.11 may do instead (recipe_common.cuh,
    current_scaling.cu), for FP32 inverse scales.

    There the largest |x| is built with fmaxf, which skips NaN; and only an infinite quotient is
    replaced, by the largest value of the tensor's type in blocks and of FP32 for whole tensors,
    where this project bounds the quotient.
    """
    amax, without_nan = largest(x, block), largest(x.nan_to_num(0.0, torch.inf, -torch.inf), block)
    rules = [("", scaling.scale_from_amax(amax, fmt, power_of_two))]
    for skipped, seen in (("", amax), (SKIPS_NAN, without_nan)):
        for limit, value in (
            ("", None),
            (KEEPS_LARGE, scaling.BF16_MAX),
            (FP32_LIMIT, scaling.FP32_MAX),
        ):
            scale = (
                scaling.scale_from_amax(seen, fmt, power_of_two)
                if value is None
                else _only_infinite(seen, fmt, power_of_two, value)
            )
            rules.append((" and ".join(cause for cause in (skipped, limit) if cause), scale))
    return [
        Rule(cause, scale, scale.reciprocal())
        for number, (cause, scale) in enumerate(rules)
        if cause or number == 0
    ]


def _only_infinite(amax: Tensor, fmt: Format, power_of_two: bool, value_for_inf: float) -> Tensor:
    """Return compute_scale_from_amax as it is written: `value_for_inf` in place of an infinite
    quotient only.
    """
    scale = torch.div(fmt.max, amax)
    scale = torch.where(scale.isinf(), value_for_inf, scale)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def fixed_rules(scale: Tensor) -> list[Rule]:
    """Return the one rule where the scale of the whole tensor is given, as in delayed scaling."""
    scale = scale.reshape(1, 1)
    return [Rule("", scale, scale.reciprocal())]


def mx_rules(x: Tensor, block: tuple[int, int], fmt: Format, rounding: str) -> list[Rule]:
    """Return ours, and Transformer Engine's (ptx.cuh, exp2f_rcp) at the smallest exponent; `stored`
    are E8M0 exponents as int32.
    """
    amax = largest(x.nan_to_num(0.0, torch.inf, -torch.inf), block)
    exponent = scaling.e8m0_exponents(amax, fmt, rounding)
    scale = scaling.exp2_biased(2 * FP32_BIAS - exponent)
    return [
        Rule("", scale, exponent),
        Rule(EXPONENT_0, torch.where(exponent == 0, torch.ones_like(scale), scale), exponent),
    ]


def difference(
    x: Tensor, ours: Copy, theirs: Copy, rules: Sequence[Rule], block: tuple[int, int], fmt: Format
) -> Difference:
    """Compare two FP8 copies of FP32 `x` (rows, columns); the first of `rules` is ours.

    `stored` of both is compared bit by bit: inverse scales in FP32, or E8M0 exponents as int32.
    """
    _same_shape(ours, theirs)
    differs, scales = ours.data != theirs.data, _bits(ours.stored) != _bits(theirs.stored)
    scale_causes = _scale_causes(scales, theirs.stored, rules)
    causes = _causes(x, ours.data, theirs.data, differs, theirs.stored, rules, block, fmt)
    missing = (
        int(differs.sum()) - sum(causes.values()) + int(scales.sum()) - sum(scale_causes.values())
    )
    return Difference(
        elements=differs.numel(),
        identical=int((~differs).sum()),
        scales=scales.numel(),
        scales_identical=int((~scales).sum()),
        largest=float(_steps(ours.data, theirs.data, fmt).max()),
        explained=causes,
        scales_explained=scale_causes,
        unexplained=missing,
    )


def _same_shape(ours: Copy, theirs: Copy) -> None:
    for mine, other in ((ours.data, theirs.data), (ours.stored, theirs.stored)):
        if mine.shape != other.shape:
            raise ValueError(
                f"shapes differ: {tuple(mine.shape)} here, {tuple(other.shape)} in Transformer"
                " Engine"
            )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _scale_causes(differs: Tensor, stored: Tensor, rules: Sequence[Rule]) -> dict[str, int]:
    left, found = differs.clone(), dict[str, int]()
    for rule in rules[1:]:
        left = _claim(left, _bits(rule.stored) == _bits(stored), rule.cause, found)
    if stored.dtype == torch.float32:
        _claim(left, _neighbours(rules[0].stored, stored), NEIGHBOUR, found)
    return found


def _neighbours(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where two positive FP32 numbers follow each other."""
    return (_bits(ours) - _bits(theirs)).abs() == 1


def _claim(left: Tensor, hit: Tensor, cause: str, found: dict[str, int]) -> Tensor:
    """Count under `cause` what is left and hit, and return what is left then."""
    count = int((left & hit).sum())
    if count:
        found[cause] = found.get(cause, 0) + count
    return left & ~hit


def _causes(
    x: Tensor,
    ours: Tensor,
    theirs: Tensor,
    differs: Tensor,
    stored: Tensor,
    rules: Sequence[Rule],
    block: tuple[int, int],
    fmt: Format,
) -> dict[str, int]:
    """Count the differing elements by cause."""
    found = dict[str, int]()
    if not bool(differs.any()):
        return found
    left = _claim(differs, _both(ours, theirs, 0), ZERO, found)
    left = _claim(left, _is_nan(ours, fmt) & _is_nan(theirs, fmt), NAN, found)
    left = _claim(left, _overflows(theirs, stored, block, fmt) & x.isfinite(), BEYOND_FP32, found)
    for rule in rules[1:]:
        if not bool(left.any()):
            return found
        chosen = spread(
            (_bits(rule.stored) == _bits(stored)) & (rule.scale != rules[0].scale), block, x.shape
        )
        left = _claim(
            left,
            chosen & _same_value(quantise(x, spread(rule.scale, block, x.shape), fmt), theirs, fmt),
            rule.cause,
            found,
        )
    if stored.dtype == torch.float32 and bool(left.any()):
        theirs_by_their_scale = _same_value(
            quantise(x, spread(stored.reciprocal(), block, x.shape), fmt), theirs, fmt
        )
        left = _claim(
            left,
            spread(_neighbours(rules[0].stored, stored), block, x.shape) & theirs_by_their_scale,
            NEIGHBOUR,
            found,
        )
    _claim(left, _at_tie(x, ours, theirs, spread(rules[0].scale, block, x.shape), fmt), TIE, found)
    return found


def _overflows(data: Tensor, stored: Tensor, block: tuple[int, int], fmt: Format) -> Tensor:
    """Where a byte stands for a number that FP32 cannot hold: this project keeps blocks as such
    numbers.
    """
    scale_inv = stored if stored.dtype == torch.float32 else scaling.exp2_biased(stored)
    return (data.view(fmt.dtype).float() * spread(scale_inv, block, data.shape)).isinf()


def _both(a: Tensor, b: Tensor, magnitude: int) -> Tensor:
    return ((a & MAGNITUDE) == magnitude) & ((b & MAGNITUDE) == magnitude)


def _is_nan(data: Tensor, fmt: Format) -> Tensor:
    return data.view(fmt.dtype).float().isnan()


def _same_value(a: Tensor, b: Tensor, fmt: Format) -> Tensor:
    return (a == b) | _both(a, b, 0) | (_is_nan(a, fmt) & _is_nan(b, fmt))


def _steps(a: Tensor, b: Tensor, fmt: Format) -> Tensor:
    """Return how many values of the format lie between two bytes; 0 where either is NaN, and
    between the two zeros.
    """
    x, y = (torch.where(data > MAGNITUDE, -(data & MAGNITUDE).int(), data.int()) for data in (a, b))
    return torch.where(_is_nan(a, fmt) | _is_nan(b, fmt), 0, (x - y).abs())


def _at_tie(x: Tensor, ours: Tensor, theirs: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Where x times its scale, exact in FP64, lies in the middle of two neighbouring values, one
    ours, one theirs.
    """
    exact = x.double() * scale.double()
    distance = [(data.view(fmt.dtype).double() - exact).abs() for data in (ours, theirs)]
    return (_steps(ours, theirs, fmt) == 1) & (distance[0] == distance[1])
