"""What a job will do, before it does it: layout, batch, memory, and where its settings differ from
those that train well.
"""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.script import boosts, described, nodes
from recipes.compose.fit import is_tight, margin, state
from recipes.compose.fitting import changes
from recipes.compose.rules import memory_remedy
from recipes.compose.tree import compose_plan
from recipes.data.files import Facts
from recipes.errors import InputError
from recipes.estimate.memory import Memory, estimate, usable_gb
from recipes.estimate.schedule import described as schedule
from recipes.estimate.sizes import parameters
from recipes.overlap import overlaps_tp, why_off
from recipes.plan import Plan
from recipes.run_folder import differences, flatten, folder_of

DIFFER = (
    "settings.",
    "data.kind",
    "precision.fp8.first_layers_bf16",
    "precision.fp8.last_layers_bf16",
)


DEMO_TEXT = "the sources of Python's standard library, a few million tokens for trying only"
INSTEAD = (
    "name your own text in data.sources=[/texts], prepared files with data=indexed data.train=[…], "
    "or set data=mock to measure speed; data.demo_text=true if you mean it"
)


def summary(plan: Plan, data: Facts) -> dict[str, Any]:
    """Return the facts of a job with the project's words as keys."""
    memory = None if plan.on_cpu else estimate(plan)
    return {
        "run_folder": str(folder_of(plan)),
        "parameters": parameters(plan.model),
        "num_gpus": plan.num_gpus,
        "nodes": nodes(plan),
        "data_parallel": plan.data_parallel,
        "global_batch": plan.mapping.global_batch,
        "tokens_per_step": plan.tokens_per_step,
        "mapping": described(plan),
        "layout": {"source": plan.mapping.source.split("; ")[0], "changed": changes(plan)},
        "schedule": schedule(plan),
        "tp_overlap": {"on": overlaps_tp(plan), "why_off": why_off(plan)},
        "vboost": {"on": boosts(plan), "why_off": vboost_off(plan)},
        "memory_gb_per_gpu": memory and _memory_facts(plan, memory),
        "data": {**asdict(data), "warning": _warning(plan)},
        "differs_from_convergence": settings_differences(plan),
    }


def vboost_off(plan: Plan) -> str | None:
    """Return why the GPUs of a plan that measures speed keep their usual clocks, and how to change
    it.

    NeMo's performance scripts ask for vboost in every run (v2.3.2 scripts/performance/llm,
    enable_vboost=True).
    """
    command = "sudo nvidia-smi boost-slider --vboost 1"
    if plan.on_cpu or plan.settings.batch != "layout" or boosts(plan):
        return None
    if plan.executor.kind == "local":
        return f"executor=local leaves it as it is; run `{command}` before, as NVIDIA's scripts do"
    return f"NVIDIA's scripts run `{command}`; set cluster.vboost=true where nodes allow it"


def _memory_facts(plan: Plan, memory: Memory) -> dict[str, Any]:
    terms = {name: size / 1e9 for name, size in memory.terms.items()}
    return {
        "predicted": memory.total_gb,
        "terms": terms,
        "dominant": memory.dominant,
        "usable": usable_gb(plan),
        "tight": is_tight(plan),
        "state": state(plan),
        "margin": margin(plan),
        "remedy": memory_remedy(plan) if is_tight(plan) else None,
    }


