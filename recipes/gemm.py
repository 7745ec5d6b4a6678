"""`python -m recipes.gemm`: what FP8 buys in the GEMM itself, by scaling granularity and by the depth K that is summed over.

The gain of FP8 in training is at most that of its GEMMs, and that depends on what shares a scale: one scale a tensor costs
nothing inside the GEMM, one a row or column is applied to the result, one for every 128 values along K must be applied while
the sum is built.  Each shape is measured with BF16 in the same rounds, on random data, on the CUDA GPU that is there.

    python -m recipes.gemm --out results/gemm                 M = N = 4096, K from 1024 to 53248
    python -m recipes.gemm --models llama3_8b,llama3_70b      the linear layers of models at sequence 8192, forward
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from recipes.compose import compose_plan
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.sizes import Shape, linear_layers

KS = (1024, 2048, 4096, 8192, 16384, 28672, 53248)
SQUARE = 4096


def sweep_over_k(ks: Sequence[int] = KS) -> list[Shape]:
    """Return the shapes of the post's first figure: square output, growing depth."""
    return [Shape("K sweep", SQUARE, SQUARE, k) for k in ks]


def shapes(models: Sequence[str], ks: Sequence[int]) -> list[Shape]:
    """Return the shapes that are asked for: those of models, or the sweep over K."""
    if not models:
        return sweep_over_k(ks)
    found = [compose_plan([f"model={name}", "gpu=b200", "experiment=throughput"]) for name in models]
    return [shape for plan in found for shape in linear_layers(plan.model, plan.seq_length)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; one line and exit code 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m recipes.gemm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[], help="models whose linear layers are measured")
    parser.add_argument("--k", type=lambda text: [int(k) for k in text.split(",")], default=list(KS), help="depths of the sweep (multiples of 128)")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each kind and shape (default: 30)")
    parser.add_argument("--out", type=Path, help="folder for gemm.jsonl and manifest.json")
    args = parser.parse_args(argv)
    try:
        asked = shapes(args.models, args.k)
        if find_spec("torch") is None:
            raise InputError("recipes.gemm needs PyTorch, which is not installed here; run it in the NeMo container, on a CUDA GPU")
        from recipes.training import gemm

        rows = gemm.measure(asked, args.rounds)
        if args.out:
            gemm.write(rows, args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    for row in rows:
        print(json.dumps(asdict(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
