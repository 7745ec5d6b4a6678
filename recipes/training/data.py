"""From text to NeMo's data module: documents -> tokenizer -> Megatron indexed data set (.bin/.idx).

`python -m recipes.training.data data=text data.sources=[…]` prepares a corpus ahead of a run; a run prepares what it
misses.  Files are written in a folder beside the target, which is renamed at the end, under a lock: an interrupted
preparation leaves nothing that could be taken for whole, a repeated one finds its work done, and two at once wait for
each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from recipes.cli import command
from recipes.compose import compose_plan
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Data
from recipes.run_folder import read_json
from recipes.training.text import SPLITS, Document, SourceFile, documents, source_files

END = "<|end_of_text|>"
PAD = "<|pad|>"
BATCH = 256  # documents tokenised at once, in parallel
LOOKS, LOOK = 32, 65536  # stretches of a data set that are held against the vocabulary, and their tokens


def prepare(data: Data, vocab_size: int) -> Path:
    """Return the folder with tokenizer/, train and heldout .bin/.idx and provenance.json, made now if need be.

    `data` is of kind text.  InputError where the folder was made from other text or another tokenizer, is damaged, or cannot be written.
    """
    assert data.root
    root = Path(data.root) / f"vocab{vocab_size}"
    try:
        return _prepared(data, vocab_size, root)
    except OSError as error:
        raise InputError(f"{root} cannot be made or read ({error.strerror or error}); choose another data.root or make room") from None


def _prepared(data: Data, vocab_size: int, root: Path) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.with_name(root.name + ".lock")):
        if (root / "provenance.json").exists():
            return _made_from(root, data, vocab_size)
        work = root.with_name(root.name + ".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _write(data, vocab_size, work)
        shutil.rmtree(root, ignore_errors=True)
        work.rename(root)
    return root


def check_indexed(data: Data, vocab_size: int) -> None:
    """Raise InputError where a file of `data` (kind indexed) is missing, cut, empty, or holds token ids beyond the vocabulary."""
    for prefix in (*data.train, *data.heldout):
        if not _is_weight(prefix):
            _check_pair(prefix, vocab_size)


def _is_weight(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _check_pair(prefix: str, vocab_size: int) -> None:
    """Hold the .bin of a prefix against its .idx, and LOOKS stretches of it against the vocabulary; reading all would take hours."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    empty = next((name for name in (f"{prefix}.bin", f"{prefix}.idx") if not os.path.exists(name) or not os.path.getsize(name)), None)
    if empty:
        raise InputError(f"{empty} is missing or empty; name the prefix of a Megatron data set, without .bin and .idx, or prepare it again")
    try:
        index = IndexedDataset(prefix).index
        tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
        indexed = int(index.sequence_lengths.sum(dtype=np.int64))
    except Exception as error:  # asserts, and whatever numpy says of a buffer that is too short
        raise InputError(f"{prefix}.bin and .idx are no Megatron data set, or were cut ({str(error)[:80]}); prepare them again") from None
    if indexed != len(tokens):
        raise InputError(f"{prefix}.bin holds {len(tokens):,} tokens, its .idx says {indexed:,}: one of them was cut; prepare them again")
    starts = np.linspace(0, max(0, len(tokens) - LOOK), LOOKS, dtype=np.int64)
    seen = [tokens[start : start + LOOK] for start in starts]
    low, high = min(int(part.min()) for part in seen), max(int(part.max()) for part in seen)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"{prefix}.bin holds token {wrong}, the model's vocabulary {vocab_size}: it was made with another tokenizer; name its own")


def facts(data: Data, vocab_size: int) -> dict[str, Any]:
    """Return what a manifest says about the data: its source, size and hashes."""
    if data.kind == "text":
        return dict(json.loads((prepare(data, vocab_size) / "provenance.json").read_text()))
    if data.kind == "mock":
        return {"source": "random tokens", "sha256": {}}
    files = [Path(f"{p}.idx") for p in (*data.train, *data.heldout) if Path(f"{p}.idx").exists()]
    return {"source": [*data.train, *data.heldout], "vocab_size": vocab_size, "sha256": {str(f): _sha256(f) for f in files}}


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _asked(data: Data) -> dict[str, Any]:
    return {"sources": list(data.sources), "tokenizer": data.tokenizer}


