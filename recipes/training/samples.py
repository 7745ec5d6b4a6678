"""Megatron-Core's samples of indexed data, each compared with the model's vocabulary as it is read.

The launch and the job's preflight read stretches of a large data set (recipes/data/indexed.py),
this reads what is trained on.  Without it an id beyond the vocabulary ends a job in a device-side
assert, or is taken for token 0 under tensor parallelism (megatron/core/tensor_parallel/layers.py,
v0.12.3: VocabParallelEmbedding.forward masks what is not of its own part).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from recipes.data.indexed import wrong_id
from recipes.errors import InputError


class Samples(GPTDataset):  # type: ignore[misc]
    """GPTDataset that raises InputError for a token id outside 0 … vocab_size - 1."""

    vocab_size: ClassVar[int]  # of the plan that this process trains

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        ids, documents = super()._query_document_sample_shuffle_indices(idx)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            where = f"{self.dataset_path}.bin, sample {idx},"
            raise InputError(wrong_id(where, low if low < 0 else high, self.vocab_size))
        return ids, documents
