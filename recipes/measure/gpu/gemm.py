"""The measurements of `python -m recipes.measure.gemm`, on a CUDA GPU: GEMMs in BF16 and FP8, the
casts that FP8 needs, and plain copies.

GEMMs are cuBLASLt's, reached through torch._scaled_mm; the layout of the scales decides which.
Casts are Transformer Engine's fused kernels where it has them
(recipes/measure/gpu/te_quantizers.py), and torch.compile's for scales by row and column.  Time is
that of the device (CUDA events) around one call, after a write that empties the L2 cache, the kinds
taking turns: what else the machine does, and the clock that falls as the chip warms, meet all of
them alike.  The host queues a round ahead of the device, so that the time to launch is not in it,
as it is not in the training of large models.  What a GPU, a PyTorch or a Transformer Engine cannot
do becomes a row that says why.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.errors import InputError, one_line
from recipes.estimate.sizes import Shape, training_gemms
from recipes.gemm_rows import BLOCKS, OPERANDS, TILES, Cast, Copy, Gemm, Quartiles, Results
from recipes.measure.gpu import te_quantizers

TILE = 128
WARM_UP = 2
MIN_ROUNDS = 10
L2_BYTES = (
    256 * 2**20
)  # more than any GPU's L2 cache, and long enough to write that the host can prepare the next call
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TE_SCALINGS = {
    "tensor, delayed": "delayed",
    "tensor, current": "current",
    "sub-channel": "subchannel",
}
READ_TWICE = ("tensor, current", "channel")  # the scale waits for the largest |x|
COPY_BYTES = [2**power for power in range(20, 32)]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """A way to multiply: `make` builds the call for operands a (m, k) and b (n, k) in BF16."""

    precision: str
    granularity: str
    accumulation: str
    make: Callable[[Tensor, Tensor], Call]


def _fp8(x: Tensor, amax: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Return x in FP8 with the inverse scale of each group; `amax` broadcasts against x."""
    largest = torch.finfo(dtype).max
    scale = largest / amax.float().clamp(min=1e-12)
    return (x.float() * scale).clamp_(-largest, largest).to(dtype), scale.reciprocal()


def _bf16(role: str) -> Callable[[Tensor, Tensor], Call]:
    """Operands lie in memory as training has them: the weight is not transposed for dgrad, nor
    input and gradient for wgrad.
    """

    def make(a: Tensor, b: Tensor) -> Call:
        if role == "fprop":
            return lambda: a @ b.t()
        right = b.t().contiguous()
        left = a.t().contiguous().t() if role == "wgrad" else a
        return lambda: left @ right

    return make


def _scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Call:
    def call() -> Tensor:
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    return call


def _tensor(fast: bool, role: str) -> Callable[[Tensor, Tensor], Call]:
    """Backward, `a` is the gradient, which the hybrid format of per-tensor recipes keeps in
    E5M2.
    """

    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = (
            _fp8(a, a.abs().amax(), E4M3 if role == "fprop" else E5M2),
            _fp8(b, b.abs().amax()),
        )
        return _scaled(qa, qb, sa, sb, fast)

    return make


def _channel(fast: bool) -> Callable[[Tensor, Tensor], Call]:
    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = (_fp8(x, x.abs().amax(1, keepdim=True)) for x in (a, b))
        return _scaled(qa, qb, sa, sb.t(), fast)

    return make


