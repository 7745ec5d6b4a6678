"""The kernels that `settings` can choose, against those that they replace, on a CUDA GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recipes.adamw_reference import master_of, parameters, set_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]
SHAPES = ((4096, 4096), (4096,), (3, 1001))
LR = 3e-4


def fused_adam(params: list[torch.Tensor]) -> Any:
    """Return FusedAdam as Megatron-Core 0.12's precision-aware optimizer makes it, with BF16
    moments.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    kinds = {
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "master_weight_dtype": torch.float32,
    }
    flags = {"master_weights": True, "use_decoupled_grad": True, "store_param_remainders": True}
    return FusedAdam(params, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **kinds, **flags)


@pytest.mark.parametrize("wide", [False, True], ids=["BF16 gradients", "FP32 gradients"])
def test_moments_are_transformer_engines_and_master_weights_within_two_units_in_the_last_place(
    wide: bool,
) -> None:
    from recipes.training.adamw import step

    ours, theirs = (parameters("cuda", SHAPES) for _ in range(2))
    kernel, engine = fused_adam(ours), fused_adam(theirs)
    for seed in range(3):
        for params in (ours, theirs):
            set_gradients(params, seed, wide)
        step(kernel)
        engine.step()
        for p, q in zip(ours, theirs, strict=True):
            a, b = kernel.state[p], engine.state[q]
            assert torch.equal(a["exp_avg"], b["exp_avg"]) and torch.equal(
                a["exp_avg_sq"], b["exp_avg_sq"]
            )
            masters = [
                master_of(weight, state["master_param"]) for weight, state in ((p, a), (q, b))
            ]
            torch.testing.assert_close(*masters, rtol=2.4e-7, atol=LR * 1e-5)
            assert float((p == q).float().mean()) > 0.999


def test_swiglus_gradient_is_as_exact_as_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.fusions import fused_bias_swiglu

    from recipes.training.compat.transformer_engine import _swiglu_backward

    made = torch.Generator("cuda").manual_seed(0)
    x, grad = (
        torch.randn(4096, width, device="cuda", generator=made).bfloat16()
        for width in (2 * 1792, 1792)
    )
    compiled = fused_bias_swiglu.swiglu_back(grad, x)
    monkeypatch.setattr(
        fused_bias_swiglu, "swiglu_back", fused_bias_swiglu.swiglu_back
    )  # to be put back
    _swiglu_backward()
    y = x.clone().requires_grad_()
    fused_bias_swiglu.bias_swiglu_impl(y, None).backward(grad)
    exact = x.double().requires_grad_()
    left, right = exact.chunk(2, -1)
    (torch.nn.functional.silu(left) * right).backward(grad.double())
    for found in (compiled, y.grad):
        torch.testing.assert_close(found.double(), exact.grad, rtol=2**-8, atol=1e-6)
    assert float((compiled == y.grad).float().mean()) > 0.99
