"""What emulated FP8 costs on a GPU, one linear layer at a time, and whether its bits are those of
the CPU.

    python -m recipes.measure.gpu.emulation_gpu
        a row for BF16 and each recipe, for two sizes of layer
    python -m recipes.measure.gpu.emulation_gpu --json

A pass is forward and backward of one layer, as training runs them.  `pass` is the time between the
GPU's events over many passes, `host` what the host needs to queue one: where it is the larger, the
layer waits for the host unless something else keeps the GPU busy.  `casts` is the time to quantise
input, weight and gradient, and the share of the memory's bandwidth that moving their BF16 bytes
takes.  Numerics emulated, times measured; they say nothing about FP8 in hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from recipes.cli import ArgumentParser, command
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.exit_codes import EXIT_WRONG_INPUT
from recipes.measure.gpu.sample_tensors import KINDS, make
from recipes.plan import Fp8
from recipes.training.fp8.linear import Calls, fp8_linear
from recipes.training.fp8.recipe import (
    ROLES,
    DelayedScaling,
    Operand,
    Quantiser,
    format_of,
    quantiser,
)

PRECISIONS = ("fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
SIZES = ((8192, 768, 3072), (4096, 4096, 4096))  # tokens, input features, output features
SHAPES = (
    (256, 512),
    (303, 300),
)  # of the tensors that are compared; no part of the second is a multiple of 16
WARM_UP, PASSES = 5, 50
COPIES = {
    "delayed": (1, 1),
    "current": (2, 1),
    "subchannel": (1, 2),
    "mxfp8": (1, 2),
}  # how often a cast reads an operand and writes one
L2_BYTES = 256 * 2**20
Call = Callable[[], Any]


def recipes() -> dict[str, Fp8]:
    """Return the FP8 recipes of conf/precision, and MXFP8 with the other rounding of its scales."""
    plans = [compose_plan([f"precision={name}"]) for name in PRECISIONS]
    found = {plan.precision.name: plan.precision.fp8 for plan in plans if plan.precision.fp8}
    return {
        **found,
        "mxfp8, ocp_floor": found["mxfp8"].model_copy(update={"mx_scale_rounding": "ocp_floor"}),
    }


def differences(
    fp8: Fp8,
    device: str,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    kinds: Sequence[str] = tuple(KINDS),
) -> Iterator[str]:
    """Yield, for each tensor that is quantised to other numbers on `device` than in torch on the
    CPU, which one and what differs.

    Delayed scaling sees the tensors in turn, so that its scale lags behind them, and its state is
    compared as well.
    """
    for role in ROLES:
        here, there = quantiser(fp8), _on(quantiser(fp8), device)
        for shape in shapes:
            for kind in kinds:
                x = make(kind, shape, format_of(fp8, role), "cpu")
                ours, theirs = here(x.float(), role, True), there(x.to(device), role, True)
                pairs = _parts(here, ours), _parts(there, theirs)
                wrong = [
                    name
                    for name in pairs[0]
                    if not same(pairs[0][name], pairs[1][name].cpu().float())
                ]
                if wrong:
                    yield f"{kind} {shape[0]} x {shape[1]}, {role}: {', '.join(wrong)}"


def _on(found: Quantiser, device: str) -> Quantiser:
    return found.to(device) if isinstance(found, DelayedScaling) else found


def _parts(found: Quantiser, operand: Operand) -> dict[str, Tensor]:
    parts = {"row": operand.row, "col": operand.col}
    if operand.scale_inv is not None:
        parts["scale_inv"] = operand.scale_inv
    if isinstance(found, DelayedScaling):
        parts |= {"scale": found.scale, "history": found.amax_history}
    return parts


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two FP32 tensors hold the same numbers: bit by bit, but for the sign of zero and the
    bits of a NaN.
    """
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def rows(size: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """Yield a row for BF16 and for each recipe; times in milliseconds."""
    tokens, inputs, outputs = size
    x, weight, grad = (
        torch.randn(*shape, device="cuda").bfloat16()
        for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    base = None
    for name, fp8 in {"bf16": None, **recipes()}.items():
        step = _pass(x, weight, grad, fp8)
        milliseconds, host = timed(step)
        base = base or milliseconds
        row = {
            "tokens": tokens,
            "inputs": inputs,
            "outputs": outputs,
            "precision": name,
            "pass_ms": milliseconds,
            "host_ms": host,
        }
        yield {
            **row,
            "ratio_to_bf16": milliseconds / base,
            **(_casts(fp8, x, weight, grad) if fp8 else {}),
        }


def _pass(x: Tensor, weight: Tensor, grad: Tensor, fp8: Fp8 | None) -> Call:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    found, calls = _on(quantiser(fp8), "cuda") if fp8 else None, Calls()

    def call() -> None:
        x.grad = weight.grad = None
        y = fp8_linear(x, weight, found, calls) if found else torch.nn.functional.linear(x, weight)
        y.backward(grad)

    return call


def _casts(fp8: Fp8, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, float]:
    found = _on(quantiser(fp8), "cuda")
    operands = dict(zip(ROLES, (x, weight, grad), strict=True))
    milliseconds = sum(
        timed(lambda role=role, value=value: found(value, role, True), cold=True)[0]
        for role, value in operands.items()
    )
    reads, writes = COPIES[fp8.scaling]
    square = (
        weight.numel() if fp8.scaling == "subchannel" else 0
    )  # one copy of a weight in square blocks
    moved = 2 * ((reads + writes) * sum(value.numel() for value in operands.values()) - square)
    return {"casts_ms": milliseconds, "casts_tb_per_s": moved / milliseconds / 1e9}


def timed(call: Call, cold: bool = False) -> tuple[float, float]:
    """Return the milliseconds of a call on the GPU and on the host; `cold`: each alone, after a
    write that empties the L2 cache.
    """
    for _ in range(WARM_UP):
        call()
    cache = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(PASSES if cold else 1)
    ]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for begin, end in events:
        if cache is not None:
            cache.zero_()
        begin.record()
        for _ in range(1 if cold else PASSES):
            call()
        end.record()
    host = (time.perf_counter() - started) * 1e3 / PASSES
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return (times[len(times) // 2] if cold else times[0] / PASSES), host


def shown(found: Sequence[dict[str, Any]]) -> Table:
    """Return the rows of one size as a table for the terminal."""
    first = found[0]
    size = f"{first['tokens']} tokens, {first['inputs']} to {first['outputs']} features"
    title = f"{size}, {torch.cuda.get_device_name()}: numerics emulated, times measured"
    table = Table(
        "precision",
        "pass, ms",
        "ratio to BF16",
        "host, ms",
        "casts, ms",
        "TB/s",
        title=title,
        title_justify="left",
    )
    for row in found:
        casts = (
            (f"{row['casts_ms']:.3f}", f"{row['casts_tb_per_s']:.2f}")
            if "casts_ms" in row
            else ("–", "–")
        )
        table.add_row(
            row["precision"],
            f"{row['pass_ms']:.3f}",
            f"{row['ratio_to_bf16']:.2f}",
            f"{row['host_ms']:.3f}",
            *casts,
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: exit code 0, 1 where bits differ from the CPU's, 2 without a GPU."""
    parser = ArgumentParser(
        prog="python -m recipes.measure.gpu.emulation_gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        error = InputError(
            "recipes.measure.gpu.emulation_gpu measures a CUDA GPU and this machine has none; use"
            " python -m recipes.measure.gpu.emulation_cpu for the CPU"
        )
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    wrong = [
        f"{name}: {what}" for name, fp8 in recipes().items() for what in differences(fp8, "cuda")
    ]
    tables = [list(rows(size)) for size in SIZES]
    if args.json:
        labels = {"numerics": "emulated", "step_time": "measured"}
        found = [row for table in tables for row in table]
        print(
            json.dumps(
                {
                    "device": torch.cuda.get_device_name(),
                    "labels": labels,
                    "differs_from_cpu": wrong,
                    "rows": found,
                },
                indent=1,
            )
        )
    else:
        for table in tables:
            Console(width=120).print(shown(table))
        print(
            "\n".join(["other numbers than on the CPU:", *wrong])
            if wrong
            else "bits: as on the CPU, every recipe, operand and tensor"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    command(main)
