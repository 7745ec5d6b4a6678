"""Read from the objects that NeMo and Megatron-Core built for a rank: parameters, bytes, groups,
the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from megatron.core import fp8_utils, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from recipes.estimate.memory import Weights
from recipes.estimate.rank_facts import RankFacts

VOCABULARY = ("word_embeddings.", "position_embeddings.", "output_layer.")
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


def read(trainer: Any) -> RankFacts:
    """Return the facts of the rank that a trainer was built for."""
    chunks = trainer.strategy.megatron_parallel
    optimizer = trainer.strategy.optimizers[0].mcore_optimizer
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])  # FSDP has one, and no chain
    fsdp = chunks[0].ddp_config.use_custom_fsdp
    weights, gradients = _fsdp_buffers(chunks) if fsdp else _buffers(chunks)
    for each in optimizers:
        _make_state(each)
    return RankFacts(
        rank=dist.get_rank(),
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        layers=tuple(tuple(layer.layer_number - 1 for layer in _layers(chunk)) for chunk in chunks),
        parameters=_parameters(chunks),
        weights=sum(_bytes(each) for each in weights if each.element_size() > 1),
        fp8_parameters=sum(_bytes(each) for each in weights if each.element_size() == 1),
        gradients=sum(map(_bytes, gradients)),
        optimizer=sum(_bytes(each) for one in optimizers for each in _optimizer_tensors(one)),
        groups=_groups(),
        checkpoint=_checkpoint(trainer.strategy),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _layers(chunk: nn.Module) -> list[Any]:
    return [module for module in chunk.modules() if isinstance(module, TransformerLayer)]


def _parameters(chunks: Any) -> Weights:
    """Return the elements of the rank's parameters; Megatron-Core itself says which layers run in
    FP8.
    """
    in_fp8 = {
        parameter
        for chunk in chunks
        for layer in _layers(chunk)
        if not isinstance(
            fp8_utils.get_fp8_context(layer.config, layer.layer_number - 1), nullcontext
        )
        for name, parameter in layer.named_parameters()
        if name.endswith(LINEAR)
    }
    counts = {"fp8": 0, "bf16": 0, "vocabulary": 0}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            is_vocabulary = any(part in name for part in VOCABULARY)
            counts["vocabulary" if is_vocabulary else "fp8" if parameter in in_fp8 else "bf16"] += (
                parameter.numel()
            )
    return Weights(**counts)


def _buffers(chunks: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the buffers of Megatron-Core's DistributedDataParallel: of parameters, and of
    gradients.
    """
    buffers = [buffer for chunk in chunks for buffer in chunk.module.buffers]
    return [buffer.param_data for buffer in buffers], [buffer.grad_data for buffer in buffers]


def _fsdp_buffers(chunks: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's shards of the buffers of Megatron-Core's FSDP: of parameters, and of
    gradients.
    """
    groups = [
        group for chunk in chunks for group in chunk.module.param_and_grad_buffer.parameter_groups
    ]
    return [group.model_weight_buffer.data for group in groups], [
        group.main_grad_buffer.data for group in groups
    ]


def _make_state(optimizer: Any) -> None:
    """Make Adam's state, as the first step does."""
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel():
                optimizer.optimizer.initialize_state(parameter)


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield moments and main parameters, wherever they are kept."""
    for state in optimizer.optimizer.state.values():
        yield from state.values()
    if not optimizer.config.use_precision_aware_optimizer:
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]


def _groups() -> dict[str, tuple[int, ...]]:
    """Return the ranks of each process group that this rank is in."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "optimizer": parallel_state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=True
        ),
    }
    return {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}


def _checkpoint(strategy: Any) -> dict[str, int]:
    """Return the bytes of each whole tensor of the checkpoint that this pipeline stage has a part
    of, by key.

    A rank has only a share of the optimizer's tensors: they are as many, and as large, as those of
    the model.
    """
    model = strategy.megatron_parallel.sharded_state_dict()
    optimizer = strategy.optimizer_sharded_state_dict()
    apply_factories(model)
    apply_factories(optimizer)
    states = {each.key.split(".")[2]: each.dtype for each in _tensors(optimizer)}
    found = {}
    for each in _tensors(model):
        elements = math.prod(each.global_shape)
        found[each.key] = elements * each.dtype.itemsize
        found |= {
            f"optimizer.state.{state}.{each.key}": elements * dtype.itemsize
            for state, dtype in states.items()
        }
    return found


def _tensors(state: Any) -> list[ShardedTensor]:
    return [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
