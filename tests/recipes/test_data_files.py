"""Indexed data are checked by the launch and again in the job, whatever is wrong with them, in one
line.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.__main__ import main as launch
from launch.preflight import main as preflight
from recipes.compose.tree import compose_plan
from recipes.data import indexed
from recipes.data.files import bounds, check_data
from recipes.errors import InputError
from recipes.run_folder import open_folder, status_of
from recipes.training.data import main as prepare

pytestmark = pytest.mark.nemo  # Megatron-Core reads and writes data sets
VOCAB = 1024  # of model=llama3_tiny
DOCUMENTS, LENGTH = 200, 40


def written(prefix: Path, ids: np.ndarray, documents: int = DOCUMENTS) -> Path:
    """Write a data set with Megatron-Core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=ids.dtype.type)
    for row in np.array_split(ids, documents):
        builder.add_document(row, [len(row)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two training sets, a held-out one, a tokenizer, and a run folder; and where they are put."""
    root = tmp_path_factory.mktemp("data")
    kept, used = root / "kept", root / "used"
    (kept / "tokenizer").mkdir(parents=True)
    write_tokenizer(kept / "tokenizer", VOCAB)
    draw = np.random.default_rng(1)
    for name in ("a", "b", "valid"):
        written(kept / name, draw.integers(0, VOCAB, DOCUMENTS * LENGTH).astype(np.uint16))
    open_folder(compose_plan(overrides(used)))
    shutil.copytree(used / "runs", kept / "runs")
    return kept, used


@pytest.fixture
def files(pristine: tuple[Path, Path]) -> Path:
    """The folder, as new."""
    kept, used = pristine
    shutil.rmtree(used, ignore_errors=True)
    return Path(shutil.copytree(kept, used))


def write_tokenizer(folder: Path, entries: int) -> None:
    vocabulary = {f"w{n}": n for n in range(entries)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))


def overrides(files: Path, *more: str, train: str = "a", heldout: str = "valid") -> list[str]:
    data = [f"data.train=[{files}/{train}]", f"data.heldout=[{files}/{heldout}]"]
    place = [f"data.tokenizer={files}/tokenizer", f"runs_dir={files}/runs", "run_name=one"]
    return ["data=indexed", *data, *place, *more]


def cut(name: str, end: int) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        (files / name).write_bytes((files / name).read_bytes()[:end])

    return change


def put(name: str, at: int, what: bytes) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        content = bytearray((files / name).read_bytes())
        content[at : at + len(what)] = what
        (files / name).write_bytes(bytes(content))

    return change


def gone(name: str) -> Callable[[Path], None]:
    return lambda files: (files / name).unlink()


def added(name: str, what: bytes) -> Callable[[Path], None]:
    return lambda files: (files / name).write_bytes((files / name).read_bytes() + what)


def looped(files: Path) -> None:
    (files / "a.bin").unlink()
    (files / "a.bin").symlink_to(files / "a.bin")


def a_folder(files: Path) -> None:
    (files / "a.bin").unlink()
    (files / "a.bin").mkdir()


def a_pipe(files: Path) -> None:
    (files / "a.bin").unlink()
    os.mkfifo(files / "a.bin")


def other_lengths(files: Path) -> None:
    """Move tokens from one document to another: the sum stays, the offsets are wrong."""
    start = indexed.HEADER.size + 4 * 20
    put("a.idx", start, struct.pack("<ii", LENGTH - 1, LENGTH + 1))(files)


def same_file(files: Path) -> None:
    for suffix in (".bin", ".idx"):
        (files / f"valid{suffix}").unlink()
        (files / f"valid{suffix}").symlink_to(files / f"a{suffix}")


def large_tokenizer(files: Path) -> None:
    write_tokenizer(files / "tokenizer", 2 * VOCAB)


def no_tokenizer(files: Path) -> None:
    (files / "tokenizer" / "tokenizer.json").unlink()


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    ".bin cut": (cut("a.bin", 1001), "a.bin has 1,001 bytes"),
    ".bin cut by a token": (cut("a.bin", 2 * DOCUMENTS * LENGTH - 2), "one of them was cut"),
    "held-out .bin cut": (cut("valid.bin", 100), "valid.bin has 100 bytes"),
    ".bin longer": (added("a.bin", b"\0\0"), "one of them was cut"),
    ".bin empty": (cut("a.bin", 0), "a.bin is empty"),
    ".bin missing": (gone("a.bin"), "a.bin cannot be read (No such file"),
    ".bin a link to itself": (looped, "a.bin cannot be read (Too many levels"),
    ".bin a folder": (a_folder, "no regular file"),
    ".bin a pipe": (a_pipe, "no regular file"),
    ".idx cut in its header": (cut("a.idx", 20), "cut within its header"),
    ".idx cut": (cut("a.idx", 1000), "a.idx has 1,000 bytes"),
    ".idx longer": (added("a.idx", b"\0" * 7), "cut, or written on"),
    ".idx empty": (cut("a.idx", 0), "a.idx is empty"),
    ".idx missing": (gone("a.idx"), "a.idx cannot be read (No such file"),
    "another magic": (put("a.idx", 0, b"garbage"), "no index of a Megatron data set"),
    "fairseq's magic": (put("a.idx", 0, b"TNTIDX\0\0\1"), "older format"),
    "another version": (put("a.idx", 9, struct.pack("<Q", 2)), "version 2"),
    "floats": (put("a.idx", 17, b"\x07"), "float32, no token ids"),
    "an unknown type": (put("a.idx", 17, b"\x63"), "unknown type (99)"),
    "a wider type": (put("a.idx", 17, b"\x04"), "one of them was cut"),
    "other counts": (put("a.idx", 18, struct.pack("<Q", 2**60)), "sequences and"),
    "lengths and offsets disagree": (other_lengths, "lengths and offsets"),
    "an id beyond the vocabulary": (put("a.bin", 5000, struct.pack("<H", VOCAB)), "token 1024"),
    "the last id": (put("a.bin", 2 * DOCUMENTS * LENGTH - 2, b"\xff\xff"), "token 65535"),
    "a held-out id": (put("valid.bin", 0, b"\xff\xff"), "valid.bin holds token 65535"),
    "trained on what is held out": (same_file, "held-out loss would be one of text trained on"),
    "a larger tokenizer": (large_tokenizer, "has 2048 entries, the model's vocabulary 1024"),
    "a tokenizer's folder without one": (no_tokenizer, "holds no tokenizer"),
}


def refusal(
    main: Callable[[Sequence[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the one line with which a command refuses."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_data_set_is_refused_by_launch_and_job(
    kind: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = BROKEN[kind]
    change(files)
    run = files / "runs" / "one"
    assert words in refusal(launch, overrides(files), capsys)
    assert status_of(run) == "new" and not (run / "job" / "local.sh").exists()
    assert words in refusal(lambda given: preflight(Path(given[0])), [str(run)], capsys)
    assert status_of(run) == "failed"


def test_whole_data_are_described(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([*overrides(files), "dry_run=true", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)[0]["summary"]["data"]
    assert data["checked"] == "every token" and data["train_tokens"] == DOCUMENTS * LENGTH
    assert data["epochs"] == pytest.approx(
        100 * 8 * 128 / (DOCUMENTS * LENGTH)
    )  # steps, batch, length
    assert data["heldout_tokens"] == DOCUMENTS * LENGTH and data["warning"] is None


def test_large_files_are_read_in_stretches(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compose_plan(overrides(files))
    monkeypatch.setattr(indexed, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(indexed, "STRETCHES", 10)
    monkeypatch.setattr(indexed, "STRETCH", 64)
    assert "10 stretches" in str(check_data(plan).checked)
    put("a.bin", 2 * DOCUMENTS * LENGTH - 2, b"\xff\xff")(files)  # the end is always read
    with pytest.raises(Exception, match="token 65535"):
        check_data(plan)
    assert check_data(plan, contents=False).checked == "sizes of the files"


PREFIXES = [
    ("data.train=[{0}/a.bin]", "names a file; name the prefix of .bin and .idx: {0}/a"),
    ("data.train=[{0}/a.idx]", "names a file; name the prefix of .bin and .idx: {0}/a"),
    ("data.train=[{0}]", "is a folder; name a prefix in it: {0}/a, {0}/b, {0}/valid"),
    ("data.train=[{0}/tokenizer]", "is a folder; name a prefix; it holds no .idx"),
    ("data.train=[s3://bucket/a]", "no path of a file system"),
    ("data.tokenizer=https://x/tokenizer.model", "no path of a file system"),
    ("data.train=[0.3,{0}/a,{0}/b]", "mixes weights and prefixes"),
    ("data.train=[{0}/a,0.3,{0}/b,0.7]", "mixes weights and prefixes"),
    ("data.train=[-1,{0}/a]", "weights are numbers above 0"),
    ("data.train=[0,{0}/a,1,{0}/b]", "weights are numbers above 0"),
    ("data.train=[nan,{0}/a]", "weights are numbers above 0"),
    ("data.heldout=[{0}/./a]", "data.train and in data.heldout"),
    ("data.heldout=[]", "data.split=[949,50,1]"),
    ("data.split=[949,50,1]", "set one of them"),
    ("data.split=949", "is no split"),
    ("data.split=[1,0,0]", "is no split"),
    ("data.split=[9,-1,0]", "is no split"),
    ("data.split=[9,x,0]", "is no split"),
    ("data.split=[949,nan]", "is no split"),
    ("data.split=[949,50,nan]", "is no split"),
    ("data.split=949,50,1", "a list as data.split=[949,50,1]"),
    ("data.tokenizer={0}/a.bin", "is no SentencePiece model"),
    ("data.tokenizer={0}/nothing", "no such file or folder"),
    ("data.train=[{0}/nothing]", "nothing.idx cannot be read (No such file"),
    ("data.train=[{0}/a,{0}/b] train.max_steps=1000", "data.train=[0.5,{0}/a,0.5,{0}/b]"),
    ("data.train=[{0}/a,{0}/b] data.heldout=[] data.split=[9,1,0]", "does not repeat a blend"),
    ("data.heldout=[] data.split=[998,1,1]", "leaves none for its held-out share"),
    ("data.heldout=[] data.split=[900,99,1]", "leaves none for its test share"),
]


@pytest.mark.parametrize(("wrong", "words"), PREFIXES)
def test_what_names_the_data_wrongly_is_refused(
    wrong: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(
        launch,
        [*overrides(files), *wrong.format(files).split(), "run_name=two", "dry_run=true"],
        capsys,
    )
    assert words.format(files) in line


def test_weights_let_small_sets_repeat(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blend = f"data.train=[3,{files}/a,1,{files}/b]"
    assert launch([*overrides(files), blend, "run_name=two", "dry_run=true", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)[0]["summary"]["data"]
    assert data["epochs"] == pytest.approx(100 * 8 * 128 * 0.75 / (DOCUMENTS * LENGTH))


@pytest.mark.parametrize(
    "split", ["949,50,1", "99,1,0", "969,30,1", "1,1,1", "0.9,0.05,0.05", "980,10,10"]
)
@pytest.mark.parametrize("sequences", [7, 500, 1999, 123457])
def test_a_split_is_cut_where_megatron_cuts_it(split: str, sequences: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    cuts = [
        (round(a * float(sequences)), round(b * float(sequences))) for a, b in filter(None, matrix)
    ]
    assert bounds(split, sequences)[: len(cuts)] == cuts


def test_what_is_not_here_is_left_to_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data=indexed", "data.train=[/corpora/c4/part0]", "data.heldout=[/corpora/c4/valid]"]
    job = [
        *data,
        "data.tokenizer=/tokenizers/llama3",
        "model=llama3_8b",
        "gpu=h100",
        "dry_run=true",
    ]
    mounts = "cluster.mounts=[/nowhere:/corpora,/tokenizers:/tokenizers]"
    assert launch([*job, mounts]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "not checked here: /nowhere/c4 is not on this machine; the job checks it" in said


def test_a_containers_paths_are_looked_for_behind_its_mounts(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data=indexed", "data.train=[/corpora/a]", "data.heldout=[/corpora/valid]"]
    job = [
        *data,
        "data.tokenizer=/corpora/tokenizer",
        "model=llama3_8b",
        "gpu=h100",
        "dry_run=true",
    ]
    mounts = f"cluster.mounts=[{files}:/corpora:ro]"
    assert launch([*job, mounts]) == 0
    assert f"{DOCUMENTS * LENGTH:,} tokens" in " ".join(capsys.readouterr().err.split())
    cut("a.bin", 10)(files)
    assert "a.bin has 10 bytes" in refusal(launch, [*job, mounts], capsys)


def test_every_token_is_read_on_request(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "WHOLE_BYTES", 0)
    command = [*overrides(files)[:4], "gpu=h100", "model=llama3_tiny"]
    assert prepare(command) == 0
    assert "whole, {'train': 8000, 'heldout': 8000} tokens" in capsys.readouterr().out
    put("a.bin", 5000, struct.pack("<H", VOCAB))(files)
    assert "token 1024" in refusal(prepare, command, capsys)


def test_an_id_that_no_check_read_is_named_when_it_is_trained_on(files: Path) -> None:
    """As NeMo reads data on a GPU: a process loads them, and puts its traceback before an error."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import DataLoader

    from recipes.training.run import of_worker
    from recipes.training.samples import Samples

    put("a.bin", 5000, struct.pack("<H", VOCAB))(files)
    places = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    tokenizer = SimpleNamespace(eod=0, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=100,
        split="1,0,0",
        path_to_cache=str(files),
        tokenizer=tokenizer,
        **places,
    )
    Samples.vocab_size = VOCAB
    read = Samples(
        IndexedDataset(f"{files}/a"), f"{files}/a", np.arange(DOCUMENTS), 75, Split.train, config
    )
    with pytest.raises(InputError) as caught:
        for _ in DataLoader(read, num_workers=1):
            pass
    assert "Traceback" in str(caught.value)
    line = str(of_worker(caught.value))
    assert (
        re.match(rf"{re.escape(str(files))}/a.bin, sample \d+, .*token {VOCAB}", line)
        and "Traceback" not in line
    )
    assert str(of_worker(InputError(line))) == line
