"""Checkpoints are written in PyTorch's own format where PyTorch asks for one, with all of their
metadata, and as they were where it does not.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from recipes.training.compat.checkpoint_writer import adapt_writer

pytestmark = pytest.mark.nemo
Writer = filesystem_async.FileSystemWriterAsync


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem_async, "_write_item", filesystem._write_item)
    monkeypatch.setattr(Writer, "finish", filesystem.FileSystemWriter.finish)


def test_the_format_is_given_where_pytorch_asks_for_it() -> None:
    adapt_writer()
    written: Any = filesystem_async._write_item
    assert isinstance(written, functools.partial) and written.keywords == {
        "serialization_format": filesystem.SerializationFormat.TORCH_SAVE
    }


def test_an_older_pytorch_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_item(transforms: Any, stream: Any, data: Any, item: Any, key: str) -> None: ...

    monkeypatch.setattr(filesystem, "_write_item", write_item)
    monkeypatch.setattr(filesystem_async, "_write_item", write_item)
    adapt_writer()
    assert filesystem_async._write_item is write_item


def finished(folder: Path) -> Metadata:
    metadata: Any = Metadata(state_dict_metadata={})
    metadata.mcore_data = {"optimizer": {"nd_reformulated_orig_global_shape": (4, 2)}}
    Writer(folder).finish(metadata, [])
    assert sorted(path.name for path in folder.iterdir()) == [".metadata"]
    read: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return read


def test_what_megatron_core_adds_to_the_metadata_is_written(tmp_path: Path) -> None:
    adapt_writer()
    assert finished(tmp_path).mcore_data == {
        "optimizer": {"nd_reformulated_orig_global_shape": (4, 2)}
    }  # type: ignore[attr-defined]


def test_it_is_written_by_a_pytorch_that_copies_its_own_fields_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy by dataclasses.replace, as PyTorch 2.11 makes one, and this one does not."""
    finish = filesystem.FileSystemWriter.finish
    monkeypatch.setattr(
        Writer,
        "finish",
        lambda self, metadata, results: finish(self, dataclasses.replace(metadata), results),
    )
    with pytest.raises(AttributeError):
        finished(tmp_path).mcore_data  # type: ignore[attr-defined]  # noqa: B018
    adapt_writer()
    written: Any = finished(tmp_path)
    assert written.mcore_data == {"optimizer": {"nd_reformulated_orig_global_shape": (4, 2)}}
    assert written.storage_meta is not None and written.version is not None
