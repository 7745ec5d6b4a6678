"""Emulated FP8 on a CUDA GPU: the CPU's bits, no wait for the GPU, and NeMo's layers around it."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.compose.tree import compose_plan
from recipes.measure.gpu import emulation_gpu
from recipes.measure.gpu.linear_layers import CONFIDENCE, FP32_UNIT, exact, ulp
from recipes.plan import Fp8, Plan
from recipes.run_folder import rows_of, status_of
from recipes.training.fp8.linear import Calls, fp8_linear
from recipes.training.fp8.recipe import ROLES, DelayedScaling, Quantiser, quantiser

pytestmark = pytest.mark.gpu
RECIPES = pytest.mark.parametrize("name", list(emulation_gpu.recipes()))
SHAPES = ((512, 256, 384), (1000, 768, 3072))  # tokens, input and output features
ON_GPU = [
    "gpu=h200",
    "stack=emulated",
    "executor=local",
    "model=llama3_tiny",
    "mapping=single",
    "logger=none",
]


def made(fp8: Fp8) -> Quantiser:
    found = quantiser(fp8)
    return found.to("cuda") if isinstance(found, DelayedScaling) else found


def tensors(size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    tokens, inputs, outputs = size
    shapes = {"input": (tokens, inputs), "weight": (outputs, inputs), "grad": (tokens, outputs)}
    return {role: torch.randn(shape, device="cuda").bfloat16() for role, shape in shapes.items()}


@RECIPES
def test_every_number_is_that_of_the_cpu(name: str) -> None:
    assert not list(emulation_gpu.differences(emulation_gpu.recipes()[name], "cuda"))


@RECIPES
def test_a_diagnosed_step_multiplies_what_another_does(name: str) -> None:
    fp8, x = emulation_gpu.recipes()[name], tensors(SHAPES[0])["input"]
    kernels, torch_code = made(fp8), made(fp8)
    torch_code.diagnose = True
    a, b = kernels(x, "input", True), torch_code(x, "input", True)
    assert a.row.dtype == b.row.dtype == torch.bfloat16
    assert (
        torch.equal(a.row, b.row)
        and torch.equal(a.col, b.col)
        and "input" in torch_code.seen
        and not kernels.seen
    )


@RECIPES
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_the_gemms_are_exact_but_for_fp32_additions_and_one_rounding(
    name: str, size: tuple[int, int, int]
) -> None:
    fp8, parts = emulation_gpu.recipes()[name], tensors(size)
    x, w = (parts[role].clone().requires_grad_() for role in ("input", "weight"))
    y = fp8_linear(x, w, made(fp8), Calls())
    y.backward(parts["grad"])
    reference = made(fp8)
    operands = {role: reference(parts[role].float(), role, False) for role in ROLES}
    for gemm, found in (("fprop", y), ("dgrad", x.grad), ("wgrad", w.grad)):
        expected = exact(gemm, operands)
        error = (found.double() - expected.product).abs()
        rounding = ulp(torch.maximum(expected.product.abs(), found.double().abs())) / 2
        additions = CONFIDENCE * math.sqrt(expected.depth) * FP32_UNIT * expected.magnitude
        assert bool((error <= rounding + additions).all())


@RECIPES
def test_nothing_waits_for_the_gpu(name: str) -> None:
    fp8, parts = emulation_gpu.recipes()[name], tensors(SHAPES[0])
    found, x, w = made(fp8), parts["input"].requires_grad_(), parts["weight"].requires_grad_()
    w.main_grad, w.grad_added_to_main_grad = torch.zeros_like(w, dtype=torch.float32), False
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            fp8_linear(x, w, found, Calls(), into_main_grad=True).backward(parts["grad"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert w.main_grad.any()


@pytest.fixture(scope="module")
def megatron(transformer_engine: str) -> Iterator[None]:
    """Megatron-Core's groups for this one process."""
    from recipes.training.compat import transformer_engine

    transformer_engine.activate(compose_plan(ON_GPU))
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def model_of(plan: Plan) -> torch.nn.Module:
    """Return the plan's model as NeMo builds it, with gradient buffers as Megatron-Core's
    data-parallel wrapper gives them.
    """
    import fiddle as fdl
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from recipes.training.recipe import build

    config = fdl.build(build(plan, Path("unused")).model.config)
    config.params_dtype, config.bf16, config.pipeline_dtype = torch.bfloat16, True, torch.bfloat16
    model_parallel_cuda_manual_seed(1)
    model = Float16Module(
        config, config.configure_model(SimpleNamespace(vocab_size=plan.model.vocab_size)).cuda()
    )
    for parameter in model.parameters():
        parameter.main_grad, parameter.grad_added_to_main_grad = (
            torch.zeros_like(parameter, dtype=torch.float32),
            False,
        )
    return model


