"""Every format that is read, as its writer writes it, and the error for one that cannot be read."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.import_logs import main
from analysis.runs.load import load_run
from tests.analysis.foreign import STEPS, arguments, command, losses, megatron, nemo, write
from tests.analysis.test_import_logs import tensorboard

TINY = ("model=llama3_tiny", "precision=bf16", "gpu=cpu")
LOSS = losses()
AT = range(1, STEPS + 1)


def bar(refresh: bool = False) -> str:
    """NeMo v2.3.2, nemo/collections/nlp/parts/nlp_overrides.py:1801, drawn by tqdm."""
    parts = []
    for step, loss in enumerate(LOSS, 1):
        shown = (
            f"reduced_train_loss={loss:.3f}, global_step={step - 1:.1f},"
            f" consumed_samples={step * 32:.1f}, train_step_timing in s=0.840"
        )
        line = (
            f"Epoch 0: :  {100 * step // STEPS:2d}%|{'#' * (step // 4):10s}| {step}/{STEPS}"
            f" [00:{step:02d}<00:40, v_num=0-11, {shown}]"
        )
        parts += [line] * (2 if refresh else 1)
    return "\r".join(["Epoch 0: :   0%|          | 0/40 [00:00<?]", *parts]) + "\n"


def titan() -> list[str]:
    """pytorch/torchtitan 00fbaaf, torchtitan/components/metrics.py, colours as on a terminal."""
    lines = [
        "[titan] 2026-03-04 08:00:00,123 - root - INFO - Building 2-D device mesh with ['dp_shard',"
        " 'tp'], [4, 2]"
    ]
    lines.append("[titan] 2026-03-04 08:00:00,123 - root - INFO - Training starts at step 1, with local batch size 1, global batch size 32, "  # noqa: E501
                 f"sequence length 8192, total steps {STEPS} (warmup 5)")  # fmt: skip
    for step, loss in enumerate(LOSS, 1):
        text = (
            f"\x1b[31mstep: {step:2}  \x1b[32mloss: {loss:7.4f}  \x1b[38;2;180;60;0mgrad_norm:"
            f" {1.51:7.4f}  "
        )
        text += (
            f"\x1b[36mmemory: {45.21:5.2f}GiB({57.15:.2f}%)  \x1b[34mtps: {7123:,}  \x1b[36mtflops:"
            f" {412.5:,.2f}  \x1b[35mmfu: {41.7:.2f}%\x1b[39m"
        )
        lines.append(f"[rank0]:[titan] 2026-03-04 08:00:{step:02d},123 - root - INFO - {text}")
        if step % 20 == 0:
            lines.append(
                f"[rank0]:[titan] 2026-03-04 08:00:{step:02d},923 - root - INFO - validate step:"
                f" {step:2}  loss: {loss + 1:7.4f}  tps: 9,000"
            )
    return lines


def deepspeed() -> list[str]:
    """microsoft/Megatron-DeepSpeed 00caa0e, megatron/training.py (training_log)."""
    lines = []
    for step, loss in enumerate(LOSS, 1):
        text = (
            f" iteration {step:8d}/{STEPS:8d} | consumed samples: {step * 32:12d} | consumed"
            f" tokens: {step * 32 * 128:12d} |"
        )
        text += (
            f" elapsed time per iteration (ms): {840.0:.1f} | learning rate: {1.5e-4:.3E} | global"
            f" batch size: {32:5d} | lm loss: {loss:.6E} |"
        )
        text += (
            f" grad norm: {0.731:.3f} | actual seqlen: {128:5d} | number of skipped iterations:"
            f" {0:3d} | number of nan iterations: {0:3d} |"
        )
        lines.append(
            text
            + f" samples per second: {38.095:.3f} | tokens per gpu per second (tgs): {4876.19:.3f}"
            f" | TFLOPs: {1.25:.2f} |"
        )
    return lines


def dllogger() -> list[str]:
    """dllogger/logger.py 07ec82a (JSONStreamBackend), as nemo/utils/loggers/dllogger.py (v2.3.2)
    calls it.
    """
    start = {
        "timestamp": "1772500000.0",
        "datetime": "2026-03-04 08:00:00",
        "elapsedtime": "0.1",
        "type": "LOG",
    }
    rows: list[dict[str, Any]] = [
        {"timestamp": "1.0", "type": "METADATA", "metric": "loss", "metadata": {"unit": "nats"}}
    ]
    rows.append(
        {
            **start,
            "step": "PARAMETER",
            "data": {"model/micro_batch_size": 2, "model/seed": 7, "model/optim/lr": 1e-4},
        }
    )
    for step, loss in enumerate(LOSS):
        data = {
            "reduced_train_loss": loss,
            "train_step_timing in s": 0.84,
            "global_step": float(step),
            "global_batch_size": 32.0,
        }
        rows.append({**start, "step": step, "data": data})
    return [
        f"DLLL {json.dumps(row)}"
        for row in [*rows, {**start, "step": [], "data": {"train_time": 33.6}}]
    ]


HISTORY = [
    {
        "_step": i,
        "_runtime": 0.84 * i,
        "_timestamp": 1.7725e9 + 0.84 * i,
        "lm loss": v,
        "iteration-time": 0.84,
        "batch-size": 32,
    }
    for i, v in enumerate(LOSS, 1)
]
UNDER_LIGHTNING = [
    (
        {
            "_step": call,
            "trainer/global_step": step,
            "reduced_train_loss": loss,
            "train_step_timing in s": 0.84,
            "global_batch_size": 32.0,
        }
        if loss is not None
        else {"_step": call, "trainer/global_step": step, "val_loss": LOSS[step] + 1}
    )
    for call, (step, loss) in enumerate(
        pair
        for i, v in enumerate(LOSS)
        for pair in [(i, v), *([(i, None)] if i % 20 == 19 else [])]
    )
]
FILES: dict[str, tuple[str, Callable[[], str | list[str]]]] = {
    "NeMo 1 bar (F11)": ("log", bar),
    "a bar that is drawn twice": ("log", lambda: bar(refresh=True)),
    "torchtitan": ("log", titan),
    "Megatron-DeepSpeed": ("log", deepspeed),
    "DLLogger": ("dllogger.json", dllogger),
    "DLLogger, terminal": (
        "log",
        lambda: [
            f"DLL 2026-03-04 08:00:00.123456 - {i} train_loss : {v} nats step_time : 0.84 s"
            for i, v in enumerate(LOSS, 1)
        ],
    ),
    "DLLogger, epoch and step": (
        "log.json",
        lambda: [
            "DLLL "
            + json.dumps(
                {"type": "LOG", "step": [i // 25, i], "data": {"train_loss": v, "step_time": 0.84}}
            )
            for i, v in enumerate(LOSS, 1)
        ],
    ),
    "W&B rows (F13)": ("history.jsonl", lambda: [json.dumps(row) for row in HISTORY]),
    "W&B rows, a list": ("history.json", lambda: json.dumps(HISTORY, indent=1)),
    "W&B rows under Lightning": (
        "history.jsonl",
        lambda: [json.dumps(row) for row in UNDER_LIGHTNING],
    ),
    "W&B rows, nested": (
        "rows.jsonl",
        lambda: [
            json.dumps({"_step": i, "train": {"loss": v, "global_step": i}, "step_time": 0.84})
            for i, v in enumerate(LOSS, 1)
        ],
    ),
    "pandas' CSV": (
        "history.csv",
        lambda: [
            ",_step,lm loss,iteration-time",
            *(f"{i},{i},{v},0.84" for i, v in enumerate(LOSS, 1)),
        ],
    ),
    "semicolons": (
        "table.csv",
        lambda: ["Step;lm loss;iteration-time", *(f"{i};{v};0.84" for i, v in enumerate(LOSS, 1))],
    ),
    "semicolons and decimal commas": (
        "table.csv",
        lambda: [
            "Step;lm loss;iteration-time",
            *(f"{i};{v};0.84".replace(".", ",") for i, v in enumerate(LOSS, 1)),
        ],
    ),
    "tabs": (
        "table.tsv",
        lambda: [
            "iteration\tlm loss\titeration-time",
            *(f"{i}\t{v}\t0.84" for i, v in enumerate(LOSS, 1)),
        ],
    ),
    "renamed columns": (
        "t.csv",
        lambda: [
            "# 2026",
            "Iter,Train Loss,Iteration time (ms)",
            *(f"{i},{v},840" for i, v in enumerate(LOSS, 1)),
        ],
    ),
    "text, and a summary": (
        "m.jsonl",
        lambda: [
            *(
                json.dumps({"step": str(i), "loss": f"{v}", "perf/step_time_seconds": 0.84})
                for i, v in enumerate(LOSS, 1)
            ),
            json.dumps({"step": STEPS, "train_loss": 6.1, "train_runtime": 33.6}),
        ],
    ),
    "several runs in one table": (
        "t.csv",
        lambda: [
            "run_name,step,loss,step_time",
            *(
                f"{run},{i},{v + more},0.84"
                for run, more in (("b", 1), ("a", 0))
                for i, v in enumerate(LOSS, 1)
            ),
        ],
    ),
    "Hugging Face's trainer_state.json": (
        "trainer_state.json",
        lambda: json.dumps(
            {
                "max_steps": STEPS,
                "log_history": [
                    {"step": i, "loss": v, "step_time": 0.84} for i, v in enumerate(LOSS, 1)
                ],
            },
            indent=2,
        ),
    ),
    "milliseconds and thousands": (
        "t.csv",
        lambda: [
            "step,train_loss,step_time_ms",
            *(f'"{i:,}",{v},"{840.0:,}"' for i, v in enumerate(LOSS, 1)),
        ],
    ),
}


def check(folder: Path, digits: float = 5.1e-4, seconds: float | None = 0.84) -> None:
    run = load_run(folder)
    assert run.steps["step"].tolist() == list(AT) and run.steps["loss"] == pytest.approx(
        LOSS, abs=digits
    )
    if seconds is not None:
        assert run.steps["step_time_s"] == pytest.approx(np.full(STEPS, seconds), rel=1e-2)


@pytest.mark.parametrize(("name", "text"), FILES.values(), ids=FILES.keys())
def test_a_format_gives_its_steps_losses_and_times(
    name: str, text: Callable[[], str | list[str]], tmp_path: Path
) -> None:
    content = text()
    (tmp_path / name).write_text(content if isinstance(content, str) else "\n".join(content) + "\n")
    more = ["--run", "a"] if "run_name" in content[0] else []
    assert main(command(tmp_path / name, tmp_path / "run", TINY, *more)) == 0
    check(tmp_path / "run", seconds=None if text is titan else 0.84)


LATER = range(STEPS)
HARNESSES: dict[str, tuple[Callable[[], str], bool]] = {
    "bar without a total": (lambda: "\r".join(
        f"Epoch 0: |          | {s + 1}/? [00:01<00:00,  1.19it/s, v_num=0, reduced_train_loss={LOSS[s]:.3f}, global_step={s:.1f}, "  # noqa: E501
        "train_step_timing in s=0.840]" for s in LATER), True),
    "bar without a bar": (lambda: "\r".join(
        f"0: Epoch 0: : {s + 1}it [00:01,  1.19it/s, v_num=0, reduced_train_loss={LOSS[s]:.3f}, train_step_timing in s=0.840]" for s in LATER), True),  # noqa: E501
    "MaxText": (lambda: "\n".join(
        f"I0304 08:00:00.1 139 max_logging.py:16] completed step: {s}, seconds: 0.840, TFLOP/s/device: 5.1, Tokens/s/device: 4876.2, "  # noqa: E501
        f"total_weights: 4096, loss: {LOSS[s]:.3f}" for s in LATER), True),
    "litgpt": (lambda: "\n".join(
        f"Epoch 1 | iter {4 * s + 4} step {s + 1} | loss train: {LOSS[s]:.3f}, val: n/a | iter time: 345.67 ms (step) remaining time: 2:03:04"  # noqa: E501
        for s in LATER), False),
    "nanochat": (lambda: "\n".join(
        f"step {s:05d}/{STEPS:05d} ({2.5 * s:.2f}%) | loss: {LOSS[s]:.6f} | lrm: 1.00 | dt: 840.00ms | tok/sec: 4,876 | epoch: 1 | total time: 0.2m"  # noqa: E501
        for s in LATER), True),
    "nanoGPT": (lambda: "\n".join(f"iter {s}: loss {LOSS[s]:.4f}, time 840.12ms, mfu 45.12%" for s in LATER), True),  # noqa: E501
    "DeepSpeed": (lambda: "\n".join(f"steps: {s + 1} loss: {LOSS[s]:0.4f} iter time (s): 0.840 samples/sec: 38.095" for s in LATER), True),  # noqa: E501
    "OLMo-core": (lambda: "\n".join(
        f"INFO\t[step={s + 1}/{STEPS},epoch=1,eta=2:03:04]\n    optim/total grad norm=0.5123\n    train/CE loss={LOSS[s]:.3f}\n    train/PPL=9,123"  # noqa: E501
        for s in LATER), False),
    "Composer": (lambda: "\n".join(
        f"[batch={s + 1}/{STEPS}]:\n\t Train time/batch: {s}\n\t Train loss/train/total: {LOSS[s]:.4f}\n\t Train trainer/batch_size: 4"  # noqa: E501
        for s in LATER), False),
    "Hugging Face": (lambda: "".join(
        f"\r {s:3d}%|# | {s + 1}/{STEPS} [00:01<10:00,  7.42s/it]\r{' ' * 80}\r{{'loss': '{LOSS[s]:.4g}', 'grad_norm': '1.2', 'epoch': '0.01'}}\n"  # noqa: E501
        for s in LATER) + "{'train_runtime': 300.1, 'train_loss': 6.1, 'epoch': 1.0}", False),
}  # fmt: skip


@pytest.mark.parametrize(("text", "timed"), HARNESSES.values(), ids=HARNESSES.keys())
def test_consoles_of_other_harnesses(text: Callable[[], str], timed: bool, tmp_path: Path) -> None:
    """Forms and sources stand in analysis/importers/dialects.py and multiline.py; each block of a
    long log is cut anywhere.
    """
    write(tmp_path / "log", [text()])
    assert main(command(tmp_path / "log", tmp_path / "run", TINY)) == 0
    check(tmp_path / "run", seconds=0.84 if timed else None)


@pytest.mark.parametrize("accumulation", ["", "gradient accumulation steps 8, "])
def test_torchtitans_step_time_follows_from_its_tokens_per_second(
    accumulation: str, tmp_path: Path
) -> None:
    """It prints tokens/s per device alone: 32 x 8,192 tokens on 8 GPUs at 7,123 each take 4.6 s.

    Its releases since gradient accumulation print that too (torchtitan/train.py).
    """
    lines = [line.replace("sequence length", f"{accumulation}sequence length") for line in titan()]
    log = write(tmp_path / "log", lines)
    assert (
        main(command(log, tmp_path / "run", ["model=llama3_8b", "precision=bf16", "gpu=h100"])) == 0
    )
    run = load_run(tmp_path / "run")
    plan = run.plan
    assert (
        plan.num_gpus,
        plan.mapping.tp,
        plan.mapping.pp,
        plan.mapping.global_batch,
        plan.seq_length,
        plan.train.warmup_steps,
    ) == (
        8,
        2,
        1,
        32,
        8192,
        5,
    )
    assert run.steps["step_time_s"] == pytest.approx(
        np.full(STEPS, 32 * 8192 / 8 / 7123)
    ) and run.heldout["step"].tolist() == [20, 40]
    assert "memory_gb" not in run.steps and run.manifest["imported"][
        "reserved_gb"
    ] == pytest.approx(45.21 * 2**30 / 1e9)


def test_megatron_deepspeed_states_its_sequence_length(tmp_path: Path) -> None:
    assert main(command(write(tmp_path / "log", deepspeed()), tmp_path / "run", TINY)) == 0
    assert load_run(tmp_path / "run").manifest["imported"]["stated"]["seq_length"] == "128"


def test_dllogger_states_its_configuration(tmp_path: Path) -> None:
    log = write(tmp_path / "log.json", dllogger())
    assert main(command(log, tmp_path / "run", TINY)) == 0
    plan = load_run(tmp_path / "run").plan
    assert (plan.mapping.micro_batch, plan.seed, plan.mapping.global_batch) == (2, 7, 32)


def test_held_out_and_test_losses_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F10, and the words of Megatron-LM before core 0.6 ("the end of training for val data")."""
    lines = megatron(64, 0.64)
    said = [
        " validation loss at iteration 20 | lm loss value: 6.393414E+00 | lm loss PPL: 5.9E+02 | "
    ]
    for name, after in (
        ("new", ["iteration 40 on validation set", "iteration 40 on test set"]),
        ("old", ["the end of training for val data", "the end of training for test data"]),
    ):
        ends = [
            f" validation loss at {what} | lm loss value: {loss:.6E} | lm loss PPL: 3.2E+01 | "
            for what, loss in zip(after, (3.468348, 3.838348), strict=True)
        ]
        log = write(tmp_path / f"{name}.log", [*lines[:20], *said, *lines[20:], *ends])
        assert main(command(log, tmp_path / name, TINY)) == 0
        run = load_run(tmp_path / name)
        assert (run.heldout["step"].tolist(), run.heldout["heldout_loss"].tolist()) == (
            [20, 40],
            [6.393414, 3.468348],
        )
        assert run.manifest["imported"]["test_loss"] == [[40, 3.838348]]
    assert "1 loss(es) on a test set are kept in manifest.json" in capsys.readouterr().out


