"""Scales: what a tensor is multiplied by before it is rounded to FP8, per tensor, per tile, or per
block of 32.

FP8 has two or three bits of mantissa and little range, so a scale moves each group of values to the
top of that range.  The recipes differ in what shares a scale, and in the numbers that a scale may
be:

- one scale a tensor (delayed, current): cheapest, but one outlier pushes the small values towards
  zero;
- 1x128 tiles and 128x128 blocks (sub-channel): an outlier spoils only its neighbours;
- 32 values along the contracted dimension with a power of two as scale (MXFP8, OCP Microscaling
  v1.0).

The rules for zero, infinite and tiny maxima are those of Transformer Engine
(common/recipe/recipe_common.cuh and common/util/ptx.cuh, read at 2.11 and at d0067d0): they decide
what a bad tensor does to a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.training.fp8.formats import (
    FP32_BIAS,
    FP32_EXPONENT_MASK,
    FP32_MANTISSA_BITS,
    Format,
    round_saturate_,
)

BF16_MAX = torch.finfo(torch.bfloat16).max
FP32_MAX = torch.finfo(torch.float32).max
TILE = 128
MX_BLOCK = 32
FP32_MANTISSA_MASK = (1 << FP32_MANTISSA_BITS) - 1


def absolute_max(x: Tensor) -> Tensor:
    """Return max |x| of the whole tensor as an FP32 scalar; NaN where there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def scale_from_amax(
    amax: Tensor, fmt: Format, power_of_two: bool = False, value_for_inf: float = BF16_MAX
) -> Tensor:
    """Return the FP32 scale that maps `amax` to the largest value of `fmt`
    (compute_scale_from_amax).

    1 where `amax` is zero, infinite or NaN; `value_for_inf` (the largest value of the tensor's own
    type) where the quotient overflows FP32; with `power_of_two` the mantissa is cut off.
    """
    scale = torch.div(fmt.max, amax).clamp_(max=value_for_inf)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def e8m0_exponents(amax: Tensor, fmt: Format, rounding: str) -> Tensor:
    """Return the biased 8-bit exponents (int32) of MX scales for FP32 maxima of blocks.

    "up" is Transformer Engine's float_to_e8m0(amax / largest value): the smallest power of two that
    saturates nothing.  "ocp_floor" is the rule of the OCP MX specification v1.0, section 6.3:
    floor(log2(amax)) minus the exponent of the largest value of the format, which saturates part of
    the top binade.  255 stands for NaN.
    """
    if rounding == "up":
        bits = (amax * (1.0 / fmt.max)).view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
        exponent = exponent + up.to(torch.int32)
        exponent = torch.where(torch.isinf(amax), 254, exponent)
    else:
        top = (torch.tensor(fmt.max).view(torch.int32) >> 23).item() - 127
        exponent = ((amax.view(torch.int32) >> 23) - int(top)).clamp_(0, 254)
    return torch.where(torch.isnan(amax), 255, exponent).to(torch.int32)


def exp2_biased(exponent: Tensor) -> Tensor:
    """Return 2**(exponent - 127) in FP32 for biased exponents: 0 gives the subnormal 2**-127, 255
    NaN.
    """
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


@dataclass(frozen=True)
class Quantised:
    """A tensor on the FP8 grid as FP32, and what was seen on the way.

    values: the tensor; for blocks already divided by its scales, for one scale a tensor still
    multiplied by it. amax: largest |x| of the tensor, scalar.  saturated: how many finite elements
    were too large for the format.
    """

    values: Tensor
    amax: Tensor
    saturated: int


def _saturated(scaled: Tensor, scaled_amax: Tensor, fmt: Format) -> int:
    """Count elements that saturate; free of cost where the maxima show that none can."""
    if not bool((scaled_amax >= fmt.overflow).any()):
        return 0
    magnitude = scaled.abs()
    return int(((magnitude >= fmt.overflow) & magnitude.isfinite()).sum())


def quantise_tensor(x: Tensor, scale: Tensor, amax: Tensor, fmt: Format) -> Quantised:
    """Quantise FP32 `x` with one `scale` (scalar); `amax` is its largest magnitude."""
    scaled = x * scale
    saturated = _saturated(scaled, amax * scale, fmt)
    return Quantised(round_saturate_(scaled, fmt), amax, saturated)


