"""A whole model put together from the parts that shallow runs measured: one GPU's share of NVIDIA's
recommended layout.

`analysis.speed.depth` knows what a layer, the vocabulary and the optimizer cost at a model's true
width.  In the layout that NVIDIA recommends for the model, a replica computes N micro-batches a
step with tp x pp x cp GPUs, and the distributed optimizer shares its work over the replicas (dp)
too, so that one GPU's share of a step is

    t = (N (v a + b L) + (v c + d L) / dp) / (tp pp cp)

with the whole depth L, and v for a run whose vocabulary was cut to one tensor-parallel share: what
does not depend on the depth is taken to grow with it.  This is compute alone: every split is taken
to be perfect, and communication, the pipeline's bubble, uneven stages and launch gaps of smaller
kernels are not in it.  A real step is longer, and its speedup smaller where these take the same
time in BF16 and FP8.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from analysis.runs import published
from analysis.runs.published import Layout, Published, layout_of
from analysis.speed.depth import Depth
from analysis.stats.series import Array
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.plan import Plan


@dataclass(frozen=True)
class Whole:
    """A whole model's step on one GPU's share of `reference`, the recommended plan.

    `micro_batches`: those of a replica in a step, of the size that was measured.  `seconds`: the
    estimate, then bootstrap samples.
    """

    reference: Plan
    layout: Layout
    micro_batches: int
    seconds: Array

    @property
    def step_time_s(self) -> float:
        """The estimate."""
        return float(self.seconds[0])


@functools.cache
def reference(model: str, precision: str, gpu: str) -> Plan | None:
    """Return the recommended plan of a model under throughput settings on the default stack; None
    where there is none that runs.
    """
    try:
        return compose_plan(
            [
                f"model={model}",
                f"precision={precision}",
                f"gpu={gpu}",
                "experiment=throughput",
                "mapping=recommended",
            ]
        )
    except InputError:
        return None


def reference_of(plan: Plan) -> Plan | None:
    """Return the recommended plan for a run's model and number format, for the GPU that its own is
    mapped like (H200: H100).

    Recommended layouts know BF16, FP8 and MXFP8; delayed scaling, which every stack has, stands for
    FP8.
    """
    fp8 = plan.precision.fp8
    name = "bf16" if fp8 is None else "mxfp8" if fp8.scaling == "mxfp8" else "fp8_delayed"
    return reference(plan.model.name, name, plan.gpu.mapped_like or plan.gpu.name)


def assemble(line: Depth) -> Whole | None:
    """Return the whole model of a line; None where passes and optimizer were not told apart or no
    layout is recommended.
    """
    plan, whole = line.plan, reference_of(line.plan)
    if (
        whole is None
        or line.passes is None
        or line.optimizer is None
        or whole.seq_length != plan.seq_length
    ):
        return None
    layout, depth, scale = (
        layout_of(whole),
        whole.model.num_layers,
        whole.model.vocab_size / plan.model.vocab_size,
    )
    count = layout.global_batch // (plan.mapping.micro_batch * layout.data_parallel)
    passes = count * (scale * line.passes.fixed + depth * line.passes.per_layer)
    optimizer = (
        scale * line.optimizer.fixed + depth * line.optimizer.per_layer
    ) / layout.data_parallel
    return Whole(
        whole, layout, count, np.asarray((passes + optimizer) / (layout.tp * layout.pp * layout.cp))
    )


def published_step(whole: Whole, precision: str) -> Published | None:
    """Return the published step of the same work a GPU: model, GPU, layout and micro-batches; the
    nearest NeMo, then number of GPUs.
    """
    plan, wanted = whole.reference, whole.layout
    cell = (plan.model.name, plan.gpu.name, precision, plan.seq_length)
    found = (
        row
        for row in published.rows()
        if row.step_time_s
        and (row.model, row.gpu, row.precision, row.seq_length) == cell
        and published.fits(row, wanted)
        and row.layout.micro_batches == wanted.micro_batches
    )
    return published.closest(found, plan.stack.recommended, wanted.num_gpus)


def published_base(step: Published) -> Published | None:
    """Return the BF16 row beside a published FP8 step: of one table, number of GPUs and batch; its
    layout may differ.
    """
    for row in published.rows():
        batch = (row.layout.num_gpus, row.layout.global_batch, row.source)
        if (row.model, row.gpu, row.precision) == (step.model, step.gpu, "bf16") and batch == (
            step.layout.num_gpus,
            step.layout.global_batch,
            step.source,
        ):
            return row
    return None
