"""Text becomes an indexed data set whole or not at all, and every wrong input is one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.errors import InputError
from recipes.plan import Data
from recipes.training import data
from recipes.training.text import documents, source_files, split_of

pytestmark = pytest.mark.nemo  # Megatron-Core reads and writes data sets
VOCAB = 400


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(40):
        (folder / f"doc{n}.txt").write_text(
            f"document {n}: " + "the quick brown fox jumps over the lazy dog. " * 5
        )
    (folder / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n} é 漢字"}) + "\n" for n in range(20))
    )
    return folder


def plan_of(corpus: Path, root: Path, **more: object) -> Data:
    return Data.model_validate(
        {"kind": "text", "root": str(root), "sources": [str(corpus)], "seed": 1, **more}
    )


def test_every_document_is_in_one_split_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoTokenizer

    root = data.prepare(plan_of(corpus, tmp_path / "out"), VOCAB)
    tokenizer = AutoTokenizer.from_pretrained(str(root / "tokenizer"))
    sets = {s: IndexedDataset(str(root / s)) for s in ("train", "heldout")}
    found = {s: [tokenizer.decode(ids[:-1]) for ids in rows] for s, rows in sets.items()}
    written = [d for f in source_files((str(corpus),)) for d in documents(f)]
    for split, texts in found.items():
        assert texts == [d.text for d in written if d.split == split]
        assert texts
    assert json.loads((root / "provenance.json").read_text())["vocab_size"] <= VOCAB


def test_unigram_entropy_is_that_of_the_heldout_tokens(corpus: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    root = data.prepare(plan_of(corpus, tmp_path / "out"), VOCAB)
    heldout = IndexedDataset(str(root / "heldout"))
    counts = np.unique(np.concatenate(list(heldout)), return_counts=True)[1]
    p = counts / counts.sum()
    said = json.loads((root / "provenance.json").read_text())["unigram_entropy_nats"]
    assert said == pytest.approx(-(p * np.log(p)).sum())


def test_the_split_does_not_depend_on_where_the_corpus_lies(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "corpus"
    moved.parent.mkdir()
    here = [(f.name, split_of(f.name)) for f in source_files((str(corpus),))]
    corpus.rename(moved)
    assert [(f.name, split_of(f.name)) for f in source_files((str(moved),))] == here


def test_an_interrupted_preparation_is_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(corpus, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(data, "_sha256", lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            data.prepare(plan, VOCAB)
    assert not (tmp_path / "out" / f"vocab{VOCAB}").exists()
    root = data.prepare(plan, VOCAB)
    made = (root / "train.bin").stat().st_mtime_ns
    assert data.prepare(plan, VOCAB) == root and (root / "train.bin").stat().st_mtime_ns == made


def test_a_tokenizer_of_ones_own_is_used(corpus: Path, tmp_path: Path) -> None:
    first = data.prepare(plan_of(corpus, tmp_path / "a"), VOCAB)
    second = data.prepare(
        plan_of(corpus, tmp_path / "b", tokenizer=str(first / "tokenizer")), VOCAB
    )
    assert (first / "train.bin").read_bytes() == (second / "train.bin").read_bytes()
    hashes = [
        data.fingerprints(plan_of(corpus, tmp_path / name), VOCAB)["tokenizer_sha256"]
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]
    file = second / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    assert (
        data.fingerprints(plan_of(corpus, tmp_path / "b"), VOCAB)["tokenizer_sha256"] != hashes[0]
    )
    prefix = str(first / "train")
    indexed = plan_of(
        corpus,
        tmp_path,
        kind="indexed",
        train=[prefix],
        sources=[],
        tokenizer=str(first / "tokenizer"),
    )
    whole = data.fingerprints(indexed, VOCAB)
    assert whole["tokenizer_sha256"] == hashes[0] and set(whole["sampled_sha256"]) == {
        f"{prefix}.bin"
    }
    tokens = bytearray((first / "train.bin").read_bytes())
    tokens[-1] ^= 1
    (first / "train.bin").write_bytes(tokens)
    assert data.fingerprints(indexed, VOCAB)["sampled_sha256"] != whole["sampled_sha256"]
    with pytest.raises(InputError, match="entries"):
        data.prepare(plan_of(corpus, tmp_path / "c", tokenizer=str(first / "tokenizer")), 300)


def test_a_folder_made_from_other_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    data.prepare(plan_of(corpus, tmp_path / "out"), VOCAB)
    with pytest.raises(InputError, match=r"choose another data\.root"):
        data.prepare(plan_of(corpus, tmp_path / "out", sources=[str(corpus / "doc1.txt")]), VOCAB)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bytes.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("none.txt", b"", "nothing to train on"),
    ],
)
def test_bad_text_is_one_line_that_names_the_file(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        data.prepare(plan_of(tmp_path / name, tmp_path / "out"), VOCAB)
    assert not (tmp_path / "out" / f"vocab{VOCAB}").exists()


@pytest.mark.parametrize(
    "wrong", ["data.sources=[nowhere]", "data=mock", "data.tokenizer=nowhere", "data.kind=parquet"]
)
def test_the_command_refuses_with_code_2(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # the variable is read at import, which may be long ago
    assert data.main([wrong, f"data.root={tmp_path}/out"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
