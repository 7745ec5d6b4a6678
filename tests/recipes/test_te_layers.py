"""Transformer Engine's layers as the harness sees them, with a stand-in for the layer: FP8 counted,
operands looked at.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recipes.plan import Fp8
from recipes.training.te_layers import Watched, sample


class Layer(nn.Module):
    """What a Transformer Engine linear layer shows of itself; `gain` makes it a LayerNormLinear."""

    def __init__(self, gain: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.fp8 = True
        self.fp8_meta = {
            "scaling_fwd": SimpleNamespace(scale=torch.tensor([2.0, 4.0, 1.0])),
            "scaling_bwd": SimpleNamespace(scale=torch.tensor([8.0, 1.0])),
        }
        self.zero_centered_gamma, self.normalization, self.eps = False, "RMSNorm", 1e-5
        if gain is not None:
            self.layer_norm_weight = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


def watched(
    fp8: Fp8 | None, gain: torch.Tensor | None = None, monkeypatch: pytest.MonkeyPatch | None = None
) -> tuple[Layer, Watched]:
    layer = Layer(gain)
    seen = Watched(layer, fp8)
    layer.register_forward_hook(seen.forward)
    if monkeypatch:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return layer, seen


def test_a_pass_in_fp8_counts_its_three_gemms() -> None:
    layer, seen = watched(None)
    layer(torch.randn(4, 16)).sum().backward()
    assert (seen.fp8_calls.fprop, seen.fp8_calls.dgrad, seen.fp8_calls.wgrad) == (1, 1, 1)


def test_a_pass_in_bf16_or_in_evaluation_counts_nothing() -> None:
    layer, seen = watched(None)
    layer.fp8 = False
    layer(torch.randn(4, 16)).sum().backward()
    layer.fp8 = True
    layer.eval()(torch.randn(4, 16))
    assert seen.fp8_calls.total == 0


def test_a_replayed_graph_counts_as_the_pass_that_was_recorded() -> None:
    layer, seen = watched(None)
    seen.replayed(backward=False)
    seen.replayed(backward=True)
    assert (seen.fp8_calls.fprop, seen.fp8_calls.dgrad, seen.fp8_calls.wgrad) == (1, 1, 1)
    layer.fp8 = False
    seen.replayed(backward=False)
    assert seen.fp8_calls.fprop == 1


def test_operands_are_looked_at_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = watched(Fp8(scaling="current"), monkeypatch=monkeypatch)
    assert seen.fp8_quantiser
    x = torch.randn(4, 16)
    layer(x).sum().backward()
    assert not seen.fp8_quantiser.seen
    seen.fp8_quantiser.diagnose = True
    layer(x).sum().backward()
    assert {role: float(found.amax) for role, found in seen.fp8_quantiser.seen.items()} == {
        "input": float(x.abs().max()),
        "weight": float(layer.weight.abs().max()),
        "grad": 1.0,
    }


def test_the_norm_inside_a_layer_is_part_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = torch.full((16,), 3.0)
    layer, seen = watched(Fp8(scaling="current"), gain, monkeypatch)
    assert seen.fp8_quantiser
    seen.fp8_quantiser.diagnose = True
    x = torch.randn(4, 16)
    layer(x)
    normed = torch.nn.functional.rms_norm(x, (16,), gain, 1e-5)
    assert float(seen.fp8_quantiser.seen["input"].amax) == float(normed.abs().max())


def test_nothing_is_computed_where_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = watched(Fp8(scaling="current"), torch.ones(16), monkeypatch)
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda *_: pytest.fail("a norm was computed for nobody")
    )
    layer(torch.randn(4, 16)).sum().backward()
    assert seen.fp8_calls.total == 3


def test_of_a_large_operand_blocks_of_rows_and_the_largest_value_are_taken() -> None:
    x = torch.randn(128 * 40 + 5, 64)
    x[-3, 7] = -50.0  # in no whole block
    taken = sample(x, elements=128 * 64 * 4)
    assert taken.shape == (512, 64) and taken.abs().max() == 50.0 and torch.equal(taken[-1], x[-3])
    for block, start in enumerate((0, 1280, 2560, 3840)):
        rows = slice(block * 128, block * 128 + (127 if block == 3 else 128))
        assert torch.equal(taken[rows], x[start : start + 128][: rows.stop - rows.start])
    assert sample(x, elements=x.numel()) is x
    x[9, 9] = torch.nan
    assert sample(x, elements=128 * 64 * 4)[-1].isnan().any()


def test_delayed_scaling_is_looked_at_with_the_scales_that_the_layer_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, seen = watched(Fp8(scaling="delayed"), monkeypatch=monkeypatch)
    found = seen.fp8_quantiser
    assert found
    found.diagnose = True
    layer(torch.full((4, 16), 300.0)).sum().backward()  # 300 x 2 is beyond 448
    assert found.scale.tolist() == [2.0, 4.0, 8.0]  # type: ignore[attr-defined]
    assert found.seen["input"].saturated == 1.0
    assert not found.amax_history.any()  # type: ignore[attr-defined]
