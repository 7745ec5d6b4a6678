"""Checkpoints of Megatron-Core 0.12 under a newer PyTorch than it was made for, with a GPU or
without.

Newer PyTorch (torch/distributed/checkpoint/filesystem.py) asks `_write_item` in which format to
write, and some versions write a copy of a checkpoint's metadata that holds PyTorch's own fields
alone; the one in NeMo 25.04's container does neither.
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
from pathlib import Path
from typing import Any


def adapt_writer() -> None:
    """Have Megatron-Core 0.12's writer (dist_checkpointing/strategies/filesystem_async.py) write
    what its reader needs, whatever PyTorch is there.
    """
    _know_format()
    _keep_own_metadata()


def _know_format() -> None:
    """Write with torch.save where PyTorch asks in which format (filesystem_async.py:320)."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    write_item = filesystem._write_item
    if "serialization_format" in inspect.signature(write_item).parameters:
        chosen = filesystem.SerializationFormat.TORCH_SAVE
        filesystem_async._write_item = functools.partial(write_item, serialization_format=chosen)


def _keep_own_metadata() -> None:
    """Write what Megatron-Core adds to the metadata where PyTorch writes a copy of its own fields
    (2.11 does).

    That is `mcore_data` (torch.py:497), without which the optimizer cannot be loaded, and
    `all_local_plans` (state_dict_saver.py:144).
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        FileSystemWriterAsync as Writer,
    )

    finish = Writer.finish

    @functools.wraps(finish)
    def finish_with_own(self: Any, metadata: Any, results: Any) -> None:
        finish(self, metadata, results)
        if metadata.storage_data is None:  # it was set in the copy
            add_lost(Path(self.path) / ".metadata", metadata)

    Writer.finish = finish_with_own


def add_lost(path: Path, metadata: Any) -> None:
    """Add to the metadata that was written at `path` the attributes of `metadata` that it lacks;
    the file is whole at each moment.
    """
    written = pickle.loads(path.read_bytes())
    lost = {name: value for name, value in vars(metadata).items() if not hasattr(written, name)}
    if not lost:
        return
    vars(written).update(lost)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        pickle.dump(written, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
