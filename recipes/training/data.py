"""From text to NeMo's data module: documents -> tokenizer -> Megatron indexed data set (.bin/.idx).

Prepares a corpus ahead of a run (data=text; a run prepares what it misses), or reads every token of
data that were prepared elsewhere (data=indexed) and compares them with the model's vocabulary.  Of
the model it needs model.vocab_size alone; GPU, precision and memory play no part.

Files are written in a folder beside the target, which is renamed at the end, under a lock: an
interrupted preparation leaves nothing that could be taken for whole, a repeated one finds its work
done, and two at once wait for each other.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from recipes.cli import ArgumentParser, command
from recipes.compose.tree import compose_data
from recipes.data.files import (
    SPLITS,
    asked,
    blend,
    check_data,
    check_made_from,
    check_tokenizer,
    parts_of,
    prepared_root,
    sets_of,
)
from recipes.data.indexed import check_contents
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Data, Plan
from recipes.run_folder import read_json
from recipes.training.text import (
    SUFFIXES,
    Document,
    SourceFile,
    are_parted,
    documents,
    source_files,
)
from recipes.training.tokenizers import Tokenizer, load

END = "<|end_of_text|>"
PAD = "<|pad|>"
EXAMPLES = """examples:
  %(prog)s data.sources=[/texts] data.root=data/mine model=llama3_8b data.tokenizer=/tokenizers/llama3
  %(prog)s data=indexed data.train=[/data/c4/part0] data.split=[949,50,1] data.tokenizer=/tokenizers/llama3 \\
      model=llama3_8b
"""  # noqa: E501
BATCH = 256  # documents tokenised at once, in parallel
SAMPLES, BLOCK = 64, 1 << 16  # of tokens that are hashed: 4 MiB of a file, however large


def prepare(data: Data, vocab_size: int, contents: bool = True) -> Path:
    """Return the folder with tokenizer/, train and heldout .bin/.idx and provenance.json, made now
    if need be.

    `data` is of kind text.  `contents`: whether the tokens of what was made before are looked at.
    InputError where the folder was made from other text or another tokenizer, is damaged, or cannot
    be written.
    """
    assert data.root
    root = prepared_root(data, vocab_size)
    try:
        return _prepared(data, vocab_size, root, contents)
    except OSError as error:
        raise InputError(
            f"{root} cannot be made or read ({error.strerror or error}); choose another data.root"
            " or make room"
        ) from None


def _prepared(data: Data, vocab_size: int, root: Path, contents: bool) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    with _lock(root.with_name(root.name + ".lock")):
        if (root / "provenance.json").exists():
            return _made_before(root, data, vocab_size, contents)
        work = root.with_name(root.name + ".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _write(data, vocab_size, work)
        shutil.rmtree(root, ignore_errors=True)
        work.rename(root)
    return root


def _made_before(root: Path, data: Data, vocab_size: int, contents: bool) -> Path:
    """Return a folder that was prepared earlier; InputError where it is damaged or of other
    text.
    """
    check_made_from(root, data)
    sets = sets_of(parts_of(data, vocab_size))
    fitting(str(root / "tokenizer"), vocab_size)
    if contents:
        check_contents(sets, vocab_size)
    return root


def check_for_training(plan: Plan) -> None:
    """Raise InputError where a process of the plan's job cannot read its data or its tokenizer.

    The contents were looked at by the preflight of the first node (launch/preflight.py).
    """
    check_data(plan, in_job=True, contents=False)
    if plan.data.kind == "indexed":
        fitting(str(plan.data.tokenizer), plan.model.vocab_size)


def facts(data: Data, vocab_size: int) -> dict[str, Any]:
    """Return what a manifest says about the data: its source, size and hashes."""
    if data.kind == "text":
        return read_json(prepare(data, vocab_size, contents=False) / "provenance.json")
    if data.kind == "mock":
        return {"source": "random tokens", "sha256": {}}
    files = [Path(f"{prefix}.idx") for _, prefix in (*blend(data.train), *blend(data.heldout))]
    source = [*data.train, *data.heldout]
    hashes = {str(f): _sha256(f) for f in files}
    return {"source": source, "vocab_size": vocab_size, "sha256": hashes}


def fingerprints(data: Data, vocab_size: int) -> dict[str, Any]:
    """Return what a manifest says beside: hashes of the tokenizer's content, and of samples of
    indexed tokens, too many to read.
    """
    if data.kind == "mock":
        return {}
    name = (
        str(data.tokenizer)
        if data.kind == "indexed"
        else str(prepared_root(data, vocab_size) / "tokenizer")
    )
    found: dict[str, Any] = {"tokenizer_sha256": load(name).sha256()}
    if data.kind == "indexed":
        files = [Path(f"{prefix}.bin") for _, prefix in (*blend(data.train), *blend(data.heldout))]
        found["sampled_sha256"] = {str(file): _sampled_sha256(file) for file in files}
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(data: Data, vocab_size: int, work: Path) -> None:
    files = source_files(data.sources)
    if not files:
        suffixes = ", ".join(SUFFIXES)
        raise InputError(
            f"data.sources={list(data.sources)} holds no file of {suffixes}; name text"
        )
    tokenizer, end = _tokenizer(data, files, vocab_size, work / "tokenizer")
    counts = _tokenise(files, tokenizer, end, work)
    if not all(count.sum() for count in counts.values()):
        raise InputError(
            f"data: {len(files)} file(s) leave nothing to train on or nothing to hold out; name"
            " more in data.sources"
        )
    share = counts["heldout"][counts["heldout"] > 0] / counts["heldout"].sum()
    provenance = {
        "source": list(data.sources) or f"Python {sys.version.split()[0]} standard library",
        "asked": asked(data),
        "tokens": {split: int(count.sum()) for split, count in counts.items()},
        "vocab_size": tokenizer.entries,
        "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
        "sha256": {f"{s}.bin": _sha256(work / f"{s}.bin") for s in SPLITS},
    }
    (work / "provenance.json").write_text(json.dumps(provenance, indent=1))


def _tokenizer(
    data: Data, files: list[SourceFile], vocab_size: int, folder: Path
) -> tuple[Tokenizer, int]:
    """Return the plan's tokenizer, or one trained on the text, and the id that ends a document.

    A copy lies in `folder`.
    """
    if data.tokenizer is None:
        shown = _shown(files, "training the tokenizer")
        read = (d for f in shown for d in documents(f, are_parted(files)))
        texts = (document.text for document in read if document.split == "train")
        train_tokenizer(texts, vocab_size, folder)
        tokenizer = load(str(folder))
        assert tokenizer.end is not None
        return tokenizer, tokenizer.end
    tokenizer, end = fitting(data.tokenizer, vocab_size)
    tokenizer.save(folder)
    return tokenizer, end


def fitting(name: str, vocab_size: int) -> tuple[Tokenizer, int]:
    """Return a tokenizer and the id that ends a document; InputError where a model cannot use
    it.
    """
    tokenizer = load(name)
    if tokenizer.entries > vocab_size:
        raise InputError(
            f"data.tokenizer={name} has {tokenizer.entries} entries, the model's vocabulary"
            f" {vocab_size}; choose another model or tokenizer"
        )
    if tokenizer.end is None:
        raise InputError(
            f"data.tokenizer={name} has no end-of-text token to part documents with; choose another"
        )
    return tokenizer, tokenizer.end


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE with `vocab_size` entries and write it to `folder` in Hugging Face's
    form.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD
    ).save_pretrained(str(folder))


def _tokenise(
    files: list[SourceFile], tokenizer: Tokenizer, end: int, work: Path
) -> dict[str, np.ndarray]:
    """Write both splits' .bin/.idx; return how often each token occurs in each."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    entries = tokenizer.entries
    dtype = DType.optimal_dtype(entries)
    builders = {
        split: IndexedDatasetBuilder(str(work / f"{split}.bin"), dtype=dtype) for split in SPLITS
    }
    counts = {split: np.zeros(entries, dtype=np.int64) for split in SPLITS}
    parted = are_parted(files)
    for batch in _batches(d for f in _shown(files, "tokenising") for d in documents(f, parted)):
        encoded = tokenizer.encode([d.text for d in batch])
        for document, ids in zip(batch, encoded, strict=True):
            if max(ids, default=0) >= entries:
                raise InputError(
                    f"data.tokenizer gives token {max(ids)}, and has {entries} entries; it is"
                    " damaged, choose another"
                )
            row = np.array([*ids, end], dtype=dtype)
            builders[document.split].add_document(row, [len(row)])
            counts[document.split] += np.bincount(row, minlength=entries)
    for split, builder in builders.items():
        builder.finalize(str(work / f"{split}.idx"))
    return counts


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(stream, BATCH)):
        yield batch


