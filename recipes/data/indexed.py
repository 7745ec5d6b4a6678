"""Megatron's indexed data sets (.bin and .idx): are they whole, and do their tokens fit a model?

Reads the files with NumPy alone, so that a login node can look before a job is queued.  The format
is that of megatron/core/datasets/indexed_dataset.py, v0.12.3, lines 36-66 and 113-190.  The .idx
holds a header, the length of every sequence, its byte offset in the .bin, and the sequence at which
each document ends; the .bin holds the tokens.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.errors import InputError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, documents + 1
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
OTHER_TYPES = {6: "float64", 7: "float32"}
OLD_MAGIC = b"TNTIDX"  # fairseq's format, which Megatron-LM read until 2022
WHOLE_BYTES = 2**30  # files up to this size together are read whole: seconds on a network disk
STRETCHES, STRETCH = 1024, 2**18  # of larger ones, so many stretches of so many bytes
CHUNK = 2**24  # elements looked at together
AGAIN = "copy or prepare them again"


@dataclass(frozen=True)
class Indexed:
    """A data set whose files agree in size; `prefix` is their path without suffix.

    `sequences` and `documents` are counts.  Lengths, offsets and tokens stay on disk until read.
    """

    prefix: str
    dtype: np.dtype[Any]
    sequences: int
    documents: int
    bin_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens in the .bin."""
        return self.bin_bytes // self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes that a whole check reads: the tokens, and the index's lengths and offsets."""
        return self.bin_bytes + 12 * self.sequences

    def start_of(self, sequence: int) -> int:
        """Return the token at which a sequence begins; the number of tokens behind the last one."""
        if sequence >= self.sequences:
            return self.tokens
        return int(self._offsets()[sequence]) // self.dtype.itemsize

    def ids(self) -> NDArray[Any]:
        """Return the tokens, read from disk as they are touched."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def _lengths(self) -> NDArray[np.int32]:
        return _part(f"{self.prefix}.idx", np.dtype(np.int32), HEADER.size, self.sequences)

    def _offsets(self) -> NDArray[np.int64]:
        start = HEADER.size + 4 * self.sequences
        return _part(f"{self.prefix}.idx", np.dtype(np.int64), start, self.sequences)

    def ends(self) -> NDArray[np.int64]:
        """Return the sequences at which documents begin and end."""
        start = HEADER.size + 12 * self.sequences
        return _part(f"{self.prefix}.idx", np.dtype(np.int64), start, self.documents + 1)


def _part(path: str, dtype: np.dtype[Any], start: int, count: int) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))


def open_indexed(prefix: str) -> Indexed:
    """Return the data set of a prefix; InputError where its files are missing, cut or foreign.

    Reads the header and the ends of the index alone, whatever the size.
    """
    _is_a_prefix(prefix)
    try:
        sizes = [_size(f"{prefix}{suffix}") for suffix in (".idx", ".bin")]
        return _opened(prefix, *sizes)
    except OSError as error:
        path = error.filename or f"{prefix}.idx"
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); name the prefix of a Megatron "
            "data set (its path without .bin and .idx) that this user may read"
        ) from None


def _is_a_prefix(prefix: str) -> None:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and not os.path.exists(f"{prefix}.bin"):
        raise InputError(
            f"{prefix} names a file; name the prefix of .bin and .idx: {path.with_suffix('')}"
        )
    if os.path.isdir(prefix) and not os.path.exists(f"{prefix}.bin"):
        found = sorted(str(p.with_suffix("")) for p in path.glob("*.idx"))[:3]
        which = f"a prefix in it: {', '.join(found)}" if found else "a prefix; it holds no .idx"
        raise InputError(f"{prefix} is a folder; name {which}")


def _size(path: str) -> int:
    """Return a file's size; OSError where it cannot be opened, InputError where it is no file."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no regular file; name the prefix of a Megatron data set")
    with open(path, "rb"):
        pass
    if not found.st_size:
        raise InputError(f"{path} is empty; {AGAIN}")
    return found.st_size


def _opened(prefix: str, idx_bytes: int, bin_bytes: int) -> Indexed:
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(HEADER.size)
    _is_megatrons(prefix, head)
    if len(head) < HEADER.size:
        raise InputError(f"{prefix}.idx was cut within its header; {AGAIN}")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != VERSION:
        raise InputError(f"{prefix}.idx has version {version}, Megatron-Core reads 1; {AGAIN}")
    if code not in TOKEN_TYPES:
        kind = OTHER_TYPES.get(code, f"elements of an unknown type ({code})")
        raise InputError(f"{prefix}.idx says that the .bin holds {kind}, no token ids; {AGAIN}")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if idx_bytes not in (expected, expected + sequences):  # a byte each: modes, of images and text
        raise InputError(
            f"{prefix}.idx has {idx_bytes:,} bytes, its {sequences:,} sequences and {bounds:,} "
            f"document bounds take {expected:,}: it was cut, or written on; {AGAIN}"
        )
    if not sequences or not bounds:
        raise InputError(f"{prefix}.idx lists no sequence; {AGAIN}")
    found = Indexed(prefix, np.dtype(TOKEN_TYPES[code]), sequences, bounds - 1, bin_bytes)
    _ends_agree(found)
    return found


