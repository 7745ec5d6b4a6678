"""The quantisers of `scaling.py` as Triton kernels: the same bits, without waiting for the GPU, in
one or two passes over memory.

What runs eagerly asks the tensor questions (does anything saturate? is there a NaN?) whose answers
the host must wait for, and writes a dozen FP32 copies on the way.  Here the rule is computed for
every element, in registers: a block recipe reads a BF16 operand once and writes both of its copies,
along rows and along columns.

Copies are BF16, which is exact.  A value of E4M3 or E5M2 has at most four significant bits.
Divided by a power of two it stays on the grid of BF16 if the operand was: where its FP8 step is
finer than BF16's smallest, 2**-133, nothing was rounded away and it is the operand's own value;
where it is coarser, it is a multiple of it with four bits.  (A value that overflows is infinite in
both.)  One scale a tensor need not be a power of two, and stays apart until the GEMM has added in
FP32.

Largest magnitudes are compared as the integers that their bits are, which orders them as numbers
and puts NaN on top.  Divisions are IEEE's, and no multiplication is contracted with an addition:
Triton's defaults are neither.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recipes.training.fp8.formats import Format
from recipes.training.fp8.scaling import BF16_MAX, FP32_MAX, MX_BLOCK, TILE

EXACT = {
    "enable_fp_fusion": False
}  # launch option: no fused multiply-add, which rounds once where the CPU rounds twice
ELEMENTS = 4096  # of a program that goes over a tensor as a line
LINE_WARPS = 8
# Rows and columns of a program's part of an operand under MX; 128 x 128 for tiles and blocks
MX_TILE = 64
WARPS = {MX_TILE: 8, TILE: 16}

INFINITE_BITS = tl.constexpr(0x7F800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
MANTISSA_BITS = tl.constexpr(0x7FFFFF)
LARGEST_BF16 = tl.constexpr(BF16_MAX)
LARGEST_FP32 = tl.constexpr(FP32_MAX)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _divide(a: tl.constexpr, b):
    return tl.div_rn(tl.full(b.shape, a, tl.float32), b)


@triton.jit
def _load(x_ptr, place, inside):
    """Elements of a BF16 tensor as FP32: their bits are its upper half."""
    half = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.uint16, bitcast=True)
    return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _store(x_ptr, place, x, inside):
    """Write FP32 numbers that BF16 can hold."""
    half = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    tl.store(x_ptr + place, half.to(tl.bfloat16, bitcast=True), mask=inside)


@triton.jit
def _round_saturate(x, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """formats.round_saturate_; comparisons, unlike minimum and maximum, let NaN through."""
    x = tl.where(x > LARGEST, LARGEST, x)
    x = tl.where(x < -LARGEST, -LARGEST, x)
    magic = tl.maximum(_bits(x) & INFINITE_BITS, (127 + MIN_EXPONENT) << 23)
    adder = _float(magic + (((23 - MANTISSA) << 23) + (1 << 22)))
    return (x + adder) - adder


@triton.jit
def _power_of_two(exponent):
    """scaling.exp2_biased for exponents from 0 to 254."""
    return _float(tl.where(exponent == 0, 0x00400000, exponent << 23))


@triton.jit
def _scale_from_amax(amax_bits, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """scaling.scale_from_amax."""
    scale = _divide(LARGEST, _float(amax_bits))
    scale = tl.where(scale > LARGEST_BF16, LARGEST_BF16, scale)
    if POWER_OF_TWO:
        scale = _float(_bits(scale) & INFINITE_BITS)
    return tl.where((amax_bits > 0) & (amax_bits < INFINITE_BITS), scale, 1.0)


@triton.jit
def _mx_exponent(amax_bits, LARGEST: tl.constexpr, ROUND_UP: tl.constexpr):
    """scaling.e8m0_exponents for maxima without NaN."""
    if ROUND_UP:
        bits = _bits(_float(amax_bits) * (1.0 / LARGEST))
        exponent, mantissa = bits >> 23, bits & MANTISSA_BITS
        up = (mantissa > 0) & (exponent != 254) & ((exponent > 0) | (mantissa > 0x400000))
        return tl.where(amax_bits == INFINITE_BITS, 254, exponent + up.to(tl.int32))
    return tl.maximum(
        (amax_bits >> 23) - (8 if LARGEST == 448.0 else 15), 0
    )  # the exponent of the largest value


@triton.jit
def _exponent(amax_bits, LARGEST: tl.constexpr, MX: tl.constexpr, ROUND_UP: tl.constexpr):
    """The biased exponent of a group's inverse scale, a power of two."""
    if MX:
        return _mx_exponent(amax_bits, LARGEST, ROUND_UP)
    return 254 - (_bits(_scale_from_amax(amax_bits, LARGEST, True)) >> 23)


