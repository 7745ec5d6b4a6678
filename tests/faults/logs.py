"""Foreign logs with garbage in them: whatever a log holds, an import ends with a run folder or with
one line, and leaves nothing else.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from analysis import import_logs
from tests.analysis.conftest import curve
from tests.analysis.test_import_logs import (
    FAMILIES,
    filled,
    megatron_log,
    nemo_log,
    table,
    tensorboard,
)
from tests.faults.commands import REFUSED, call
from tests.faults.mutations import BYTES, HOSTILE
from tests.faults.registry import Outcome, fault

SET = ["--set", "model=llama3_tiny", "precision=bf16", "gpu=cpu"]
STEPS = 60


def _sources(folder: Path) -> list[Path]:
    """Return a log of each form."""
    loss = [float(value) for value in curve(STEPS)]
    for name, lines in (("nemo.log", nemo_log(loss)), ("megatron.log", megatron_log(loss))):
        (folder / name).write_text("\n".join(lines) + "\n")
    (events,) = tensorboard(folder / "events", filled(FAMILIES[1][0], loss), 1).iterdir()
    columns = {"run - reduced_train_loss": loss, "run - train_step_timing in s": [0.25] * STEPS}
    return [
        folder / "nemo.log",
        folder / "megatron.log",
        table(folder / "table.csv", "trainer/global_step", columns),
        events,
        _offline(folder / "run.wandb", loss),
    ]


def _offline(path: Path, loss: list[float]) -> Path:
    """Write a W&B offline run as the wandb package's own writer does."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_write(str(path))
    for step, value in enumerate(loss):
        record = Record()
        for key, number in (
            ("trainer/global_step", step),
            ("reduced_train_loss", value),
            ("train_step_timing in s", 0.25),
        ):
            item = record.history.item.add()
            item.key, item.value_json = key, json.dumps(number)
        store.write(record)
    store.close()
    return path


def _garbled(content: bytes, draw: random.Random) -> bytes:
    """Put garbage between and into lines."""
    lines = content.split(b"\n")
    for _ in range(draw.choice((1, 3, 10))):
        at = draw.randrange(len(lines))
        junk = draw.choice(
            [
                *(text.encode(errors="replace") for text in HOSTILE),
                draw.randbytes(40),
                b"9" * 400,
                b"\x1b[31m",
                b"1e999",
                b"-inf",
                b"\x00",
            ]
        )
        cut = draw.randrange(len(lines[at]) + 1)
        lines[at] = draw.choice(
            [
                junk,
                lines[at][:cut] + junk + lines[at][cut:],
                lines[at][:cut] + junk,
                lines[at] + b"\n" + lines[at - 1][cut:],
            ]
        )
    return b"\n".join(lines)


@fault(
    "Analysis",
    "foreign logs (NeMo, Megatron, TensorBoard, W&B) with garbage in them: `analysis.import_logs`",
    small=40,
    full=2000,
)
def imports_of_garbage(count: int, folder: Path) -> Outcome:
    sources, outcome = _sources(folder), Outcome()
    out = folder / "imported" / "run"
    for seed in range(count):
        draw = random.Random(seed)
        source = draw.choice(sources)
        kind = (
            draw.choice([*BYTES, *(["garbled"] * 10)])
            if source.suffix in (".log", ".csv")
            else draw.choice([k for k in BYTES if k != "as UTF-16"])
        )
        (folder / "broken").mkdir(exist_ok=True)
        broken = folder / "broken" / source.name
        broken.write_bytes(
            (_garbled if kind == "garbled" else BYTES[kind])(source.read_bytes(), draw)
        )
        ended = call(import_logs.main, [broken, "--out", out, *SET])
        left = sorted(p.name for p in out.parent.iterdir()) if out.parent.exists() else []
        wrong = ended.wrong((0,)) or (
            None if left == (["run"] if ended.code == 0 else []) else f"left behind: {left}"
        )
        outcome.add(
            "imported" if ended.code == 0 else REFUSED,
            lost=wrong and f"{source.name}, {kind}, seed {seed}: {wrong}",
        )
        shutil.rmtree(out.parent, ignore_errors=True)
    return outcome
