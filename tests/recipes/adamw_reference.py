"""AdamW as Transformer Engine's multi_tensor/adam.cu writes it, in plain FP32 torch: what the
kernel is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHAPES = ((2048,), (3, 1000), (5,))  # a program's elements, a part of one, and the last one alone


def parameters(device: str = "cpu", shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Return BF16 parameters of usual size."""
    made = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=made) * 0.02).bfloat16().to(device) for shape in shapes]


def set_gradients(params: Sequence[Tensor], seed: int, wide: bool) -> None:
    """Give each parameter a gradient as Megatron-Core does; large ones, tiny ones and zeros among
    them.
    """
    made = torch.Generator().manual_seed(100 + seed)
    for p in params:
        size = 10.0 ** torch.empty(p.shape).uniform_(-9, 1, generator=made)
        grad = torch.randn(p.shape, generator=made) * size
        grad.view(-1)[::97] = 0
        p.decoupled_grad = (grad if wide else grad.bfloat16()).to(p.device)  # type: ignore[attr-defined]


def master_of(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the FP32 number whose nearest BF16 is `weight` and whose lower 16 bits are
    `remainder`.
    """
    high = weight.view(torch.int16).int() - (remainder < 0).int()
    return ((high << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


class Reference:
    """FP32 masters and BF16 moments; products and sums are rounded one by one."""

    def __init__(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        self.params, self.masters = params, [p.float() for p in params]
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    def step(self, scalars: Sequence[float]) -> None:
        """Update what has a gradient."""
        lr, beta1, beta2, correction1, correction2, eps, decay = (
            torch.tensor(value, dtype=torch.float32) for value in scalars
        )
        for i, p in enumerate(self.params):
            if p.decoupled_grad is None:  # type: ignore[attr-defined]
                continue
            g, master = p.decoupled_grad.float(), self.masters[i]  # type: ignore[attr-defined]
            m = self.m[i].float() * beta1 + g * (1 - beta1)
            v = self.v[i].float() * beta2 + g * (1 - beta2) * g
            first, second = (
                torch.full_like(m, float(value)) for value in (correction1, correction2)
            )  # torch multiplies by 1 / a scalar
            root = (
                (v / second).double().sqrt().float()
            )  # torch's FP32 root on a CPU is not always the nearest
            update = master * decay + (m / first) / (root + eps)
            self.masters[i] = master - update * lr
            self.m[i], self.v[i] = m.bfloat16(), v.bfloat16()
