"""The training lines of one dialect, gathered from a text as numbers.

Lines that differ only in their values are read by one pattern, and a block of nothing else by one call of it, which
keeps a log of a million steps within seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.importers.dialects import NEMO, Dialect, Shape, learn
from analysis.importers.lines import Rank, rank_of
from analysis.metrics import Array

MOST_SHAPES, RECENT = 2000, 8  # how many shapes are learned from one log, and how many of them are tried on a line
PARTLY = frozenset({"grad_norm", "lr", "global_batch", "samples", "memory_bytes"})  # columns that a run can do without
TIMESTAMP = " [20"  # before Megatron's lines where no rank stands


class Scanner:
    """Collects the training lines of one dialect.

    `places`, `rows`: by shape, the place of each line among all training lines, and its values as printed; `blocks`: the
    same as arrays, for what was read before.  `ranks`: who printed each line.  `validated`: the places of the lines that
    are the first after a validation.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect, self.shapes, self.recent = dialect, list[Shape](), list[int]()
        self.places, self.rows = list[list[int]](), list[list[tuple[str, ...]]]()
        self.blocks = list[tuple[int, NDArray[np.int64], list[Array]]]()
        self.ranks, self.validated = list[Rank](), set[int]()
        self.pending, self.heldout = set[Rank](), list[tuple[float, float]]()
        self.garbled = self.last = 0

    def line(self, line: str, at: int) -> None:
        """Read a training line that starts at `at`."""
        found = ((number, match) for number in self.recent if (match := self.shapes[number].match(line, at)))
        number, match = next(found, (-1, None))
        if match is None:
            number, match = self._learn(line, at)
        if not match or (line[-1] != "\n" and not self.dialect.closed and match.end(match.lastindex or 0) >= len(line.rstrip())):
            self.garbled += bool(self.dialect.head.match(line, at))  # or the file ends within a number
            return
        rank = () if at < 2 or line.startswith(TIMESTAMP) else rank_of(line[:at])
        self._first_after_validation(rank)
        self.places[number].append(len(self.ranks))
        self.rows[number].append(match.groups())
        self.last = number
        self.ranks.append(rank)

    def _learn(self, line: str, at: int) -> tuple[int, re.Match[str] | None]:
        shape = learn(self.dialect, line, at) if len(self.shapes) < MOST_SHAPES else None
        if shape is None:
            return -1, None
        self.shapes.append(shape)
        self.recent = [len(self.shapes) - 1, *self.recent[: RECENT - 1]]
        self.places.append([])
        self.rows.append([])
        return len(self.shapes) - 1, shape.match(line, at)

    def block(self, text: str, others: Sequence[str]) -> bool:
        """Read a block at once if all its training lines look like the last one read; return whether that was done.

        `others`: texts of other lines that matter; a block that has one is to be read line by line.
        """
        if not self.ranks or not text.endswith("\n"):
            return False
        shape = self.shapes[self.last]
        rows = shape.block.findall(text)
        has_others = text.count("\n") != len(rows)
        if not rows or (has_others and (any(text.count(m) != len(rows) for m in self.dialect.marks) or any(other in text for other in others))):
            return False
        places = np.arange(len(self.ranks), len(self.ranks) + len(rows))
        self.blocks.append((self.last, places, [_numbers(column) for column in zip(*rows, strict=True)]))
        self._first_after_validation(self.ranks[-1])
        self.ranks += [self.ranks[-1]] * len(rows)
        return True

    def _first_after_validation(self, rank: Rank) -> None:
        if rank in self.pending:
            self.validated.add(len(self.ranks))
            self.pending.discard(rank)

    def flush(self) -> None:
        """Turn the lines read so far into numbers, which take a tenth of their room."""
        for number, (places, rows) in enumerate(zip(self.places, self.rows, strict=True)):
            if rows:
                self.blocks.append((number, np.array(places), [_numbers(column) for column in zip(*rows, strict=True)]))
            places.clear()
            rows.clear()

    def columns(self) -> dict[str, Array]:
        """Return the values of n training lines by column, NaN where a line did not print one."""
        found = {"iteration": np.full(len(self.ranks), np.nan)} if self.ranks else {}
        left_out = self._cut_shapes()
        for number, places, values in self.blocks:
            whole = ~np.isneginf(values).any(axis=0) & (number not in left_out)
            self.garbled += int((~whole).sum())
            for name, column in zip(self.shapes[number].columns, values, strict=True):
                if name not in found:
                    found[name] = np.full(len(self.ranks), np.nan)
                found[name][places[whole]] = column[whole]
        for name in found.keys() & PARTLY:
            if any(name not in self.shapes[number].columns for number, _, _ in self.blocks if number not in left_out):
                del found[name]  # unprinted is not NaN, and a column has a value a line
        if self.dialect is NEMO and found:
            found["validated"] = np.isin(np.arange(len(self.ranks)), list(self.validated)).astype(np.float64)
        return found

    def _cut_shapes(self) -> set[int]:
        """A line that ends with its loss was cut there if most lines go on."""
        cut = {number for number, shape in enumerate(self.shapes) if shape.loss_is_last}
        return cut if sum(len(places) for number, places, _ in self.blocks if number in cut) * 2 < len(self.ranks) else set()


def _numbers(printed: Sequence[str]) -> Array:
    """Return printed values as numbers; one that is none becomes minus infinity, which no training line prints."""
    try:
        if printed.count(printed[0]) == len(printed):
            return np.full(len(printed), float(printed[0]))
        return np.fromiter(map(float, printed), dtype=np.float64, count=len(printed))
    except ValueError:
        return np.array([_number(value) for value in printed])


def _number(printed: str) -> float:
    try:
        return float(printed)
    except ValueError:
        return -np.inf
