"""NeMo's loss of a micro-batch, without waiting for the device.

NeMo v2.3.2 (lightning/megatron_parallel.py, MaskedTokenLossReduction.forward) asks in Python
whether a micro-batch has any token that counts.  The answer lies on the device, so the host waits
there for each micro-batch's forward pass to end, and the device then for the host to launch the
backward pass.  Asked on the device itself it costs nothing, and every number is the same bit for
bit. NeMo v2.4.0 (megatron_parallel.py:1739) does not ask, and sums over context-parallel ranks
elsewhere. Its own loss is kept there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.megatron.utils import (
    average_losses_across_data_parallel_group,
)
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction, masked_token_loss
from torch import Tensor


class MaskedLoss(MaskedTokenLossReduction):  # type: ignore[misc]
    """The sum of the loss over the tokens that count (float32 scalar), their number (int32 scalar,
    1 where none does), and the mean to report.
    """

    def forward(
        self, batch: dict[str, Tensor], forward_out: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Take the loss of each token, float [batch, sequence], and the batch's `loss_mask` of that
        shape.
        """
        parts = parallel_state.get_context_parallel_world_size()
        summed = masked_token_loss(forward_out, batch["loss_mask"], parts)
        counted = batch.get("num_valid_tokens_in_ub") if parts > 1 else None
        tokens = (
            (batch["loss_mask"].sum() if counted is None else counted)
            .clamp(min=1)
            .detach()
            .to(torch.int)
        )
        return summed, tokens, {"avg": average_losses_across_data_parallel_group([summed / tokens])}


def set_loss(model: Any) -> None:
    """Have a NeMo 2.3 GPTModel train with this loss.

    The model makes its own where it finds none (collections/llm/gpt/model/base.py, v2.3.2).
    """
    if "cp_size" in inspect.signature(masked_token_loss).parameters:
        model._training_loss_reduction = MaskedLoss()
