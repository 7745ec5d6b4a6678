"""Run folders made up for the tests: a loss curve, noise between batches that all runs share, and a
gap.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from analysis.runs.load import Array
from recipes.compose.tree import compose_plan
from recipes.estimate.fp8_gemms import fp8_gemms
from recipes.estimate.schedule import rates
from recipes.plan import Plan
from recipes.run_folder import set_status

STEPS = 1200
Maker = Callable[..., Path]


def curve(steps: int = STEPS, seed: int = 0) -> Array:
    """Return a loss that falls from 6 to about 2.3 with the noise of its batches."""
    step = np.arange(1, steps + 1)
    return np.asarray(
        2.2 + 3.8 * (1 + step / 20) ** -0.9 + np.random.default_rng(seed).normal(0, 0.05, steps)
    )


def own_noise(seed: int, steps: int = STEPS, size: float = 0.01) -> Array:
    """Return what a run adds of its own: autoregressive noise (0.6), as rounding leaves in a paired
    gap.
    """
    draws = np.random.default_rng(seed).normal(0, size * 0.8, steps)
    noise = np.empty(steps)
    noise[0] = draws[0] / 0.8
    for i in range(1, steps):
        noise[i] = 0.6 * noise[i - 1] + draws[i]
    return noise


def as_run(loss: Array, plan: Plan) -> Array:
    """Return a loss that begins as an untrained model does, with rounding of its own: 1e-9 nats, by
    the run's name.
    """
    rounding = np.random.default_rng(crc32(plan.run_name.encode())).normal(0, 1e-9, len(loss))
    return np.asarray(np.concatenate([[math.log(plan.model.vocab_size)], loss[1:]]) + rounding)


def metrics_of(loss: Array, plan: Plan) -> list[dict[str, Any]]:
    gemms, steps = fp8_gemms(plan), np.arange(1.0, len(loss) + 1)
    step_time = np.random.default_rng(1).normal(0.8 if gemms else 1.0, 0.01, len(loss))
    lr = rates(plan.train, steps)
    return [
        {
            "step": i,
            "tokens": i * plan.tokens_per_step,
            "loss": float(value),
            "grad_norm": 1.0,
            "lr": float(lr[i - 1]),
            "step_time_s": float(step_time[i - 1]),
            "fp8_gemms": gemms,
        }
        for i, value in enumerate(loss, 1)
    ]


def write(folder: Path, loss: Array, precision: str, overrides: list[str], **manifest: Any) -> Path:
    """Write a run folder with the loss curve `loss`, and what a run adds of its own far below what
    is judged.
    """
    every = max(1, len(loss) // 4)
    steps = [f"train.max_steps={len(loss)}", "train.warmup_steps=1", f"train.eval_interval={every}"]
    plan = compose_plan(
        [
            f"precision={precision}",
            f"run_name={folder.name}",
            f"runs_dir={folder.parent}",
            *steps,
            *overrides,
        ]
    )
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan.model_dump()))
    data = {"source": "made up", "sha256": {"train.bin": "0"}, "unigram_entropy_nats": 5.0}
    labels = {"loss": "emulated", "step_time": "measured"}
    device = "none" if plan.on_cpu else f"NVIDIA {plan.gpu.device_name}"
    facts = {
        "code": {"commit": "0" * 40, "dirty": False},
        "device": device,
        "data": data,
        "order_sha256": "1",
        "labels": labels,
    }
    (folder / "manifest.json").write_text(json.dumps({**facts, **manifest}))
    loss = as_run(loss, plan)
    rows = metrics_of(loss, plan)
    for i in range(every, len(loss) + 1, every):
        rows.append(
            {
                "step": i,
                "tokens": i * plan.tokens_per_step,
                "heldout_loss": float(loss[i - 1]) + 0.1,
            }
        )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["step"]))
    )
    set_status(folder, "done", step=len(loss))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Return a writer of run folders: make(name, loss, precision="fp8_current", overrides=(),
    **manifest).
    """

    def maker(
        name: str,
        loss: Array,
        precision: str = "fp8_current",
        overrides: tuple[str, ...] = (),
        **manifest: Any,
    ) -> Path:
        return write(tmp_path / name, loss, precision, list(overrides), **manifest)

    return maker