def _made_from(root: Path, data: Data, vocab_size: int) -> Path:
    try:
        made = read_json(root / "provenance.json")["asked"]
    except (ValueError, KeyError):
        raise InputError(
            f"{root / 'provenance.json'} was changed or cut: nothing says what was prepared; remove {root} to prepare it again"
        ) from None
    if made != _asked(data):
        raise InputError(f"{root} was prepared from {made}, the plan asks for {_asked(data)}; choose another data.root")
    for split in SPLITS:
        _check_pair(str(root / split), vocab_size)
    return root


def _write(data: Data, vocab_size: int, work: Path) -> None:
    files = source_files(data.sources)
    tokenizer = _tokenizer(data, files, vocab_size, work / "tokenizer")
    counts = _tokenise(files, tokenizer, work)
    if not all(count.sum() for count in counts.values()):
        raise InputError(f"data: {len(files)} files leave nothing to train on or nothing to hold out; name more in data.sources")
    share = counts["heldout"][counts["heldout"] > 0] / counts["heldout"].sum()
    provenance = {
        "source": list(data.sources) or f"Python {sys.version.split()[0]} standard library",
        "asked": _asked(data),
        "tokens": {split: int(count.sum()) for split, count in counts.items()},
        "vocab_size": len(tokenizer),
        "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
        "sha256": {f"{s}.bin": _sha256(work / f"{s}.bin") for s in SPLITS},
    }
    (work / "provenance.json").write_text(json.dumps(provenance, indent=1))


def _tokenizer(data: Data, files: list[SourceFile], vocab_size: int, folder: Path) -> Any:
    """Return the plan's tokenizer, or one trained on the text; a copy lies in `folder`."""
    from transformers import AutoTokenizer

    if data.tokenizer is None:
        texts = (d.text for f in _shown(files, "training the tokenizer") for d in documents(f) if d.split == "train")
        train_tokenizer(texts, vocab_size, folder)
        return AutoTokenizer.from_pretrained(str(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer, trust_remote_code=False)  # nor asks whether to
    except Exception as error:  # a damaged file raises whatever its reader does, Exception itself too
        raise InputError(f"data.tokenizer={data.tokenizer} cannot be loaded ({type(error).__name__}); name a Hugging Face folder or model") from None
    if len(tokenizer) > vocab_size:
        sizes = f"{len(tokenizer)} entries, the model's vocabulary {vocab_size}"
        raise InputError(f"data.tokenizer={data.tokenizer} has {sizes}; choose another model or tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"data.tokenizer={data.tokenizer} has no end-of-text token to part documents with; choose another")
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with `vocab_size` entries and write it to `folder` in Hugging Face's form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD).save_pretrained(str(folder))


def _tokenise(files: list[SourceFile], tokenizer: Any, work: Path) -> dict[str, np.ndarray]:
    """Write both splits' .bin/.idx; return how often each token occurs in each."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(len(tokenizer))
    builders = {split: IndexedDatasetBuilder(str(work / f"{split}.bin"), dtype=dtype) for split in SPLITS}
    counts = {split: np.zeros(len(tokenizer), dtype=np.int64) for split in SPLITS}
    for batch in _batches(d for f in _shown(files, "tokenising") for d in documents(f)):
        encoded = tokenizer([d.text for d in batch], add_special_tokens=False)["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            if max(ids, default=0) >= len(tokenizer):
                raise InputError(f"data.tokenizer gives token {max(ids)}, and has {len(tokenizer)} entries; it is damaged, choose another")
            row = np.array([*ids, tokenizer.eos_token_id], dtype=dtype)
            builders[document.split].add_document(row, [len(row)])
            counts[document.split] += np.bincount(row, minlength=len(tokenizer))
    for split, builder in builders.items():
        builder.finalize(str(work / f"{split}.idx"))
    return counts


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(stream, BATCH)):
        yield batch


def _shown(files: list[SourceFile], what: str) -> Iterator[SourceFile]:
    yield from track(files, what, console=Console(stderr=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(overrides: list[str]) -> int:
    """Prepare the data of the plan that `overrides` compose and say where it lies; exit code 2 for a wrong input."""
    try:
        plan = compose_plan(overrides)
        if plan.data.kind != "text":
            raise InputError(f"data={plan.data.kind} needs no preparation; use data=text")
        root = prepare(plan.data, plan.model.vocab_size)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    print(f"{root}: {json.loads((root / 'provenance.json').read_text())['tokens']} tokens")
    return 0


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
