"""Checkpoints are written in PyTorch's own format where PyTorch asks for one, and as they were where it does not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import filesystem

from recipes.training.serialization import know_serialization_format


def test_the_format_is_given_where_pytorch_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_write_item", filesystem._write_item)
    know_serialization_format()
    written: Any = filesystem_async._write_item
    assert isinstance(written, functools.partial) and written.keywords == {"serialization_format": filesystem.SerializationFormat.TORCH_SAVE}


def test_an_older_pytorch_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_item(transforms: Any, stream: Any, data: Any, item: Any, key: str) -> None: ...

    monkeypatch.setattr(filesystem, "_write_item", write_item)
    monkeypatch.setattr(filesystem_async, "_write_item", write_item)
    know_serialization_format()
    assert filesystem_async._write_item is write_item