def _shown(files: list[SourceFile], what: str) -> Iterator[SourceFile]:
    """Yield the files, with a progress bar on a terminal alone: a refusal elsewhere is one line."""
    console = Console(stderr=True)
    yield from track(files, what, console=console, disable=not console.is_terminal)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_sha256(path: Path) -> str:
    """Return the hash of a file's size and of SAMPLES blocks of BLOCK bytes, spread evenly from its
    beginning to its end.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.linspace(0, max(0, size - BLOCK), SAMPLES, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _unknown_package(error: ModuleNotFoundError) -> InputError:
    return InputError(
        f"{error.name} is not installed here, and preparing text needs it; run `make install`, or "
        "prepare in the stack's container (compute nodes have it)"
    )


def prepare_or_check(data: Data, vocab_size: int) -> str:
    """Prepare text, or read every token of an indexed data set; return what there is, in a line."""
    if data.kind == "mock":
        raise InputError("data=mock needs no preparation; use data=text, or data=indexed to check")
    if data.kind == "text":
        root = prepare(data, vocab_size)
        return f"{root}: {read_json(root / 'provenance.json')['tokens']} tokens"
    check_tokenizer(data.tokenizer, data.tokenizer, vocab_size)
    parts = parts_of(data, vocab_size)
    with Console(stderr=True).status("reading every token"):
        check_contents(sets_of(parts), vocab_size, everything=True)
    counts = {name: sum(part.tokens for part in split) for name, split in parts.items()}
    return (
        f"{', '.join(data.train)}: whole, {counts} tokens, all within model.vocab_size={vocab_size}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare or check the data that Hydra overrides name; exit code 2 for a wrong input."""
    form = argparse.RawDescriptionHelpFormatter
    name = "python -m recipes.training.data"
    parser = ArgumentParser(prog=name, description=__doc__, epilog=EXAMPLES, formatter_class=form)
    what = (
        "Hydra overrides: data=…, data.sources=…, data.tokenizer=…, and model=… for its vocabulary"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    try:
        data, vocab_size = compose_data(parser.parse_args(argv).overrides)
        print(prepare_or_check(data, vocab_size))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except ModuleNotFoundError as error:
        print(f"error: {_unknown_package(error)}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