def _tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in E4M3 with a scale for each 1x128 tile, as cuBLASLt wants them: (rows, k / 128),
    column by column.
    """
    groups = x.view(x.shape[0], -1, TILE)
    q, scale = _fp8(groups, groups.abs().amax(2, keepdim=True))
    return q.view(x.shape), scale.squeeze(2).t().contiguous().t()


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in E4M3 with a scale for each 128x128 block, (rows / 128, k / 128), row by row."""
    groups = x.view(x.shape[0] // TILE, TILE, -1, TILE)
    q, scale = _fp8(groups, groups.abs().amax((1, 3), keepdim=True))
    return q.view(x.shape), scale.view(scale.shape[0], -1).contiguous()


def _sub_channel(weights_in_blocks: bool) -> Callable[[Tensor, Tensor], Call]:
    def make(a: Tensor, b: Tensor) -> Call:
        (qa, sa), (qb, sb) = _tiles(a), _blocks(b) if weights_in_blocks else _tiles(b)
        return _scaled(qa, qb, sa, sb.t(), fast=False)

    return make


def kinds(role: str = "fprop", every: bool = True) -> list[Kind]:
    """Return the kinds of GEMM for a role, BF16 first; block scales are always accumulated
    precisely.

    `every`: the forward GEMM also with 1x128 tiles for both operands, which training has in wgrad
    only.
    """
    found = [
        Kind("bf16", "-", "precise", _bf16(role)),
        Kind("fp8", "tensor", "fast", _tensor(True, role)),
        Kind("fp8", "tensor", "precise", _tensor(False, role)),
        Kind("fp8", "channel", "fast", _channel(True)),
        Kind("fp8", "channel", "precise", _channel(False)),
    ]
    if role != "wgrad":
        found.append(Kind("fp8", BLOCKS, "precise", _sub_channel(True)))
    if role == "wgrad" or (role == "fprop" and every):
        found.append(Kind("fp8", TILES, "precise", _sub_channel(False)))
    return found


def check(layers: Iterable[Shape]) -> None:
    """Raise InputError where there is no CUDA GPU or a shape is no multiple of 128."""
    if not torch.cuda.is_available():
        raise InputError(
            "recipes.measure.gemm measures a CUDA GPU and this machine has none; run it where there"
            " is one"
        )
    bad = next((s for s in layers if s.m % TILE or s.n % TILE or s.k % TILE), None)
    if bad:
        raise InputError(
            f"{bad.name}: {bad.m} x {bad.n} x {bad.k} is no multiple of {TILE}, which sub-channel"
            " scales need; choose others"
        )


def measure(layer: Shape, rounds: int, seconds: float) -> tuple[list[Gemm], list[Cast]]:
    """Return the rows of a linear layer's three GEMMs and of its casts; `layer` is its forward
    GEMM.

    A shape is measured `rounds` times at most, 10 times at least (or `rounds`, if fewer), and in
    between for `seconds`.
    """
    torch.manual_seed(0)
    gemms = [
        row
        for shape in training_gemms(layer)
        for row in _gemms(shape, not layer.model, rounds, seconds)
    ]
    casts = _casts(layer, rounds, seconds)
    torch.cuda.empty_cache()
    return gemms, casts


def _gemms(shape: Shape, every: bool, rounds: int, seconds: float) -> list[Gemm]:
    a, b = (_random(rows, shape.k) for rows in (shape.m, shape.n))
    found = kinds(shape.role, every)
    calls, refused = _calls([functools.partial(kind.make, a, b) for kind in found])
    times = timed(calls, rounds, seconds)
    base = float(np.median(times[0])) if 0 in times else None
    return [
        _gemm(shape, kind, base, times.get(n), refused.get(n, "")) for n, kind in enumerate(found)
    ]


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


def _calls(makers: Sequence[Callable[[], Call]]) -> tuple[dict[int, Call], dict[int, str]]:
    """Return the calls that run here, by their number, and of the others why not."""
    calls, refused = dict[int, Call](), dict[int, str]()
    for number, make in enumerate(makers):
        try:
            call = make()
            call()
            torch.cuda.synchronize()
            calls[number] = call
        # Whatever a library raises where it lacks this kind: one row less, not a run less
        except Exception as error:
            refused[number] = f"{type(error).__name__}: {one_line(str(error))[:200]}"
    return calls, refused


def timed(calls: Mapping[int, Call], rounds: int, seconds: float) -> dict[int, list[float]]:
    """Return the device's seconds of each call, the calls taking turns."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    times: dict[int, list[float]] = {number: [] for number in calls}
    for _ in range(WARM_UP):
        _round(calls, flush)
    started = time.perf_counter()
    for done in range(rounds if calls else 0):
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for number, spent in _round(calls, flush).items():
            times[number].append(spent)
    return times


def _round(calls: Mapping[int, Call], flush: Tensor) -> dict[int, float]:
    events = {}
    for number, call in calls.items():
        start, end = events[number] = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return {number: start.elapsed_time(end) / 1e3 for number, (start, end) in events.items()}


def _quartiles(times: Sequence[float]) -> Quartiles:
    low, median, high = (float(t) for t in np.percentile(times, [25, 50, 75]))
    return low, median, high


def _gemm(
    shape: Shape, kind: Kind, base: float | None, times: Sequence[float] | None, refused: str
) -> Gemm:
    where = {
        **asdict(shape),
        "precision": kind.precision,
        "granularity": kind.granularity,
        "accumulation": kind.accumulation,
    }
    if not times:
        return Gemm(**where, refused=refused)
    spent = _quartiles(times)
    tflops = 2 * shape.m * shape.n * shape.k / spent[1] / 1e12
    return Gemm(**where, seconds=spent, tflops=tflops, speedup_over_bf16=base and base / spent[1])


def _casts(layer: Shape, rounds: int, seconds: float) -> list[Cast]:
    sizes = dict(
        zip(OPERANDS, ((layer.m, layer.k), (layer.n, layer.k), (layer.m, layer.n)), strict=True)
    )
    operands = {name: _random(*size) for name, size in sizes.items()}
    found = [
        (granularity, operand) for granularity in (*TE_SCALINGS, "channel") for operand in OPERANDS
    ]
    calls, refused = _calls(
        [
            functools.partial(_cast_call, granularity, operand, operands[operand])
            for granularity, operand in found
        ]
    )
    times = timed(calls, rounds, seconds)
    rows = []
    for number, (granularity, operand) in enumerate(found):
        where = {
            "name": layer.name,
            "model": layer.model,
            "layer": layer.layer,
            "operand": operand,
            "granularity": granularity,
        }
        where |= {
            "rows": sizes[operand][0],
            "columns": sizes[operand][1],
            "made_by": _made_by(granularity),
        }
        if number not in calls:
            rows.append(Cast(**where, refused=f"cast: {refused[number]}"))
            continue
        spent, moved = (
            _quartiles(times[number]),
            bytes_of_cast(granularity, operands[operand], calls[number]()),
        )
        rows.append(Cast(**where, seconds=spent, bytes=moved, gb_per_s=moved / spent[1] / 1e9))
    return rows


def _made_by(granularity: str) -> str:
    if granularity == "channel":
        return f"torch.compile, PyTorch {torch.__version__}"
    return f"Transformer Engine {te_quantizers.version() or '(not installed)'}"


def _cast_call(granularity: str, operand: str, x: Tensor) -> Call:
    if granularity == "channel":
        blocked = x.view(x.shape[0] // TILE, TILE, x.shape[1] // TILE, TILE)
        return functools.partial(_compiled_channel_cast(), blocked)
    quantizer = getattr(te_quantizers.quantizers(TE_SCALINGS[granularity]), operand)
    return functools.partial(quantizer, x)


def channel_cast(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x in E4M3 with a scale a row, and transposed with a scale a column: data and inverse
    scales of each.

    `x` is a matrix seen as (rows / 128, 128, columns / 128, 128): so the compiler knows its sizes
    for multiples of 128.
    """
    size = x.abs()
    by_row, row_scale = _fp8(x, size.amax((2, 3), keepdim=True))
    by_column, column_scale = _fp8(x, size.amax((0, 1), keepdim=True))
    return by_row, row_scale, by_column.permute(2, 3, 0, 1).contiguous(), column_scale


@functools.cache
def _compiled_channel_cast() -> Callable[[Tensor], Any]:
    return torch.compile(
        channel_cast, dynamic=True, fullgraph=True
    )  # fullgraph: raises instead of falling back to eager


def bytes_of_cast(granularity: str, x: Tensor, result: Any) -> int:
    """Return the bytes that a cast of `x` must read and write at least."""
    written = result if isinstance(result, tuple) else te_quantizers.copies(result)
    reads = 2 if granularity in READ_TWICE else 1
    return reads * x.nbytes + sum(tensor.nbytes for tensor in written)


def copies(rounds: int, seconds: float) -> list[Copy]:
    """Return rows of copies on the device, of 1 MB to 2 GB."""
    source, target = (
        torch.zeros(COPY_BYTES[-1], dtype=torch.int8, device="cuda") for _ in range(2)
    )
    calls = {size: functools.partial(target[:size].copy_, source[:size]) for size in COPY_BYTES}
    found = {size: _quartiles(times) for size, times in timed(calls, rounds, seconds).items()}
    return [Copy(size, spent, 2 * size / spent[1] / 1e9) for size, spent in found.items()]


def write(results: Results, folder: Path) -> None:
    """Write the rows and what made them to `folder`."""
    results.write(results.files(), folder, results.settings, {"step_time": "measured"})
