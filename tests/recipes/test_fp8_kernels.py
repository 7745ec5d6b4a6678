"""The GPU's quantisers on the CPU: Triton's interpreter runs the kernels as they are, and they give
the bits of the torch code.

Triton decides when it is imported whether it interprets, so the kernels run in a process of their
own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from recipes.measure.gpu import emulation_gpu
from recipes.training.fp8.linear import Calls, fp8_linear
from recipes.training.fp8.recipe import MxScaling, quantiser

SHAPES = (
    (70, 150),
    (130, 40),
)  # each cuts tiles of 128 and groups of 32, in one dimension or in both
INTERPRETED = """
import sys
from recipes.measure.gpu.emulation_gpu import differences, recipes
from recipes.training.fp8 import recipe
recipe.on_gpu = lambda x: True
changed = recipes()[sys.argv[1]].model_copy(update=eval(sys.argv[2]))
print(*differences(changed, "cpu", eval(sys.argv[3])), sep="\\n")
"""
VARIANTS = [
    *((name, {}) for name in emulation_gpu.recipes()),
    ("fp8_current", {"power_of_two_scales": True}),
    ("fp8_delayed", {"amax_history_len": 4, "amax_compute_algo": "most_recent", "margin": 1}),
    ("fp8_delayed", {"amax_history_len": 1}),
    ("mxfp8", {"format": "hybrid"}),
]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_the_kernels_give_the_numbers_of_the_cpu_for_ordinary_and_extreme_tensors(
    name: str, changes: dict[str, object]
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, name, repr(changes), repr(SHAPES)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


def test_the_comparison_sees_another_rounding_and_another_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the tests above and the GPU's rest on: two recipes that differ are told apart."""
    found = emulation_gpu.recipes()
    assert not list(emulation_gpu.differences(found["mxfp8"], "cpu", SHAPES[:1], ["normal"]))
    others = iter([quantiser(found["mxfp8"]), quantiser(found["mxfp8, ocp_floor"])] * 3)
    monkeypatch.setattr(emulation_gpu, "quantiser", lambda fp8: next(others))
    wrong = list(emulation_gpu.differences(found["mxfp8"], "cpu", SHAPES[:1], ["normal"]))
    assert len(wrong) == 3 and all("row, col" in line for line in wrong)
    x = torch.tensor([0.0, torch.nan, 1.0])
    assert emulation_gpu.same(x, -x * torch.tensor([1.0, 1.0, -1.0])) and not emulation_gpu.same(
        x, x.roll(1)
    )


def test_without_a_gpu_the_benchmark_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert emulation_gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def weight(**attributes: object) -> torch.Tensor:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    w.main_grad = torch.zeros(64, 96)
    for name, value in attributes.items():
        setattr(w, name, value)
    return w


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def test_gradients_are_added_to_main_grad_in_fp32_and_the_hooks_are_told() -> None:
    fp8, w, plain, parts = (
        emulation_gpu.recipes()["mxfp8"],
        weight(grad_added_to_main_grad=False),
        weight(),
        [],
    )
    for tokens in (32, 64):  # two micro-batches
        x, g, quantise = random(tokens, 96), random(tokens, 64), MxScaling(fp8)
        fp8_linear(x, w, MxScaling(fp8), Calls(), into_main_grad=True).backward(g)
        fp8_linear(x, plain, MxScaling(fp8), Calls()).backward(g)
        parts.append(quantise(g, "grad", True).col.t() @ quantise(x, "input", True).col)
    assert torch.equal(w.main_grad, parts[0] + parts[1]) and w.grad_added_to_main_grad is True
    assert not plain.main_grad.any() and torch.equal(
        plain.grad, parts[0].bfloat16() + parts[1].bfloat16()
    )
    assert not torch.equal(plain.grad.float(), w.main_grad)


def test_without_hooks_that_wait_no_gradient_is_returned() -> None:
    w, x = weight(), torch.randn(32, 96).bfloat16()
    fp8_linear(
        x, w, MxScaling(emulation_gpu.recipes()["mxfp8"]), Calls(), into_main_grad=True
    ).backward(torch.ones(32, 64).bfloat16())
    assert w.grad is None and w.main_grad.any()
    told = weight(grad_added_to_main_grad=False, zero_out_wgrad=True)
    fp8_linear(
        x, told, MxScaling(emulation_gpu.recipes()["mxfp8"]), Calls(), into_main_grad=True
    ).backward(torch.ones(32, 64).bfloat16())
    assert (
        told.grad is not None and not told.grad.any() and torch.equal(told.main_grad, w.main_grad)
    )
