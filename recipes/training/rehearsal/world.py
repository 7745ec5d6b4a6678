"""One rank of a job of any size, in this process: its environment, process groups that join nobody,
and no memory.

PyTorch's fake process group knows every rank and sends nothing.  What NeMo and Megatron-Core put on
the current CUDA device goes to the meta device, whose tensors have shapes and no memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipes.environment import variables
from recipes.plan import Plan
from recipes.training.rehearsal.stand_ins import QuantizedTensor

META = torch.device("meta")
PORT = "29500"  # named in the environment; nothing listens


class Stream:
    """A CUDA stream or event that nothing runs on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Wait for nothing."""

    def record(self, stream: Any = None) -> None:
        """Record nothing."""


@contextmanager
def as_rank(plan: Plan, rank: int) -> Iterator[None]:
    """Be `rank` of the plan's job while NeMo builds it, with the job's environment variables."""
    node = plan.gpu.devices_per_node if plan.num_gpus > plan.gpu.devices_per_node else plan.num_gpus
    environment = {
        **{variable.name: variable.value for variable in variables(plan)},
        "RANK": rank,
        "WORLD_SIZE": plan.num_gpus,
        "LOCAL_RANK": rank % node,
        "LOCAL_WORLD_SIZE": node,
        "GROUP_RANK": rank // node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": PORT,
        "TORCHELASTIC_RUN_ID": "rehearsal",  # Lightning then takes ranks from these variables
    }
    init, new = dist.init_process_group, dist.new_group

    def init_fake(backend: Any = None, rank: int = -1, world_size: int = -1, **kwargs: Any) -> None:
        init("fake", rank=rank, world_size=world_size, store=FakeStore())

    def new_fake(
        ranks: Any = None,
        timeout: Any = None,
        backend: Any = None,
        pg_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        return new(ranks, backend="fake", **kwargs)

    type_name = torch.Tensor.type

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron-Core compares it with "torch.cuda.BFloat16Tensor"
        (optimizer/distrib_optimizer.py:335).
        """
        name = type_name(self, *args, **kwargs)
        return f"torch.cuda.{name.rpartition('.')[2]}" if isinstance(name, str) else name

    capability = tuple(int(part) for part in (plan.gpu.compute_capability or "0.0").split("."))
    with ExitStack() as stack:
        stack.enter_context(
            patch.dict(os.environ, {name: str(value) for name, value in environment.items()})
        )
        for where, name, value in (
            (dist, "init_process_group", init_fake),
            (dist, "new_group", new_fake),
            (
                dist,
                "broadcast_object_list",
                lambda *args, **kwargs: None,
            ),  # each rank keeps what it has
            (torch.Tensor, "type", cuda_type_name),
            # Megatron-Core's FSDP wants no parameter on the meta device once it is set up
            # (custom_fsdp/param_and_grad_buffer.py:1131).
            (torch.Tensor, "is_meta", False),
            (torch.cuda, "current_device", lambda: META),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "Event", Stream),
            (torch.cuda, "graph_pool_handle", Stream),
            (torch.cuda, "set_stream", lambda stream: None),
            (torch.cuda, "current_stream", lambda device=None: Stream()),
        ):
            stack.enter_context(patch.object(where, name, value))
        stack.callback(_forget)
        yield


def _forget() -> None:
    """End the rank's groups, and what Megatron-Core and NeMo keep for a process."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel import random
    from nemo.utils import AppState

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    if dist.is_initialized():
        dist.destroy_process_group()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = (
        False  # the next plan may want another kind of tracker
    )
    for kind in (torch.nn.Parameter, QuantizedTensor):
        if "main_grad" in vars(
            kind
        ):  # custom_fsdp/param_and_grad_buffer.py:1245 sets it in the class
            del kind.main_grad
    vars(AppState()).clear()
    AppState().__init__()
