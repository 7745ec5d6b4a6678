"""A training step put together: micro-batches through the slowest pipeline stage, the bubble, and
what is done once.

In the steady state of one forward, one backward, every stage waits for the slowest; filling and
draining the pipeline takes (pp - 1) / vp micro-batches more (Megatron-LM, arXiv 2104.04473, section
2.2).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from analysis.predictor.model import cost as numbers
from analysis.predictor.model.cost import Constants, Seconds, seconds, waiting
from analysis.predictor.model.gemm import measured
from analysis.predictor.model.hardware import Hardware, hardware
from analysis.predictor.model.work import (
    Layer,
    Step,
    fully_sharded,
    layer,
    pipeline,
    step,
    vocabulary,
)
from recipes.estimate.memory import layers_by_chunk
from recipes.plan import Plan

TERMS = {
    "gemm": "GEMMs of the linear layers",
    "casts": "casts to FP8",
    "attention": "attention",
    "elementwise": "norms, activations, residuals",
    "vocabulary": "output layer and loss",
    "recompute": "recomputation",
    "tp_comm": "tensor-parallel communication",
    "cp_comm": "context-parallel communication",
    "pp_comm": "pipeline communication",
    "dp_comm": "data-parallel communication, FSDP",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "launch": "gaps between kernels, host",
    "fixed": "fixed part of a step",
    "stragglers": "waiting for the slowest GPU",
}


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its layers, how many of them run in FP8 and are recomputed; whether it has
    the embedding and the output layer.
    """

    layers: int
    in_fp8: int
    recomputed: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Counted:
    """Everything about a plan that no constant touches, so that a fit counts once."""

    hw: Hardware
    stages: tuple[Stage, ...]
    bf16: Layer
    fp8: Layer | None
    vocabulary: Layer
    sharded: dict[bool, tuple[float, float]]
    once: dict[Stage, Step]
    pipeline: float
    micro_batches: int
    pp: int
    vp: int
    graphs: bool
    doublings: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by term (TERMS), and what follows from their sum."""

    terms: dict[str, float]
    tokens_per_step: int
    num_gpus: int

    @property
    def step_time_s(self) -> float:
        """Seconds a step."""
        return math.fsum(self.terms.values())

    @property
    def overhead(self) -> float:
        """Share of the step that is launching and what depends on nothing: large in small models,
        and known least.
        """
        return (self.terms["launch"] + self.terms["fixed"]) / self.step_time_s

    @property
    def attention(self) -> float:
        """Share of the step that is attention: large in long sequences."""
        return self.terms["attention"] / self.step_time_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens_per_step / self.num_gpus / self.step_time_s


def predict(plan: Plan, constants: Constants) -> Prediction:
    """Return the predicted step of a plan; InputError where its GPU's peaks are unknown."""
    return Prediction(price(count(plan), constants), plan.tokens_per_step, plan.num_gpus)


def count(plan: Plan, hw: Hardware | None = None) -> Counted:
    """Return the counted work of a plan, GEMMs at the measured efficiency; `hw` instead of the
    peaks of the plan's GPU.
    """
    hw, gemms, m = hw or hardware(plan.gpu), measured(), plan.mapping
    stages = tuple(_stage(plan, stage) for stage in range(m.pp))
    return Counted(
        hw=hw,
        stages=stages,
        bf16=layer(plan, hw, gemms, in_fp8=False),
        fp8=layer(plan, hw, gemms, in_fp8=True) if plan.precision.fp8 else None,
        vocabulary=vocabulary(plan, hw, gemms),
        sharded={in_fp8: fully_sharded(plan, hw, in_fp8) for in_fp8 in (False, True)},
        once={
            stage: step(plan, hw, stage.layers, stage.in_fp8, stage.first + stage.last)
            for stage in stages
        },
        pipeline=pipeline(plan, hw),
        micro_batches=m.global_batch // (m.micro_batch * plan.data_parallel),
        pp=m.pp,
        vp=m.vp,
        graphs=m.cuda_graphs,
        doublings=max(0.0, math.log2(plan.num_gpus / plan.gpu.devices_per_node)),
    )


def _stage(plan: Plan, stage: int) -> Stage:
    chunks = layers_by_chunk(plan, stage)
    recomputed = sum(min(plan.mapping.recompute_layers, len(chunk)) for chunk in chunks)
    return Stage(
        sum(map(len, chunks)),
        sum(map(sum, chunks)),
        recomputed,
        stage == 0,
        stage == plan.mapping.pp - 1,
    )


