"""One linear layer in Transformer Engine and here: the three GEMMs on the same operands, in BF16
output, bit by bit.

The casts agree (recipes/measure/gpu/casts.py), so what differs is how products are added.  Both are
held against the exact product of the quantised operands, in FP64.  An FP32 sum in any order lies
within a known distance of it; Hopper's tensor cores keep fewer bits inside a sum (about 14,
DeepSeek-V3, arXiv 2412.19437, section 3.3.2) and cut off the rest, so that errors add up instead of
averaging out (the bias in each row shows it); Transformer Engine breaks a sum into pieces that it
adds in FP32 where it asks for the split accumulator.  The bits of an output differ where the two
sums lie on two sides of a rounding boundary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipes.measure.gpu.te_quantizers import FORMATS, RECIPES
from recipes.plan import Fp8
from recipes.te_parity_rows import (
    AS_CHOSEN,
    GEMMS,
    OUTPUT,
    PRECISE,
    ROLES,
    STATE,
    Difference,
    Row,
    facts,
)
from recipes.training.fp8.linear import Calls, fp8_linear
from recipes.training.fp8.recipe import DelayedScaling, Operand, Quantiser, format_of, quantiser

SIZES = ((512, 256, 384), (2048, 1024, 4096))  # tokens, input features, output features
TRAINING = (4096, 4096, 4096)
SCALES = (
    1.0,
    2.5,
    1.7,
)  # of the operands, a step each: delayed scaling needs a past, and the last step is compared
# Of the mantissa, the hidden one included; the smallest exponent that frexp gives to a normal
# number
BF16_BITS, BF16_MIN_EXPONENT = 8, -125
# Half a step where sums are rounded to nearest, a whole one where bits are cut off
FP32_UNIT, TENSOR_CORE_UNIT = 2.0**-24, 2.0**-13
# n additions rounded to nearest err less than CONFIDENCE sqrt(n) unit sum |a b| (Higham and Mary,
# probabilistic rounding error analysis, 2019)
CONFIDENCE = 4.0
TENSOR_CORE_DEPTH = 32  # FP8 products that one instruction adds
ORDER, FEWER_BITS = "order of FP32 additions", "fewer bits in the tensor core's sums"


@dataclass(frozen=True)
class Exact:
    """A GEMM's product in FP64, and what its error may be: the sum of |a b|, in the product's
    units, and the depth K.
    """

    product: Tensor
    magnitude: Tensor
    depth: int


def rows(name: str, fp8: Fp8, large: bool, unavailable: str) -> Iterator[Row]:
    """Yield the rows of layers of several sizes; `unavailable` says why Transformer Engine does not
    run the recipe here, or "".
    """
    for size in (*SIZES, TRAINING) if large else SIZES:
        for accumulation in (AS_CHOSEN, PRECISE):
            try:
                found, why = (
                    ({}, unavailable) if unavailable else (_layer(fp8, size, accumulation), "")
                )
            except Exception as error:  # whatever a library raises: a layer less, not a run less
                found, why = {}, f"{type(error).__name__}: {error}"
            for gemm in GEMMS:
                row = Row(
                    "linear layer", name, gemm, OUTPUT, _formats(fp8, gemm), size, accumulation
                )
                yield replace(row, **found[gemm]) if gemm in found else row.refuse(why)
            for role in (role for role in ROLES if role in found):
                yield Row(
                    "linear layer",
                    name,
                    role,
                    STATE,
                    format_of(fp8, role).name,
                    size,
                    accumulation,
                    **found[role],
                )
            torch.cuda.empty_cache()


def _formats(fp8: Fp8, gemm: str) -> str:
    left, right = OPERANDS[gemm]
    return f"{format_of(fp8, left).name} x {format_of(fp8, right).name}"


OPERANDS = {"fprop": ("input", "weight"), "dgrad": ("grad", "weight"), "wgrad": ("grad", "input")}


def _layer(fp8: Fp8, size: tuple[int, int, int], accumulation: str) -> dict[str, dict[str, Any]]:
    """Return the fields of the rows of the three GEMMs, and for delayed scaling of each role's
    state, after the last step.
    """
    tokens, inputs, outputs = size
    ours, theirs = _ours(fp8), TeLayer(fp8, inputs, outputs, accumulation)
    weight = _random((outputs, inputs), 0) * 0.02
    for number, scale in enumerate(SCALES):
        x, grad = (
            _random((tokens, inputs), 1 + 2 * number) * scale,
            _random((tokens, outputs), 2 + 2 * number) * scale * 1e-3,
        )
        operands = {
            role: ours(value.float(), role, False)
            for role, value in zip(ROLES, (x, weight, grad), strict=True)
        }
        mine, others = _step(ours, x, weight, grad), theirs.step(x, weight, grad)
    found = {gemm: _compared(exact(gemm, operands), mine[gemm], others[gemm]) for gemm in GEMMS}
    return found | (_states(ours, theirs) if isinstance(ours, DelayedScaling) else {})


def _ours(fp8: Fp8) -> Quantiser:
    found = quantiser(fp8)
    return found.to("cuda") if isinstance(found, DelayedScaling) else found


def _random(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(
        shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)
    ).bfloat16()


def _step(quantise: Quantiser, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the three GEMMs of this project's linear layer."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = fp8_linear(x, weight, quantise, Calls())
    y.backward(grad)
    return {"fprop": y.detach(), "dgrad": x.grad, "wgrad": weight.grad}


class TeLayer:
    """Transformer Engine's linear layer under a recipe; PRECISE asks for the split accumulator
    where its choice is another (module/linear.py).
    """

    def __init__(self, fp8: Fp8, inputs: int, outputs: int, accumulation: str) -> None:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        # Histories of layers before this one, which share a key where their recipe reads the same
        FP8GlobalStateManager.reset()
        form = recipe.Format[FORMATS[fp8.scaling]]
        self.recipe = getattr(recipe, RECIPES[fp8.scaling])(fp8_format=form, **_delayed(fp8))
        if accumulation == PRECISE:
            for gemm in GEMMS:
                setattr(
                    self.recipe, f"fp8_gemm_{gemm}", recipe.MMParams(use_split_accumulator=True)
                )
        self.autocast = te.fp8_autocast
        self.layer = te.Linear(
            inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda"
        )

    def step(self, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the three GEMMs."""
        x = x.detach().requires_grad_()
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        self.layer.weight.grad = None
        with self.autocast(enabled=True, fp8_recipe=self.recipe):
            y = self.layer(x)
        y.backward(grad)
        return {"fprop": y.detach(), "dgrad": x.grad, "wgrad": self.layer.weight.grad}

    def state(self, role: str) -> tuple[Tensor, Tensor]:
        """Return the scale and the history that delayed scaling left for an operand (forward:
        input, weight, output; backward: gradient).
        """
        meta = self.layer.fp8_meta["scaling_bwd" if role == "grad" else "scaling_fwd"]
        column = 0 if role == "grad" else ROLES.index(role)
        return meta.scale[column], meta.amax_history[:, column]