@triton.jit
def _quantise(
    x, exponent, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr
):
    """scaling._quantise_tiles: scale, round, divide by the scale."""
    rounded = _round_saturate(x * _power_of_two(254 - exponent), LARGEST, MANTISSA, MIN_EXPONENT)
    return rounded * _power_of_two(exponent)


@triton.jit
def _groups_kernel(
    x_ptr,
    row_ptr,
    col_ptr,
    rows,
    cols,
    GROUP: tl.constexpr,
    MX: tl.constexpr,
    ROUND_UP: tl.constexpr,
    SQUARE: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Both copies of SIDE x SIDE elements of a BF16 operand (rows, cols): groups of GROUP along
    rows and columns, or one square one.
    """
    i = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    place = i[:, None] * cols + j[None, :]
    inside = (i < rows)[:, None] & (j < cols)[None, :]
    x = _load(x_ptr, place, inside)
    magnitude = _bits(x) & MAGNITUDE_BITS
    if MX:
        magnitude = tl.where(magnitude > INFINITE_BITS, 0, magnitude)  # fmaxf skips NaN
    if SQUARE:
        exponent = _exponent(
            tl.max(tl.max(magnitude, axis=1, keep_dims=True), axis=0, keep_dims=True),
            LARGEST,
            MX,
            ROUND_UP,
        )
        _store(row_ptr, place, _quantise(x, exponent, LARGEST, MANTISSA, MIN_EXPONENT), inside)
    else:
        wide: tl.constexpr = [SIDE, SIDE // GROUP, GROUP]
        exponent = _exponent(
            tl.max(tl.reshape(magnitude, wide), axis=2, keep_dims=True), LARGEST, MX, ROUND_UP
        )
        along_rows = _quantise(tl.reshape(x, wide), exponent, LARGEST, MANTISSA, MIN_EXPONENT)
        _store(row_ptr, place, tl.reshape(along_rows, [SIDE, SIDE]), inside)
        tall: tl.constexpr = [SIDE // GROUP, GROUP, SIDE]
        exponent = _exponent(
            tl.max(tl.reshape(magnitude, tall), axis=1, keep_dims=True), LARGEST, MX, ROUND_UP
        )
        along_cols = _quantise(tl.reshape(x, tall), exponent, LARGEST, MANTISSA, MIN_EXPONENT)
        _store(col_ptr, place, tl.reshape(along_cols, [SIDE, SIDE]), inside)


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, count, ELEMENTS: tl.constexpr):
    """The largest magnitude of a tensor as the bits of an FP32 number, over what `amax_ptr`
    holds.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = _load(x_ptr, place, place < count)
    tl.atomic_max(amax_ptr, tl.max(_bits(x) & MAGNITUDE_BITS, axis=0))


@triton.jit(do_not_specialize=["column"])
def _tensor_kernel(
    x_ptr,
    q_ptr,
    amax_ptr,
    scale_ptr,
    scale_inv_ptr,
    column,
    count,
    CURRENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A tensor under one scale, still multiplied by it: from `amax_ptr` (CURRENT), or given, when
    the maximum is collected instead.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = _load(x_ptr, place, place < count)
    if CURRENT:
        scale = _scale_from_amax(tl.load(amax_ptr), LARGEST, POWER_OF_TWO)
    else:
        scale = tl.load(scale_ptr + column)
        tl.atomic_max(amax_ptr, tl.max(_bits(x) & MAGNITUDE_BITS, axis=0))
    _store(q_ptr, place, _round_saturate(x * scale, LARGEST, MANTISSA, MIN_EXPONENT), place < count)
    if tl.program_id(0) == 0:
        tl.store(scale_inv_ptr, _divide(1.0, scale))


@triton.jit(do_not_specialize=["column"])
def _observe_kernel(
    amax_ptr,
    history_ptr,
    scale_ptr,
    column,
    length,
    ROLES: tl.constexpr,
    LARGEST: tl.constexpr,
    MOST_RECENT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """DelayedScaling._observe: roll a column of the history (length, ROLES), put the present
    maximum in, set the next scale.
    """
    amax_bits = tl.load(amax_ptr) & MAGNITUDE_BITS
    i = tl.arange(0, ENTRIES)
    history = history_ptr + i * ROLES + column
    rolled = _bits(tl.load(history + ROLES, mask=i < length - 1, other=0.0))
    rolled = tl.where(i == length - 1, amax_bits, rolled)
    used_bits = (
        amax_bits if MOST_RECENT else tl.max(tl.where(rolled > INFINITE_BITS, 0, rolled), axis=0)
    )  # fmaxf skips NaN
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(
        history, _float(tl.where(i == 0, 0, rolled)), mask=i < tl.where(amax_bits == 0, 0, length)
    )
    scale = _divide(LARGEST, _float(used_bits))
    known = (used_bits > 0) & (used_bits < INFINITE_BITS) & (amax_bits != 0)
    tl.store(scale_ptr + column, tl.where(scale > LARGEST_FP32, LARGEST_FP32, scale), mask=known)


def _of(fmt: Format) -> dict[str, Any]:
    return {
        "LARGEST": fmt.max,
        "MANTISSA": fmt.mantissa_bits,
        "MIN_EXPONENT": fmt.min_exponent,
        **EXACT,
    }


def _groups(
    x: Tensor, group: int, fmt: Format, mx: bool, round_up: bool, square: bool
) -> tuple[Tensor, Tensor]:
    x, side = x.contiguous(), max(group, MX_TILE)
    row = torch.empty_like(x)
    col = row if square else torch.empty_like(x)
    grid = (triton.cdiv(x.shape[1], side), triton.cdiv(x.shape[0], side))
    _groups_kernel[grid](
        x,
        row,
        col,
        *x.shape,
        GROUP=group,
        MX=mx,
        ROUND_UP=round_up,
        SQUARE=square,
        SIDE=side,
        num_warps=WARPS[side],
        **_of(fmt),
    )
    return row, col


def quantise_mx(x: Tensor, fmt: Format, rounding: str) -> tuple[Tensor, Tensor]:
    """Return the MXFP8 copies of BF16 `x` (rows, cols), divided by their scales: groups of 32 along
    rows, and along columns.
    """
    return _groups(x, MX_BLOCK, fmt, mx=True, round_up=rounding == "up", square=False)


def quantise_tiles(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return the copies of BF16 `x` (rows, cols), divided by their power-of-two scales: 1x128
    tiles, and 128x1.
    """
    return _groups(x, TILE, fmt, mx=False, round_up=False, square=False)


def quantise_squares(x: Tensor, fmt: Format) -> Tensor:
    """Return the copy of BF16 `x` (rows, cols), divided by its power-of-two scales: 128x128
    blocks.
    """
    return _groups(x, TILE, fmt, mx=False, round_up=False, square=True)[0]


def quantise_current(x: Tensor, fmt: Format, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return BF16 `x` on the FP8 grid, multiplied by the scale of its own maximum, and the inverse
    scale (FP32, scalar).
    """
    x, amax = x.contiguous(), _zero(x)
    _amax_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](
        x, amax, x.numel(), ELEMENTS=ELEMENTS, num_warps=LINE_WARPS
    )
    return _tensor(x, amax, amax, 0, fmt, current=True, power_of_two=power_of_two)


def quantise_delayed(
    x: Tensor, scales: Tensor, column: int, fmt: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """Return BF16 `x` on the FP8 grid, multiplied by `scales[column]`, the inverse scale and max
    |x| (FP32, scalars).
    """
    x, amax = x.contiguous(), _zero(x)
    return *_tensor(x, amax, scales, column, fmt, current=False, power_of_two=False), amax.view(
        torch.float32
    )


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=x.device)


def _tensor(
    x: Tensor,
    amax: Tensor,
    scales: Tensor,
    column: int,
    fmt: Format,
    current: bool,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    q, scale_inv = torch.empty_like(x), torch.empty((), dtype=torch.float32, device=x.device)
    options = {
        "CURRENT": current,
        "POWER_OF_TWO": power_of_two,
        "ELEMENTS": ELEMENTS,
        "num_warps": LINE_WARPS,
    }
    _tensor_kernel[(triton.cdiv(x.numel(), ELEMENTS),)](
        x, q, amax, scales, scale_inv, column, x.numel(), **options, **_of(fmt)
    )
    return q, scale_inv


def observe(
    amax: Tensor, history: Tensor, scales: Tensor, column: int, largest: float, most_recent: bool
) -> None:
    """Put `amax` into column `column` of `history` (length, roles) and set `scales[column]`, as
    DelayedScaling does; in place, FP32.
    """
    length, roles = history.shape
    options = {
        "ROLES": roles,
        "LARGEST": largest,
        "MOST_RECENT": most_recent,
        "ENTRIES": triton.next_power_of_2(length),
    }
    _observe_kernel[(1,)](
        amax.view(torch.int32), history, scales, column, length, **options, **EXACT
    )
