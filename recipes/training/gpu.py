"""What NeMo's recipe is set to on GPUs: precision plugin, communication overlap, CUDA graphs, FSDP,
recompute.

NVIDIA's numbers are made by scripts/performance of NeMo (v2.3.2; `set_primary_perf_configs` in
utils.py and a script a model), which change a recipe after the library has built it.  This module
does the same from the plan, so that a job of this harness is the job that was published, and says
where it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import nemo_run as run
import torch
from nemo.collections.llm.recipes.precision import mixed_precision
from nemo.collections.llm.recipes.tp_overlap_configs import userbuffers
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from recipes.nemo_recipes import NEMO_NAMES
from recipes.overlap import overlaps_tp
from recipes.plan import Fp8, Plan

PRESETS: dict[str, Callable[[], run.Config]] = {
    "delayed": mixed_precision.bf16_with_fp8_mixed,
    "current": mixed_precision.bf16_with_fp8_current_scaling_mixed,
    "mxfp8": mixed_precision.bf16_with_mxfp8_mixed,
    "subchannel": (
        mixed_precision.bf16_mixed
    ),  # 2.3 has no preset; 2.4's is bf16_mixed with the recipe's name, as below
}

# Userbuffer schedules by model, and by compute capability below 10 or from it on: as each model's
# script chooses them.
USERBUFFERS = {
    ("llama3_70b", False): "{dtype}_h100_h8192_tp4_mbs1_seqlen8192",
    ("llama3_70b", True): "{dtype}_b200_h8192_tp2_mbs1_seqlen8192",
    ("llama31_405b", False): "{dtype}_h100_h16384_tp8_cp2_mbs1_seqlen8192",
    ("llama31_405b", True): "{dtype}_b200_h16384_tp4_cp2_mbs1_seqlen8192",
    ("nemotron4_15b", True): "bf16_b200_h6144_tp2_mbs1_seqlen4096",
    ("nemotron4_340b", True): "{dtype}_b200_h18432_tp8_mbs1_seqlen4096",
}


def for_gpu(recipe: run.Partial, plan: Plan) -> None:
    """Set what the plan says about running on GPUs; `recipe` was built with
    performance_mode=True.
    """
    recipe.trainer.plugins = precision_plugin(plan)
    recipe.optim.config.use_precision_aware_optimizer = plan.settings.precision_aware_optimizer
    if plan.settings.adam_moments == "bf16":
        recipe.optim.config.exp_avg_dtype = recipe.optim.config.exp_avg_sq_dtype = torch.bfloat16
    recipe.model.config.cross_entropy_fusion_impl = plan.settings.cross_entropy_fusion
    if not plan.settings.gradient_accumulation_fusion:
        recipe.model.config.gradient_accumulation_fusion = False
    recipe.model.config.enable_cuda_graph = recipe.trainer.strategy.use_te_rng_tracker = (
        plan.mapping.cuda_graphs
    )
    recipe.trainer.strategy.pipeline_dtype = torch.bfloat16 if plan.mapping.pp > 1 else None
    _activations(recipe.model.config, plan)
    _overlap(recipe, plan)
    if plan.mapping.fsdp:
        _fsdp(recipe, plan)
    if (
        plan.precision.fp8
        and plan.precision.fp8.scaling == "mxfp8"
        and plan.precision.fp8.param_gather
    ):
        _mxfp8_parameters(recipe)


def precision_plugin(plan: Plan) -> run.Config:
    """Return NeMo's precision plugin for the plan: its own preset, with the plan's values put
    in.
    """
    fp8 = plan.precision.fp8
    plugin = PRESETS[fp8.scaling]() if fp8 else mixed_precision.bf16_mixed()
    plugin.grad_reduce_in_fp32 = plan.settings.grad_reduce_in_fp32
    if fp8:
        _fp8(plugin, fp8)
    return plugin


def _fp8(plugin: run.Config, fp8: Fp8) -> None:
    plugin.fp8, plugin.fp8_recipe, plugin.fp8_param_gather = (
        fp8.format,
        NEMO_NAMES[fp8.scaling],
        fp8.param_gather,
    )
    if fp8.scaling == "delayed":
        plugin.fp8_margin, plugin.fp8_amax_history_len, plugin.fp8_amax_compute_algo = (
            fp8.margin,
            fp8.amax_history_len,
            fp8.amax_compute_algo,
        )
    plugin.first_last_layers_bf16 = bool(fp8.first_layers_bf16 or fp8.last_layers_bf16)
    plugin.num_layers_at_start_in_bf16, plugin.num_layers_at_end_in_bf16 = (
        fp8.first_layers_bf16,
        fp8.last_layers_bf16,
    )


def _activations(config: run.Config, plan: Plan) -> None:
    if plan.mapping.recompute_layers:
        config.recompute_granularity, config.recompute_method = "full", "block"
        config.recompute_num_layers = plan.mapping.recompute_layers
    if plan.mapping.offload_layers:
        config.cpu_offloading, config.cpu_offloading_weights = True, False
        config.cpu_offloading_num_layers = plan.mapping.offload_layers


def _overlap(recipe: run.Partial, plan: Plan) -> None:
    """Tensor-parallel overlap by userbuffers, where the plan has it, set up by the stack's backend.

    Unset, NeMo's callback passes None, for which Transformer Engine takes MPI where PyTorch has it.
    Megatron-Core model_parallel_config.py allows the deferred embedding gradient only with a
    pipeline.
    """
    callback, m = comm_overlap(recipe), plan.mapping
    callback.tp_comm_overlap = overlaps_tp(plan)
    if plan.stack.userbuffers:
        callback.tp_comm_bootstrap_backend = plan.stack.userbuffers.bootstrap
    callback.tp_comm_overlap_cfg = _userbuffers(plan) if callback.tp_comm_overlap else None
    callback.overlap_param_gather_with_optimizer_step = (
        plan.settings.overlap_param_gather_with_optimizer_step
    )
    if m.pp == 1 or m.fsdp:
        callback.defer_embedding_wgrad_compute = False


def comm_overlap(recipe: run.Partial) -> run.Config:
    """Return the recipe's communication-overlap callback, which performance mode brings."""
    return next(
        c for c in recipe.trainer.callbacks if c.__fn_or_cls__ is MegatronCommOverlapCallback
    )


