"""`python -m tests.analysis.benchmark_import --megabytes 350`: how long an import of a generated
console log takes, and its memory.

It prints a line a harness: size, processor time, which on an idle machine is the time that passes,
and the largest resident memory of a process that does nothing else.  The goal is 350 MB in 6 s,
below 1 GB of memory, and 2,000 MB in no more than that memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SETS = ["model=llama3_8b", "precision=bf16", "gpu=h100", "num_gpus=64"]
CHILD = """import resource, sys, time
from analysis.import_logs import main
start = time.process_time()
code = main(sys.argv[1:])
print(code, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"""  # noqa: E501
LINES_AT_A_TIME = 10_000


def megatron(step: int, steps: int) -> str:
    """Return a line of Megatron-LM core_v0.12.3."""
    text = (
        f" [2026-03-04 08:{step // 60 % 60:02d}:{step % 60:02d}.{step % 1000000:06d}] iteration"
        f" {step:8d}/{steps:8d} |"
    )
    text += f" consumed samples: {step * 512:12d} |"
    text += (
        f" elapsed time per iteration (ms): {5800 + step % 97 / 10:.1f} | throughput per GPU"
        f" (TFLOP/s/GPU): {560 + step % 7:.1f} |"
    )
    text += (
        f" learning rate: {1.5e-4 * (1 + step % 1000 / 1e6):.6E} | global batch size: {512:5d} |"
    )
    text += f" lm loss: {2 + 100 / (step + 20):.6E} | loss scale: 1.0 |"
    return (
        text
        + f" grad norm: {0.5 + step % 31 / 100:.3f} | number of skipped iterations:   0 | number of"
        " nan iterations:   0 |\n"
    )


def nemo(step: int, steps: int) -> str:
    """Return a line of NeMo v2.3.2."""
    text = (
        f"Training epoch 0, iteration {step - 1}/{steps - 1} | lr:"
        f" {1.5e-4 * (1 + step % 1000 / 1e6):.4}"
    )
    text += f" | global_batch_size: 512 | global_step: {step - 1}"
    text += (
        f" | reduced_train_loss: {2.0001 + 100 / (step + 20):.4} | train_step_timing in s:"
        f" {5.801 + step % 97 / 1e4:.4}"
    )
    return (
        text
        + f" | max_memory_allocated: {65123456000 + step % 9} | consumed_samples: {step * 512}\n"
    )


HARNESSES = {"megatron": megatron, "nemo": nemo}


def _lines(harness: str, size: int) -> Iterator[str]:
    line = HARNESSES[harness]
    steps = size // len(line(10**6, 10**7))
    for start in range(1, steps + 1, LINES_AT_A_TIME):
        yield "".join(
            line(step, steps) for step in range(start, min(start + LINES_AT_A_TIME, steps + 1))
        )


def measure(harness: str, size: int) -> str:
    """Write a log of `size` bytes, import it in a process of its own, and return the line that says
    what it took.
    """
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("w") as file:
            file.writelines(_lines(harness, size))
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(log), "--out", f"{place}/run", "--set", *SETS],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not done.stdout.split()[-3] == "0":
            raise SystemExit(done.stderr[-2000:] or done.stdout[-2000:])
        seconds, memory = map(float, done.stdout.split()[-2:])
        return (
            f"{harness}: {log.stat().st_size / 1e6:,.0f} MB in {seconds:.1f} s of processor time,"
            f" {memory:.2f} GB of memory at most (measured)"
        )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.analysis.benchmark_import", description=__doc__
    )
    parser.add_argument("--megabytes", type=int, default=350, help="size of each log")
    args = parser.parse_args()
    for harness in HARNESSES:
        print(measure(harness, args.megabytes * 10**6), flush=True)


if __name__ == "__main__":
    main()