def _is_megatrons(prefix: str, head: bytes) -> None:
    if head.startswith(OLD_MAGIC):
        raise InputError(
            f"{prefix}.idx is in fairseq's older format; prepare the data with Megatron-LM's"
            " tools/preprocess_data.py"
        )
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise InputError(f"{prefix}.idx is no index of a Megatron data set; {AGAIN}")


def _ends_agree(found: Indexed) -> None:
    """The last sequence must end where the .bin ends, the last document with the last sequence."""
    last, size = int(found.ends()[-1]), found.dtype.itemsize
    if last != found.sequences:
        raise InputError(
            f"{found.prefix}.idx ends its documents at sequence {last:,} and has"
            f" {found.sequences:,}: it was changed; {AGAIN}"
        )
    end = int(found._offsets()[-1]) + int(found._lengths()[-1]) * size
    if end != found.bin_bytes:
        raise InputError(
            f"{found.prefix}.bin has {found.bin_bytes:,} bytes, its .idx describes {end:,}: one of"
            f" them was cut, or is of another data set; {AGAIN}"
        )


# Contents


def check_contents(sets: Sequence[Indexed], vocab_size: int, everything: bool = False) -> str:
    """Return how much was read; InputError for an id outside 0 … vocab_size - 1, or a broken index.

    Reads all tokens where all files together have at most WHOLE_BYTES, or `everything` is asked
    for, else stretches spread evenly, so that terabytes take seconds.
    """
    together = sum(each.bytes for each in sets)
    if everything or together <= WHOLE_BYTES:
        for each in sets:
            _index_agrees(each)
            _ids_fit(each, vocab_size, [(0, each.tokens)])
        return "every token"
    for each in sets:
        count = max(2, round(STRETCHES * each.bytes / together))
        _ids_fit(each, vocab_size, _stretches(each, count))
    return f"{STRETCHES:,} stretches of {STRETCH // 1024:,} KiB, spread evenly"


def _stretches(found: Indexed, count: int) -> list[tuple[int, int]]:
    """Return the bounds of stretches spread evenly over the tokens, first and last included."""
    length = min(found.tokens, STRETCH // found.dtype.itemsize)
    starts = np.linspace(0, found.tokens - length, count, dtype=np.int64)
    return [(int(start), int(start) + length) for start in starts]


def _index_agrees(found: Indexed) -> None:
    """Offsets must be the sums of the lengths before them, and documents end in order."""
    lengths, offsets, ends = found._lengths(), found._offsets(), found.ends()
    at = 0
    for start, stop in _chunks(0, found.sequences):
        sizes = lengths[start:stop].astype(np.int64) * found.dtype.itemsize
        wanted = at + np.concatenate(([0], np.cumsum(sizes)))
        if sizes.min() < 0 or not np.array_equal(offsets[start:stop], wanted[:-1]):
            raise InputError(
                f"{found.prefix}.idx: lengths and offsets of its sequences disagree: it was"
                f" changed; {AGAIN}"
            )
        at = int(wanted[-1])
    if any((np.diff(ends[a : b + 1]) < 0).any() for a, b in _chunks(0, len(ends))) or ends[0] < 0:
        raise InputError(f"{found.prefix}.idx: its documents are out of order; {AGAIN}")


def _ids_fit(found: Indexed, vocab_size: int, parts: Sequence[tuple[int, int]]) -> None:
    ids = found.ids()
    for first, last in parts:
        for start, stop in _chunks(first, last):
            piece = ids[start:stop]
            low, high = int(piece.min()), int(piece.max())
            if low < 0 or high >= vocab_size:
                raise InputError(
                    wrong_id(f"{found.prefix}.bin", low if low < 0 else high, vocab_size)
                )


def wrong_id(where: str, token: int, vocab_size: int) -> str:
    """Return what to say of a token id that the model has no embedding for."""
    return (
        f"{where} holds token {token}, the model's vocabulary has {vocab_size} (model.vocab_size): "
        "it was made with another tokenizer, or changed; name data of this model's tokenizer"
    )


def _chunks(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, CHUNK):
        yield start, min(last, start + CHUNK)
