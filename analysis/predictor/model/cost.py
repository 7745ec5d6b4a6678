"""From counts to seconds: twelve constants, each with a meaning and a unit, seven of them fitted on
published step times.

A constant starts from what is known of it before any fit (`KNOWN`, with how sure that is) and is
moved by the published rows only as far as they insist; where a fit has no row that tells (no
Blackwell row, no MXFP8 row), it stays there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from analysis.predictor.model.hardware import Hardware
from analysis.predictor.model.work import Work

# GEMMs of training run at the power limit, which lowers the clock: a GPU with less power for its
# peak sustains less of it.  Dynamic power goes with f V^2: f goes between P (V at its floor) and
# P^(1/3) (V with f).  The former is taken, not fitted (docs/predictor.md).
POWER = 1.0
# CUDA graphs launch a layer at once.  The grid's ramp stays of the gap between kernels, a new
# launch does not: a profile's idle gaps are 1.6 of `gap`'s 5.5 microseconds
# (analysis/results/layer_h200).  Half is taken.
GRAPHED_GAP = 0.5
# Of `fixed`, the host's share of which hides behind a graph; taken as the gap's idle share, 1.6 /
# 5.5
GRAPHED_FIXED = 0.29
# Seconds until a small message between GPUs of a NVLink domain has arrived, beside its bytes:
# all-gathers of a few kB take about 10 microseconds (NCCL's own tests on 8 GPUs).
LATENCY = 10e-6
# Data-parallel messages of the distributed optimizer travel beside the first and the last
# micro-batches.  Of the link's peak NCCL reaches 0.8 (busbw of large messages); of a hidden message
# this share is waited for: the last bucket, and the multiprocessors that NCCL takes from GEMMs (16
# of 132 on an H100).
NCCL_BANDWIDTH, HIDDEN_EXPOSED = 0.8, 0.3
SHARPNESS = (
    4  # how sharply the slower of host and GPU decides: the norm in which their times are joined
)


@dataclass(frozen=True)
class Constants:
    """What the counts are priced with; `KNOWN` says what each means, its unit and what is known of
    it.
    """

    sustained: float
    attention: float
    memory: float
    blackwell: float
    mxfp8: float
    tp_exposed: float
    net_exposed: float
    scale: float
    stragglers: float
    launch: float
    gap: float
    fixed: float


@dataclass(frozen=True)
class Prior:
    """A constant before the fit: what it means, its value, the factor by which it may well be off
    (one standard deviation), bounds, unit, why.
    """

    meaning: str
    value: float
    factor: float
    low: float
    high: float
    unit: str
    why: str


KNOWN = {
    "sustained": Prior(
        "speed of GEMMs in training over that of a GEMM measured alone (clocks under load, other"
        " streams)",
        1.0,
        1.1,
        0.6,
        1.2,
        "1",
        "the shapes of training were measured, most of them at the GPU's power limit"
        " (analysis/results/gemm_h200)",
    ),
    "attention": Prior(
        "share of the dense BF16 peak that attention reaches on Hopper in the forward pass",
        0.52,
        1.2,
        0.2,
        0.8,
        "1",
        "cuDNN's fused attention on an H200, 517 TFLOP/s (causal, head 128, sequence 8192;"
        " analysis/results/layer_h200)",
    ),
    "memory": Prior(
        "share of the memory bandwidth that element-wise kernels, casts and the optimizer reach",
        0.75,
        1.15,
        0.4,
        1.0,
        "1",
        "copies on an H100 reach nine tenths, fused kernels less",
    ),
    "blackwell": Prior(
        "share of its peak that Blackwell reaches in GEMMs, over Hopper's with the same power for"
        " its peak",
        1.15,
        1.1,
        0.6,
        1.4,
        "1",
        "a FLOP costs less energy: TSMC gives N4P 22 % more power efficiency than N5 (October"
        " 2021), and 4N lies between; not fitted",
    ),
    "mxfp8": Prior(
        "speed of an MXFP8 GEMM over a per-tensor one",
        0.95,
        1.1,
        0.6,
        1.1,
        "1",
        "the same peak; block scales are loaded too; not fitted",
    ),
    "tp_exposed": Prior(
        "share of tensor-parallel communication, at NVLink's peak, that is waited for",
        0.5,
        1.5,
        0.0,
        3.0,
        "1",
        "half of the collectives overlap with a GEMM in chunks (Transformer Engine's userbuffers)",
    ),
    "net_exposed": Prior(
        "the same of FSDP, context- and pipeline-parallel communication",
        0.5,
        1.5,
        0.0,
        3.0,
        "1",
        "overlapped with computation, but for the ends",
    ),
    "scale": Prior(
        "growth of data-parallel communication with each doubling of the NVLink domains that it"
        " spans",
        0.2,
        2.0,
        0.0,
        2.0,
        "a doubling",
        "latency and stragglers of larger groups",
    ),
    "stragglers": Prior(
        "growth of a step with each doubling of the GPUs beyond a node: all wait for the slowest",
        0.003,
        2.0,
        0.0,
        0.02,
        "a doubling",
        "rows of NeMo 24.09 at several scales grow 0.3 to 0.7 % a doubling",
    ),
    "launch": Prior(
        "time of the host a kernel, where CUDA graphs do not launch them",
        20.0,
        1.5,
        2.0,
        80.0,
        "microseconds a kernel",
        "PyTorch and Transformer Engine in Python, forward and backward",
    ),
    "gap": Prior(
        "time between one kernel's end and the next one's full speed, on the GPU",
        5.5,
        2.0,
        0.2,
        20.0,
        "microseconds a kernel",
        "the smallest copy that was measured, 1 MB, takes 6.0, its bytes 0.4 of that"
        " (gemm_h200/bandwidth.jsonl); idle gaps alone are 1.6",
    ),
    "fixed": Prior(
        "time of a step that depends on nothing: data, scalars, clipping, logging",
        0.03,
        2.0,
        0.0,
        0.3,
        "s a step",
        "global reductions and the scheduler",
    ),
}
# Of messages that no GEMM hides all is waited for.  Userbuffers leave half of a message by design,
# so that `tp_exposed` over that half is how much longer than at NVLink's peak a message takes (1).
OVERLAP_EXPOSES = KNOWN["tp_exposed"].value
PRIOR = Constants(**{name: prior.value for name, prior in KNOWN.items()})
NAMES = tuple(field.name for field in fields(Constants))
# Not fitted, for that made the rows worse that were not fitted (docs/predictor.md).  The fit's
# Blackwell rows are of NeMo 25.04 and 25.07 alone, whose kernels were new; `gap` stood in for what
# was missing; no fitted row tells of the other two.
HELD = ("blackwell", "mxfp8", "launch", "gap", "fixed")
FITTED = tuple(name for name in NAMES if name not in HELD)


@dataclass(frozen=True)
class Seconds:
    """Seconds of one pass, by what they are spent on."""

    gemm: float
    casts: float
    attention: float
    elementwise: float
    tp: float
    cp: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.gemm + self.casts + self.attention + self.elementwise + self.tp + self.cp


def seconds(work: Work, hw: Hardware, c: Constants) -> Seconds:
    """Return what a pass costs on the GPU."""
    generation = hw.power**POWER * (c.blackwell if hw.blackwell else 1.0)
    stream = 1 / (hw.memory * c.memory)
    return Seconds(
        gemm=(work.gemm + work.mx_gemm / c.mxfp8) / (c.sustained * generation) + work.gemm_bytes,
        casts=work.cast_bytes * stream,
        attention=work.attention / c.attention,
        elementwise=work.bytes * stream,
        tp=(work.tp + work.tp_bare / OVERLAP_EXPOSES) * c.tp_exposed + work.collectives * LATENCY,
        cp=work.cp * c.net_exposed,
    )


def waiting(gpu: float, kernels: float, graphs: bool, c: Constants) -> float:
    """Return the seconds that launching kernels adds to a pass: gaps between them, and what a
    slower host costs (softly, the slower decides).
    """
    gaps = kernels * c.gap * 1e-6 * (GRAPHED_GAP if graphs else 1.0)
    host = 0.0 if graphs else kernels * c.launch * 1e-6
    busy = gpu + gaps
    return float(gaps + (busy**SHARPNESS + host**SHARPNESS) ** (1 / SHARPNESS) - busy)
