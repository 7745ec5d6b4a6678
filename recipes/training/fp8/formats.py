"""The two 8-bit floating-point formats and rounding to them.

E4M3 (4 exponent, 3 mantissa bits, largest 448, no infinity) keeps more precision and serves
activations and weights; E5M2 (largest 57344) keeps more range and serves gradients in the hybrid
recipes.  Both are in "FP8 Formats for Deep Learning" (arXiv 2209.05433) and the OCP 8-bit floating
point specification, revision 1.0.

Rounding stays in FP32: a value on the FP8 grid is kept as the FP32 number that it stands for, which
is what an FP32 GEMM needs, and which costs a fifth of a round trip through torch's 8-bit types on a
CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FP32_EXPONENT_MASK = 0x7F800000
FP32_MANTISSA_BITS = 23
FP32_BIAS = 127


@dataclass(frozen=True)
class Format:
    """An FP8 format: its largest finite value, explicit mantissa bits and smallest normal
    exponent.
    """

    name: str
    max: float
    mantissa_bits: int
    min_exponent: int
    dtype: torch.dtype

    @property
    def overflow(self) -> float:
        """The smallest magnitude that would round beyond `max`, and so saturates: `max` and half a
        step.
        """
        step = 2.0 ** (math.frexp(self.max)[1] - 1 - self.mantissa_bits)
        return self.max + step / 2


E4M3 = Format("e4m3", 448.0, 3, -6, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, 2, -14, torch.float8_e5m2)


def round_saturate_(x: Tensor, fmt: Format) -> Tensor:
    """Round FP32 `x` in place to the nearest value of `fmt`, ties to even, and return it.

    Saturates as CUDA's cvt.satfinite does: beyond the largest value, infinities included, lies the
    largest value; NaN stays NaN.  Adding and subtracting 1.5 * 2**(e + 23 - mantissa_bits), e the
    exponent of the element, makes the FP32 adder do the rounding; e is held at the smallest normal
    exponent, which gives the subnormals.  A negative zero becomes zero.
    """
    x.clamp_(-fmt.max, fmt.max)
    shift = FP32_MANTISSA_BITS - fmt.mantissa_bits
    magic = x.view(torch.int32).bitwise_and(FP32_EXPONENT_MASK)
    magic.clamp_(min=(FP32_BIAS + fmt.min_exponent) << FP32_MANTISSA_BITS)
    magic.add_((shift << FP32_MANTISSA_BITS) + (1 << (FP32_MANTISSA_BITS - 1)))
    adder = magic.view(torch.float32)
    return x.add_(adder).sub_(adder)
