"""A recipe at work in one linear layer: which operand gets which format and scale, in which of the
three GEMMs.

    fprop  y  = x  w^T     contracts over input features
    dgrad  dx = dy w       contracts over output features
    wgrad  dw = dy^T x     contracts over tokens

Scaling along the contracted dimension means that an operand used in two GEMMs has two FP8 copies:
"row" (scaled along its last dimension) and "col" (along its first).  Per-tensor recipes need one
copy only.  E4M3 is used forward; the gradient dy is E5M2 in the hybrid format.

On a GPU, BF16 operands are quantised by `kernels.py`: the same bits in BF16, which a tensor core
multiplies, and no wait for the GPU.  What the kernels do not keep, the statistics of diagnosed
steps, is computed as on the CPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.plan import Fp8
from recipes.training.fp8 import scaling
from recipes.training.fp8.formats import E4M3, E5M2, Format
from recipes.training.fp8.scaling import Quantised

ROLES = ("input", "weight", "grad")


@dataclass(frozen=True)
class Operand:
    """FP8 copies of a 2-D tensor; a GEMM's result is multiplied by both operands' `scale_inv`.

    Values are FP32; of a BF16 tensor on a GPU they are BF16, wherever that holds them exactly.
    """

    row: Tensor
    col: Tensor
    scale_inv: Tensor | None = None

    def bf16(self) -> Operand:
        """Return the same in BF16."""
        row = self.row.bfloat16()
        return Operand(row, row if self.col is self.row else self.col.bfloat16(), self.scale_inv)


@dataclass(frozen=True)
class Seen:
    """What the last quantisation of an operand met.

    amax: its largest magnitude.  saturated: the share of its elements that were too large for the
    format.  On request (`diagnose`) also underflow: the share of its non-zero elements that became
    zero; and sqnr_db: the power of the signal over that of the quantisation noise, in decibels,
    over finite elements (None where there is no noise).
    """

    amax: float
    saturated: float
    underflow: float | None = None
    sqnr_db: float | None = None


class Quantiser(Protocol):
    """Turns one operand into FP8; `training` is False in evaluation, when no state may change."""

    seen: dict[str, Seen]
    diagnose: bool

    def __call__(self, x: Tensor, role: str, training: bool) -> Operand: ...


def look(x: Tensor, q: Quantised, dequantised: Tensor, diagnose: bool) -> Seen:
    """Return what was seen when `x` became `q`, which stands for the values `dequantised`."""
    amax, saturated = float(q.amax), q.saturated / max(1, x.numel())
    if not diagnose:
        return Seen(amax, saturated)
    nonzero = int(x.count_nonzero())
    lost = int(((x != 0) & (dequantised == 0)).sum())
    finite = x.isfinite()
    signal = float(x[finite].double().square().sum())
    noise = float((x - dequantised)[finite].double().square().sum())
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return Seen(amax, saturated, lost / max(1, nonzero), sqnr)


def format_of(fp8: Fp8, role: str) -> Format:
    """Return the FP8 format of an operand."""
    return E5M2 if role == "grad" and fp8.format == "hybrid" else E4M3


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can run on `x`."""
    return x.is_cuda


def in_bf16(x: Tensor) -> bool:
    """Whether the copies of `x` are BF16: on a GPU, whose tensor cores multiply that."""
    return x.dtype == torch.bfloat16 and on_gpu(x)


class Stateless(ABC):
    """A recipe that looks at the present tensor only: `in_torch` on any device, `in_kernels` on a
    GPU, to the same bits.
    """

    def __init__(self, fp8: Fp8) -> None:
        self.fp8 = fp8
        self.seen: dict[str, Seen] = {}
        self.diagnose = False

    def __call__(self, x: Tensor, role: str, training: bool) -> Operand:
        fmt = format_of(self.fp8, role)
        if not (in_bf16(x) and self.fits_bf16):
            return self.in_torch(x.float(), role, fmt)
        return (
            self.in_torch(x.float(), role, fmt).bf16()
            if self.diagnose
            else self.in_kernels(x, role, fmt)
        )

    @property
    def fits_bf16(self) -> bool:
        """Whether BF16 holds every value of the copies exactly."""
        return True

    @abstractmethod
    def in_torch(self, x: Tensor, role: str, fmt: Format) -> Operand:
        """Return the operand of FP32 `x`, and keep what was seen."""

    @abstractmethod
    def in_kernels(self, x: Tensor, role: str, fmt: Format) -> Operand:
        """Return the operand of BF16 `x` on a GPU."""

    def blocks(self, x: Tensor, role: str, row: Quantised, col: Quantised) -> Operand:
        """Return the operand of two copies that are divided by their scales already, and keep what
        was seen.
        """
        self.seen[role] = look(x, row, row.values, self.diagnose)
        return Operand(row.values, col.values)


class CurrentScaling(Stateless):
    """One scale a tensor, from the tensor itself (Transformer Engine's Float8CurrentScaling)."""

    def in_torch(self, x: Tensor, role: str, fmt: Format) -> Operand:
        amax = scaling.absolute_max(x)
        scale = scaling.scale_from_amax(amax, fmt, self.fp8.power_of_two_scales)
        q, scale_inv = scaling.quantise_tensor(x, scale, amax, fmt), scale.reciprocal()
        self.seen[role] = look(
            x, q, q.values * scale_inv if self.diagnose else q.values, self.diagnose
        )
        return Operand(q.values, q.values, scale_inv)

    def in_kernels(self, x: Tensor, role: str, fmt: Format) -> Operand:
        from recipes.training.fp8 import kernels

        q, scale_inv = kernels.quantise_current(x, fmt, self.fp8.power_of_two_scales)
        return Operand(q, q, scale_inv)


