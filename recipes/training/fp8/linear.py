"""The three GEMMs of a linear layer on FP8 or BF16 operands, with FP32 accumulation and output in
the operands' type.

Tensor cores multiply narrow operands exactly and add in FP32.  Values on the BF16 or FP8 grid are
exact in FP32, and so are their products, so an FP32 GEMM over them means the same on a CPU, apart
from the order of the additions; and it is fast on every processor, also on those that have no BF16
instructions.  On a GPU, FP8 values that BF16 holds are multiplied as BF16, which means the same
again.
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


def _inverse(a: Operand, b: Operand) -> Tensor | None:
    """Return what a GEMM of two operands is multiplied by, an FP32 scalar; None: nothing."""
    return None if a.scale_inv is None or b.scale_inv is None else a.scale_inv * b.scale_inv


def _multiply(a: Tensor, b: Tensor, scale_inv: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a b, added in FP32, times `scale_inv`, in `dtype`: rounded to it once.

    BF16 copies are multiplied by tensor cores; cuBLAS may add the parts of a split sum in BF16
    unless told not to.
    """
    in_bf16 = a.dtype == torch.bfloat16
    if in_bf16 and scale_inv is None and dtype == torch.bfloat16:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        return a @ b
    product = torch.mm(a, b, out_dtype=torch.float32) if in_bf16 else a @ b
    if scale_inv is None:
        return product.to(dtype)
    return torch.mul(
        product,
        scale_inv,
        out=product if dtype == torch.float32 else torch.empty_like(product, dtype=dtype),
    )


def _add_to_main_grad(weight: Any, gradient: Tensor) -> Tensor | None:
    """Add an FP32 gradient to `weight.main_grad` and return what autograd is told, in place of the
    gradient.

    As Megatron-Core's and Transformer Engine's layers do under gradient_accumulation_fusion, so
    that micro-batches are added in FP32 (Megatron-Core 0.12 tensor_parallel/layers.py,
    LinearWithGradAccumulationAndAsyncCommunication.backward).
    """
    weight.main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return (
        torch.zeros_like(weight)
        if getattr(weight, "zero_out_wgrad", False)
        else torch.empty_like(weight)
    )


class Fp8Gemms(torch.autograd.Function):
    """y = x w^T with FP8 operands forward and backward; x (tokens, in), w (out, in)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        quantise: Quantiser,
        calls: Calls,
        training: bool,
        into_main_grad: bool,
    ) -> Tensor:
        a, b = quantise(x, "input", training), quantise(w, "weight", training)
        ctx.save_for_backward(a.col, b.col)
        ctx.scales, ctx.quantise, ctx.calls = (a.scale_inv, b.scale_inv), quantise, calls
        ctx.dtypes, ctx.weight = (x.dtype, w.dtype), w if into_main_grad else None
        if training:
            calls.fprop += 1
        return _multiply(a.row, b.row.t(), _inverse(a, b), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_col, b_col = ctx.saved_tensors
        a, b = Operand(a_col, a_col, ctx.scales[0]), Operand(b_col, b_col, ctx.scales[1])
        g = ctx.quantise(grads[0], "grad", True)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _multiply(g.row, b.col, _inverse(g, b), ctx.dtypes[0])
            ctx.calls.dgrad += 1
        if ctx.needs_input_grad[1]:
            dw = _multiply(
                g.col.t(),
                a.col,
                _inverse(g, a),
                torch.float32 if ctx.weight is not None else ctx.dtypes[1],
            )
            dw = dw if ctx.weight is None else _add_to_main_grad(ctx.weight, dw)
            ctx.calls.wgrad += 1
        return dx, dw, None, None, None, None


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
    """Return x w^T for x (..., in) and w (out, in): BF16 operands, FP32 accumulation, output in x's
    type.
    """
    y: Tensor = Bf16Gemms.apply(x.reshape(-1, x.shape[-1]), w)
    return y.view(*x.shape[:-1], w.shape[0])


def fp8_linear(
    x: Tensor,
    w: Tensor,
    quantise: Quantiser,
    calls: Calls,
    training: bool = True,
    into_main_grad: bool = False,
) -> Tensor:
    """Return x w^T for x (..., in) and w (out, in) with all three GEMMs on FP8 operands; counts
    them in `calls`.

    `into_main_grad`: the gradient of w is added to w.main_grad in FP32 and not returned.
    """
    y: Tensor = Fp8Gemms.apply(
        x.reshape(-1, x.shape[-1]), w, quantise, calls, training, into_main_grad
    )
    return y.view(*x.shape[:-1], w.shape[0])
