"""What was built for one rank of a job, and how it compares with the plan's own arithmetic.

Facts are read from NeMo's and Megatron-Core's objects (recipes/training/rehearsal); expectations
are those of recipes/estimate/memory.py, on which the check of memory, the choice of layouts and the
predictor rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from recipes.estimate.memory import Weights, stage_state
from recipes.plan import Plan

TOLERANCE = 0.01  # of what recipes/estimate/memory.py counts; Megatron-Core pads its buffers


class Difference(NamedTuple):
    """A quantity by our arithmetic and by Megatron-Core's objects."""

    name: str
    expected: float
    built: float

    @property
    def relative(self) -> float:
        """How far the objects are from our arithmetic, as a share of it."""
        return (self.built - self.expected) / max(self.expected, 1)


@dataclass(frozen=True)
class RankFacts:
    """One rank as built.

    `layers`: the numbers of its layers from 0, for each chunk of the pipeline stage.  `parameters`:
    in layers that run in FP8, in BF16, and of embedding and output layer.  Bytes: `weights` in
    BF16, `fp8_parameters` those kept in FP8 alone, `gradients`, and `optimizer` with its main
    parameters.  `groups`: members of its process groups. `checkpoint`: bytes of each whole tensor
    that the rank has a part of.
    """

    rank: int
    stage: int
    layers: tuple[tuple[int, ...], ...]
    parameters: Weights
    weights: int
    fp8_parameters: int
    gradients: int
    optimizer: int
    groups: dict[str, tuple[int, ...]]
    checkpoint: dict[str, int]


def differences(plan: Plan, facts: RankFacts) -> list[Difference]:
    """Return the rank's parameters and bytes by our arithmetic and as built; gathered FP8 copies
    are made in the first step.
    """
    weights, state = stage_state(plan, facts.stage)
    kinds = (
        "parameters of FP8 layers",
        "parameters of BF16 layers",
        "parameters of embedding and output layer",
    )
    return [
        *(Difference(*each) for each in zip(kinds, weights, facts.parameters, strict=True)),
        Difference("bytes of BF16 weights", state["weights"], facts.weights),
        Difference(
            "bytes of parameters kept in FP8", state["fp8_parameters"], facts.fp8_parameters
        ),
        Difference("bytes of gradients", state["gradients"], facts.gradients),
        Difference("bytes of the optimizer", state["optimizer"], facts.optimizer),
    ]


def wrong(plan: Plan, facts: RankFacts) -> list[str]:
    """Return in what a rank is not as the plan's arithmetic has it; empty where it is."""
    found = [
        f"{d.name}: {d.expected:,.0f} counted, {d.built:,.0f} built"
        for d in differences(plan, facts)
        if abs(d.relative) > TOLERANCE
    ]
    return [f"rank {facts.rank} (pipeline stage {facts.stage}): {text}" for text in found]
