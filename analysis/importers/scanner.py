"""The training lines of one dialect, gathered from a text as numbers.

Lines that differ only in their values are read by one pattern, and a block of nothing else by one
call of it, which keeps a log of a million steps within seconds.  Numbers are kept a block at a
time, and a column that has one value in a block as that value, so that a log of gigabytes takes
little more memory than its losses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.importers.dialects import Dialect, Shape, learn
from analysis.importers.lines import Rank, rank_of
from analysis.runs.metrics import Array
from recipes.errors import InputError

# How many shapes are learned from one log, and how many of them are tried on a line
MOST_SHAPES, RECENT = 2000, 8
MOST_BLOCKS = 256  # that are kept apart; small arrays fragment the memory
NEEDED = frozenset(
    {"grad_norm", "lr", "global_batch", "samples"}
)  # columns that are dropped where a line lacks them
TIMESTAMP = " [20"  # before Megatron's lines where no rank stands


@dataclass
class Block:
    """Lines of one shape: their places among all training lines, and their columns, a single value
    where all agree.
    """

    shape: int
    places: slice | NDArray[np.int64]
    count: int
    columns: dict[str, Array]

    def goes_on_in(self, other: Block) -> bool:
        """Whether another block has the lines that follow this one's, with the same columns."""
        mine, theirs = self.places, other.places
        together = (
            isinstance(mine, slice) and isinstance(theirs, slice) and mine.stop == theirs.start
        )
        return (
            together and self.shape == other.shape and self.columns.keys() == other.columns.keys()
        )


