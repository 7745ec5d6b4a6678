"""Broken data: files that are cut, empty, of another tokenizer or no text; preparations that are
killed, or two at once.

The commands' `main` is called in this process, for a process that imports Megatron-Core takes
seconds; those that are killed are processes.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from launch import preflight
from launch.__main__ import main as launch
from tests.faults.commands import PROJECT, REFUSED, Ended, Main, call
from tests.faults.folders import opened
from tests.faults.mutations import BYTES
from tests.faults.registry import Outcome, fault
from tests.recipes.test_data_files import write_tokenizer, written

AREA = "Data"
VOCAB = 400
Change = Callable[[Path, random.Random], None]


def corpus(folder: Path, documents: int = 40) -> Path:
    """Write so many documents of text."""
    folder.mkdir(parents=True)
    for n in range(documents):
        (folder / f"doc{n}.txt").write_text(
            f"document {n}: " + "the quick brown fox jumps over the lazy dog. é漢字 " * 5
        )
    return folder


def text(source: Path, root: Path, tokenizer: Path | None = None, vocab: int = VOCAB) -> list[str]:
    """Return the overrides that name text, and the root of what is prepared from it."""
    own = [f"data.tokenizer={tokenizer}"] if tokenizer else []
    return [f"data.sources=[{source}]", f"data.root={root}", f"model.vocab_size={vocab}", *own]


def indexed(root: Path, tokenizer: Path) -> list[str]:
    """Return the overrides that name the data sets train and heldout of a folder."""
    train = f"0.5,{root}/train,0.5,{root}/train"
    data = [f"data.train=[{train}]", f"data.heldout=[{root}/heldout]"]
    return ["data=indexed", *data, f"data.tokenizer={tokenizer}", f"model.vocab_size={VOCAB}"]


def prepare_main(overrides: Sequence[str]) -> int:
    """Run `python -m recipes.training.data`, whose import takes seconds."""
    from recipes.training.data import main

    return main(overrides)


def prepare(overrides: Sequence[str]) -> Ended:
    """Return how the preparation ends."""
    return call(prepare_main, overrides)


def job(run: Sequence[object]) -> int:
    """Run what a job runs first: `python -m launch.preflight RUN`."""
    return preflight.main(Path(str(run[0])))


def whole(ended: Ended) -> None:
    """Assert that a command took whole data for whole."""
    assert ended.code == 0, ended


def refusal(main: Main, arguments: Sequence[object]) -> str | None:
    """Return what is wrong with how a command ends that must refuse."""
    ended = call(main, arguments)
    return "taken for whole" if ended.code == 0 else ended.wrong(())


class Checks:
    """The commands that look at one data set: its preparation, the launch, and the job."""

    def __init__(self, folder: Path, *overrides: Sequence[str]) -> None:
        place = f"runs_dir={folder}/runs"
        self.asked = [[*data, place, f"run_name=run{n}"] for n, data in enumerate(overrides)]
        self.runs = [opened(asked) for asked in self.asked]

    def ends(self) -> Iterator[Ended]:
        """Yield how each command ends."""
        for asked, run in zip(self.asked, self.runs, strict=True):
            yield prepare(asked)
            yield call(launch, [*asked, "dry_run=true"])
            yield call(job, [run])

    def wrong(self) -> str | None:
        """Return what is wrong with how they end where all must refuse."""
        ends = [("taken for whole" if end.code == 0 else end.wrong(())) for end in self.ends()]
        return next((f"command {n}: {end}" for n, end in enumerate(ends) if end), None)


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


@fault(
    AREA,
    "`.bin` and `.idx` cut at any byte, longer, empty, missing or garbage; indexed and prepared"
    " data: `recipes.training.data`, `launch`, a job's preflight",
    small=6,
    full=300,
)
def broken_data_sets(count: int, folder: Path) -> Outcome:
    """Garbage in .bin alone is seen where it gives ids beyond the vocabulary, as random bytes
    do.
    """
    outcome, made = Outcome(), text(corpus(folder / "corpus"), folder / "out")
    whole(prepare(made))
    root = folder / "out" / f"vocab{VOCAB}"
    kept = shutil.copytree(root, folder / "kept")
    checks = Checks(folder, made, indexed(root, kept / "tokenizer"))
    for ended in checks.ends():
        whole(ended)
    for seed in range(count):
        draw = random.Random(seed)
        shutil.rmtree(root)
        shutil.copytree(kept, root)
        change = draw.choice([_cut, _cut, _cut, _longer, _empty, _missing, _garbage])
        path = root / draw.choice(["train.bin", "train.idx", "heldout.bin", "heldout.idx"])
        change(path, draw)
        wrong = checks.wrong()
        outcome.add(REFUSED, lost=wrong and f"{path.name}, {change.__name__}, seed {seed}: {wrong}")
    return outcome


@fault(
    AREA,
    "a data set of another tokenizer, whose ids go beyond the model's vocabulary at any place: the"
    " same commands",
    small=6,
    full=300,
)
def ids_beyond_the_vocabulary(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", VOCAB)
    _write_data(folder, np.arange(2000, dtype=np.int32) % VOCAB)
    checks = Checks(folder, indexed(folder, folder / "tokenizer"))
    for seed in range(count):
        draw = random.Random(seed)
        ids = np.random.default_rng(seed).integers(0, VOCAB, draw.randint(1, 4000)).astype(np.int32)
        ids[draw.randrange(len(ids))] = draw.choice([VOCAB, VOCAB + 1, 60_000, 2**31 - 1, -1])
        _write_data(folder, ids)
        wrong = checks.wrong()
        outcome.add(REFUSED, lost=wrong and f"seed {seed}: {wrong}")
    return outcome


def _write_data(folder: Path, ids: np.ndarray) -> None:
    for split in ("train", "heldout"):
        written(folder / split, ids, documents=1)


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


@fault(
    AREA,
    "text that is no text: undecodable bytes, empty, cut or retyped JSONL",
    small=6,
    full=13,
)
def text_that_is_none(count: int, folder: Path) -> Outcome:
    outcome = Outcome()
    for n, (kind, (name, content)) in enumerate(list(TEXTS.items())[:count]):
        source = folder / str(n) / name
        source.parent.mkdir()
        source.write_bytes(content)
        root = folder / f"out{n}"
        wrong = refusal(prepare_main, text(source, root))
        wrong = wrong or (
            "something was left that looks whole" if (root / f"vocab{VOCAB}").exists() else None
        )
        outcome.add(REFUSED, lost=wrong and f"{kind}: {wrong}")
    return outcome


@fault(
    AREA,
    "a tokenizer that is missing, damaged, wants code of its own, or is larger than the vocabulary",
    small=8,
    full=300,
)
def wrong_tokenizers(count: int, folder: Path) -> Outcome:
    """A damaged tokenizer that still loads is not refused where all its ids are in the vocabulary:
    it is then another tokenizer.
    """
    outcome, source = Outcome(), corpus(folder / "corpus")
    whole(prepare(text(source, folder / "out")))
    made = folder / "out" / f"vocab{VOCAB}"
    entries = int(json.loads((made / "provenance.json").read_text())["vocab_size"])
    broken = folder / "tokenizer"
    for seed in range(count):
        draw = random.Random(seed)
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(made / "tokenizer", broken)
        must, vocab = _break_tokenizer(broken, seed, draw), entries - 1 if seed == 0 else VOCAB
        asked = text(source, folder / f"made{seed}", broken, vocab)
        wrong = refusal(prepare_main, asked)
        loaded = wrong == "taken for whole" and not must
        if loaded:
            wrong = call(launch, [*asked, f"runs_dir={folder}/runs", "dry_run=true"]).wrong((0,))
        if (broken / "owned").exists():
            wrong = "code of the tokenizer's folder was run"
        outcome.add(
            "loaded, ids in the vocabulary" if loaded else REFUSED,
            lost=wrong and f"seed {seed}: {wrong}",
        )
        shutil.rmtree(folder / f"made{seed}", ignore_errors=True)
    return outcome


@fault(
    AREA,
    "a SentencePiece model that is cut, changed, or larger than the vocabulary",
    small=4,
    full=300,
)
def wrong_sentencepiece_models(count: int, folder: Path) -> Outcome:
    """A changed model that still loads is another tokenizer, as above."""
    outcome, source = Outcome(), corpus(folder / "corpus")
    model, broken = sentencepiece_model(source, folder), folder / "broken.model"
    whole(prepare(text(source, folder / "out", model)))
    for seed in range(count):
        draw = random.Random(seed)
        content, kind = (
            model.read_bytes(),
            draw.choice([kind for kind in BYTES if kind != "as UTF-16"]),
        )
        broken.write_bytes(content if seed == 0 else BYTES[kind](content, draw))
        root = folder / f"made{seed}"
        wrong = refusal(
            prepare_main, text(source, root, broken, PIECES - 1 if seed == 0 else VOCAB)
        )
        loaded = wrong == "taken for whole" and seed > 0
        outcome.add(
            "loaded" if loaded else REFUSED,
            lost=None if loaded or not wrong else f"seed {seed}, {kind}: {wrong}",
        )
        shutil.rmtree(root, ignore_errors=True)
    return outcome


PIECES = 120


def sentencepiece_model(source: Path, folder: Path) -> Path:
    """Train a SentencePiece model with PIECES pieces on a folder of text."""
    from sentencepiece import SentencePieceTrainer

    files = ",".join(map(str, sorted(source.glob("*.txt"))))
    sizes = {
        "vocab_size": PIECES,
        "hard_vocab_limit": True,
        "character_coverage": 1.0,
        "byte_fallback": False,
    }
    SentencePieceTrainer.train(
        input=files, model_prefix=str(folder / "pieces"), model_type="bpe", minloglevel=2, **sizes
    )
    return folder / "pieces.model"


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
            kept = {
                k: v for k, v in json.loads((broken / name).read_text()).items() if "eos" not in k
            }
            (broken / name).write_text(json.dumps(kept))
        return True
    path = draw.choice(sorted(broken.iterdir()))
    kind = draw.choice([*BYTES])
    path.write_bytes(BYTES[kind](path.read_bytes(), draw))
    return False


def _process(source: Path, root: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-m", "recipes.training.data", *text(source, root)]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=nothing, stderr=nothing)


def _files(root: Path) -> dict[str, bytes]:
    return {
        name: (root / f"vocab{VOCAB}" / name).read_bytes()
        for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx")
    }


@fault(AREA, "a preparation killed (-9) at a random moment, and run again", small=0, full=25)
def preparation_killed(count: int, folder: Path) -> Outcome:
    """Nothing that looks whole is left unless it is, and the second run makes what an uninterrupted
    one does.
    """
    outcome, source = Outcome(), corpus(folder / "corpus", 2000)
    process = _begun(source, folder / "undisturbed")
    start = time.monotonic()
    assert process.wait() == 0
    length, expected = time.monotonic() - start, _files(folder / "undisturbed")
    for n in range(count):
        root = folder / f"out{n}"
        process = _begun(source, root)
        time.sleep(random.Random(n).uniform(0, length))
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = (root / f"vocab{VOCAB}").exists() and _files(root) != expected
        wrong = (
            "half-written data looked whole" if left else prepare(text(source, root)).wrong((0,))
        )
        wrong = wrong or (None if _files(root) == expected else "made again, it differs")
        outcome.add("made again, the same bytes", lost=wrong and f"killed preparation {n}: {wrong}")
    return outcome


def _begun(source: Path, root: Path) -> subprocess.Popen[bytes]:
    """Return a preparation that has made its folder, or has ended."""
    process = _process(source, root)
    while not root.exists() and process.poll() is None:
        time.sleep(0.005)
    return process


@fault(AREA, "two preparations of one data set at the same moment", small=1, full=10)
def two_preparations(count: int, folder: Path) -> Outcome:
    outcome, source = Outcome(), corpus(folder / "corpus", 500)
    whole(prepare(text(source, folder / "undisturbed")))
    expected = _files(folder / "undisturbed")
    for n in range(count):
        root = folder / f"out{n}"
        processes = [_process(source, root) for _ in range(2)]
        codes = [process.wait() for process in processes]
        right = codes == [0, 0] and _files(root) == expected and not list(root.glob("*.partial"))
        outcome.add(
            "one made it, both have it",
            lost=None if right else f"exit codes {codes}, same bytes: {_files(root) == expected}",
        )
    return outcome


@fault(
    AREA,
    "a data.root that is a file, a link to nothing, or in a place that cannot be written",
    small=3,
    full=3,
)
def roots_that_cannot_be_written(count: int, folder: Path) -> Outcome:
    outcome, source = Outcome(), corpus(folder / "corpus", 3)
    (folder / "file").write_text("")
    (folder / "loop").symlink_to("loop")
    for root in (folder / "file", folder / "loop", Path("/proc/nowhere"))[:count]:
        wrong = refusal(prepare_main, text(source, root))
        outcome.add(REFUSED, lost=wrong and f"{root}: {wrong}")
    return outcome
