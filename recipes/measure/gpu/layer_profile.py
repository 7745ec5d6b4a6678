"""The kernels of one transformer layer, forward and backward, out of a trace of torch.profiler:
where FP8 saves time and where it costs some.

A trace of a training step on a GPU holds every kernel with the call that launched it.  In the order
of their launches the norms mark the layers: Megatron-Core's dense layer has two, before attention
and before the MLP, and one more stands after the last layer.  Layers do the same thing in every
micro-batch, so each kernel's time is the median over all that launch the same kernels in the same
order. What is cut out is a layer long, from norm to norm (backward from that before the MLP), so
that it may hold the end of one layer and the beginning of the next.  The first micro-batch is left
out (it casts the weights), and so is the outermost stretch of a pass at either end.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.errors import InputError

NORMS = {
    "forward": re.compile(r"(rmsnorm|ln)_fwd_\w*kernel"),
    "backward": re.compile(r"(rmsnorm|ln)_bwd_(?!finalize)\w*kernel"),
}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
KINDS = (  # the first that is found in a kernel's name
    ("attention", re.compile(r"sdpa|fmha|cudnn::fusion|fused_attn|flash")),
    ("cast", re.compile(r"cast_transpose|amax|quantize|mxfp8|blockwise")),
    ("gemm", re.compile(r"nvjet|gemm|cutlass|xmma")),
)
Event = dict[str, Any]


def kernels_of_a_layer(trace: Path, layers: int, precision: str) -> list[dict[str, Any]]:
    """Return a row a kernel of one layer, from a Chrome trace of a step of `layers` layers (three
    or more) and two micro-batches or more.

    `place`: its place in the pass; `microseconds`: the median over `layers_seen` layers and
    micro-batches.  InputError where no layer is found.
    """
    launched = _by_launch(json.loads(trace.read_text())["traceEvents"])
    rows = []
    for name, norm in NORMS.items():
        seen = _layers(launched, norm, layers, skip=2 if name == "forward" else 3)
        if not seen:
            raise InputError(
                f"{trace}: no {name} pass of {layers} layers is in it; profile a step on a GPU,"
                " with three layers or more"
            )
        usual, number = Counter(
            tuple(event["name"] for event in layer) for layer in seen
        ).most_common(1)[0]
        alike = [layer for layer in seen if tuple(event["name"] for event in layer) == usual]
        rows += [
            _row(precision, name, place, [layer[place] for layer in alike], number)
            for place in range(len(usual))
        ]
    return rows


def _by_launch(events: Iterable[Event]) -> list[Event]:
    """Return what ran on the device, in the order of the calls that launched it."""
    events = list(events)
    ran = {
        event["args"].get("correlation"): event for event in events if event.get("cat") in ON_DEVICE
    }
    calls = [
        event
        for event in events
        if event.get("cat") in LAUNCHES and event["args"].get("correlation") in ran
    ]
    return [
        ran[event["args"]["correlation"]]
        for event in sorted(calls, key=lambda event: float(event["ts"]))
    ]


def _layers(
    launched: Sequence[Event], norm: re.Pattern[str], layers: int, skip: int
) -> list[Sequence[Event]]:
    """Return the kernels of every inner layer of every micro-batch but the first; `skip`: norms
    before the first inner layer.
    """
    places = [place for place, event in enumerate(launched) if norm.search(event["name"])]
    norms = 2 * layers + 1
    starts = [
        batch * norms + first
        for batch in range(1, len(places) // norms)
        for first in range(skip, skip + 2 * (layers - 2), 2)
    ]
    return [
        launched[places[start] : places[start + 2]] for start in starts if start + 2 < len(places)
    ]


def _row(
    precision: str, name: str, place: int, events: Sequence[Event], number: int
) -> dict[str, Any]:
    kernel = (
        events[0]["name"]
        .replace("(anonymous namespace)::", "")
        .removeprefix("void ")
        .split("(")[0]
        .strip()
    )
    return {
        "precision": precision,
        "pass": name,
        "place": place,
        "kernel": kernel[:100],
        "kind": _kind(events[0]),
        "microseconds": round(statistics.median(float(event["dur"]) for event in events), 3),
        "layers_seen": number,
        "label": "measured",
    }


def _kind(event: Event) -> str:
    if event["cat"] != "kernel":
        return "memory"
    return next((kind for kind, pattern in KINDS if pattern.search(event["name"])), "elementwise")