def settings_differences(plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Return what the plan sets otherwise than the convergence settings would for its cell: key ->
    (there, here).
    """
    axes = {
        "model": plan.model.name,
        "precision": plan.precision.name,
        "gpu": plan.gpu.name,
        "stack": plan.stack.name,
    }
    nowhere = [
        "cluster.container_runtime=none",
        "cluster.python=python",
    ]  # a container need not know the GPU
    try:
        usual = compose_plan([*(f"{axis}={name}" for axis, name in axes.items()), *nowhere])
    except InputError:
        return {}  # a cell of the user's own, which the default mapping does not fit
    there, here = (flatten(p.model_dump()) for p in (usual, plan))
    keys = [
        key for key in differences(there, here) if key.startswith(DIFFER) and key != "settings.name"
    ]
    return {key: (there.get(key), here.get(key)) for key in keys}


def _warning(plan: Plan) -> str | None:
    """Return what a job on a cluster with the demo's text is told, which a launch would refuse."""
    if plan.executor.kind == "local" or plan.on_cpu or not plan.data.is_demo_text:
        return None
    refused = "" if plan.data.demo_text else f"; a launch refuses it: {INSTEAD}"
    return f"{DEMO_TEXT}{refused}"


def table(plan: Plan, data: Facts) -> str:
    """Return the summary as text for people."""
    facts = summary(plan, data)
    grid = Table.grid(padding=(0, 2))
    memory = facts["memory_gb_per_gpu"]
    rows = {
        "run folder": facts["run_folder"],
        "model": (
            f"{plan.model.name}, {facts['parameters'] / 1e9:.2f} B parameters,"
            f" {plan.precision.name}, {plan.stack.name}"
        ),
        "devices": f"{facts['num_gpus']} x {plan.gpu.name} on {facts['nodes']} node(s)",
        "mapping": facts["mapping"],
        "layout": "; ".join([facts["layout"]["source"], *facts["layout"]["changed"]]),
        **({"TP overlap": f"off: {why}"} if (why := facts["tp_overlap"]["why_off"]) else {}),
        **({"vboost": f"off: {why}"} if (why := facts["vboost"]["why_off"]) else {}),
        "tokens a step": f"{facts['tokens_per_step']:,}",
        "schedule": _schedule(facts["schedule"]),
        "data": f"{_data(plan)}{_known(plan, data)}",
        **({"WARNING": facts["data"]["warning"]} if facts["data"]["warning"] else {}),
        **({"memory": _memory(memory)} if memory else {}),
        "settings": f"{plan.settings.name}{_differing(facts['differs_from_convergence'])}",
    }
    for name, value in rows.items():
        grid.add_row(name, str(value))
    text = io.StringIO()
    Console(file=text, width=140, highlight=False, markup=False).print(grid)
    return text.getvalue().rstrip()


def _schedule(facts: dict[str, Any]) -> str:
    """Return steps, rates and warm-up, and where they are not those that the model was published
    with.
    """
    text = (
        f"{facts['max_steps']:,} steps, {facts['tokens']:,} tokens; learning rate"
        f" {facts['max_lr']:g} to {facts['min_lr']:g}"
    )
    text += f", warm-up {facts['warmup_steps']:,} steps"
    if facts["published"] is None:
        return f"{text}; the model's file has no published schedule"
    differs = facts["differs_from_published"]
    return f"{text}; {'; '.join(differs) or 'as published'} ({facts['published']['source']})"


def _data(plan: Plan) -> str:
    data = plan.data
    if data.kind == "mock":
        return "random tokens: the loss says nothing"
    if data.kind == "indexed":
        heldout = f"split {data.split}" if data.split else f"held out: {', '.join(data.heldout)}"
        return f"{', '.join(data.train)}; {heldout}; tokenizer {data.tokenizer}"
    library = "Python's standard library (for trying only)"
    return f"text of {', '.join(data.sources) or library}, prepared in {data.root}"


def _known(plan: Plan, data: Facts) -> str:
    """Return what the check of the files found, behind what the plan says of them."""
    if plan.data.kind == "mock":
        return ""
    if data.train_tokens is None:
        return f"; not checked here: {data.reason}"
    counts = (
        f"{data.train_tokens:,} tokens, {data.epochs:.2g} epochs; {data.heldout_tokens:,} held out"
    )
    return f"; {counts}; checked: {data.checked}"


def _memory(memory: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{name} {size:.0f}"
        for name, size in sorted(memory["terms"].items(), key=lambda item: -item[1])
        if size >= 0.5
    )
    within = f"within the {memory['margin']:.1%} by which the estimate may be off"
    tight = f"; tight: {within}; {memory['remedy']}" if memory["tight"] else ""
    return (
        f"{memory['predicted']:.0f} GB a GPU of {memory['usable']:.0f} usable (predicted):"
        f" {parts}{tight}"
    )


def _differing(found: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        ["", *(f"{key.removeprefix('settings.')} {a} → {b}" for key, (a, b) in found.items())]
    ).replace("; ", ", differs: ", 1)
