"""The GEMMs of `python -m recipes.gemm`, on a CUDA GPU: BF16 and FP8 with scales by tensor, by row and column, by 1x128 and 128x128.

Each kind is cuBLASLt's, reached through torch._scaled_mm; the layout of the scales decides which.  Time is that of the device
(CUDA events) around one call, after a write that empties the L2 cache, the kinds taking turns: what else the machine does, and
the clock that falls as the chip warms, meet all of them alike.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.errors import InputError
from recipes.run_folder import write_json
from recipes.sizes import Shape
from recipes.training.manifest import code

TILE = 128
WARM_UP = 5
L2_BYTES = 128 * 2**20  # more than any GPU's L2 cache
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One kind of GEMM at one shape: seconds and TFLOP/s (2 m n k operations) as quartiles; `refused` says why there is no time."""

    name: str
    m: int
    n: int
    k: int
    precision: str
    granularity: str
    accumulation: str
    seconds: tuple[float, float, float] | None = None
    tflops: float | None = None
    speedup_over_bf16: float | None = None
    refused: str = ""
    label: str = "measured"


@dataclass
class Kind:
    """A way to multiply: `make` builds the call for operands a (m, k) and b (n, k) in BF16."""

    precision: str
    granularity: str
    accumulation: str
    make: Callable[[Tensor, Tensor], Call]
    times: list[float] = field(default_factory=list)


def _e4m3(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in E4M3 with the inverse scale of each group; `amax` broadcasts against x."""
    scale = 448.0 / amax.float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale.reciprocal()


def _bf16(a: Tensor, b: Tensor) -> Call:
    return lambda: a @ b.t()


def _scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Call:
    def call() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return call


def _tensor(fast: bool) -> Callable[[Tensor, Tensor], Call]:
    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = _e4m3(a, a.abs().amax()), _e4m3(b, b.abs().amax())
        return _scaled(qa, qb, sa, sb, fast)

    return make


def _channel(fast: bool) -> Callable[[Tensor, Tensor], Call]:
    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = (_e4m3(x, x.abs().amax(1, keepdim=True)) for x in (a, b))
        return _scaled(qa, qb, sa, sb.t(), fast)

    return make


def _tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in E4M3 with a scale for each 1x128 tile, as cuBLASLt wants them: (rows, k / 128), column by column."""
    groups = x.view(x.shape[0], -1, TILE)
    q, scale = _e4m3(groups, groups.abs().amax(2, keepdim=True))
    return q.view(x.shape), scale.squeeze(2).t().contiguous().t()


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in E4M3 with a scale for each 128x128 block, (rows / 128, k / 128), row by row."""
    groups = x.view(x.shape[0] // TILE, TILE, -1, TILE)
    q, scale = _e4m3(groups, groups.abs().amax((1, 3), keepdim=True))
    return q.view(x.shape), scale.view(scale.shape[0], -1).contiguous()


def _sub_channel(weights_in_blocks: bool) -> Callable[[Tensor, Tensor], Call]:
    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = _tiles(a), _blocks(b) if weights_in_blocks else _tiles(b)
        return _scaled(qa, qb, sa, sb.t(), fast=False)

    return make


def kinds() -> list[Kind]:
    """Return the kinds of the figure, BF16 first; block scales are always accumulated precisely."""
    return [
        Kind("bf16", "-", "precise", _bf16),
        Kind("fp8", "tensor", "fast", _tensor(True)),
        Kind("fp8", "tensor", "precise", _tensor(False)),
        Kind("fp8", "channel", "fast", _channel(True)),
        Kind("fp8", "channel", "precise", _channel(False)),
        Kind("fp8", "sub-channel 1x128, 128x128", "precise", _sub_channel(True)),
        Kind("fp8", "sub-channel 1x128, 1x128", "precise", _sub_channel(False)),
    ]


def measure(shapes: Sequence[Shape], rounds: int) -> list[Row]:
    """Return a row for each kind at each shape; InputError where there is no CUDA GPU or a shape is no multiple of 128."""
    if not torch.cuda.is_available():
        raise InputError("recipes.gemm measures a CUDA GPU and this machine has none; run it where there is one")
    bad = next((s for s in shapes if s.m % TILE or s.n % TILE or s.k % TILE), None)
    if bad:
        raise InputError(f"{bad.name}: {bad.m} x {bad.n} x {bad.k} is no multiple of {TILE}, which sub-channel scales need; choose others")
    return [row for shape in shapes for row in _rows(shape, rounds)]


def _rows(shape: Shape, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    a, b = (torch.randn(rows, shape.k, device="cuda", dtype=torch.bfloat16) for rows in (shape.m, shape.n))
    found, calls, refused = kinds(), list[tuple[Kind, Call]](), dict[int, str]()
    for kind in found:
        try:
            call = kind.make(a, b)
            call()
            torch.cuda.synchronize()
            calls.append((kind, call))
        except (RuntimeError, ValueError, TypeError) as error:  # a GPU or a torch without this kind
            refused[id(kind)] = str(error).splitlines()[0][:200]
    _time(calls, rounds)
    base = float(np.median(found[0].times))
    return [_row(shape, kind, base, refused.get(id(kind), "")) for kind in found]


def _time(calls: Sequence[tuple[Kind, Call]], rounds: int) -> None:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    for number in range(WARM_UP + rounds):
        for kind, call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                kind.times.append(start.elapsed_time(end) / 1e3)


def _row(shape: Shape, kind: Kind, base: float, refused: str) -> Row:
    where = {**asdict(shape), "precision": kind.precision, "granularity": kind.granularity, "accumulation": kind.accumulation}
    if not kind.times:
        return Row(**where, refused=refused)
    low, median, high = (float(t) for t in np.percentile(kind.times, [25, 50, 75]))
    tflops = 2 * shape.m * shape.n * shape.k / median / 1e12
    return Row(**where, seconds=(low, median, high), tflops=tflops, speedup_over_bf16=base / median)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the rows and what made them to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gemm.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    facts = {"code": code(), "device": torch.cuda.get_device_name(), "versions": versions, "labels": {"step_time": "measured"}}
    write_json(folder / "manifest.json", facts)