FAMILIES = [
    (
        {
            "lm-loss-training/lm loss": LOSS,
            "iteration-time/iteration-time": 0.84,
            "lm-loss-training/lm loss vs tokens": 1.0,
            "world-size/world-size": 8.0,
        },
        1,
    ),
    (
        {
            "loss_metrics/global_avg_loss": LOSS,
            "time_metrics/end_to_end(s)": 0.84,
            "memory/max_reserved(GiB)": 45.2,
        },
        1,
    ),
    (
        {
            "lm loss": LOSS,
            "iteration-time": 0.84,
            "mem-max-allocated-bytes": 65e9,
            "world-size": 8.0,
        },
        1,
    ),
    ({"reduced_train_loss": LOSS, "train_step_timing in s": 0.84, "max_memory_allocated": 65e9}, 0),
    (
        {
            "learning/loss": LOSS,
            "learning/lm_loss": 0.0,
            "perf/step_time_seconds": 0.84,
            "perf/per_device_tokens_per_sec": 4876.2,
        },
        0,
    ),
    ({"train/CE loss": LOSS, "throughput/device/TPS": 8192 / 0.84}, 1),
]


@pytest.mark.parametrize(("tags", "first"), FAMILIES)
def test_tensorboard_tags_of_each_family(tags: dict[str, Any], first: int, tmp_path: Path) -> None:
    filled = {
        tag: values if isinstance(values, list) else [values] * STEPS
        for tag, values in tags.items()
    }
    events = tensorboard(tmp_path / "events", filled, first)
    scale = (
        ["num_gpus=16", "mapping.global_batch=16", "seq_length=8192"]
        if "throughput/device/TPS" in tags
        else []
    )
    sets = ["model=llama3_8b", "precision=bf16", "gpu=h100", *scale] if scale else TINY
    assert main(command(events, tmp_path / "run", sets)) == 0
    check(tmp_path / "run", 1e-5)
    run = load_run(tmp_path / "run")
    assert run.manifest["imported"]["memory_gb"] == (
        pytest.approx(65) if any("alloc" in tag for tag in tags) else None
    )
    assert any("orld" in tag for tag in tags) == ("num_gpus" in run.manifest["imported"]["stated"])