class DelayedScaling(torch.nn.Module):
    """One scale a tensor, from the largest |x| of past steps (Transformer Engine's DelayedScaling).

    Buffers, kept in checkpoints: `scale` (3) and `amax_history` (length, 3), a column a role.  As
    in delayed_scaling.cu, entry 0 takes the maximum of the present pass, the history then rolls by
    one, and the new scale is largest value / 2**margin / amax; a zero or non-finite amax leaves the
    scale as it was.  Maxima are reduced over all ranks.
    """

    scale: Tensor
    amax_history: Tensor

    def __init__(self, fp8: Fp8) -> None:
        super().__init__()
        self.fp8 = fp8
        self.register_buffer("scale", torch.ones(len(ROLES)))
        self.register_buffer("amax_history", torch.zeros(fp8.amax_history_len, len(ROLES)))
        self.seen: dict[str, Seen] = {}
        self.diagnose = False

    def _apply(self, fn: Any, recurse: bool = True) -> DelayedScaling:
        """Follow a move to a device, but stay in FP32 where the model turns to BF16
        (Megatron-Core's Float16Module).
        """
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self

    def __call__(self, x: Tensor, role: str, training: bool) -> Operand:
        fmt, column = format_of(self.fp8, role), ROLES.index(role)
        if in_bf16(x) and not self.diagnose:
            found, amax = self._in_kernels(x, fmt, column)
            observe = self._observe_in_kernels
        else:
            found, amax = self._in_torch(x.float(), role, fmt, column)
            found, observe = found.bf16() if in_bf16(x) else found, self._observe
        if training:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(amax, dist.ReduceOp.MAX)
            observe(amax, column, fmt.max / 2**self.fp8.margin)
        return found

    def _in_torch(self, x: Tensor, role: str, fmt: Format, column: int) -> tuple[Operand, Tensor]:
        scale, amax = self.scale[column].clone(), scaling.absolute_max(x)
        q, scale_inv = scaling.quantise_tensor(x, scale, amax, fmt), scale.reciprocal()
        self.seen[role] = look(
            x, q, q.values * scale_inv if self.diagnose else q.values, self.diagnose
        )
        return Operand(q.values, q.values, scale_inv), amax

    def _in_kernels(self, x: Tensor, fmt: Format, column: int) -> tuple[Operand, Tensor]:
        from recipes.training.fp8 import kernels

        q, scale_inv, amax = kernels.quantise_delayed(x, self.scale, column, fmt)
        return Operand(q, q, scale_inv), amax

    @torch.no_grad()
    def _observe(self, amax: Tensor, column: int, largest: float) -> None:
        """Record the maximum of this pass and set the scale of the next, which maps what was seen
        to `largest`.
        """
        if amax == 0:
            return
        history = self.amax_history[:, column]
        history[0] = amax
        history.copy_(history.roll(-1))
        used = (
            history.nan_to_num(0.0, float("inf")).max()
            if self.fp8.amax_compute_algo == "max"
            else amax
        )
        history[0] = 0
        if torch.isfinite(used) and used > 0:
            self.scale[column] = torch.div(largest, used).clamp_(max=scaling.FP32_MAX)

    def _observe_in_kernels(self, amax: Tensor, column: int, largest: float) -> None:
        from recipes.training.fp8 import kernels

        kernels.observe(
            amax,
            self.amax_history,
            self.scale,
            column,
            largest,
            self.fp8.amax_compute_algo == "most_recent",
        )


class SubchannelScaling(Stateless):
    """1x128 tiles for activations and gradients, 128x128 blocks for weights
    (Float8BlockScaling).
    """

    @property
    def fits_bf16(self) -> bool:
        """A value over a scale that is no power of two has more bits than BF16."""
        return self.fp8.power_of_two_scales

    def in_torch(self, x: Tensor, role: str, fmt: Format) -> Operand:
        tile, source = scaling.TILE, scaling.Source.of(x)

        def copy(block: tuple[int, int]) -> Quantised:
            return scaling.quantise_blocks(source, block, fmt, self.fp8.power_of_two_scales)

        if role == "weight":
            q = copy((tile, tile))
            return self.blocks(x, role, q, q)
        return self.blocks(x, role, copy((1, tile)), copy((tile, 1)))

    def in_kernels(self, x: Tensor, role: str, fmt: Format) -> Operand:
        from recipes.training.fp8 import kernels

        if role != "weight":
            return Operand(*kernels.quantise_tiles(x, fmt))
        q = kernels.quantise_squares(x, fmt)
        return Operand(q, q)


class MxScaling(Stateless):
    """Blocks of 32 along the contracted dimension with power-of-two scales (MXFP8BlockScaling)."""

    def in_torch(self, x: Tensor, role: str, fmt: Format) -> Operand:
        rounding, source = self.fp8.mx_scale_rounding, scaling.Source.of(x)
        return self.blocks(
            x, role, *(scaling.quantise_mx(source, axis, fmt, rounding) for axis in (1, 0))
        )

    def in_kernels(self, x: Tensor, role: str, fmt: Format) -> Operand:
        from recipes.training.fp8 import kernels

        return Operand(*kernels.quantise_mx(x, fmt, self.fp8.mx_scale_rounding))


QUANTISERS: dict[str, type] = {
    "delayed": DelayedScaling,
    "current": CurrentScaling,
    "subchannel": SubchannelScaling,
    "mxfp8": MxScaling,
}


def quantiser(fp8: Fp8) -> Quantiser:
    """Return a fresh quantiser for one linear layer."""
    made: Quantiser = QUANTISERS[fp8.scaling](fp8)
    return made
