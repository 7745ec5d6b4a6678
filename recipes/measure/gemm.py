"""`python -m recipes.measure.gemm`: what FP8 buys in the GEMM itself, by scaling granularity and by
the depth K that is summed over.

The gain of FP8 in training is at most that of its GEMMs, and that depends on what shares a scale:
one scale a tensor costs nothing inside the GEMM, one a row or column is applied to the result, one
for every 128 values along K must be applied while the sum is built.  And operands must be cast
first, which costs memory traffic that BF16 does not have.  Each shape is measured with BF16 in the
same rounds, on random data, on the CUDA GPU that is there: the three GEMMs of a linear layer
(forward, input gradient, weight gradient), and the casts of its input, weight and gradient as
Transformer Engine does them, where it is there.

    python -m recipes.measure.gemm --out results/gemm
        M = N = 4096, K from 1024 to 53248
    python -m recipes.measure.gemm --models all --bandwidth --out results/gemm
        and the linear layers of the five models, and copies
    python -m recipes.measure.gemm --models llama3_70b --tp 4 --k none
        only one model's layers, a rank's share
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from recipes.cli import ArgumentParser, command
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.estimate.sizes import MODELS, Shape, linear_layers
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.gemm_rows import Cast, Gemm, Layer, Results, as_trained, layer_rows

KS = (1024, 2048, 4096, 8192, 16384, 28672, 53248)
SQUARE = 4096
Measured = tuple[list[Gemm], list[Cast]]


def sweep_over_k(ks: Sequence[int] = KS) -> list[Shape]:
    """Return the shapes of the post's first figure: square output, growing depth."""
    return [Shape("K sweep", SQUARE, SQUARE, k) for k in ks]


def shapes(models: Sequence[str], ks: Sequence[int], tp: int = 1) -> list[Shape]:
    """Return the linear layers that are asked for, as their forward GEMMs: the sweep over K, then
    those of models.
    """
    names = dict.fromkeys(
        name for asked in models for name in (MODELS if asked == "all" else (asked,))
    )
    plans = [compose_plan([f"model={name}", "gpu=b200", "experiment=throughput"]) for name in names]
    return [
        *sweep_over_k(ks),
        *(shape for plan in plans for shape in linear_layers(plan.model, plan.seq_length, tp)),
    ]


def relabelled(measured: Measured, layer: Shape) -> Measured:
    """Return measurements of a layer under the name of another one of the same sizes."""
    gemms = [
        replace(row, name=layer.name, model=layer.model, layer=layer.layer) for row in measured[0]
    ]
    return gemms, [
        replace(row, name=layer.name, model=layer.model, layer=layer.layer) for row in measured[1]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for a wrong input."""
    args = _parser().parse_args(argv)
    try:
        asked = shapes(args.models, args.k, args.tp)
        if args.rounds < 1 or args.micro_batches < 1:
            raise InputError("--rounds and --micro-batches count from 1; give a positive number")
        if find_spec("torch") is None:
            raise InputError(
                "recipes.measure.gemm needs PyTorch, which is not installed here; run it in the"
                " NeMo container, on a CUDA GPU"
            )
        for line in _run(asked, args):
            print(line, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m recipes.measure.gemm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=[],
        help="models whose linear layers are measured; all: the five",
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        help="measure one rank's share of the models' layers (default: 1)",
    )
    parser.add_argument(
        "--k",
        type=_depths,
        default=list(KS),
        help="depths of the sweep (multiples of 128); none: no sweep",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=8,
        help="micro-batches a step, which share the weight's cast (default: 8)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="the most measurements of each kind and shape (default: 30)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.25,
        help="stop a shape's rounds after this long, but not before 10 (default: 0.25)",
    )
    parser.add_argument(
        "--bandwidth",
        action="store_true",
        help="also measure copies on the device, of 1 MB to 2 GB",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the rows and manifest.json; without it the rows are printed",
    )
    return parser


def _depths(text: str) -> list[int]:
    return [] if text == "none" else [int(k) for k in text.split(",")]


def _run(asked: Sequence[Shape], args: argparse.Namespace) -> Iterator[str]:
    """Measure and yield what to print; the folder is written after every layer, so that a run that
    is cut leaves what it has.
    """
    from recipes.measure.gpu import gemm

    gemm.check(asked)
    results = Results(
        {
            "tp": args.tp,
            "micro_batches": args.micro_batches,
            "rounds": args.rounds,
            "seconds_a_shape": args.seconds,
        }
    )
    said = set[str]()
    known = dict[tuple[int, int, int, bool], Measured]()
    for layer in asked:
        key = (layer.m, layer.n, layer.k, bool(layer.model))
        if key not in known:
            known[key] = gemm.measure(layer, args.rounds, args.seconds)
        gemms, casts = relabelled(known[key], layer)
        rows = layer_rows(gemms, casts, args.micro_batches)
        results.gemms += gemms
        results.casts += casts
        results.layers += rows
        if args.out:
            gemm.write(results, args.out)
            yield summary(rows)
            yield from (
                f"  refused: {why}"
                for why in dict.fromkeys(row.refused for row in rows)
                if why and why not in said
            )
            said |= {row.refused for row in rows}
    if args.bandwidth:
        results.copies += gemm.copies(args.rounds, args.seconds)
        if args.out:
            gemm.write(results, args.out)
            yield (
                f"copies: at most {max(c.gb_per_s for c in results.copies):.0f} GB/s read and"
                " written"
            )
    if not args.out:
        yield from (json.dumps(row) for rows in results.files().values() for row in rows)


def summary(rows: Sequence[Layer]) -> str:
    """Return a layer in a line: BF16's milliseconds, and of each recipe the speedups alone, with
    casts, with the weight's shared.
    """
    base = rows[0]
    time = "refused" if base.seconds is None else f"{base.seconds * 1e3:.3f} ms"
    said = [f"{base.name} {base.m} x {base.n} x {base.k}: BF16 {time}"]
    for row in rows[1:]:
        if as_trained(row.granularity, row.accumulation):
            numbers = (row.speedup, row.speedup_with_casts, row.speedup_weights_amortised)
            said.append(
                f"{row.granularity} " + "/".join("-" if x is None else f"{x:.2f}" for x in numbers)
            )
    return "; ".join(said)


if __name__ == "__main__":
    command(main)