def _delayed(fp8: Fp8) -> dict[str, Any]:
    if fp8.scaling != "delayed":
        return {}
    return {
        "margin": fp8.margin,
        "amax_history_len": fp8.amax_history_len,
        "amax_compute_algo": fp8.amax_compute_algo,
    }


def _states(ours: DelayedScaling, theirs: TeLayer) -> dict[str, dict[str, Any]]:
    """Return for each role the fields of the row that compares what the last step left; a scale off
    by one ULP is named, nothing else.
    """
    found = {}
    for column, role in enumerate(ROLES):
        scale, history = theirs.state(role)
        same = ours.amax_history[:, column].view(torch.int32) == history.contiguous().view(
            torch.int32
        )
        steps = int(abs(ours.scale[column].view(torch.int32) - scale.view(torch.int32)))
        wrong, named = int((~same).sum()), {"scale differs by one ULP": 1} if steps == 1 else {}
        left = wrong + (steps > 1)
        scales = {"scales": 1, "scales_identical": int(steps == 0), "scales_explained": named}
        found[role] = facts(
            Difference(
                same.numel(),
                same.numel() - wrong,
                **scales,
                largest=float(steps),
                unit="ULP",
                unexplained=left,
            )
        )
    return found


def exact(gemm: str, operands: dict[str, Operand]) -> Exact:
    """Return a GEMM on quantised operands, exact but for FP64's rounding."""
    a, b = (operands[role] for role in OPERANDS[gemm])
    left = {"fprop": a.row, "dgrad": a.row, "wgrad": a.col.t()}[gemm].double()
    right = {"fprop": b.row.t(), "dgrad": b.col, "wgrad": b.col}[gemm].double()
    scale = (
        1.0
        if a.scale_inv is None or b.scale_inv is None
        else a.scale_inv.double() * b.scale_inv.double()
    )
    return Exact(left @ right * scale, left.abs() @ right.abs() * scale, left.shape[1])


