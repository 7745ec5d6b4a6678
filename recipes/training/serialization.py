"""Checkpoints of Megatron-Core 0.12 under a newer PyTorch than it was made for, with a GPU or without.

Newer PyTorch (torch/distributed/checkpoint/filesystem.py) asks `_write_item` in which format to write; the one in NeMo 25.04's container
does not.
"""

from __future__ import annotations

import functools
import inspect


def know_serialization_format() -> None:
    """Have Megatron-Core 0.12 (dist_checkpointing/strategies/filesystem_async.py:320) write with torch.save where PyTorch asks in which format."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    write_item = filesystem._write_item
    if "serialization_format" in inspect.signature(write_item).parameters:
        chosen = filesystem.SerializationFormat.TORCH_SAVE
        filesystem_async._write_item = functools.partial(write_item, serialization_format=chosen)
