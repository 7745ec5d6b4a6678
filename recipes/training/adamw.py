"""AdamW for BF16 moments in one Triton kernel: what FusedAdam does with FP32 copies, in one pass
over memory.

Transformer Engine's FusedAdam (2.11, pytorch/optimizers/fused_adam.py) copies BF16 moments to FP32,
updates them by multi_tensor/adam.cu and copies them back.  Here a parameter's 18 bytes (gradient,
weight, remainder, two moments; BF16 gradients) are read and written once.  The FP32 master weight
is kept as there: the BF16 weight, rounded to nearest, and the lower 16 bits (`remainder`).

The arithmetic is adam.cu's in FP32, with the same fused multiply-adds.  Divisions and the square
root are rounded to nearest here; Transformer Engine's are the GPU's approximations, and flush
subnormal numbers.  So moments come out the same, and an update of a master weight differs in the
last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a program: 8 a thread, so that BF16 is loaded 16 bytes at a time
WARPS = 8

QUIET_NAN = tl.constexpr(0x7FC0)


@triton.jit
def _widened(half):
    """BF16, given as 16-bit integers, as FP32."""
    return (half.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    """FP32 as BF16 in 16-bit integers, to nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, QUIET_NAN, half).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _adamw_kernel(
    weight_ptr,
    remainder_ptr,
    m_ptr,
    v_ptr,
    grad_ptr,
    count,
    lr,
    beta1,
    beta2,
    correction1,
    correction2,
    eps,
    decay,
    WIDE_GRAD: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """One step over `count` elements; all pointers are of 16-bit integers but the gradient's, which
    is FP32 if WIDE_GRAD.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    g = tl.load(grad_ptr + place, mask=inside, other=0)
    if not WIDE_GRAD:
        g = _widened(g)
    m = _widened(tl.load(m_ptr + place, mask=inside, other=0))
    v = _widened(tl.load(v_ptr + place, mask=inside, other=0))
    weight = tl.load(weight_ptr + place, mask=inside, other=0)
    low = tl.load(remainder_ptr + place, mask=inside, other=0)

    high = tl.where(low < 0, weight - 1, weight)  # undo the rounding
    master = ((high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
    m = tl.fma(m, beta1, g * (1.0 - beta1))
    v = tl.fma(v, beta2, g * (1.0 - beta2) * g)
    denominator = tl.sqrt_rn(tl.div_rn(v, correction2)) + eps
    update = tl.fma(master, decay, tl.div_rn(tl.div_rn(m, correction1), denominator))
    bits = tl.fma(-update, lr, master).to(tl.int32, bitcast=True)

    low = (bits & 0xFFFF).to(tl.int16)
    high = (bits >> 16).to(tl.int16)
    tl.store(weight_ptr + place, tl.where(low < 0, high + 1, high), mask=inside)
    tl.store(remainder_ptr + place, low, mask=inside)
    tl.store(m_ptr + place, _rounded(m), mask=inside)
    tl.store(v_ptr + place, _rounded(v), mask=inside)


def update(
    weight: Tensor,
    remainder: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    scalars: tuple[float, ...],
) -> None:
    """Step one parameter: BF16 weight and moments, int16 remainder, BF16 or FP32 gradient, all
    contiguous; `scalars` as of `scalars_of`.
    """
    kinds = (weight.dtype, remainder.dtype, m.dtype, v.dtype)
    if kinds != (torch.bfloat16, torch.int16, torch.bfloat16, torch.bfloat16) or grad.dtype not in (
        torch.bfloat16,
        torch.float32,
    ):
        raise TypeError(
            "settings.adam_kernel=triton updates BF16 weights and moments with their remainders,"
            f" not {kinds} with a gradient of {grad.dtype}; set"
            " settings.adam_kernel=transformer_engine"
        )
    if not all(tensor.is_contiguous() for tensor in (weight, remainder, m, v, grad)):
        raise ValueError(
            "settings.adam_kernel=triton updates contiguous parameters; set"
            " settings.adam_kernel=transformer_engine"
        )
    wide = grad.dtype == torch.float32
    half = [tensor.view(torch.int16) for tensor in (weight, remainder, m, v)]
    _adamw_kernel[(triton.cdiv(weight.numel(), ELEMENTS),)](
        *half,
        grad if wide else grad.view(torch.int16),
        weight.numel(),
        *scalars,
        WIDE_GRAD=wide,
        ELEMENTS=ELEMENTS,
        num_warps=WARPS,
    )


def scalars_of(group: dict[str, Any]) -> tuple[float, ...]:
    """Return lr, both betas, their bias corrections, eps and weight decay of a parameter group at
    its step.

    Corrections as adam.cu computes them: powers of the FP32 betas in FP64.
    """
    betas = [float(np.float32(beta)) for beta in group["betas"]]
    corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in betas]
    return (
        float(group["lr"]),
        *betas,
        *corrections,
        float(group["eps"]),
        float(group["weight_decay"]),
    )


@torch.no_grad()
def step(self: Any, closure: Any = None, grad_scaler: Any = None) -> Any:
    """Stand in for FusedAdam.step (TE 2.11): one step of all parameters that have a gradient."""
    loss = closure() if closure is not None else None
    if self.capturable or not self.adam_w_mode:
        raise ValueError(
            "settings.adam_kernel=triton is plain AdamW; set"
            " settings.adam_kernel=transformer_engine"
        )
    for group in self.param_groups:
        if not group["params"]:
            continue
        group["step"] = group.get("step", 0) + 1
        scalars = scalars_of(group)
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.initialize_state(parameter, self.store_param_remainders)
            grad = (
                getattr(parameter, "decoupled_grad", None)
                if self.use_decoupled_grad
                else parameter.grad
            )
            if grad is not None:
                state = self.state[parameter]
                update(
                    parameter.data,
                    state["master_param"],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    grad.data,
                    scalars,
                )
    return loss