@dataclass(frozen=True)
class Source:
    """FP32 `x` (rows, cols) with its magnitudes and the powers of two below them, which both copies
    of it need.
    """

    x: Tensor
    magnitude: Tensor
    binade: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Source:
        """Return the source of `x`."""
        return cls(x, x.abs(), x.view(torch.int32) & FP32_EXPONENT_MASK)


def _blocked(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View (rows, cols) as (rows/b0, b0, cols/b1, b1), padded with zeros where a block is cut."""
    rows, cols = x.shape
    pad = (-cols % block[1], -rows % block[0])
    if any(pad):
        x = torch.nn.functional.pad(x, (0, pad[0], 0, pad[1]))
    return x.reshape(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1])


def _unblocked(x: Tensor, shape: torch.Size) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])[: shape[0], : shape[1]]


def _is_ordinary(amax: Tensor) -> bool:
    """Whether all maxima are zero or well inside FP32's range, so that no exponent below runs over
    an end.
    """
    low, high = torch.aminmax(amax)
    return bool(high < 2.0**100) and (
        bool(low > 2.0**-80) or bool(((amax > 2.0**-80) | (amax == 0)).all())
    )


def _quantise_tiles(
    source: Source,
    block: tuple[int, int],
    amax: Tensor,
    scale: Tensor,
    scale_inv: Tensor,
    fmt: Format,
) -> Quantised:
    tiles = _blocked(source.x, block)
    saturated = _saturated(tiles * scale, amax * scale, fmt)
    rounded = round_saturate_(tiles * scale, fmt).mul_(scale_inv)
    return Quantised(_unblocked(rounded, source.x.shape), amax.amax(), saturated)


def _round_in_place_of_scale(
    source: Source, block: tuple[int, int], amax: Tensor, exponent: Tensor, fmt: Format
) -> Quantised:
    """Quantise as `_quantise_tiles` does, in half the passes; `exponent` (int32, biased) is that of
    1/scale, a power of two.

    Multiplying by a power of two moves no mantissa bit, so elements can be rounded where they
    stand: only the exponent below which they are subnormal depends on the scale.  For ordinary
    maxima of which none saturates.
    """
    shift = FP32_MANTISSA_BITS - fmt.mantissa_bits
    lowest = (exponent + fmt.min_exponent).clamp_(min=1) << FP32_MANTISSA_BITS
    adder = torch.maximum(_blocked(source.binade, block), lowest)
    adder = adder.add_((shift << FP32_MANTISSA_BITS) + (1 << (FP32_MANTISSA_BITS - 1))).view(
        torch.float32
    )
    rounded = (_blocked(source.x, block) + adder).sub_(adder)
    return Quantised(_unblocked(rounded, source.x.shape), amax.amax(), 0)


def quantise_blocks(
    source: Source, block: tuple[int, int], fmt: Format, power_of_two: bool
) -> Quantised:
    """Quantise with one scale a block of `block` elements."""
    amax = _blocked(source.magnitude, block).amax((1, 3), keepdim=True)
    if power_of_two and _is_ordinary(amax):
        exponent = 2 * FP32_BIAS - (
            torch.div(fmt.max, amax).view(torch.int32) >> FP32_MANTISSA_BITS
        )
        return _round_in_place_of_scale(source, block, amax, exponent, fmt)
    scale = scale_from_amax(amax, fmt, power_of_two)
    return _quantise_tiles(source, block, amax, scale, scale.reciprocal(), fmt)


def quantise_mx(source: Source, axis: int, fmt: Format, rounding: str) -> Quantised:
    """Quantise to MXFP8 with blocks of 32 along `axis` (0 rows, 1 columns).

    A NaN element stays NaN and leaves its block's scale alone: Transformer Engine's maximum is
    fmaxf, which skips NaN.
    """
    block = (MX_BLOCK, 1) if axis == 0 else (1, MX_BLOCK)
    amax = _blocked(source.magnitude, block).amax((1, 3), keepdim=True)
    if rounding == "up" and _is_ordinary(amax):
        exponent = (
            (amax * (1.0 / fmt.max)).view(torch.int32) + FP32_MANTISSA_MASK
        ) >> FP32_MANTISSA_BITS
        return _round_in_place_of_scale(source, block, amax, exponent, fmt)
    if bool(amax.isnan().any()):
        amax = _blocked(source.magnitude.nan_to_num(0.0, float("inf")), block).amax(
            (1, 3), keepdim=True
        )
    exponent = e8m0_exponents(amax, fmt, rounding)
    return _quantise_tiles(
        source, block, amax, exp2_biased(254 - exponent), exp2_biased(exponent), fmt
    )
