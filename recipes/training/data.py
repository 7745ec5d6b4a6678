"""From text to NeMo's data module: files -> tokenizer -> Megatron indexed data set (.bin/.idx) -> PreTrainingDataModule.

The default corpus is the text that every machine with Python has: the sources of its standard library.  A tenth of
the files, chosen by a hash of their names, is held out.  Preparation writes beside the target and renames at the end,
so an interrupted one leaves nothing that could be taken for whole, and a repeated one finds its work done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.progress import track

from recipes.errors import InputError
from recipes.plan import Data

END = "<|end_of_text|>"
PAD = "<|pad|>"
SPLITS = ("train", "heldout")
HELD_OUT_ONE_IN = 10


def source_files(sources: tuple[str, ...]) -> list[Path]:
    """Return the text and JSONL files to read, sorted; the standard library's sources where none are named."""
    if not sources:
        library = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    missing = [s for s in sources if not Path(s).exists()]
    if missing:
        raise InputError(f"data.sources: no such file {missing[0]}; name text (.txt, .md, .py) or .jsonl files")
    return sorted(p for s in sources for p in ([Path(s)] if Path(s).is_file() else Path(s).rglob("*")) if p.is_file())


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file: one a line (its "text") of a JSONL file, else the whole file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data: {path} is not UTF-8 (byte {error.start}); convert it or leave it out") from None
    if path.suffix != ".jsonl":
        if text.strip():
            yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f'data: {path} line {number} is no JSON object with a "text"; mend the file') from None


def split_of(name: str) -> str:
    """Return "train" or "heldout" for a document's name, by hash, so that the split does not depend on the order."""
    return "heldout" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0 else "train"


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


def prepare(data: Data, vocab_size: int) -> Path:
    """Return the folder with tokenizer/, train and heldout .bin/.idx and provenance.json, made now if need be."""
    assert data.root
    root = Path(data.root) / f"vocab{vocab_size}"
    if (root / "provenance.json").exists():
        return root
    work = root.with_name(root.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _write(data, vocab_size, work)
    shutil.rmtree(root, ignore_errors=True)
    work.rename(root)
    return root


def _write(data: Data, vocab_size: int, work: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    files = source_files(data.sources)
    named = [(f"{path}#{n}", text) for path in track(files, "reading text") for n, text in enumerate(documents(path))]
    train = [text for name, text in named if split_of(name) == "train"]
    if not train or len(train) == len(named):
        raise InputError(f"data: {len(named)} documents leave nothing to train on or to hold out; name more files in data.sources")
    train_tokenizer(iter(train), vocab_size, work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(work / "tokenizer"))
    builders = {s: IndexedDatasetBuilder(str(work / f"{s}.bin"), dtype=np.int32) for s in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for name, text in track(named, "tokenising"):
        ids = np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], dtype=np.int32)
        split = split_of(name)
        builders[split].add_document(ids, [len(ids)])
        tokens[split] += len(ids)
        if split == "heldout":
            counts += np.bincount(ids, minlength=vocab_size)
    for split in SPLITS:
        builders[split].finalize(str(work / f"{split}.idx"))
    share = counts[counts > 0] / counts.sum()
    provenance = {
        "source": list(data.sources) or f"Python {sys.version.split()[0]} standard library",
        "documents": len(named),
        "tokens": tokens,
        "vocab_size": len(tokenizer),
        "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
        "sha256": {f"{s}.bin": _sha256(work / f"{s}.bin") for s in SPLITS},
    }
    (work / "provenance.json").write_text(json.dumps(provenance, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
