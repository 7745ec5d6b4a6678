"""Scales: what a tensor is multiplied by before it is rounded to FP8, per tensor, per tile, or per block of 32.

FP8 has two or three bits of mantissa and little range, so a scale moves each group of values to the top of that
range.  The recipes differ in what shares a scale, and in the numbers that a scale may be:

- one scale a tensor (delayed, current): cheapest, but one outlier pushes the small values towards zero;
- 1x128 tiles and 128x128 blocks (sub-channel): an outlier spoils only its neighbours;
- 32 values along the contracted dimension with a power of two as scale (MXFP8, OCP Microscaling v1.0).

The rules for zero, infinite and tiny maxima are those of Transformer Engine (common/recipe/recipe_common.cuh and
common/util/ptx.cuh, read at 2.11 and at d0067d0): they decide what a bad tensor does to a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.training.fp8.formats import Format, round_saturate_

BF16_MAX = torch.finfo(torch.bfloat16).max
FP32_MAX = torch.finfo(torch.float32).max
TILE = 128
MX_BLOCK = 32


def absolute_max(x: Tensor) -> Tensor:
    """Return max |x| of the whole tensor as an FP32 scalar; NaN where there is one."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def scale_from_amax(amax: Tensor, fmt: Format, power_of_two: bool = False, value_for_inf: float = BF16_MAX) -> Tensor:
    """Return the FP32 scale that maps `amax` to the largest value of `fmt` (compute_scale_from_amax).

    1 where `amax` is zero, infinite or NaN; `value_for_inf` (the largest value of the tensor's own type) where the
    quotient overflows FP32; with `power_of_two` the mantissa is cut off.
    """
    scale = torch.div(fmt.max, amax).clamp_(max=value_for_inf)
    if power_of_two:
        scale = scale.view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def e8m0_exponents(amax: Tensor, fmt: Format, rounding: str) -> Tensor:
    """Return the biased 8-bit exponents (int32) of MX scales for FP32 maxima of blocks.

    "up" is Transformer Engine's float_to_e8m0(amax / largest value): the smallest power of two that saturates
    nothing.  "ocp_floor" is the rule of the OCP MX specification v1.0, section 6.3: floor(log2(amax)) minus the
    exponent of the largest value of the format, which saturates part of the top binade.  255 stands for NaN.
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
    """Return 2**(exponent - 127) in FP32 for biased exponents: 0 gives the subnormal 2**-127, 255 NaN."""
    bits = torch.where(exponent == 0, 0x00400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def quantise_tensor(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return FP32 `x` times the scalar `scale`, on the grid of `fmt` (not divided by the scale again)."""
    return round_saturate_(x * scale, fmt)


def _blocked(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """View (rows, cols) as (rows/b0, b0, cols/b1, b1), padded with zeros where a block is cut; return the shape too."""
    rows, cols = x.shape
    pad = (-cols % block[1], -rows % block[0])
    if any(pad):
        x = torch.nn.functional.pad(x, (0, pad[0], 0, pad[1]))
    return x.reshape(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1]), (rows, cols)


def _unblocked(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])[: shape[0], : shape[1]]


def quantise_blocks(x: Tensor, block: tuple[int, int], fmt: Format, power_of_two: bool) -> Tensor:
    """Return FP32 (rows, cols) `x` as FP8 with one scale a block of `block` elements, divided by the scales again."""
    tiles, shape = _blocked(x, block)
    scale = scale_from_amax(tiles.abs().amax((1, 3), keepdim=True), fmt, power_of_two)
    return _unblocked(round_saturate_(tiles * scale, fmt).mul_(scale.reciprocal()), shape)


def quantise_mx(x: Tensor, axis: int, fmt: Format, rounding: str) -> Tensor:
    """Return FP32 (rows, cols) `x` as MXFP8 with blocks of 32 along `axis` (0 rows, 1 columns), divided by the scales.

    A NaN element stays NaN and leaves its block's scale alone: Transformer Engine's maximum is fmaxf, which skips NaN.
    """
    tiles, shape = _blocked(x, (MX_BLOCK, 1) if axis == 0 else (1, MX_BLOCK))
    exponent = e8m0_exponents(tiles.abs().nan_to_num_(0.0, float("inf")).amax((1, 3), keepdim=True), fmt, rounding)
    quantised = round_saturate_(tiles * exp2_biased(254 - exponent), fmt)
    return _unblocked(quantised.mul_(exp2_biased(exponent)), shape)
