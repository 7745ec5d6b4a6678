"""The three GEMMs of a linear layer on FP8 or BF16 operands, with FP32 accumulation and output in the operands' type.

Tensor cores multiply narrow operands exactly and add in FP32.  Values on the BF16 or FP8 grid are exact in FP32, and
so are their products, so an FP32 GEMM over them means the same on a CPU, apart from the order of the additions; and it
is fast on every processor, also on those that have no BF16 instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.training.fp8.recipe import Operand, Quantiser


@dataclass
class Calls:
    """How often each of a layer's GEMMs ran in FP8: the evidence that FP8 was on."""

    fprop: int = 0
    dgrad: int = 0
    wgrad: int = 0

    @property
    def total(self) -> int:
        """All three together."""
        return self.fprop + self.dgrad + self.wgrad


def _descaled(product: Tensor, a: Operand, b: Operand) -> Tensor:
    if a.scale_inv is not None and b.scale_inv is not None:
        product.mul_(a.scale_inv * b.scale_inv)
    return product


class Fp8Gemms(torch.autograd.Function):
    """y = x w^T with FP8 operands forward and backward; x (tokens, in), w (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, quantise: Quantiser, calls: Calls, training: bool) -> Tensor:
        a, b = quantise(x.float(), "input", training), quantise(w.float(), "weight", training)
        ctx.save_for_backward(a.col, b.col)
        ctx.scales, ctx.quantise, ctx.calls = (a.scale_inv, b.scale_inv), quantise, calls
        ctx.dtypes = (x.dtype, w.dtype)
        if training:
            calls.fprop += 1
        return _descaled(a.row @ b.row.t(), a, b).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_col, b_col = ctx.saved_tensors
        a, b = Operand(a_col, a_col, ctx.scales[0]), Operand(b_col, b_col, ctx.scales[1])
        g = ctx.quantise(grads[0].float(), "grad", True)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _descaled(g.row @ b.col, g, b).to(ctx.dtypes[0])
            ctx.calls.dgrad += 1
        if ctx.needs_input_grad[1]:
            dw = _descaled(g.col.t() @ a.col, g, a).to(ctx.dtypes[1])
            ctx.calls.wgrad += 1
        return dx, dw, None, None, None


class Bf16Gemms(torch.autograd.Function):
    """y = x w^T with BF16 operands, multiplied in FP32; x (tokens, in), w (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x.float() @ w.float().t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = grads[0].float()
        dx = (g @ w.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = (g.t() @ x.float()).to(w.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw


def bf16_linear(x: Tensor, w: Tensor) -> Tensor:
    """Return x w^T for x (..., in) and w (out, in): BF16 operands, FP32 accumulation, output in x's type."""
    y: Tensor = Bf16Gemms.apply(x.reshape(-1, x.shape[-1]), w)
    return y.view(*x.shape[:-1], w.shape[0])


def fp8_linear(x: Tensor, w: Tensor, quantise: Quantiser, calls: Calls, training: bool = True) -> Tensor:
    """Return x w^T for x (..., in) and w (out, in) with all three GEMMs on FP8 operands; counts them in `calls`."""
    y: Tensor = Fp8Gemms.apply(x.reshape(-1, x.shape[-1]), w, quantise, calls, training)
    return y.view(*x.shape[:-1], w.shape[0])
