"""Tokenizers of Hugging Face and SentencePiece behind one face, for preparing, training, judging.

`load` reads what `data.tokenizer` names; `within` takes NeMo's own object, which wraps the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.data.tokenizer_files import is_on_the_hub, sentencepiece_file
from recipes.errors import InputError

MODEL = "tokenizer.model"  # a SentencePiece model in a folder of prepared data


class HuggingFace:
    """A tokenizer of the transformers library."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.entries: int = len(tokenizer)
        self.end: int | None = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any that mark begin or end."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return str(self.tokenizer.decode(ids))

    def vocabulary(self) -> dict[str, int]:
        """Return every entry with its id."""
        return dict(self.tokenizer.get_vocab())

    def sha256(self) -> str:
        """Return the SHA-256 of its vocabulary and of the rules by which it parts text.

        Of a tokenizer that is written in Python, the vocabulary alone.
        """
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        content = fast.to_str() if fast else json.dumps(self.vocabulary(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it to `folder`, for `load` to read."""
        self.tokenizer.save_pretrained(str(folder))


class SentencePiece:
    """A model of the sentencepiece library."""

    def __init__(self, processor: Any, path: Path | None = None) -> None:
        self.processor, self.path = processor, path
        self.entries: int = processor.get_piece_size()
        self.end: int | None = None if processor.eos_id() < 0 else processor.eos_id()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any that mark begin or end."""
        return [list(ids) for ids in self.processor.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return str(self.processor.decode([int(each) for each in ids]))

    def vocabulary(self) -> dict[str, int]:
        """Return every piece with its id."""
        return {self.processor.id_to_piece(n): n for n in range(self.entries)}

    def sha256(self) -> str:
        """Return the SHA-256 of its model, which holds pieces and rules."""
        return hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it to `folder`, for `load` to read."""
        assert self.path
        folder.mkdir(parents=True)
        shutil.copyfile(self.path, folder / MODEL)


Tokenizer = HuggingFace | SentencePiece


def load(name: str) -> Tokenizer:
    """Return the tokenizer that `name` names; InputError where there is none that can be read."""
    model = sentencepiece_file(name)
    return _hugging_face(name) if model is None else _sentencepiece(model)


def _sentencepiece(path: Path) -> SentencePiece:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePiece(SentencePieceProcessor(model_file=str(path)), path)
    except (OSError, RuntimeError) as error:
        why = f"({type(error).__name__})"
        raise InputError(f"data.tokenizer={path} is a damaged SentencePiece model {why}") from None


def _hugging_face(name: str) -> HuggingFace:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # nor asks whether to
    except (
        Exception
    ) as error:  # a damaged file raises whatever its reader does, Exception itself too
        raise InputError(f"data.tokenizer={name} cannot be loaded {_why(name, error)}") from None
    return HuggingFace(found)


def _why(name: str, error: Exception) -> str:
    kind = type(error).__name__
    if is_on_the_hub(name):
        return (
            f"({kind}): no folder is called so here, and the Hugging Face hub has it not, cannot "
            "be reached, or HF_HUB_OFFLINE is set; download it, and name the folder"
        )
    return f"({kind}); name a Hugging Face folder or name, or a SentencePiece .model file"


def within(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer that NeMo's object wraps."""
    inner = tokenizer.tokenizer
    return SentencePiece(inner) if hasattr(inner, "get_piece_size") else HuggingFace(inner)