def _compared(found: Exact, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    error = dict[str, float]()
    for side, x in (("te", theirs), ("our", ours)):
        off = x.double() - found.product
        error[f"{side}_error"] = float((off.abs() / ulp(found.product)).median())
        error[f"{side}_bias"] = float(
            (off * found.product.sign()).sum() / found.product.abs().sum()
        )
    gap = (theirs.double() - ours.double()).abs().max()
    return {
        **facts(difference(found, ours, theirs)),
        **error,
        "largest_over_rms": float(gap) / rms(found.product),
    }


def difference(found: Exact, ours: Tensor, theirs: Tensor) -> Difference:
    """Compare two BF16 outputs of a GEMM with each other, and put what differs into classes by
    their distances from the exact one.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ValueError(
            f"outputs differ in shape or type: {tuple(ours.shape)} {ours.dtype} here,"
            f" {tuple(theirs.shape)} {theirs.dtype} there"
        )
    differs = ours.view(torch.int16) != theirs.view(torch.int16)
    mine, other = (
        (x.double() - found.product).abs() - _rounding(found.product, x) for x in (ours, theirs)
    )
    fp32 = CONFIDENCE * math.sqrt(found.depth) * FP32_UNIT * found.magnitude
    order = differs & (mine <= fp32) & (other <= fp32)
    fewer_bits = (
        max(1, found.depth / TENSOR_CORE_DEPTH) * TENSOR_CORE_UNIT * found.magnitude
    )  # cut off, the errors add up
    fewer = differs & ~order & (mine <= fp32) & (other <= fewer_bits)
    gap = (ours.double() - theirs.double()).abs() / ulp(
        torch.maximum(ours.abs(), theirs.abs()).double()
    )
    causes = {ORDER: int(order.sum()), FEWER_BITS: int(fewer.sum())}
    return Difference(
        elements=differs.numel(),
        identical=int((~differs).sum()),
        largest=float(gap.max()),
        unit="BF16 ULP",
        explained={cause: count for cause, count in causes.items() if count},
        unexplained=int((differs & ~order & ~fewer).sum()),
    )


def _rounding(product: Tensor, output: Tensor) -> Tensor:
    """Return what rounding to BF16 may add: half a step at the larger of the exact value and the
    output.
    """
    return ulp(torch.maximum(product.abs(), output.double().abs())) / 2


def ulp(x: Tensor) -> Tensor:
    """Return the distance between neighbouring BF16 numbers at each FP64 value."""
    exponent = torch.where(x == 0, BF16_MIN_EXPONENT, torch.frexp(x).exponent).clamp(
        min=BF16_MIN_EXPONENT
    )
    return torch.exp2((exponent - BF16_BITS).double())


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.square().mean().sqrt())
