"""What NeMo 2.3 and Megatron-Core 0.12 need before they train on a machine without a GPU.

Both assume CUDA in places that have nothing to do with CUDA: a device index, a string compare, an
assertion.  Each function below fixes one such place and names the upstream line that needs it (NeMo
v2.3.2, Megatron-Core 0.12.3, PyTorch 2.13).  `activate` applies them once, before NeMo is used, and
does nothing where there is a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from recipes.training.compat.checkpoint_writer import adapt_writer

CPU = torch.device("cpu")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_active = False


def activate() -> bool:
    """Adapt the process to a machine without a GPU; return whether anything was changed."""
    global _active
    if torch.cuda.is_available() or _active:
        return False
    _active = True
    for mend in (
        _allocator,
        _devices,
        _factories,
        _type_names,
        _rng,
        _optimizer,
        _parameter_groups,
        _checkpoint_writer,
        _checkpoint_reader,
        _progress,
        _gemms,
    ):
        mend()
    return True


def _allocator() -> None:
    """glibc returns large blocks to the kernel after each use; the page faults of the next cost
    more than the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _devices() -> None:
    """torch.cuda.current_device() and .cuda() all over Megatron-Core, e.g.

    distributed/param_and_grad_buffer.py.
    """
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign, return-value]


def _factories() -> None:
    """device="cuda" in literals: optimizer/optimizer.py:357, clip_grads.py:90,
    pipeline_parallel/schedules.py:477.
    """

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return made

    for name in ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _type_names() -> None:
    """optimizer/distrib_optimizer.py:335, :387 and optimizer.py:548 compare Tensor.type() with
    "torch.cuda.…Tensor".
    """
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[assignment, method-assign]


def _rng() -> None:
    """tensor_parallel/random.py keeps CUDA states, and megatron_init.py:237 seeds it only where a
    GPU is counted.
    """
    from megatron.core.tensor_parallel import random

    def get_state(
        device: Any = "cpu", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    class Tracker(random.CudaRNGStatesTracker):  # type: ignore[misc]
        """Dropout and initialisation draw from the CPU generator, which NeMo seeds."""

        @contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            yield

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    random.CudaRNGStatesTracker = Tracker
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)


def _optimizer() -> None:
    """The distributed optimizer without Apex or Transformer Engine, that is, over
    torch.optim.AdamW.
    """
    from megatron.core.optimizer import distrib_optimizer as module

    cls = module.DistributedOptimizer
    quantize = module.quantize_param_shard

    def quantize_if_any(model_params: list[Any], *rest: Any, **named: Any) -> None:
        # distrib_optimizer.py:2019 calls it also where no parameter is FP8; fp8_utils.py:302 raises
        if model_params:
            quantize(model_params, *rest, **named)

    module.quantize_param_shard = quantize_if_any
    state_dict, load, place = (
        cls.state_dict,
        cls.load_state_dict,
        cls._set_main_param_and_optimizer_states,
    )

    def state_dict_with_step(self: Any) -> Any:
        if self.optimizer.state:
            return state_dict(self)
        for group in (
            self.optimizer.param_groups
        ):  # :606 asserts that there is a step, also before the first
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(0.0)
        state = state_dict(self)
        self.optimizer.state.clear()
        return state

    def load_with_own_steps(self: Any, state: Any) -> None:
        load(
            self, state
        )  # :738 gives all parameters one tensor, which AdamW would then advance once a parameter
        for entry in self.optimizer.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].clone()

    def place_all_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[
            model_param
        ]  # :878 wants "step" among the tensors
        entry = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        place(
            self, model_param, {**tensors, **({"step": entry["step"]} if "step" in entry else {})}
        )

    cls.state_dict, cls.load_state_dict = state_dict_with_step, load_with_own_steps
    cls._set_main_param_and_optimizer_states = place_all_but_step


def _parameter_groups() -> None:
    """optimizer/__init__.py:51 orders groups by the first parameter that a rank has, and a
    checkpoint's are loaded by their number.

    On a later pipeline stage that is a norm, where norms stand alone: its norms then get the weight
    decay, and its matrices none. Core 0.13 matches groups by what they are (optimizer.py,
    _filter_and_reorder_param_groups).
    """
    from megatron.core import optimizer

    original = optimizer._get_param_groups

    def decayed_first(*args: Any, **kwargs: Any) -> Any:
        return sorted(original(*args, **kwargs), key=lambda group: -group["wd_mult"])

    optimizer._get_param_groups = decayed_first


def _checkpoint_writer() -> None:
    """strategies/filesystem_async.py: the queue of results comes from a spawned process that
    imports NeMo again (14 s a save); a forked one need not, and ends with this one."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    adapt_writer()

    @functools.cache
    def results() -> Any:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(ctypes.CDLL(None).prctl, (PR_SET_PDEATHSIG, signal.SIGKILL))
        return manager.Queue()

    module._get_write_results_queue = results


def _checkpoint_reader() -> None:
    """nemo/lightning/io/pl.py:433 asserts that CUDA is initialised; on the CPU no tensor needs
    moving.
    """
    from nemo.lightning.io import pl

    pl._fix_tensors_device = lambda checkpoint: checkpoint


def _progress() -> None:
    """nemo/lightning/pytorch/callbacks/progress_printer.py:218 gathers timers on rank 0 alone: gloo
    waits for ever.
    """
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    ProgressPrinter.log_megatron_timers = lambda self, timers: None


def _gemms() -> None:
    """tensor_parallel/layers.py:939, :1174: BF16 GEMMs with FP32 accumulation, fast without BF16
    instructions.

    Its autograd function gathers the sequence before a GEMM, and sums the gradient of what ranks
    share: both are asked for here.
    """
    from megatron.core.tensor_parallel import layers, mappings

    from recipes.training.fp8.linear import bf16_linear

    def linear(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool = False,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if sequence_parallel:
            input = mappings.gather_from_sequence_parallel_region(input)
        elif allreduce_dgrad:
            input = mappings.copy_to_tensor_model_parallel_region(input)
        y = bf16_linear(input, weight)
        return y if bias is None else y + bias

    layers.linear_with_grad_accumulation_and_async_allreduce = linear