class Scanner:
    """Collects the training lines of one dialect.

    `places`, `rows`: by shape, the place of each line among all training lines, and its values as
    printed; `blocks`: the same as numbers, for what was read before.  `ranks`: who printed the
    lines, with their count, one after another. `validated`: the places of the lines that are the
    first after a validation.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect, self.shapes, self.recent = dialect, list[Shape](), list[int]()
        self.places, self.rows = list[list[int]](), list[list[tuple[str, ...]]]()
        self.blocks, self.ranks = list[Block](), list[tuple[Rank, int]]()
        self.pending, self.validated = set[Rank](), set[int]()
        self.heldout, self.test = list[tuple[float, float]](), list[tuple[float, float]]()
        self.evaluated = {False: 0, True: 0}  # lines before the last evaluation, and the last test
        self.count = self.garbled = self.last = self.merged = self.epoch = 0
        self.total: int | None = None

    def line(self, line: str, at: int) -> bool:
        """Read a training line that starts at `at`; return whether it is one."""
        found = (
            (number, match)
            for number in self.recent
            if (match := self.shapes[number].match(line, at))
        )
        number, match = next(found, (-1, None))
        if match is None:
            number, match = self._learn(line, at)
        if not match or (
            line[-1] != "\n"
            and not self.dialect.closed
            and match.end(match.lastindex or 0) >= len(line.rstrip())
        ):
            is_head = (
                self.dialect.head.match(line, at) is not None
            )  # or the file ends within a number
            self.garbled += is_head and self.dialect.counts_garbled
            return is_head
        self._add_ranks(() if at < 2 or line.startswith(TIMESTAMP) else rank_of(line[:at]), 1)
        self.places[number].append(self.count)
        self.rows[number].append(match.groups())
        self.last = number
        self.count += 1
        return True

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
        """Read a block at once if all its training lines look like the last one read; return
        whether that was done.

        `others`: texts of other lines that matter; a block that has one is to be read line by line.
        """
        if not self.count or not text.endswith("\n"):
            return False
        rows = self.shapes[self.last].block.findall(text)
        has_others = text.count("\n") != len(rows)
        if not rows or (
            has_others
            and (
                any(text.count(m) != len(rows) for m in self.dialect.marks)
                or any(other in text for other in others)
            )
        ):
            return False
        self._store(self.last, slice(self.count, self.count + len(rows)), rows)
        if len(self.blocks) - self.merged > MOST_BLOCKS:
            self._merge()
        self._add_ranks(self.ranks[-1][0], len(rows))
        self.count += len(rows)
        return True

    def _add_ranks(self, rank: Rank, count: int) -> None:
        if rank in self.pending:
            self.validated.add(self.count)
            self.pending.discard(rank)
        before = self.ranks[-1] if self.ranks else None
        if before and before[0] == rank:
            self.ranks[-1] = (rank, before[1] + count)
        else:
            self.ranks.append((rank, count))

    def flush(self) -> None:
        """Turn the lines read so far into numbers, which take a tenth of their room."""
        for number, (places, rows) in enumerate(zip(self.places, self.rows, strict=True)):
            if rows:
                self._store(number, np.array(places), rows)
            places.clear()
            rows.clear()

    def _store(
        self, number: int, places: slice | NDArray[np.int64], rows: Sequence[tuple[str, ...]]
    ) -> None:
        """Keep lines as numbers; one that holds something else is garbled."""
        columns = dict(
            zip(
                self.shapes[number].columns,
                (_numbers(column) for column in zip(*rows, strict=True)),
                strict=True,
            )
        )
        bad = np.zeros(1, dtype=bool)
        for values in columns.values():
            bad = bad | np.isneginf(values)
        if bad.any():
            whole = np.broadcast_to(~bad, len(rows))
            self.garbled += int((~whole).sum())
            places = (
                np.arange(places.start, places.stop) if isinstance(places, slice) else places
            )[whole]
            columns = {
                name: values[whole] if values.size > 1 else values
                for name, values in columns.items()
            }
        count = places.stop - places.start if isinstance(places, slice) else places.size
        if count:
            self._place(columns)
            self.blocks.append(Block(number, places, count, columns))

    def _merge(self) -> None:
        """Put blocks that follow each other together."""
        apart, self.blocks[self.merged :] = self.blocks[self.merged :], []
        while apart:
            end = next(
                (i for i in range(1, len(apart)) if not apart[i - 1].goes_on_in(apart[i])),
                len(apart),
            )
            self.blocks.append(_together(apart[:end]))
            del apart[:end]
        self.merged = len(self.blocks)

    def _place(self, columns: dict[str, Array]) -> None:
        """Put the step, counted from 1, in place of what tells it; NeMo's iteration starts anew
        with each epoch, global_step does not.
        """
        counted = columns.pop("iteration") + 1 - self.dialect.first_iteration
        epoch, given = columns.pop("epoch", np.zeros(1)), columns.pop("global_step", None)
        self.epoch = max(self.epoch, int(epoch.max()))
        if given is None and (epoch > 0).any():
            raise InputError(
                "the log goes over more than one epoch and does not print global_step; its"
                " iterations count anew; import TensorBoard's events"
            )
        columns["step"] = counted if given is None else given + 1
        if (total := columns.pop("total", None)) is not None:
            self.total = int(total[-1]) + (
                0 if self.dialect.total_counts else 1 - self.dialect.first_iteration
            )

    def columns(self) -> dict[str, Array]:
        """Return the values of n training lines by column, NaN where a line did not print one; the
        scanner is empty then.
        """
        self._leave_out_cut()
        names = dict.fromkeys(name for block in self.blocks for name in block.columns)
        found, is_whole = (
            dict[str, Array](),
            sum(block.count for block in self.blocks) == self.count,
        )
        for name in names:
            if name in NEEDED and any(name not in block.columns for block in self.blocks):
                continue  # unprinted is not NaN, and a column has a value a line
            parts = [
                (block.places, block.columns.pop(name))
                for block in self.blocks
                if name in block.columns
            ]
            values = np.unique([part[0] for _, part in parts])
            if (
                is_whole
                and values.size == 1
                and len(parts) == len(self.blocks)
                and all(part.size == 1 for _, part in parts)
            ):
                found[name] = np.broadcast_to(values, self.count)
                continue
            found[name] = column = np.full(self.count, np.nan)
            while parts:
                places, part = parts.pop()
                column[places] = part
        self.blocks.clear()
        return found

    def _leave_out_cut(self) -> None:
        """A line that ends with its loss was cut there if most lines go on."""
        cut = [block for block in self.blocks if self.shapes[block.shape].loss_is_last]
        if cut and sum(block.count for block in cut) * 2 < self.count:
            self.garbled += sum(block.count for block in cut)
            self.blocks = [
                block for block in self.blocks if not self.shapes[block.shape].loss_is_last
            ]

    def who(self) -> tuple[list[Rank], NDArray[np.int32]]:
        """Return the ranks that printed lines, in order, and for each line which of them did."""
        names = sorted({rank for rank, _ in self.ranks})
        if len(names) == 1:
            return names, np.broadcast_to(np.int32(0), self.count)
        place = {rank: i for i, rank in enumerate(names)}
        return names, np.repeat(
            np.array([place[rank] for rank, _ in self.ranks], dtype=np.int32),
            [count for _, count in self.ranks],
        )


def _together(blocks: Sequence[Block]) -> Block:
    """Return blocks that follow each other as one."""
    first, last = blocks[0].places, blocks[-1].places
    if len(blocks) == 1 or not isinstance(first, slice) or not isinstance(last, slice):
        return blocks[0]
    columns = dict[str, Array]()
    for name in blocks[0].columns:
        parts = [block.columns[name] for block in blocks]
        is_one = all(part.size == 1 and part[0] == parts[0][0] for part in parts)
        columns[name] = (
            parts[0]
            if is_one
            else np.concatenate([np.broadcast_to(b.columns[name], b.count) for b in blocks])
        )
    return Block(
        blocks[0].shape,
        slice(first.start, last.stop),
        sum(block.count for block in blocks),
        columns,
    )


def _numbers(printed: Sequence[str]) -> Array:
    """Return printed values as numbers, one number where they are alike; what is none becomes minus
    infinity, which no line prints.
    """
    try:
        if printed.count(printed[0]) == len(printed):
            return np.array([float(printed[0])])
        return np.fromiter(map(float, printed), dtype=np.float64, count=len(printed))
    except ValueError:
        return np.array([_number(value) for value in printed])


def _number(printed: str) -> float:
    try:
        return float(printed.replace(",", ""))
    except ValueError:
        return -np.inf
