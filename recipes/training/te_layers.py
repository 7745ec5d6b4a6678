"""What happens in Transformer Engine's linear layers: proof that FP8 ran, and what it does to their
operands.

NeMo and Megatron-Core train on in BF16 without a word where FP8 is not to be had, so each layer's
FP8 GEMMs are counted.  On steps that are diagnosed, this project's numerics quantise the operands
that the layer had, as the recipe does, and keep what they met (recipes/measure/gpu/casts.py says
how exactly they agree with Transformer Engine's own casts).  Of a large operand they take rows from
all over it, and the one with the largest value, which decides a scale: the whole in FP32, with what
the numerics make of it, would need more memory than the training it looks at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.plan import Fp8
from recipes.training.fp8.linear import Calls
from recipes.training.fp8.recipe import DelayedScaling, quantiser

LOOKED_AT = 1 << 22  # elements of an operand
BLOCK = 128  # neighbouring rows: sub-channel scaling's blocks of weights


class Watched:
    """A Transformer Engine linear layer: its count of FP8 GEMMs, and a quantiser of its recipe
    (None: counted only).
    """

    def __init__(self, layer: Any, fp8: Fp8 | None) -> None:
        self.layer, self.fp8_calls = layer, Calls()
        self.fp8_quantiser = quantiser(fp8) if fp8 else None

    @property
    def in_fp8(self) -> bool:
        """Whether the last pass ran in FP8; Transformer Engine sets it in each."""
        return bool(self.layer.fp8)

    def forward(self, module: Any, inputs: Any, output: Any) -> None:
        """Forward hook: count, look at input and weight, and at the gradient when it comes."""
        if not self.in_fp8 or not module.training:
            return
        self.fp8_calls.fprop += 1
        if self._looks:
            self._look(_normed(module, inputs[0].detach()), "input")
            self._look(module.weight, "weight")
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(self._backward)

    def replayed(self, backward: bool) -> None:
        """Count a pass of a CUDA graph."""
        if self.in_fp8:
            self.fp8_calls.fprop += not backward
            self.fp8_calls.dgrad += backward
            self.fp8_calls.wgrad += backward

    def _backward(self, grad: Tensor) -> None:
        self.fp8_calls.dgrad += 1
        self.fp8_calls.wgrad += 1
        if self._looks:
            self._look(grad, "grad")

    @property
    def _looks(self) -> bool:
        """Whether this pass is looked at; none is while a CUDA graph is recorded."""
        return (
            self.fp8_quantiser is not None
            and self.fp8_quantiser.diagnose
            and not torch.cuda.is_current_stream_capturing()
        )

    @torch.no_grad()
    def _look(self, x: Tensor, role: str) -> None:
        found = self.fp8_quantiser
        if isinstance(found, DelayedScaling):
            _scales_of(self.layer, found)
        values = (
            x.dequantize()
            if hasattr(x, "dequantize") and type(x) is not Tensor and type(x) is not nn.Parameter
            else x
        )
        assert found
        found(sample(values.detach().reshape(-1, x.shape[-1])).float(), role, training=False)


def sample(x: Tensor, elements: int = LOOKED_AT) -> Tensor:
    """Return about `elements` of `x` [rows, columns]: blocks of rows spread over it, the last row
    being that with the largest |x|.

    A NaN counts as largest.  All of `x` where it is no larger.
    """
    rows, columns = x.shape
    wanted = max(1, elements // columns // BLOCK)
    blocks = rows // BLOCK
    if x.numel() <= elements or blocks <= wanted:
        return x
    starts = [BLOCK * (n * blocks // wanted) for n in range(wanted)]
    taken = torch.cat([x[start : start + BLOCK] for start in starts])
    taken[-1] = x[torch.linalg.vector_norm(x, torch.inf, dim=1).argmax()]
    return taken


def _normed(module: Any, x: Tensor) -> Tensor:
    """Return what the GEMM of a layer multiplies: its input, or the norm of it that LayerNormLinear
    computes inside.
    """
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    gain = weight + 1 if module.zero_centered_gamma else weight
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], gain, module.eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, module.layer_norm_bias, module.eps)


def _scales_of(layer: Any, found: DelayedScaling) -> None:
    """Take over the scales that the layer used (fp8_meta: forward input, weight, output; backward
    the gradient first).
    """
    forward, backward = (layer.fp8_meta[key].scale for key in ("scaling_fwd", "scaling_bwd"))
    found.scale.data = torch.stack([forward[0], forward[1], backward[0]])


def watch(model: nn.Module, fp8: Fp8 | None) -> dict[str, Watched]:
    """Return the Transformer Engine linear layers of `model` by name, watched from now on; looked
    at closely if `fp8` is given.
    """
    try:
        from transformer_engine.pytorch import LayerNormLinear, Linear
    except ImportError:
        return {}
    layers = {
        name: Watched(m, fp8)
        for name, m in model.named_modules()
        if isinstance(m, (Linear, LayerNormLinear))
    }
    for watched in layers.values():
        watched.layer.register_forward_hook(watched.forward)
    _watch_graphs({watched.layer: watched for watched in layers.values()})
    return layers


def _watch_graphs(layers: dict[nn.Module, Watched]) -> None:
    """Count in replayed CUDA graphs too: no module is called there, but the kernels are those of
    the pass that was recorded.

    Megatron-Core 0.12 transformer/cuda_graphs.py: a runner a layer and micro-batch in flight.
    """
    from megatron.core.transformer.cuda_graphs import _CudagraphReplayNode as Node

    replay_forward, replay_backward = Node.forward, Node.backward

    def replayed(runner: Any, backward: bool) -> None:
        for module in runner.base_module.modules():
            if module in layers:
                layers[module].replayed(backward)

    def forward(ctx: Any, runner: Any, *args: Any) -> Any:
        replayed(runner, backward=False)
        return replay_forward(ctx, runner, *args)

    def backward(ctx: Any, *grads: Any) -> Any:
        replayed(ctx.runner, backward=True)
        return replay_backward(ctx, *grads)

    Node.forward, Node.backward = staticmethod(forward), staticmethod(backward)
