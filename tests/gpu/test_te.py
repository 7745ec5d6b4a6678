"""What is changed in Transformer Engine, on itself."""

from __future__ import annotations

import gc

import pytest
import torch

from recipes.measure.gpu.te_quantizers import quantizers
from recipes.training.compat.transformer_engine import _no_walk_over_arguments
from recipes.training.deferred import Moment, Number

pytestmark = pytest.mark.gpu


def test_a_quantised_tensor_leaves_no_garbage_and_keeps_its_values(
    transformer_engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = pytest.importorskip("transformer_engine.pytorch.quantized_tensor").QuantizedTensor
    cast = quantizers("current").weight
    cast.internal = False
    x = cast(
        torch.randn(
            128,
            256,
            device="cuda",
            dtype=torch.bfloat16,
            generator=torch.Generator("cuda").manual_seed(0),
        )
    )
    assert isinstance(x, kind)
    monkeypatch.setattr(kind, "__torch_function__", kind.__torch_function__)  # to be put back
    seen, walk = [], kind.__torch_function__
    for _ in range(2):
        values, doubled = x.dequantize(), x + x
        gc.collect()
        gc.disable()
        shapes = [x.shape for _ in range(100)]
        garbage = gc.collect()
        gc.enable()
        seen.append((values, doubled, shapes, garbage))
        _no_walk_over_arguments()
    assert (
        torch.equal(seen[0][0], seen[1][0])
        and torch.equal(seen[0][1], seen[1][1])
        and seen[0][2] == seen[1][2]
    )
    assert seen[1][3] == 0
    assert seen[0][3] > 0 or "tree_map" not in walk.__func__.__code__.co_names


def test_a_number_comes_while_the_device_goes_on() -> None:
    x = torch.full((1,), 2.5, device="cuda")
    started = Moment()
    number = Number(x)
    a = torch.randn(8192, 8192, device="cuda")
    for _ in range(50):
        a @ a
    ended = Moment()
    assert number.read() == 2.5
    assert not ended.event.query()  # the work launched after it is not waited for
    assert started.until(ended) > 0.01 and ended.event.query()