def step(model: torch.nn.Module, plan: Plan) -> float:
    torch.manual_seed(0)
    tokens = torch.randint(plan.model.vocab_size, (2, plan.seq_length + 1), device="cuda")
    positions = torch.arange(plan.seq_length, device="cuda").expand(2, -1)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    for parameter in model.parameters():
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad += parameter.grad
        parameter.grad = None
    return float(loss.detach())


def plan_of(precision: str) -> Plan:
    return compose_plan([*ON_GPU, f"precision={precision}", "data=mock"])


@pytest.mark.parametrize(
    ("precision", "in_fp8"),
    [("mxfp8", 4), ("fp8_subchannel", 4), ("fp8_delayed", 4), ("fp8_current", 2)],
)
def test_a_model_of_nemo_has_its_linear_layers_in_emulated_fp8_and_the_rest_from_transformer_engine(
    precision: str, in_fp8: int, megatron: None
) -> None:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
    )

    from recipes.training.layers import fp8_modules

    plans = {name: plan_of(name) for name in ("bf16", precision)}
    models = {name: model_of(plan) for name, plan in plans.items()}
    emulated = fp8_modules(models[precision])
    assert len(emulated) == 4 * in_fp8 and not fp8_modules(models["bf16"])
    layers = models[precision].module.decoder.layers
    assert all(
        isinstance(layer.self_attention.core_attention, TEDotProductAttention) for layer in layers
    )
    assert (
        sum(isinstance(layer.mlp.linear_fc1, TEColumnParallelLinear) for layer in layers)
        == len(layers) - in_fp8
    )
    assert all(
        type(layer.input_layernorm).__module__.startswith("transformer_engine") for layer in layers
    )
    for name in models:  # delayed scaling takes its scales from the first pass
        step(models[name], plans[name])
        for parameter in models[name].parameters():
            parameter.main_grad.zero_()
    losses = {name: step(models[name], plans[name]) for name in models}
    assert losses[precision] != losses["bf16"] and losses[precision] == pytest.approx(
        losses["bf16"], rel=5e-3
    )
    assert {
        (m.fp8_calls.fprop, m.fp8_calls.dgrad, m.fp8_calls.wgrad) for m in emulated.values()
    } == {(2, 2, 2)}
    for name, module in emulated.items():
        ours = module.weight
        theirs = models["bf16"].get_submodule(name).weight
        assert torch.equal(ours, theirs)  # one seed, one set of initial weights
        assert ours.grad_added_to_main_grad and ours.main_grad.isfinite().all()
        assert (
            float(
                torch.nn.functional.cosine_similarity(
                    ours.main_grad.flatten(), theirs.main_grad.flatten(), dim=0
                )
            )
            > 0.95
        )


def read(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row.get("loss"), row.get("heldout_loss"))
        for row in rows_of(folder / "metrics.jsonl")
    ]


@pytest.mark.nemo
def test_a_run_trains_pauses_and_goes_on_with_emulated_fp8_on_the_gpu(
    transformer_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.__main__ import main

    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join([gpu] * 4))  # four tiny runs share a GPU

    short = [
        "train.max_steps=6",
        "train.warmup_steps=1",
        "train.eval_interval=2",
        "train.eval_batches=1",
        "train.checkpoint_interval=100",
    ]
    sweep = [
        "-m",
        *ON_GPU,
        *short,
        "train.diagnostics_interval=3",
        "executor.max_parallel=4",
        "precision=bf16,fp8_delayed,fp8_current,mxfp8",
    ]
    assert main([*sweep, f"runs_dir={tmp_path}/whole"]) == 0
    assert main([*sweep, f"runs_dir={tmp_path}/cut", "train.stop_after=2"]) == 0
    assert main([*sweep, f"runs_dir={tmp_path}/cut"]) == 0
    for whole in sorted((tmp_path / "whole").iterdir()):
        cut, fp8 = tmp_path / "cut" / whole.name, ".bf16." not in whole.name
        assert status_of(whole) == status_of(cut) == "done"
        for (step_a, *a), (step_b, *b) in zip(read(whole), read(cut), strict=True):
            assert step_a == step_b and [v for v in a if v] == pytest.approx(
                [v for v in b if v], rel=1e-3
            )
        labels = json.loads((whole / "manifest.json").read_text())["labels"]
        assert labels == {"loss": "emulated" if fp8 else "measured", "step_time": "measured"}
        gemms = {r["fp8_gemms"] for r in rows_of(whole / "metrics.jsonl") if "loss" in r}
        assert gemms == {(4 if fp8 else 0) * (2 if ".fp8_current." in whole.name else 4) * 3 * 2}
        assert (whole / "fp8.jsonl").exists() == fp8
