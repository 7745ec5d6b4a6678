"""`python -m recipes.measure.te_parity`: how many bits of this project's FP8 numerics are
Transformer Engine's, and why not all.

Training on the CPU is emulated FP8, and what is said about it holds on GPUs as far as its numbers
are the GPU's.  So each recipe's casts are compared with Transformer Engine's own quantizers, bytes
and scales of both copies of each operand, on ordinary tensors and on those that break casts; the
state of delayed scaling after some steps; and the three GEMMs of a linear layer, whose sums are
added in another order.  What differs is counted by cause.

    python -m recipes.measure.te_parity --out results/bits
        bits.jsonl and manifest.json; about a minute on a Hopper GPU
    python -m recipes.measure.te_parity --small
        without the layers and tensors of training's size
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from recipes.cli import ArgumentParser, command
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.te_parity_rows import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    parser = ArgumentParser(
        prog="python -m recipes.measure.te_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--small", action="store_true", help="leave out tensors and layers of 4096 x 4096"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for bits.jsonl and manifest.json; without it the rows are printed only",
    )
    args = parser.parse_args(argv)
    try:
        if find_spec("torch") is None:
            raise InputError(
                "recipes.measure.te_parity needs PyTorch, which is not installed here; run it in"
                " the NeMo container, on a CUDA GPU"
            )
        for line in _run(args.small, args.out):
            print(line, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


def _run(small: bool, out: Path | None) -> Iterator[str]:
    """Compare and yield each row as JSON; the folder is written at the end, and after a run that
    was cut.
    """
    from recipes.measure.gpu import casts
    from recipes.measure.gpu.results import write

    casts.check()
    rows: list[Row] = []
    try:
        for row in casts.run(large=not small):
            rows.append(row)
            yield json.dumps(asdict(row))
    finally:
        if out:
            write(
                {"bits": [asdict(row) for row in rows]}, out, {"small": small}, {"bits": "measured"}
            )


if __name__ == "__main__":
    command(main)