def test_tensorboards_own_downloads(tmp_path: Path) -> None:
    for tag, values in (("reduced_train_loss", LOSS), ("train_step_timing in s", [0.84] * STEPS)):
        stem = f"run-.-tag-{tag.replace(' ', '_')}"
        (tmp_path / f"{stem}.csv").write_text(
            "\n".join(
                ["Wall time,Step,Value", *(f"1772500000.{i},{i},{v}" for i, v in enumerate(values))]
            )
            + "\n"
        )
        (tmp_path / f"{stem}.json").write_text(
            json.dumps([[1.7725e9 + i, i, v] for i, v in enumerate(values)])
        )
    for form in ("csv", "json"):
        files = [str(file) for file in sorted(tmp_path.glob(f"*.{form}"))]
        assert main([*files, "--out", str(tmp_path / form), "--set", *TINY]) == 0
        check(tmp_path / form)


def test_steps_are_the_trainers_also_where_a_table_counts_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B's Step counts calls of its logger, which Lightning makes for evaluations too, and every
    tenth step alone.
    """
    rows = [[call, 10 * call + 9, loss] for call, loss in enumerate(LOSS)]
    heads = {
        "beside": "Step,oak - trainer/global_step,oak - reduced_train_loss",
        "named": "Step,trainer/global_step,reduced_train_loss",
    }
    for name, head in heads.items():
        (tmp_path / f"{name}.csv").write_text(
            "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"
        )
        assert main(command(tmp_path / f"{name}.csv", tmp_path / name, TINY)) == 0
        assert load_run(tmp_path / name).steps["step"].tolist() == list(
            range(10, 10 * STEPS + 1, 10)
        )
    (tmp_path / "alone.csv").write_text(
        "\n".join(["Step,oak - reduced_train_loss", *(f"{row[0]},{row[2]}" for row in rows)]) + "\n"
    )
    capsys.readouterr()
    assert main(command(tmp_path / "alone.csv", tmp_path / "alone", TINY)) == 2
    assert "export it with trainer/global_step" in capsys.readouterr().err


def test_a_loss_of_another_name_is_named_and_what_was_found_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tensorboard(tmp_path / "events", {"Loss/my run": LOSS, "grad-norm": [0.5] * STEPS}, 1)
    table = write(
        tmp_path / "t.csv", ["step,My Loss,time", *(f"{i},{v},1" for i, v in enumerate(LOSS, 1))]
    )
    log = write(
        tmp_path / "log", [line.replace("lm loss:", "mtp loss:") for line in megatron(8, 0.84)]
    )
    for source, key in ((events, "Loss/my run"), (table, "My Loss"), (log, "mtp loss")):
        if source != log:
            assert main(command(source, tmp_path / "run", TINY)) == 2
            assert key in capsys.readouterr().err
        assert (
            main(
                command(
                    source, tmp_path / key.split("/")[-1].replace(" ", "_"), TINY, "--loss-key", key
                )
            )
            == 0
        )
        check(tmp_path / key.split("/")[-1].replace(" ", "_"), 1e-5, None)
        assert main(command(source, tmp_path / "run", TINY, "--loss-key", "none such")) == 2
        assert "none such" in capsys.readouterr().err


def test_megatrons_and_bridges_memory_reports(tmp_path: Path) -> None:
    """F20's kind: Megatron-LM prints it once, a line a rank, in MB of 1,048,576 bytes; Bridge in GB
    of 1e9.
    """
    lines, sets = (
        megatron(64, 7.424),
        [
            "model=llama3_8b",
            "precision=bf16",
            "gpu=h100",
            "num_gpus=8",
        ],
    )
    after = "(after 2 iterations) memory"
    held = "reserved: 64000.0 | max reserved: 70000.0"
    bridge = (
        "mem-allocated-gigabytes: 40.1 | mem-max-allocated-gigabytes: 65.124 |"
        " mem-max-reserved-gigabytes: 73.4 | mem-alloc-retires: 0"
    )
    reports = {
        "megatron": [
            f"[Rank 0] {after} (MB) | allocated: 4e4 | max allocated: 60000.5 | {held}",
            f"[Rank 1] {after} (MB) | allocated: 41000.0 | max allocated: 62107.0 | {held}",
        ],
        "bridge": [f"[Rank 0] {after} (GB) | {bridge}"],
    }
    for name, report in reports.items():
        log = write(tmp_path / f"{name}.log", [*lines[:2], *report, *lines[2:]])
        assert main(command(log, tmp_path / name, sets)) == 0
        assert load_run(tmp_path / name).imported["memory_gb"] == pytest.approx(65.124, abs=1e-3)
        assert load_run(tmp_path / name).manifest["imported"]["reserved_gb"] == pytest.approx(
            73.4, abs=1e-3
        )


def zstandard(text: bytes) -> bytes:
    """Compress as two frames, as pzstd and appended files are."""
    package = pytest.importorskip("zstandard")
    half = len(text) // 2
    return bytes(package.compress(text[:half]) + package.compress(text[half:]))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_compression_and_line_ends(
    pack: Callable[[bytes], bytes], end: str, tmp_path: Path
) -> None:
    text = end.join(["2026-03-04T08:00:00.123Z " + line for line in nemo(32, 0.84)]) + end
    (tmp_path / "log").write_bytes(pack(text.encode()))
    assert main(command(tmp_path / "log", tmp_path / "run", TINY)) == 0
    assert len(load_run(tmp_path / "run").steps["loss"]) == STEPS


def test_zstandards_package_is_named_where_it_is_missing_and_damage_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 50)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zstandard", None)
        assert main(command(tmp_path / "log.zst", tmp_path / "run", TINY)) == 2
    assert "pip install zstandard, or unpack it first (zstd -d)" in capsys.readouterr().err
    pytest.importorskip("zstandard")
    assert main(command(tmp_path / "log.zst", tmp_path / "run", TINY)) == 2
    assert "compressed and damaged" in capsys.readouterr().err


def test_a_line_of_a_gigabyte_does_not_fill_the_memory(tmp_path: Path) -> None:
    """B11: here 64 MB, with a limit of 1 MB for a line; what stands around it is read."""
    lines = [*arguments(num_layers=2), *megatron(8, 0.84)]
    (tmp_path / "log").write_bytes(
        "\n".join(lines[:20]).encode()
        + b"\n"
        + b"0" * (64 << 20)
        + b"\n"
        + "\n".join(lines[20:]).encode()
        + b"\n"
        + b"0" * (8 << 20)
    )
    import tracemalloc

    tracemalloc.start()
    assert main(command(tmp_path / "log", tmp_path / "run", [*TINY, "model.num_layers=2"])) == 0
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert len(load_run(tmp_path / "run").steps["loss"]) == STEPS


UNREADABLE: list[tuple[str, Sequence[str], str]] = [
    ("rows.jsonl", ['{"loss": 1.0}', '{"loss": 2.0}'], "holds no row with a step"),
    (
        "trainer_state.json",
        ["{", '"log_history": null, "max_steps": "NaN"', "}"],
        "holds no row with a step",
    ),
    ("rows.json", ["[{", '"a": '], "is no list of JSON"),
    ("t.csv", ["time,value", "1,2"], "has no column of steps (trainer/global_step"),
    ("t.csv", ["step,accuracy", "1,2"], "it holds accuracy"),
    (
        "dll.json",
        [
            'DLLL {"type": "LOG", "step": [0, 1], "data": {"train_loss": 1}}',
            'DLLL {"type": "LOG", "step": [1, 1], "data": {"train_loss": 1}}',
        ],
        "counts its steps anew in each epoch",
    ),
    (
        "log",
        ["nothing here"],
        "of any form that is known (NeMo, Megatron, torchtitan, Lightning progress bar, ",
    ),
    ("log", ["nothing here"], "no line names a loss; name another log"),
    (
        "log",
        ["Epoch 3 - batch 7, my loss 4.5"],
        "its first line with a loss is 'Epoch 3 - batch 7, my loss 4.5'; name another",
    ),
    (
        "log",
        ["{'loss': 9.5, 'epoch': 0.1}"] * 3,
        "import the run's trainer_state.json, which has the steps",
    ),
    ("t.csv", ["step,samples_loss", "1,2"], "samples_loss is logged by consumed samples"),
    (
        "t.csv",
        ["run_name,step,loss", "a,1,2", "b,1,2"],
        "holds several runs (a, b, …); choose one with --run",
    ),
    (
        "t.csv",
        ["step,loss", *(f"{i},2" for i in (1, 2, 3, 1, 2, 3))],
        "holds two runs: one ends at step 3 of 3",
    ),
]


@pytest.mark.parametrize(("name", "lines", "says"), UNREADABLE)
def test_what_cannot_be_read_names_what_was_found(
    name: str, lines: Sequence[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ["--loss-key", "samples_loss"] if "samples" in says else []
    assert main(command(write(tmp_path / name, lines), tmp_path / "run", TINY, *key)) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_row_without_any_known_name_does_not_decide_whose_steps_they_are(tmp_path: Path) -> None:
    rows = [{"_step": 0, "_timestamp": 1.0, "my_custom": 3}]
    rows += [
        {"_step": n + 1, "trainer/global_step": n, "reduced_train_loss": loss}
        for n, loss in enumerate(LOSS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(tmp_path / "rows.jsonl", tmp_path / "run", TINY)) == 0
    assert load_run(tmp_path / "run").steps["step"].tolist() == list(range(1, STEPS + 1))


def test_a_decimal_comma_is_not_read_as_thousands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path / "run.tsv", ["step\tloss", *(f"{step}\t9,{step}" for step in range(500, 540))]
    )
    assert main(command(file, tmp_path / "run", ["model=llama3_tiny", "gpu=cpu"])) == 2
    assert "a loss as '9,500', with a comma for the decimal point" in capsys.readouterr().err
