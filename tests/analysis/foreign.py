"""Logs of other harnesses, written as each of them writes: what stands before the training lines,
and the lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

STEPS = 40
LLAMA3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "group_query_attention": True,
    "seq_length": 8192,
}


def losses(steps: int = STEPS) -> list[float]:
    """Return a loss that falls from 9.9, the same in every log."""
    return [round(2.2 + 7.7 * (1 + step / 20) ** -0.9, 6) for step in range(1, steps + 1)]


def arguments(**values: object) -> list[str]:
    """Megatron-LM core_v0.12.3, megatron/training/arguments.py:985 (_print_args)."""
    listed = [
        f"  {name} {'.' * (48 - len(name))} {value}" for name, value in sorted(values.items())
    ]
    return [
        "-" * 24 + " arguments " + "-" * 24,
        *listed,
        "-" * 20 + " end of arguments " + "-" * 21,
    ]


def megatron(
    batch: int, seconds: float, steps: int = STEPS, tflops: float | None = None, every: int = 1
) -> list[str]:
    """Megatron-LM core_v0.12.3, megatron/training/training.py (training_log)."""
    lines = []
    for step, loss in enumerate(losses(steps), 1):
        if step % every:
            continue
        text = (
            f" [2026-03-04 08:00:01] iteration {step:8d}/{steps:8d} | consumed samples:"
            f" {step * batch:12d} |"
        )
        text += f" elapsed time per iteration (ms): {seconds * 1000 + step % 4:.1f} |"
        text += "" if tflops is None else f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |"
        text += (
            f" learning rate: {1.5e-4:.6E} | global batch size: {batch:5d} | lm loss: {loss:.6E} |"
            f" loss scale: {1.0:.1f} |"
        )
        lines.append(
            f"{text} grad norm: {0.731:.3f} | number of skipped iterations: {0:3d} | number of nan"
            f" iterations: {0:3d} |"
        )
    return lines


def nemo(batch: int, seconds: float, steps: int = STEPS, **fields: float) -> list[str]:
    """NeMo v2.3.2, nemo/lightning/pytorch/callbacks/progress_printer.py (format_string); `fields`
    from the second line on.
    """
    lines = []
    for step, loss in enumerate(losses(steps)):
        values: dict[str, float] = {
            "lr": 1.5e-4,
            "global_batch_size": float(batch),
            "global_step": float(step),
        }
        values |= {"reduced_train_loss": loss, "train_step_timing in s": seconds + step % 4 / 100}
        values |= {} if step == 0 else {**fields, "consumed_samples": float((step + 1) * batch)}
        text = f"Training epoch 0, iteration {step}/{steps - 1}"
        lines.append(
            text
            + "".join(
                f" | {k}: {int(v) if v.is_integer() else format(v, '.4')}"
                for k, v in values.items()
            )
        )
    return lines


def write(path: Path, lines: Iterable[str], end: str = "\n") -> Path:
    """Write lines as a log."""
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    return path


def command(source: Path, out: Path, sets: Sequence[str], *more: str) -> list[str]:
    """Return the arguments of an import."""
    return [str(source), "--out", str(out), "--set", *sets, *more]
