"""`python -m launch.rehearse model=… precision=… gpu=…`: build a job's ranks at true size here,
before it queues.

NeMo and Megatron-Core build what they build on the cluster, with the job's number of ranks, on no
GPU and without memory: layers, parameters, gradient buffers, the optimizer's shards, process groups
and the checkpoint's tensors.  Each pipeline stage is built as its first and its last rank.  What
they refuse ends the command with their message and exit code 2.  What they build is compared with
the plan's own arithmetic (recipes/estimate/memory.py): exit code 1 where they differ by more than 1
%.

Not rehearsed: Transformer Engine's kernels (its layers are stand-ins of the same shapes), NCCL,
userbuffers, the capture of CUDA graphs, data, and training itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from recipes.cli import ArgumentParser, command
from recipes.compose.axes import check_single, with_axes
from recipes.compose.tree import compose_plan, sweep
from recipes.errors import InputError
from recipes.estimate.rank_facts import RankFacts, differences, wrong
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.plan import Plan

EXIT_DIFFERS = 1
ROW = (
    "cell",
    "gpus",
    "tp x pp x cp x vp",
    "ranks built",
    "layers of a rank",
    "parameters of a rank",
    "built",
    "largest difference",
    "checkpoint, GB",
)


@dataclass(frozen=True)
class Rehearsal:
    """A plan and its ranks as built, in `seconds`."""

    plan: Plan
    ranks: tuple[RankFacts, ...]
    seconds: float

    @property
    def cell(self) -> str:
        """Return model, precision and GPU."""
        return f"{self.plan.model.name} {self.plan.precision.name} {self.plan.gpu.name}"

    @property
    def wrong(self) -> list[str]:
        """Return in what it is not as our arithmetic has it: a rank, or layers that no stage or
        several have.
        """
        stages = {facts.stage: facts for facts in self.ranks}
        built = sorted(
            layer for facts in stages.values() for chunk in facts.layers for layer in chunk
        )
        complete = len(stages) == self.plan.mapping.pp
        model = self.plan.model
        layers = (
            [f"layers {built} of {model.num_layers} are built"]
            if complete and built != list(range(model.num_layers))
            else []
        )
        return [*layers, *(text for facts in self.ranks for text in wrong(self.plan, facts))]

    @property
    def checkpoint(self) -> dict[str, int]:
        """Return the bytes of each tensor of the checkpoint."""
        return {key: size for facts in self.ranks for key, size in facts.checkpoint.items()}


def ranks_of(plan: Plan, asked: Sequence[int]) -> list[int]:
    """Return the first and the last rank of each pipeline stage, and those that are asked for;
    InputError for one too many.

    Megatron-Core parallel_state.py: pipeline stages are the outermost of "tp-cp-ep-dp-pp".
    """
    beyond = next((rank for rank in asked if not 0 <= rank < plan.num_gpus), None)
    if beyond is not None:
        raise InputError(
            f"--rank {beyond}: the plan has ranks 0 to {plan.num_gpus - 1}; name one of them"
        )
    stage = plan.num_gpus // plan.mapping.pp
    ends = {rank for first in range(0, plan.num_gpus, stage) for rank in (first, first + stage - 1)}
    return sorted(ends | set(asked))


def rehearse(plan: Plan, asked: Sequence[int] = ()) -> Rehearsal:
    """Build the ranks of a plan; InputError for what cannot be built."""
    if plan.on_cpu:
        raise InputError(
            f"gpu={plan.gpu.name} trains on this machine, there is nothing to rehearse; name the"
            " GPU of the job"
        )
    if find_spec("nemo") is None:
        raise InputError(
            "nemo is not installed here; run `make install`, or rehearse in the container"
        )
    ranks = ranks_of(plan, asked)
    heavy = importlib.import_module("recipes.training.rehearsal")
    start = time.monotonic()
    with redirect_stdout(sys.stderr):  # NeMo talks on stdout, which is for the results
        facts = tuple(heavy.rehearse(plan, rank) for rank in ranks)
    return Rehearsal(plan, facts, time.monotonic() - start)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is no flag is a Hydra override."""
    parser = ArgumentParser(
        prog="python -m launch.rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides, as for python -m launch"
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="one table of every combination of comma-separated values",
    )
    parser.add_argument(
        "--rank",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="a rank to build as well; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser.parse_intermixed_args(argv)


def facts_of(one: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as JSON."""
    plan, m = one.plan, one.plan.mapping
    return {
        **{
            "model": plan.model.name,
            "precision": plan.precision.name,
            "gpu": plan.gpu.name,
            "stack": plan.stack.name,
        },
        **{
            "num_gpus": plan.num_gpus,
            "tp": m.tp,
            "pp": m.pp,
            "cp": m.cp,
            "vp": m.vp,
            "fsdp": m.fsdp,
            "settings": plan.settings.name,
        },
        "seconds": round(one.seconds, 1),
        "wrong": one.wrong,
        "checkpoint": {"tensors": len(one.checkpoint), "bytes": sum(one.checkpoint.values())},
        "ranks": [
            {
                **{
                    "rank": facts.rank,
                    "stage": facts.stage,
                    "layers": facts.layers,
                    "groups": facts.groups,
                },
                "compared": {
                    d.name: {"counted": d.expected, "built": d.built}
                    for d in differences(plan, facts)
                },
            }
            for facts in one.ranks
        ],
    }


def row(one: Rehearsal) -> list[str]:
    """Return a rehearsal as a line of the table: of the rank with most parameters, and of all ranks
    the largest difference.
    """
    plan, m = one.plan, one.plan.mapping
    fullest = max(one.ranks, key=lambda facts: sum(facts.parameters))
    counted, built = (
        sum(each)
        for each in zip(
            *((d.expected, d.built) for d in differences(plan, fullest)[:3]), strict=True
        )
    )
    largest = max((d.relative for facts in one.ranks for d in differences(plan, facts)), key=abs)
    layers = sorted({sum(map(len, facts.layers)) for facts in one.ranks})
    return [
        one.cell,
        str(plan.num_gpus),
        f"{m.tp} x {m.pp} x {m.cp} x {m.vp}" + (", FSDP" if m.fsdp else ""),
        str(len(one.ranks)),
        " or ".join(map(str, layers)),
        f"{counted:,.0f}",
        f"{built:,.0f}",
        f"{largest:+.3%}",
        f"{sum(one.checkpoint.values()) / 1e9:,.0f}",
    ]


def table(found: Sequence[Rehearsal]) -> str:
    """Return the rehearsals as a Markdown table."""
    lines = [ROW, ["---"] * len(ROW), *map(row, found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(one: Rehearsal) -> str:
    """Return one rehearsal, a line for each rank."""
    m = one.plan.mapping
    lines = [
        f"{one.cell}: {one.plan.num_gpus} ranks, tp {m.tp} pp {m.pp} cp {m.cp} vp {m.vp},"
        f" {len(one.ranks)} built in {one.seconds:.0f} s"
    ]
    for facts in one.ranks:
        parameters, layers = sum(facts.parameters), sum(map(len, facts.layers))
        largest = max((d.relative for d in differences(one.plan, facts)), key=abs)
        state = sum((facts.weights, facts.fp8_parameters, facts.gradients, facts.optimizer)) / 1e9
        lines.append(
            f"  rank {facts.rank}, stage {facts.stage}: {layers} layers, {parameters:,} parameters,"
            f" {state:.2f} GB of weights, gradients and optimizer; largest difference to our"
            f" arithmetic {largest:+.3%}"
        )
    size = sum(one.checkpoint.values()) / 1e9
    return "\n".join(
        [
            *lines,
            (
                f"  checkpoint: {len(one.checkpoint)} tensors, {size:,.1f} GB; data, kernels and"
                " communication are not rehearsed"
            ),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 as counted, 1 where something differs, 2 for wrong input and what cannot
    be built.
    """
    args = arguments(argv)
    try:
        found, refused = _all(args) if args.multirun else ([_one(args)], [])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    if args.json:
        print(
            json.dumps(
                [facts_of(one) for one in found] if args.multirun else facts_of(found[0]), indent=1
            )
        )
    elif found:
        print(table(found) if args.multirun else report(found[0]))
    for line in [text for one in found for text in one.wrong]:
        print(f"differs: {line}", file=sys.stderr)
    for line in refused:
        print(f"error: {line}", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    seconds = sum(one.seconds for one in found)
    print(
        f"{len(found)} rehearsed, {len(refused)} refused, {seconds:.0f} s, at most {peak:.1f} GB of"
        " memory",
        file=sys.stderr,
    )
    return EXIT_WRONG_INPUT if refused else EXIT_DIFFERS if any(one.wrong for one in found) else 0


def _one(args: argparse.Namespace) -> Rehearsal:
    check_single(args.overrides)
    return rehearse(compose_plan(args.overrides), args.rank)


def _all(args: argparse.Namespace) -> tuple[list[Rehearsal], list[str]]:
    """Return the rehearsals of a sweep, and why each of the others was refused."""
    found, refused = [], []
    for overrides in sweep(with_axes(args.overrides)):
        try:
            found.append(rehearse(compose_plan(overrides), args.rank))
            print(f"{found[-1].cell}: {found[-1].seconds:.0f} s", file=sys.stderr)
        except InputError as error:
            refused.append(str(error))
    return found, refused


if __name__ == "__main__":
    command(main)
