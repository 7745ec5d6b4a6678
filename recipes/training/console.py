"""The lines of a job's log that tell how training goes, in the form of NeMo 2's own.

NeMo's ProgressPrinter (nemo/lightning/pytorch/callbacks/progress_printer.py, v2.3.2) waits for the
device in each step, and rounds a loss to four digits, too few to compare runs by.  These lines have
its form, so that whatever reads NeMo's logs reads them, `analysis.import_logs` among others.
"""

from __future__ import annotations

from typing import Any

from recipes.plan import Plan


def training_line(row: dict[str, Any], epoch: int, plan: Plan) -> str:
    """Return the line of a step, from its row in metrics.jsonl; NeMo counts steps from 0, and
    memory in bytes.
    """
    fields = {
        "lr": f"{row['lr']:.6g}",
        "global_batch_size": plan.mapping.global_batch,
        "global_step": row["step"] - 1,
        "max_memory_allocated": round(row["memory_gb"] * 1e9),
        "reduced_train_loss": f"{row['loss']:.7g}",
        "train_step_timing in s": f"{row['step_time_s']:.6g}",
        "grad_norm": f"{row['grad_norm']:.6g}",
        "tokens_per_s_per_gpu": f"{row['tokens_per_s_per_gpu']:.6g}",
    }
    head = f"Training epoch {epoch}, iteration {row['step'] - 1}/{plan.train.max_steps - 1}"
    return " | ".join([head, *(f"{name}: {value}" for name, value in fields.items())])


def validation_line(step: int, loss: float, plan: Plan) -> str:
    """Return the line of a held-out evaluation after a step."""
    done = f"Validation: iteration {plan.train.eval_batches}/{plan.train.eval_batches}"
    return f"{done} | global_step: {step - 1} | val_loss: {loss:.7g}"
