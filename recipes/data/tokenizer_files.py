"""What `data.tokenizer` names, read without the tokenizers' libraries: its kind and its entries.

It is a Hugging Face folder, a SentencePiece model (a file, or a folder with one), or a name on the
Hugging Face hub.  recipes/training/tokenizers.py loads it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from recipes.errors import InputError

HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
WHAT = "a Hugging Face folder, a SentencePiece .model file, or a name on the Hugging Face hub"


def sentencepiece_file(name: str) -> Path | None:
    """Return the SentencePiece model that `name` is or holds; None where it is of Hugging Face.

    InputError where it names a place that has no tokenizer, or a file of another kind.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return _checked(path)
    except OSError as error:
        raise InputError(f"data.tokenizer={name} cannot be read ({error.strerror})") from None
    if _is_path(name):
        raise InputError(f"data.tokenizer={name}: no such file or folder; name {WHAT}")
    return None


def is_on_the_hub(name: str) -> bool:
    """Return whether `name` can only be a name on the hub: no file or folder is called so here."""
    return not _is_path(name) and not os.path.exists(name)


def _is_path(name: str) -> bool:
    has_suffix = Path(name).suffix in (".model", ".json")
    return has_suffix or name.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(name)


def _in_folder(folder: Path) -> Path | None:
    if any((folder / name).exists() for name in HUGGING_FACE):
        return None
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return _checked(models[0])
    what = f"{len(models)} .model files: name one" if models else "no tokenizer"
    raise InputError(
        f"data.tokenizer={folder} holds {what}; a Hugging Face folder has tokenizer.json, a"
        " SentencePiece tokenizer is one .model file"
    )


def _checked(path: Path) -> Path:
    if path.name in HUGGING_FACE:
        raise InputError(f"data.tokenizer={path} is a file of a folder; name {path.parent}")
    with path.open("rb") as file:
        head = file.read(100)
    if TIKTOKEN.match(head):
        raise InputError(
            f"data.tokenizer={path} is a list of tiktoken's ranks (as Llama 3's original "
            "tokenizer.model), no SentencePiece model; name the folder of the model's Hugging Face "
            "tokenizer, which has tokenizer.json"
        )
    if not _pieces(path):
        raise InputError(
            f"data.tokenizer={path} is no SentencePiece model, or was cut; name {WHAT}"
        )
    return path


def entries(name: str) -> int | None:
    """Return how many ids a tokenizer has, the largest plus one; None where its files do not say.

    InputError as `sentencepiece_file`.
    """
    model = sentencepiece_file(name)
    return _pieces(model) if model else _of_json(Path(name) / "tokenizer.json")


def _of_json(path: Path) -> int | None:
    """Return the entries of Hugging Face's tokenizer.json; None where there is none to read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tree["model"]["vocab"]
        ids = (
            [vocabulary[word] for word in vocabulary]
            if isinstance(vocabulary, dict)
            else [len(vocabulary) - 1]
        )
        return int(max([*ids, *(token["id"] for token in tree.get("added_tokens", []))])) + 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _pieces(path: Path) -> int:
    """Return the pieces of a SentencePiece model, 0 where the file is none.

    The file is one protobuf message whose field 1 repeats, a piece each
    (sentencepiece_model.proto).
    """
    data, at, count = path.read_bytes(), 0, 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            if key & 7 != 2 or key >> 3 == 0:  # every field of this message has a length
                return 0
            length, at = _varint(data, at)
            at += length
            count += key >> 3 == 1
    except IndexError:
        return 0
    return count if at == len(data) else 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
