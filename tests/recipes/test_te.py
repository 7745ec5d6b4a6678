"""What is changed in Transformer Engine, on stand-ins of it."""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from recipes.training.compat.transformer_engine import (
    _no_walk_over_arguments,
    accumulate_weight_gradient,
)

MODULE = "transformer_engine.pytorch.quantized_tensor"


class Walks(torch.Tensor):
    """A tensor that walks over the arguments of each call, as TE 2.11's quantised ones do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch._C._disabled_torch_function_impl(
            func, types, tree_map(lambda x: x, args), kwargs or {}
        )


class Direct(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def garbage_kept() -> Any:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def stand_in(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    module: Any = ModuleType(MODULE)
    module.QuantizedTensor = kind
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, module)


def garbage_of(x: torch.Tensor) -> int:
    """Return the objects that only a garbage collection takes away after 100 looks at `x`."""
    gc.collect()
    assert [x.shape for _ in range(100)] == [torch.Size([2, 3])] * 100
    return gc.collect()


def test_a_quantised_tensor_leaves_no_garbage(
    monkeypatch: pytest.MonkeyPatch, garbage_kept: None
) -> None:
    x = torch.ones(2, 3).as_subclass(Walks)
    assert garbage_of(x) >= 300
    monkeypatch.setattr(Walks, "__torch_function__", Walks.__torch_function__)  # to be put back
    stand_in(monkeypatch, Walks)
    _no_walk_over_arguments()
    assert garbage_of(x) == 0
    assert torch.equal((2 * x).sum(dim=0, keepdim=True), torch.full((1, 3), 4.0))


def test_one_that_does_not_walk_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Direct.__torch_function__
    stand_in(monkeypatch, Direct)
    _no_walk_over_arguments()
    assert Direct.__torch_function__ is before


def test_older_versions_have_the_class_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    _no_walk_over_arguments()


def gemm_of_2_2(A: Any, B: Any, workspace: Any, out_dtype: Any = None, **options: Any) -> None:
    assert workspace == "workspace"
    gemm_of_2_11(A, B, out_dtype, **options)


def gemm_of_2_11(A: Any, B: Any, out_dtype: Any = None, **options: Any) -> None:
    assert (options["layout"], options["accumulate"], options["grad"]) == ("NT", True, True)
    options["out"] += (B.T @ A).to(out_dtype)


@pytest.mark.parametrize("gemm", [gemm_of_2_2, gemm_of_2_11])
def test_a_weight_gradient_is_added_in_every_version(
    monkeypatch: pytest.MonkeyPatch, gemm: Any
) -> None:
    """Transformer Engine 2.2 and 2.5 want a workspace (cpp_extensions/gemm.py), 2.11 has none."""
    parts = ("", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.module", ".pytorch.module.base")
    for part in parts:
        name = f"transformer_engine{part}"
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    extensions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    extensions.general_gemm = gemm
    base: Any = sys.modules["transformer_engine.pytorch.module.base"]
    base.get_workspace = lambda: "workspace"
    x, grad, main_grad = torch.ones(3, 2), torch.full((3, 4), 2.0), torch.ones(4, 2)
    accumulate_weight_gradient(x, grad, main_grad)
    assert torch.equal(main_grad, torch.full((4, 2), 7.0))
