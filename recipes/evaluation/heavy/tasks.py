"""Tasks of EleutherAI's lm-evaluation-harness, asked of a checkpoint that was exported to Hugging
Face form.

The harness knows the tasks, their prompts and their metrics; what is kept here is one outcome a
question, so that BF16 and FP8 can be compared on the same questions (analysis.convergence.tasks).
Nothing is fetched unless the user says so.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.errors import InputError, one_line

CORRECTNESS = (
    "acc",
    "exact_match",
    "em",
)  # metrics of the harness that say right or wrong of one question, best first


def task_dtype() -> str:
    """Return the arithmetic that tasks run in: BF16 on a GPU, FP32 on a CPU."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def quiet() -> None:
    import logging as python_logging

    from nemo.utils import logging

    logging.setLevel(python_logging.ERROR)
    for name in ("lightning", "lm_eval", "datasets", "megatron"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, and the harness's manager that knows them."""

    names: list[str]
    manager: Any


def find_tasks(names: Sequence[str], folder: Path | None) -> Tasks:
    """Return the tasks of these names, from `folder` first, then the harness's own; InputError
    where one does not exist.
    """
    from lm_eval.tasks import TaskManager

    quiet()
    here = str(folder) if folder else None
    manager = TaskManager(include_path=here, include_defaults=False) if here else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=here)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            instead = (
                f"did you mean {', '.join(near)}?"
                if near
                else "`lm_eval ls tasks` lists those there are; --task-dir adds your own"
            )
            raise InputError(f"no task is called {name}; {instead}")
    try:
        manager.load(
            list(names)
        )  # their files and data, so that what is missing is known before a model is loaded
    except (
        Exception
    ) as error:  # data sets that are not here, files of a task that are wrong: many types
        raise _cannot_run(names, error) from None
    return Tasks(list(names), manager)


def _cannot_run(names: Sequence[str], error: Exception) -> InputError:
    reason = one_line(f"{type(error).__name__}: {error}")[:200]
    what = f"tasks {', '.join(names)} cannot be run ({reason})"
    return InputError(
        f"{what}; no network is used: get the data first, or set HF_HUB_OFFLINE=0"
        " HF_DATASETS_OFFLINE=0"
    )


def run_tasks(
    model: str, tasks: Tasks, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the exported model in folder `model`; return results by task and an outcome a
    question.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = HFLM(pretrained=model, dtype=task_dtype(), device=device, batch_size=16)
    try:
        found = simple_evaluate(
            asked,
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (
        Exception
    ) as error:  # a question that the task's template or metric cannot take: many types
        raise _cannot_run(tasks.names, error) from None
    results, items = dict[str, Any](), list[dict[str, Any]]()
    for name, samples in found["samples"].items():
        results[name], rows = _of_task(name, samples, found["results"].get(name, {}))
        items += rows
    return results, items


def _of_task(
    name: str, samples: list[dict[str, Any]], aggregated: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a task's result and the outcome of each question under its first filter, `correct`
    None where there is none.
    """
    first = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    metric = next(
        (m for m in CORRECTNESS if m in samples[0] and all(s[m] in (0, 1) for s in samples)), None
    )
    items = [
        {
            "task": name,
            "doc_id": s["doc_id"],
            "doc_sha256": s["doc_hash"],
            "prompt_sha256": s["prompt_hash"],
            "correct": int(s[metric]) if metric else None,
        }
        for s in samples
    ]
    right = (
        np.array([item["correct"] for item in items], dtype=np.float64) if metric else np.zeros(0)
    )
    result = {
        "metric": metric,
        "filter": first,
        "accuracy": float(right.mean()) if metric else None,
        "stderr": float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else None,
        "n": len(samples),
        "all_metrics": {k: v for k, v in aggregated.items() if isinstance(v, int | float)},
    }
    return result, items