def _userbuffers(plan: Plan) -> Any:
    """Return the userbuffer schedule of the model's script, as a config that can be written; None:
    NeMo's default.
    """
    blackwell = int((plan.gpu.compute_capability or "0").split(".")[0]) >= 10
    name = USERBUFFERS.get((plan.model.nemo_recipe, blackwell))
    if name is None:
        return None
    schedule = _as_config(
        getattr(
            userbuffers, "userbuffers_" + name.format(dtype="fp8" if plan.precision.fp8 else "bf16")
        )
    )
    for gemm in (
        gemm
        for each in plan.stack.scripts.without_aggregate
        if each.where.holds(plan)
        for gemm in each.gemms
    ):
        getattr(schedule, gemm).aggregate = False
    return schedule


def _as_config(value: Any) -> Any:
    """Return a dataclass as run.Config: NeMo-Run writes configs, not instances."""
    if not dataclasses.is_dataclass(value):
        return value
    return run.Config(
        type(value),
        **{f.name: _as_config(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init},
    )


def _fsdp(recipe: run.Partial, plan: Plan) -> None:
    """Megatron-Core's FSDP; arguments.py (core_v0.12) refuses it together with
    gradient-accumulation fusion.
    """
    recipe.model.config.init_model_with_meta_device = True
    recipe.model.config.gradient_accumulation_fusion = False
    recipe.trainer.strategy.fsdp = "megatron"
    ddp, scripts = recipe.trainer.strategy.ddp, plan.stack.scripts
    ddp.data_parallel_sharding_strategy = "optim_grads_params"
    ddp.average_in_collective = (
        scripts.fsdp_average_in_collective and not plan.settings.grad_reduce_in_fp32
    )
    ddp.keep_fp8_transpose_cache_when_using_custom_fsdp = False
    if plan.optimizer_instances > 1:
        recipe.trainer.strategy.num_distributed_optimizer_instances = plan.optimizer_instances


def _mxfp8_parameters(recipe: run.Partial) -> None:
    """Parameters kept in MXFP8, gathered in BF16 through the gradient buffer and cast: without
    overlap.

    Megatron-Core 0.13 distributed_data_parallel.py:551-556 and
    distributed_data_parallel_config.py:117 (@ 03f77931), whose assertion wants `fp8_param_gather`
    beside, which NeMo v2.4.0's scripts leave out.
    """
    ddp = recipe.trainer.strategy.ddp
    ddp.fp8_param_gather = ddp.reuse_grad_buf_for_mxfp8_param_ag = True
    recipe.optim.config.reuse_grad_buf_for_mxfp8_param_ag = True
    comm_overlap(recipe).overlap_param_gather = False
