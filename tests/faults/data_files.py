"""Broken data: files that are cut, empty, of another tokenizer or no text; preparations that are killed, or two at once.

Functions are called in this process, for a process that imports NeMo takes twenty seconds; those that are killed are processes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recipes.errors import InputError
from recipes.plan import Data
from tests.faults.commands import REFUSED
from tests.faults.mutations import BYTES
from tests.faults.registry import Outcome, fault
from tests.faults.run_folders import PROJECT

AREA = "Data"
VOCAB = 400
Change = Callable[[Path, random.Random], None]


def corpus(folder: Path, documents: int = 40) -> Path:
    """Write so many documents of text."""
    folder.mkdir(parents=True)
    for n in range(documents):
        (folder / f"doc{n}.txt").write_text(f"document {n}: " + "the quick brown fox jumps over the lazy dog. é漢字 " * 5)
    return folder


def text_data(sources: Path, root: Path, **more: object) -> Data:
    return Data.model_validate({"kind": "text", "root": str(root), "sources": [str(sources)], "seed": 1, **more})


def indexed_data(root: Path) -> Data:
    prefixes = {"train": ["0.5", str(root / "train"), "0.5", str(root / "train")], "heldout": [str(root / "heldout")]}
    return Data.model_validate({"kind": "indexed", **prefixes, "tokenizer": str(root / "tokenizer"), "seed": 1})


def refusal(does: Callable[..., object], *arguments: object) -> str | None:
    """Return what is wrong with how a call ends that must be refused."""
    try:
        does(*arguments)
    except InputError as error:
        return None if "\n" not in str(error) else "more than one line"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:150]}"
    return "taken for whole"


def _cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _missing(path: Path, draw: random.Random) -> None:
    path.unlink()


def _longer(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(2 * draw.randint(1, 99)))


def _garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(max(34, path.stat().st_size)))


def _empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


@fault(AREA, "`.bin` and `.idx` cut at any byte, longer, empty, missing or garbage; indexed and prepared data", small=60, full=2000)
def broken_data_sets(count: int, folder: Path) -> Outcome:
    """Garbage in .bin alone is seen where it gives ids beyond the vocabulary, as random bytes do."""
    from recipes.training import data

    outcome, source = Outcome(), corpus(folder / "corpus")
    whole = data.prepare(text_data(source, folder / "out"), VOCAB)
    kept = shutil.copytree(whole, folder / "kept")
    data.check_indexed(indexed_data(whole), VOCAB)
    for seed in range(count):
        draw = random.Random(seed)
        shutil.rmtree(whole)
        shutil.copytree(kept, whole)
        change = draw.choice([_cut, _cut, _cut, _longer, _empty, _missing, _garbage])
        path = whole / draw.choice(["train.bin", "train.idx", "heldout.bin", "heldout.idx"])
        if path.suffix == ".idx" and change is _longer:
            change = _cut  # what follows an index is never read
        change(path, draw)
        wrong = refusal(data.check_indexed, indexed_data(whole), VOCAB) or refusal(data.prepare, text_data(source, folder / "out"), VOCAB)
        outcome.add(REFUSED, lost=wrong and f"{path.name}, {change.__name__}, seed {seed}: {wrong}")
    return outcome


@fault(AREA, "a data set of another tokenizer, whose ids go beyond the model's vocabulary at any place", small=20, full=300)
def ids_beyond_the_vocabulary(count: int, folder: Path) -> Outcome:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from recipes.training import data

    outcome = Outcome()
    for seed in range(count):
        draw = random.Random(seed)
        ids = np.random.default_rng(seed).integers(0, VOCAB, draw.randint(1, 4000))
        ids[draw.randrange(len(ids))] = draw.choice([VOCAB, VOCAB + 1, 60_000, 2**31 - 1, -1])
        for split in ("train", "heldout"):
            builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.int32)
            builder.add_document(ids.astype(np.int32), [len(ids)])
            builder.finalize(str(folder / f"{split}.idx"))
        wrong = refusal(data.check_indexed, indexed_data(folder), VOCAB)
        outcome.add(REFUSED, lost=wrong and f"seed {seed}: {wrong}")
    return outcome


TEXTS: dict[str, tuple[str, bytes]] = {
    "bytes that are no UTF-8": ("a.txt", b"good text \xff\xfe\x00"),
    "UTF-16": ("a.txt", "text".encode("utf-16")),
    "an empty file": ("a.txt", b""),
    "white space": ("a.txt", b" \n\n"),
    "a JSONL line that is cut": ("a.jsonl", b'{"text": "a"}\n{"text": '),
    "a JSONL line without text": ("a.jsonl", b'{"txt": "a"}\n'),
    "a JSONL text that is a number": ("a.jsonl", b'{"text": 5}\n'),
    "a JSONL text that is null": ("a.jsonl", b'{"text": null}\n'),
    "a JSONL list": ("a.jsonl", b"[1, 2]\n"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n'),
    "deep nesting": ("a.jsonl", b"[" * 100_000 + b"\n"),
    "a number of 10,000 digits": ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n"),
    "one document, so nothing held out": ("a.txt", b"text"),
}


@fault(AREA, "text that is no text: undecodable bytes, empty, cut or retyped JSONL", small=13, full=13)
def text_that_is_none(count: int, folder: Path) -> Outcome:
    from recipes.training import data

    outcome = Outcome()
    for n, (kind, (name, content)) in enumerate(list(TEXTS.items())[:count]):
        source = folder / str(n) / name
        source.parent.mkdir()
        source.write_bytes(content)
        root = folder / f"out{n}"
        wrong = refusal(data.prepare, text_data(source, root), VOCAB)
        wrong = wrong or ("something was left that looks whole" if (root / f"vocab{VOCAB}").exists() else None)
        outcome.add(REFUSED, lost=wrong and f"{kind}: {wrong}")
    return outcome


@fault(AREA, "a tokenizer that is missing, damaged, wants code of its own, or is larger than the vocabulary", small=25, full=300)
def wrong_tokenizers(count: int, folder: Path) -> Outcome:
    """A damaged tokenizer that still loads is not refused where all its ids are in the vocabulary: it is then another tokenizer."""
    from recipes.training import data

    outcome, source = Outcome(), corpus(folder / "corpus")
    made = data.prepare(text_data(source, folder / "out"), VOCAB)
    whole, entries = made / "tokenizer", int(json.loads((made / "provenance.json").read_text())["vocab_size"])
    broken = folder / "tokenizer"
    for seed in range(count):
        draw = random.Random(seed)
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        must, vocab = _break_tokenizer(broken, seed, draw), entries - 1 if seed == 0 else VOCAB
        root = folder / f"made{seed}"
        wrong = refusal(data.prepare, text_data(source, root, tokenizer=str(broken)), vocab)
        loaded = wrong == "taken for whole" and not must
        if loaded:
            wrong = refusal(data.check_indexed, indexed_data(root / f"vocab{vocab}"), vocab)
            wrong = None if wrong == "taken for whole" else wrong
        outcome.add("loaded, ids in the vocabulary" if loaded else REFUSED, lost=wrong and f"seed {seed}: {wrong}")
        shutil.rmtree(root, ignore_errors=True)
    return outcome


def _break_tokenizer(broken: Path, seed: int, draw: random.Random) -> bool:
    """Break a tokenizer; return whether it must be refused."""
    if seed == 0:
        return True  # whole, and larger than the vocabulary that is asked for
    if seed == 1:
        shutil.rmtree(broken)
        return True
    if seed == 2:
        config = json.loads((broken / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
        (broken / "tokenizer_config.json").write_text(json.dumps(config))
        (broken / "evil.py").write_text(f"open({str(broken / 'owned')!r}, 'w')\n")
        return True
    if seed == 3:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            kept = {k: v for k, v in json.loads((broken / name).read_text()).items() if "eos" not in k}
            (broken / name).write_text(json.dumps(kept))
        return True
    path = draw.choice(sorted(broken.iterdir()))
    kind = draw.choice([*BYTES])
    path.write_bytes(BYTES[kind](path.read_bytes(), draw))
    return False


PREPARE = """
import sys
from pathlib import Path
from tests.faults.data_files import VOCAB, text_data
from recipes.training import data
print("ready", flush=True)
data.prepare(text_data(Path(sys.argv[1]), Path(sys.argv[2])), VOCAB)
"""


def _process(source: Path, root: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", PREPARE, str(source), str(root)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _files(root: Path) -> dict[str, bytes]:
    return {name: (root / f"vocab{VOCAB}" / name).read_bytes() for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx")}


@fault(AREA, "a preparation killed (-9) at a random moment, and run again", small=2, full=25)
def preparation_killed(count: int, folder: Path) -> Outcome:
    """Nothing that looks whole is left unless it is, and the second run makes what an uninterrupted one does."""
    from recipes.training import data

    outcome, source = Outcome(), corpus(folder / "corpus", 2000)
    start = time.monotonic()
    data.prepare(text_data(source, folder / "undisturbed"), VOCAB)
    length, expected = time.monotonic() - start, _files(folder / "undisturbed")
    for n in range(count):
        root = folder / f"out{n}"
        process = _process(source, root)
        assert process.stdout
        process.stdout.readline()
        time.sleep(random.Random(n).uniform(0, length))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = (root / f"vocab{VOCAB}").exists() and _files(root) != expected
        data.prepare(text_data(source, root), VOCAB)
        wrong = "half-written data looked whole" if left else None if _files(root) == expected else "made again, it differs"
        outcome.add("made again, the same bytes", lost=wrong and f"killed preparation {n}: {wrong}")
    return outcome


@fault(AREA, "two preparations of one data set at the same moment", small=1, full=10)
def two_preparations(count: int, folder: Path) -> Outcome:
    from recipes.training import data

    outcome, source = Outcome(), corpus(folder / "corpus", 500)
    data.prepare(text_data(source, folder / "undisturbed"), VOCAB)
    expected = _files(folder / "undisturbed")
    for n in range(count):
        root = folder / f"out{n}"
        processes = [_process(source, root) for _ in range(2)]
        for process in processes:
            process.communicate()
        codes = [process.returncode for process in processes]
        right = codes == [0, 0] and _files(root) == expected and not list(root.glob("*.partial"))
        outcome.add("one made it, both have it", lost=None if right else f"exit codes {codes}, same bytes: {_files(root) == expected}")
    return outcome


@fault(AREA, "a data.root that is a file, a link to nothing, or in a place that cannot be written", small=3, full=3)
def roots_that_cannot_be_written(count: int, folder: Path) -> Outcome:
    from recipes.training import data

    outcome, source = Outcome(), corpus(folder / "corpus", 3)
    (folder / "file").write_text("")
    (folder / "loop").symlink_to("loop")
    for root in (folder / "file", folder / "loop", Path("/proc/nowhere"))[:count]:
        outcome.add(REFUSED, lost=(wrong := refusal(data.prepare, text_data(source, root), VOCAB)) and f"{root}: {wrong}")
    return outcome