def price(counted: Counted, c: Constants) -> dict[str, float]:
    """Return seconds by term."""
    per_layer = {
        in_fp8: _layer(counted, work, in_fp8, c)
        for in_fp8, work in ((False, counted.bf16), (True, counted.fp8))
        if work
    }
    head = _head(counted, c)
    stages = [_micro_batch(stage, per_layer, head) for stage in counted.stages]
    slowest = max(range(len(stages)), key=lambda place: sum(stages[place].values()))
    terms = {name: counted.micro_batches * value for name, value in stages[slowest].items()}
    mean = sum(sum(stage.values()) for stage in stages) / len(stages)
    once = counted.once[counted.stages[slowest]]
    stream = 1 / (counted.hw.memory * c.memory)
    terms["casts"] += once.cast_bytes * stream
    terms["pp_comm"] = counted.micro_batches * counted.pipeline * c.net_exposed
    terms["dp_comm"] += _data_parallel(counted, counted.stages[slowest], once, c)
    terms["bubble"] = (counted.pp - 1) / counted.vp * mean
    terms["optimizer"] = once.optimizer_bytes * stream
    terms["fixed"] = c.fixed * (numbers.GRAPHED_FIXED if counted.graphs else 1.0)
    terms["stragglers"] = c.stragglers * counted.doublings * sum(terms.values())
    return {name: terms[name] for name in TERMS}


def _data_parallel(counted: Counted, stage: Stage, once: Step, c: Constants) -> float:
    """Return what is waited for of gathering parameters and reducing gradients, seconds a step.

    Parameters arrive during the first forward passes, gradients leave during the last backward
    ones.  Those are one micro-batch's, and with interleaved stages of each of the first, and last,
    pp micro-batches: they pass through all chunks before the next ones start (Megatron-LM, arXiv
    2104.04473, section 2.2).
    """
    beside = min(counted.pp, counted.micro_batches) if counted.vp > 1 else 1
    forward, backward = (beside * each for each in _computing(counted, stage, c))
    longer = (1 + c.scale * math.log2(once.domains)) / numbers.NCCL_BANDWIDTH
    messages = ((once.gather * longer, forward), (once.reduce * longer, backward))
    return sum(
        max(numbers.HIDDEN_EXPOSED * message, message - compute) for message, compute in messages
    )


def _computing(counted: Counted, stage: Stage, c: Constants) -> tuple[float, float]:
    """Return seconds of a stage's forward and backward pass over a micro-batch, its layers
    alone.
    """
    numbers = ((counted.bf16, stage.layers - stage.in_fp8), (counted.fp8, stage.in_fp8))
    passes = [(work.forward, work.backward, number) for work, number in numbers if work]
    forward = sum(number * seconds(one, counted.hw, c).total for one, _, number in passes)
    return forward, sum(number * seconds(one, counted.hw, c).total for _, one, number in passes)


def _layer(counted: Counted, work: Layer, in_fp8: bool, c: Constants) -> dict[str, float]:
    """Return seconds of one layer and micro-batch by term; "recompute" is what it costs if it is
    recomputed.
    """
    passes = [seconds(part, counted.hw, c) for part in (work.forward, work.backward)]
    kernels = [work.forward.kernels, work.backward.kernels]
    terms = _by_term(passes)
    terms["launch"] = sum(
        waiting(p.total, k, counted.graphs, c) for p, k in zip(passes, kernels, strict=True)
    )
    terms["recompute"] = passes[0].total
    terms["dp_comm"] = sum(
        _hidden(message, part.total, c)
        for message, part in zip(counted.sharded[in_fp8], passes, strict=True)
    )
    return terms


def _by_term(passes: list[Seconds]) -> dict[str, float]:
    total = {name: sum(getattr(part, name) for part in passes) for name in asdict(passes[0])}
    return {"tp_comm": total.pop("tp"), "cp_comm": total.pop("cp"), **total}


def _hidden(message: float, compute: float, c: Constants) -> float:
    """Return what is waited for of a message that travels while the GPU computes: a share, and what
    is longer than the computation.
    """
    return max(message * c.net_exposed, message - compute) if message else 0.0


def _head(counted: Counted, c: Constants) -> float:
    parts = (counted.vocabulary.forward, counted.vocabulary.backward)
    return sum(seconds(part, counted.hw, c).total for part in parts)


def _micro_batch(
    stage: Stage, per_layer: dict[bool, dict[str, float]], head: float
) -> dict[str, float]:
    """Return seconds of a stage's micro-batch by term."""
    numbers = {True: stage.in_fp8, False: stage.layers - stage.in_fp8}
    names = next(iter(per_layer.values()))
    terms = {
        name: sum(numbers[in_fp8] * terms[name] for in_fp8, terms in per_layer.items())
        for name in names
    }
    terms["recompute"] *= stage.recomputed / stage.layers if stage.layers else 0.0
    terms["vocabulary"] = head if stage.last else 0.0
    return terms
