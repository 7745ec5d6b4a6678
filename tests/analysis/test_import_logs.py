"""Foreign logs as run folders: every form as its framework prints it, what is refused, and that
nothing is made up.

Lines are those of NeMo 2.3.2 (ProgressPrinter.format_string, called here where NeMo is installed),
of Megatron-LM's and Megatron-Bridge's training_log, whose format strings are written out below, and
of the writers of TensorBoard and W&B.
"""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.compare import main as compare
from analysis.import_logs import main
from analysis.report import main as report
from analysis.runs.load import load_run
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.run_folder import rows_of
from recipes.training.console import training_line, validation_line
from tests.analysis.conftest import Maker, curve, own_noise

N = 60
TINY = ["--set", "model=llama3_tiny", "precision=bf16", "gpu=cpu"]
FP8 = ["--set", "model=llama3_tiny", "precision=fp8_current", "gpu=cpu", "--assert-fp8"]
Run = Callable[..., Path]


def nemo_line(
    step: int, loss: float, total: int = N, *, first: bool = False, heldout: float | None = None
) -> str:
    """A line of nemo/lightning/pytorch/callbacks/progress_printer.py: metrics as {:.4}, whole
    floats as integers.
    """
    metrics: dict[str, float] = {
        "lr": 1.2e-4,
        "global_batch_size": 8.0,
        "global_step": step - 1.0,
        "reduced_train_loss": loss,
    }
    metrics |= {"train_step_timing in s": 0.1712} | (
        {} if first else {"consumed_samples": step * 8.0}
    )
    metrics |= {} if heldout is None else {"val_loss": heldout}
    text = f"Training epoch 0, iteration {step - 1}/{total - 1}"
    for name, value in metrics.items():
        text += f" | {name}: {int(value)}" if value.is_integer() else f" | {name}: {value:.4}"
    return text


def megatron_line(
    step: int,
    loss: float | None,
    total: int = N,
    *,
    stamp: str = " [2025-06-02 12:00:00.123456]",
    **counts: int,
) -> str:
    """A line of megatron/training/training.py, training_log (Megatron-Bridge: the same, its stamp
    without microseconds).
    """
    text = (
        f"{stamp} iteration {step:8d}/{total:8d} | consumed samples: {step * 8:12d} | elapsed time"
        f" per iteration (ms): {171.2:.1f} |"
    )
    text += (
        f" throughput per GPU (TFLOP/s/GPU): {410.2:.1f} | learning rate: {1.2e-4:.6E} | global"
        f" batch size: {8:5d} |"
    )
    text += "" if loss is None else f" lm loss: {loss:.6E} |"
    text += f" loss scale: {1.0:.1f} | grad norm: {0.512:.3f} |"
    return (
        text + f" number of skipped iterations: {counts.get('skipped', 0):3d} | number of nan"
        f" iterations: {counts.get('nan', 0):3d} |"
    )


def nemo_log(loss: Sequence[float], **kwargs: Any) -> list[str]:
    return [
        nemo_line(i, float(value), len(loss), first=i == 1, **kwargs)
        for i, value in enumerate(loss, 1)
    ]


def megatron_log(loss: Sequence[float], **kwargs: Any) -> list[str]:
    return [megatron_line(i, float(value), len(loss), **kwargs) for i, value in enumerate(loss, 1)]


@pytest.fixture
def bring(tmp_path: Path) -> Run:
    """Return an importer of lines: bring(name, lines, *arguments) -> the run folder."""

    def bringer(name: str, lines: Sequence[str] | bytes, *arguments: str) -> Path:
        log = tmp_path / f"{name}.log"
        log.write_bytes(
            lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        )
        assert main([str(log), "--out", str(tmp_path / name), *(arguments or TINY)]) == 0
        return tmp_path / name

    return bringer


def refusal(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    return said.err


# --- NeMo


REAL_NEMO = [
    # NVIDIA BioNeMo's and a NeMo user's published logs, as printed
    (
        "0: Training epoch 0, iteration 28/99 | lr: 5.6e-06 | global_batch_size: 32 | global_step:"
        " 28 | reduced_train_loss: 2.778 | train_step_timing in s: 0.189 | consumed_samples: 928 |"
        " val_loss: 2.861 | val_ppl: 17.57"
    ),
    (
        "Training epoch 0, iteration 0/9 | lr: 0 | global_batch_size: 1 | global_step: 0 |"
        " reduced_train_loss: 1.371 | train_step_timing in s: 2.193"
    ),
    (
        "[2025-11-20T14:55:23+08:00] retraining/0 Training epoch 0, iteration 97/99 | lr: 1.469e-05"
        " | global_batch_size: 128 | global_step: 97 | reduced_train_loss: 6.265 |"
        " train_step_timing in s: 12.22 | tokens_per_sec_per_gpu: 1.073e+04 | consumed_samples:"
        " 12544"
    ),
    (
        "Training epoch 0, iteration 45/99 | lr: 6.897e-06 | global_batch_size: 128 | global_step:"
        " 45 | max_memory_reserved: 127785762816 | max_memory_allocated: 115792977920 |"
        " reduced_train_loss: 11.96 | train_step_timing in s: 6.08 | TFLOPS_per_GPU: 1.249e+03 |"
        " consumed_samples: 5888"
    ),
]
REAL_MEGATRON = [
    # Megatron-Bridge docs/training/multi-token-prediction.md; Megatron-LM logs with labels of
    # torchrun and of a site; Megatron-DeepSpeed, in seconds
    (
        "iteration      100/  300000 | consumed samples:         3200 | elapsed time per iteration"
        " (ms): 3738.6 | learning rate: 6.000000E-05 | global batch size:    32 | lm loss:"
        " 7.968678E+00 | load_balancing_loss: 1.329517E+00 | mtp_1 loss: 7.925096E+00 | loss scale:"
        " 1.0 | grad norm: 1.040 | number of skipped iterations:   0 | number of nan iterations: "
        "  0 |"
    ),
    (
        "[default7]: [2026-09-14 15:08:34.201805] iteration       45/  102400 | consumed samples:  "
        "        360 | elapsed time per iteration (ms): 6928.0 | throughput per GPU (TFLOP/s/GPU):"
        " 61.9 | learning rate: 1.318359E-04 | global batch size:     8 | lm loss: 6.457796E+00 |"
        " loss scale: 1.0 | grad norm: 4.096 | num zeros: 760881152.0 | params norm: 2241.466 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    ),
    (
        "[default3]: iteration       20/  292968 | consumed samples:        20480 | elapsed time"
        " per iteration (s): 34.9991 | learning rate: 9.467E-06 | global batch size:  1024 | lm"
        " loss: 1.010884E+01 | loss scale: 4096.0 | grad norm: 42.627 | number of skipped"
        " iterations:   0 | number of nan iterations:   0 | samples per second: 28.551 | TFLOPs:"
        " 199.03 |"
    ),
]


@pytest.mark.parametrize(
    ("line", "step", "loss", "seconds"),
    [
        (REAL_NEMO[0], 29, 2.778, 0.189),
        (REAL_NEMO[1], 1, 1.371, 2.193),
        (REAL_NEMO[2], 98, 6.265, 12.22),
        (REAL_NEMO[3], 46, 11.96, 6.08),
        (REAL_MEGATRON[0], 100, 7.968678, 3.7386),
        (REAL_MEGATRON[1], 45, 6.457796, 6.928),
        (REAL_MEGATRON[2], 20, 10.10884, 34.9991),
    ],
)
def test_lines_that_others_published_are_read(
    line: str, step: int, loss: float, seconds: float, tmp_path: Path
) -> None:
    from analysis.importers.console import read

    (tmp_path / "log").write_text(line + "\n")
    log = read(tmp_path / "log")
    assert (log.steps["step"][0], log.steps["loss"][0]) == (step, loss)
    assert log.steps["step_time_s"][0] == pytest.approx(seconds)


def test_a_nemo_console_log_becomes_a_run_with_its_digits_and_what_it_does_not_say(
    bring: Run,
) -> None:
    loss = curve(N)
    run = load_run(bring("run", nemo_log(loss)))
    assert run.steps["loss"] == pytest.approx(loss, abs=5e-4 * 1.01)
    assert (
        run.plan.train.max_steps == N and run.plan.mapping.global_batch == 8 and run.name == "run"
    )
    said = run.manifest["imported"]
    assert (
        said["loss_digits"] == 4
        and said["format"] == "NeMo console log"
        and said["sources"][0]["name"] == "run.log"
    )
    assert {"code", "versions", "data", "order_sha256", "fp8_gemms"} <= set(
        said["missing"]
    ) and len(said["sources"][0]["sha256"]) == 64
    assert run.manifest["labels"] == {"loss": "measured", "step_time": "measured"}
    assert run.steps["step_time_s"][5] == 0.1712 and run.steps["tokens"][-1] == N * 8 * 128


PREFIXES = [
    "0: ",
    " 3: ",
    "name/0 [default0]:",
    "[default0]:",
    "[node17:3]: ",
    "\x1b[32m",
    "\r",
    "10%|█ | 1/10\r",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", [nemo_log, megatron_log])
def test_prefixes_colours_and_carriage_returns_change_nothing(
    prefix: str, form: Any, bring: Run
) -> None:
    lines = form(curve(N))
    plain, prefixed = (
        load_run(bring("plain", lines)),
        load_run(bring("prefixed", [prefix + line for line in lines])),
    )
    assert {k: v.tolist() for k, v in plain.steps.items()} == {
        k: v.tolist() for k, v in prefixed.steps.items()
    }


def test_interleaved_ranks_are_one_run_and_a_difference_is_said(
    bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = curve(N)
    both = [
        line
        for lines in zip(nemo_log(loss), nemo_log(loss + 0.5), strict=True)
        for line in (f"1: {lines[1]}", f"0: {lines[0]}")
    ]
    assert load_run(bring("run", both)).steps["loss"] == pytest.approx(loss, abs=6e-4)
    assert (
        "2 ranks print the same steps; rank 0 was kept, although their losses differ"
        in capsys.readouterr().out
    )


def test_a_run_that_went_on_on_another_rank_is_kept_whole(bring: Run) -> None:
    lines = megatron_log(curve(N))
    assert (
        len(
            load_run(
                bring("run", [f"63: {x}" for x in lines[:40]] + [f"31: {x}" for x in lines[35:]])
            ).steps["loss"]
        )
        == N
    )


@pytest.mark.parametrize("form", [nemo_log, megatron_log])
def test_after_a_restart_the_later_lines_win_and_it_is_said(
    form: Any, bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = curve(N), curve(N) + 0.25
    folder = bring("run", [*form(first)[:50], "srun: job requeued", *form(second)[40:]])
    assert load_run(folder).steps["loss"] == pytest.approx(
        np.concatenate([first[:40], second[40:]]), abs=6e-4
    )
    assert "from step 41; the later lines were kept" in capsys.readouterr().out


def test_the_logs_of_a_run_that_was_continued_are_one_run(tmp_path: Path) -> None:
    lines = nemo_log(curve(N))
    for name, part in (("first.log", lines[:35]), ("second.log", lines[30:])):
        (tmp_path / name).write_text("\n".join(part) + "\n")
    assert (
        main(
            [
                str(tmp_path / "first.log"),
                str(tmp_path / "second.log"),
                "--out",
                str(tmp_path / "run"),
                "--label",
                "emulated",
                *TINY,
            ]
        )
        == 0
    )
    run = load_run(tmp_path / "run")
    assert (
        run.steps["loss"] == pytest.approx(curve(N), abs=6e-4) and run.label("loss") == "emulated"
    )
    assert [source["name"] for source in run.manifest["imported"]["sources"]] == [
        "first.log",
        "second.log",
    ]


def test_gradients_that_are_nan_are_no_missing_column(bring: Run) -> None:
    lines = [
        line.replace("grad norm: 0.512", "grad norm: nan") if i > 20 else line
        for i, line in enumerate(megatron_log(curve(N)))
    ]
    with pytest.raises(InputError, match="grad_norm is no finite number"):
        load_run(bring("run", lines))


def test_validations_of_nemo_are_placed_at_the_step_before_the_line_that_shows_them(
    bring: Run,
) -> None:
    lines = ["Sanity checking Validation: iteration 1/2"]
    for step in range(1, 31):
        lines.append(
            nemo_line(
                step,
                6 / step**0.1,
                30,
                first=step == 1,
                heldout=None if step <= 10 else 5.5 if step <= 20 else 5.25,
            )
        )
        if step % 10 == 0:
            lines += ["Validation: iteration 1/2", "Validation: iteration 2/2"]
    run = load_run(bring("run", lines))
    assert (run.heldout["step"].tolist(), run.heldout["heldout_loss"].tolist()) == (
        [10, 20],
        [5.5, 5.25],
    )


def test_a_log_of_every_tenth_step_is_on_that_grid(bring: Run) -> None:
    lines = [nemo_line(step, 3.25, 605, first=step == 10) for step in range(10, 606, 10)]
    run = load_run(bring("run", lines))
    assert (
        run.steps["step"].tolist() == list(range(10, 601, 10)) and run.plan.train.max_steps == 605
    )
    with pytest.raises(InputError, match="step 300 is missing"):
        load_run(bring("gap", [line for i, line in enumerate(lines, 1) if i != 30]))


# --- Megatron


def test_a_megatron_log_becomes_a_run_with_its_validations_and_layout(bring: Run) -> None:
    loss = curve(N)
    lines = [
        "------------------------ arguments ------------------------",
        f"  fp8 {'.' * 45} None",
        f"  micro_batch_size {'.' * 32} 4",
        f"  wandb_api_key {'.' * 35} SECRET",
        *megatron_log(loss)[:30],
        "-" * 60,
        (
            f" validation loss at iteration 30 | lm loss value: {2.5:.6E} | lm loss PPL:"
            f" {12.18:.6E} | "
        ),
        "-" * 60,
        *megatron_log(loss, stamp=" [2025-06-02 12:00:00]")[30:],
        (
            f" validation loss at iteration {N} on validation set | lm loss value: {9.5:.6E} | lm"
            f" loss PPL: {12.18:.6E} | "
        ),
    ]
    run = load_run(bring("run", lines))
    assert run.steps["loss"] == pytest.approx(loss, abs=5.1e-7) and run.steps["step_time_s"][
        0
    ] == pytest.approx(0.1712)
    assert run.heldout["heldout_loss"].tolist() == [2.5, 9.5] and run.plan.mapping.micro_batch == 4
    assert (
        run.manifest["imported"]["loss_digits"] == 7
        and run.manifest["imported"]["stated"]["precision"] == "bf16"
    )
    assert "SECRET" not in "".join(p.read_text() for p in run.folder.iterdir())


def test_megatrons_line_of_the_first_iteration_is_off_the_grid_and_left_out(
    bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [megatron_line(step, 3.5, 300) for step in (1, *range(10, 301, 10))]
    assert load_run(bring("run", lines)).steps["step"].tolist() == list(range(10, 301, 10))
    assert (
        "step 1, which is printed before the first interval ends, was left out"
        in capsys.readouterr().out
    )


UNSOUND = [
    (
        lambda x: [*x[:20], megatron_line(21, None, N, nan=1), *x[21:]],
        "1 iteration(s) with NaN, first reported at step 21",
    ),
    (
        lambda x: [*x[:20], megatron_line(21, 3.0, N, skipped=2), *x[21:]],
        "2 iteration(s) skipped, first reported at step 21",
    ),
    (lambda x: [*x[:20], *x[21:]], "step 21 is missing"),
    (lambda x: x[:-1], f"the log ends at step {N - 1} of {N}"),
    (lambda x: [*x[:20], x[20][:170], *x[21:]], "step 21 is missing"),
    (lambda x: [*x[:20], x[20][:180] + x[21], *x[22:]], "steps 21 to 22 are missing"),
    (lambda x: [*x[:20], x[20].replace("lm loss: ", "lm loss: x"), *x[21:]], "step 21 is missing"),
    (
        lambda x: [*x[:20], x[20].replace("E+00 | loss", "E+999 | loss"), *x[21:]],
        "the loss is no finite number in 1 step(s), first at step 21",
    ),
    (
        lambda x: [*x[:20], x[20].replace("grad norm: 0.512", "grad norm: inf"), *x[21:]],
        "grad_norm is no finite number in 1 step(s)",
    ),
    (
        lambda x: [*x[:20], x[20].replace("(ms): 171.2", "(ms): 0.0"), *x[21:]],
        "step_time_s is not above 0 in 1 step(s), first at step 21",
    ),
]


@pytest.mark.parametrize(("change", "says"), UNSOUND)
def test_a_log_that_is_not_sound_is_imported_and_then_refused_with_the_reason(
    change: Any, says: str, bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bring("run", change(megatron_log(curve(N))))
    assert f"not a sound run: {says}" in capsys.readouterr().out
    assert compare([str(folder), str(folder)]) == 2
    assert says in capsys.readouterr().err
    if "NaN" in says:
        assert [
            e["step"] for e in rows_of(folder / "events.jsonl") if e["event"] == "non_finite_loss"
        ] == [21]


def test_a_diverged_nemo_run_is_refused(bring: Run) -> None:
    with pytest.raises(InputError, match="no finite number in 5 step"):
        load_run(bring("run", nemo_log([*curve(N)[:55], *[float("nan")] * 5])))


def test_a_cut_last_line_is_no_number_but_one_that_lacks_only_its_line_feed_is(
    bring: Run, tmp_path: Path
) -> None:
    nemo, megatron = ("\n".join(form(curve(N))) for form in (nemo_log, megatron_log))
    assert (
        len(load_run(bring("nemo", nemo.encode())).steps["loss"])
        == len(load_run(bring("megatron", megatron.encode())).steps["loss"])
        == N
    )
    start = nemo.rfind("reduced_train_loss: ") + len("reduced_train_loss: ")
    for end in range(start, start + 30):
        folder = bring(f"cut{end}", nemo[:end].encode())
        rows = [row["loss"] for row in rows_of(folder / "metrics.jsonl")]
        assert len(rows) == N - 1 or rows[-1] == pytest.approx(curve(N)[-1], abs=6e-4)


# --- TensorBoard and W&B


def tensorboard(folder: Path, tags: dict[str, Sequence[float]], first: int, every: int = 1) -> Path:
    """Write an event file with tensorboard's own writer, a value an event, as torch's SummaryWriter
    does.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for i, values in enumerate(zip(*tags.values(), strict=True)):
        for tag, value in zip(tags, values, strict=True):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=first + i * every, wall_time=1e9 + i, summary=summary))
    writer.close()
    return folder


FAMILIES = [
    (
        {
            "reduced_train_loss": None,
            "train_step_timing in s": 0.25,
            "lr": 1e-4,
            "global_step": range(N),
        },
        0,
    ),
    (
        {
            "learning-rate": 1e-4,
            "lm loss": None,
            "grad-norm": 0.5,
            "lm loss vs samples": 1.0,
            "iteration-time": 0.25,
        },
        1,
    ),
    ({"loss": None, "step_time_s": 0.25, "grad_norm": 0.5, "fp8_gemms": 0.0}, 1),
]


def filled(tags: dict[str, Any], loss: Any) -> dict[str, Any]:
    return {
        k: loss if v is None else [v] * N if isinstance(v, float) else list(v)
        for k, v in tags.items()
    }


@pytest.mark.parametrize(("tags", "first"), FAMILIES)
def test_tensorboard_events_are_read_at_full_precision(
    tags: dict[str, Any], first: int, tmp_path: Path
) -> None:
    loss = curve(N)
    events = tensorboard(tmp_path / "events", filled(tags, loss), first)
    assert main([str(events), "--out", str(tmp_path / "run"), *TINY]) == 0
    run = load_run(tmp_path / "run")
    assert (
        run.steps["loss"].tolist() == loss.astype(np.float32).tolist()
        and run.steps["step_time_s"].tolist() == [0.25] * N
    )
    assert run.manifest["imported"]["loss_digits"] is None and not run.rounding().any()


def test_lightnings_counter_that_falls_back_at_a_restart_is_mended_by_global_step(
    tmp_path: Path,
) -> None:
    loss = list(curve(N))
    for start, end, lag in ((0, 30, 0), (30, N, 1)):
        tags = {
            "reduced_train_loss": loss[start:end],
            "global_step": [float(i) for i in range(start, end)],
            "train_step_timing in s": [0.2] * (end - start),
        }
        events = tensorboard(tmp_path / f"events{start}", tags, start - lag)
    assert (
        main([str(tmp_path / "events0"), str(events), "--out", str(tmp_path / "run"), *TINY]) == 0
    )
    assert load_run(tmp_path / "run").steps["loss"] == pytest.approx(loss)


def test_a_step_time_logged_every_tenth_step_is_that_of_the_ten_and_a_name_logged_now_and_then_is_left_out(  # noqa: E501
    tmp_path: Path,
) -> None:
    names = ["a - lm loss", "a - iteration-time", "a - grad-norm"]
    rows = [
        [step, 3.25, step / 100 if step % 10 == 0 else "", 1.0 if step > 5 else ""]
        for step in range(1, N + 1)
    ]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in [["Step", *names], *rows]) + "\n")
    assert main([str(path), "--out", str(tmp_path / "run"), *TINY]) == 0
    run = load_run(tmp_path / "run")
    assert run.steps["step_time_s"].tolist() == [-(-step // 10) / 10 for step in range(1, N + 1)]
    assert "grad_norm" not in run.steps and "grad_norm" in run.manifest["imported"]["missing"]


def test_a_damaged_event_file_ends_where_it_is_damaged_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tensorboard(tmp_path / "events", filled(FAMILIES[1][0], curve(N)), 1)
    (file,) = events.iterdir()
    whole = file.read_bytes()
    for name, damaged in (
        ("cut", whole[:-5]),
        ("flipped", whole[:-300] + bytes(b ^ 255 for b in whole[-300:-296]) + whole[-296:]),
    ):
        file.write_bytes(damaged)
        assert main([str(file), "--out", str(tmp_path / name), *TINY]) == 0
        assert "damaged or was cut" in capsys.readouterr().out
        assert 0 < len(rows_of(tmp_path / name / "metrics.jsonl")) <= N


@pytest.mark.slow
def test_a_real_offline_run_of_wandb_is_read_without_a_server(tmp_path: Path) -> None:
    code = (
        "import sys, wandb; loss = [float(x) for x in sys.argv[2:]]\nconfig = {'fp8': 'hybrid',"
        " 'key': 'SECRET'}\nrun = wandb.init(project='p', mode='offline', dir=sys.argv[1],"
        " config=config, settings=wandb.Settings(console='off'))\nfor i, value in"
        " enumerate(loss):\n    run.log({'reduced_train_loss': value, 'train_step_timing in s':"
        " 0.25, 'global_step': float(i), 'trainer/global_step': i})\n    if i % 20 == 19:"
        " run.log({'val_loss': value + 1, 'trainer/global_step': i})\nrun.finish()\n"
    )
    loss = curve(N).tolist()
    env = {**os.environ, "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *map(repr, loss)],
        check=True,
        env=env,
        timeout=120,
    )
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.wandb")}
    assert main([str(folder), "--out", str(tmp_path / "run"), *FP8]) == 0
    run = load_run(tmp_path / "run")
    assert run.steps["loss"].tolist() == loss and run.heldout["step"].tolist() == [20, 40, 60]
    assert (
        run.manifest["imported"]["stated"]["precision.fp8.format"] == "hybrid"
        and "SECRET" not in (tmp_path / "run" / "manifest.json").read_text()
    )
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.wandb")} == before
    (file,) = before
    (tmp_path / "cut.wandb").write_bytes(file.read_bytes()[:-40000])
    assert main([str(tmp_path / "cut.wandb"), "--out", str(tmp_path / "cut"), *FP8]) in (0, 2)


def table(path: Path, x: str, columns: dict[str, Sequence[object]], first: int = 0) -> Path:
    rows = [[first + i, *values] for i, values in enumerate(zip(*columns.values(), strict=True))]
    path.write_text(
        "\n".join(",".join(f'"{cell}"' for cell in row) for row in [[x, *columns], *rows]) + "\n"
    )
    return path


def test_tables_of_wandb_are_joined_and_know_their_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = curve(N)
    names = [f"a run - reduced_train_loss{suffix}" for suffix in ("", "__MIN", "__MAX")]
    one = table(
        tmp_path / "loss.csv",
        "trainer/global_step",
        {name: [f"{v:.3f}" for v in loss] for name in names},
    )
    two = table(
        tmp_path / "time.csv", "trainer/global_step", {"a run - train_step_timing in s": [0.25] * N}
    )
    assert main([str(one), str(two), "--out", str(tmp_path / "run"), *TINY]) == 0
    run = load_run(tmp_path / "run")
    assert (
        run.steps["loss"] == pytest.approx(loss, abs=5.1e-4)
        and run.manifest["imported"]["loss_digits"] == 4
    )
    assert "holds no step time" not in capsys.readouterr().err
    assert main([str(one), "--out", str(tmp_path / "untimed"), *TINY]) == 0
    assert (
        "the log holds no step time: tables of throughput leave it out" in capsys.readouterr().out
    )
    more = table(
        tmp_path / "more.csv",
        "Step",
        {
            "a - lm loss": loss,
            "b - lm loss": loss,
            "a - iteration-time": loss,
            "b - iteration-time": loss,
        },
        1,
    )
    assert "choose one with --run" in refusal([more, "--out", tmp_path / "other", *TINY], capsys)
    assert main([str(more), "--run", "b", "--out", str(tmp_path / "b"), *TINY]) == 0
    assert load_run(tmp_path / "b").steps["loss"] == pytest.approx(loss)


# --- what is compared, and how finely


def pair(bring: Run, form: Any, base: Any, candidate: Any, *vouched: str) -> list[str]:
    return [
        str(bring("bf16", form(base), *TINY, *vouched)),
        str(bring("fp8", form(candidate), *FP8, *vouched)),
    ]


def test_batches_must_be_vouched_for_and_the_notes_say_so(
    bring: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loss, other = curve(), curve() + own_noise(1, size=0.002)
    unvouched = pair(bring, megatron_log, loss, other)
    assert compare(unvouched) == 2
    assert "--same-data" in capsys.readouterr().err
    for folder in unvouched:
        subprocess.run(["rm", "-r", folder], check=True)
    runs = pair(bring, megatron_log, loss, other, "--same-data", "c4-seed1")
    assert compare(runs) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "asserted, not proved: plan (fp8_current), same data, fp8 (asserted:c4-seed1)" in said
    assert compare(["--json", *runs]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (
        row["asserted"]["fp8"] == ["plan (fp8_current)", "same data", "fp8"]
        and row["labels"]["loss"] == "emulated"
    )
    assert report([*runs, "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "asserted, not proved" in page and "FP8 GEMMs: not recorded" in page


def test_runs_of_two_names_and_runs_of_ours_are_not_compared_with_each_other(
    bring: Run, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(bring("bf16", megatron_log(curve()), *TINY, "--same-data", "a"))
    other = str(bring("fp8", megatron_log(curve()), *FP8, "--same-data", "b"))
    assert compare([base, other]) == 2 and "order of the batches" in capsys.readouterr().err
    assert compare([base, str(make("ours", curve()))]) == 2


def test_an_imported_fp8_run_must_be_vouched_for(
    bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bring("fp8", megatron_log(curve(N)), *[word for word in FP8 if word != "--assert-fp8"])
    assert "comparing it needs --assert-fp8" in capsys.readouterr().out
    with pytest.raises(InputError, match="--assert-fp8"):
        load_run(folder)


def test_learning_rates_that_differ_are_found_in_the_logs(
    bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [
        line.replace("learning rate: 1.2", "learning rate: 1.3") for line in megatron_log(curve(N))
    ]
    runs = pair(
        bring, lambda x: other if x is None else megatron_log(x), curve(N), None, "--same-data", "a"
    )
    assert compare(runs) == 2 and "learning rate from step 1" in capsys.readouterr().err


def test_four_digits_leave_open_what_seven_decide(
    bring: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gap of 0.005 nats at a loss of 2.3 lies inside the bar (0.0058) by less than what two
    roundings of 0.0005 leave.
    """
    loss = np.maximum(curve(), 2.05)
    for form, code, note in ((megatron_log, 0, ""), (nemo_log, 3, "printed with too few digits")):
        runs = pair(bring, form, loss, loss + 0.005, "--same-data", "a")
        capsys.readouterr()
        assert compare(["--json", *runs]) == code
        (row,) = json.loads(capsys.readouterr().out)
        assert row["rounding_nats"] == pytest.approx(1e-3 if code else 1e-6)
        assert row["tokens_to_decide"] is None
        compare(runs)
        said = " ".join(capsys.readouterr().out.split())
        assert note in said and f"printed with {4 if code else 7} digits; the interval is" in said
        for folder in runs:
            subprocess.run(["rm", "-r", folder], check=True)


# --- what is refused, and that nothing breaks


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = tmp_path / "a.log", tmp_path / "run"
    log.write_text("\n".join(megatron_log(curve(N))) + "\n")
    (tmp_path / "mixed.log").write_text(megatron_line(1, 3.0) + "\n" + nemo_line(1, 3.0) + "\n")
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "fp8.log").write_text(f"  fp8 {'.' * 45} hybrid\n" + log.read_text())
    (tmp_path / "broken.log.gz").write_bytes(gzip.compress(log.read_bytes())[:-100])
    (tmp_path / "epochs.log").write_text(
        nemo_line(1, 3.0).replace("epoch 0", "epoch 1").replace("global_step", "gstep") + "\n"
    )
    (tmp_path / "sparse.log").write_text(
        "\n".join(megatron_line(s, 3.0) for s in (1, 3, 7, 15, 31)) + "\n"
    )
    (tmp_path / "run.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "exists").mkdir()
    events = tensorboard(tmp_path / "events", {"accuracy": [1.0]}, 0)
    wrong = [
        ([tmp_path / "nowhere", *TINY], "is no file and no folder"),
        ([tmp_path / "empty.log", *TINY], "no training line found"),
        ([tmp_path / "empty", *TINY], "no event file of TensorBoard"),
        ([tmp_path / "mixed.log", *TINY], "two runs in one file"),
        ([log, events, *TINY], "mixed formats"),
        ([events, *TINY], "no training loss found"),
        ([tmp_path / "broken.log.gz", *TINY], "compressed and damaged"),
        ([tmp_path / "epochs.log", *TINY], "more than one epoch"),
        ([tmp_path / "run.csv", *TINY], "no column of steps"),
        ([log, "--set", "precision=bf16"], "which model, gpu it is of"),
        ([log, "--set", "model=llama3_tiny", "gpu=cpu"], "which precision it is of"),
        ([log, "--set", "model=llama3_tiny", "gpu=cpu", "precision=fp4"], "precision=fp4"),
        ([log, *TINY, "mapping.global_batch=16"], "the log states mapping.global_batch=8"),
        ([log, *TINY, "train.max_steps=30"], "the log states train.max_steps=60"),
        ([tmp_path / "fp8.log", *TINY], "the log states FP8 (fp8 hybrid), --set precision=bf16"),
        ([log, *TINY, "--assert-fp8"], "--assert-fp8"),
        ([log, *TINY, "--same-data", "a b"], "--same-data takes a name"),
        ([log, *TINY, "--run", "a"], "--run chooses"),
        ([log, *TINY, "--format", "nemo"], "no training line found"),
        ([log, *TINY, "--format", "wandb"], "no training loss found"),
        ([log, *TINY, "--format", "tensorboard"], "no training loss found"),
    ]
    for arguments, says in wrong:
        assert says in refusal([*arguments, "--out", out], capsys)
        assert not out.exists() and not out.with_name("run.part").exists()
    assert "exists" in refusal([log, *TINY, "--out", tmp_path / "exists"], capsys)
    (tmp_path / "run.part").mkdir()
    assert "another import is under way" in refusal([log, *TINY, "--out", out], capsys)
    (tmp_path / "run.part").rmdir()
    assert "no name for a run" in refusal([log, *TINY, "--out", tmp_path / "a b"], capsys)
    assert "follow no grid" in refusal([tmp_path / "sparse.log", *TINY, "--out", out], capsys)
    assert main([str(log), *TINY, "--out", str(out)]) == 0
    assert "run folder already" in refusal([out, *TINY, "--out", tmp_path / "again"], capsys)


def test_the_format_that_is_named_settles_a_mixed_file(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "\n".join(
            x
            for lines in zip(megatron_log(curve(N)), nemo_log(curve(N) + 1), strict=True)
            for x in lines
        )
        + "\n"
    )
    assert (
        main([str(tmp_path / "log"), "--format", "megatron", "--out", str(tmp_path / "run"), *TINY])
        == 0
    )
    assert load_run(tmp_path / "run").steps["loss"] == pytest.approx(curve(N), abs=1e-6)


def test_nothing_is_left_of_an_import_that_fails_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text("\n".join(megatron_log(curve(N))) + "\n")
    monkeypatch.setattr(
        "analysis.importers.folder.set_status",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert "No space left" in refusal([tmp_path / "log", "--out", tmp_path / "run", *TINY], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_the_tensorboard_package_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tensorboard(tmp_path / "events", {"loss": [1.0]}, 1)
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    assert "pip install tensorboard" in refusal([events, "--out", tmp_path / "run", *TINY], capsys)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_encodings_and_compression(encoding: str, tmp_path: Path) -> None:
    text = "Größe: 5 µs\n" + "\n".join(nemo_log(curve(N))) + "\n"
    (tmp_path / "log.gz").write_bytes(
        gzip.compress(text.encode(encoding)) if encoding != "utf-16" else text.encode(encoding)
    )
    assert main([str(tmp_path / "log.gz"), "--out", str(tmp_path / "run"), *TINY]) == 0
    assert load_run(tmp_path / "run").steps["loss"] == pytest.approx(curve(N), abs=6e-4)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    junk=st.one_of(
        st.binary(max_size=80),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")),
    ),
    place=st.integers(0, 10**6),
)
def test_junk_in_a_log_gives_an_error_an_unsound_run_or_the_same_losses(
    junk: bytes, place: int, tmp_path: Path
) -> None:
    from analysis.importers.console import read
    from analysis.importers.log import settle, why_unsound

    whole = ("\n".join(nemo_log(curve(20))) + "\n").encode()
    place %= len(whole)
    (tmp_path / "log").write_bytes(whole[:place] + junk + whole[place:])
    try:
        log = settle(read(tmp_path / "log"))
    except InputError:
        return
    if not why_unsound(log, 20) and not any(
        byte in b"0123456789-.eE" for byte in junk
    ):  # a digit within a number is a number
        assert log.steps["loss"] == pytest.approx(curve(20), abs=6e-4)


HOSTILE = [
    b"Training epoch 0, iteration " + b"9" * 5000 + b"/1 | reduced_train_loss: 1 | x: 1\n",
    (
        b"Training epoch 0, iteration 1/1 | reduced_train_loss: [red]1[/red] | global_step:"
        b" __import__('os') | x: 1\n"
    ),
    b"".join(
        b"Training epoch 0, iteration 1/1 | k%d: 1 | reduced_train_loss: 1 | x: 1\n" % i
        for i in range(500)
    ),
    b"\x1b]0;title\x07" * 50 + b"\x00\xff\xfe" * 50 + b"\n",
    b" iteration 1/2 |" + b" a |" * 100_000 + b"\n",
    b"| fp8: hybrid'; DROP TABLE runs; -- <script>alert(1)</script>\n",
]


@pytest.mark.parametrize(
    "hostile", HOSTILE, ids=["digits", "code", "shapes", "escapes", "bars", "markup"]
)
def test_hostile_text_is_left_out(hostile: bytes, bring: Run) -> None:
    lines = "".join(f"{line}\n" for line in nemo_log(curve(N))).encode()
    started = time.process_time()
    run = load_run(bring("run", hostile + lines, *FP8))
    assert (
        run.steps["loss"] == pytest.approx(curve(N), abs=6e-4)
        and time.process_time() - started < 20
    )
    assert "script" not in (run.folder / "manifest.json").read_text()


@pytest.mark.nemo
@pytest.mark.skipif(importlib.util.find_spec("nemo") is None, reason="needs NeMo")
def test_the_lines_above_are_those_of_nemos_own_printer() -> None:
    code = (
        "from nemo.lightning.pytorch.callbacks import ProgressPrinter\nmetrics = {'lr': 1.2e-4,"
        " 'global_batch_size': 8.0, 'global_step': 4.0, 'reduced_train_loss': 2.34567,"
        " 'train_step_timing in s': 0.1712, 'consumed_samples': 40.0}\nprint('LINE ' +"
        " ProgressPrinter().format_string('Training epoch 0, iteration 4/59', metrics))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("LINE ")[1].strip() == nemo_line(5, 2.34567)


@pytest.mark.nemo
def test_the_logs_of_a_real_run_hold_the_numbers_of_its_folder(tmp_path: Path) -> None:
    """A run of ours with NeMo's progress printer switched on: console, TensorBoard and W&B against
    metrics.jsonl.
    """
    from launch.__main__ import main as launch

    steps = [
        "train.max_steps=6",
        "train.warmup_steps=1",
        "train.eval_interval=2",
        "train.eval_batches=1",
        "train.checkpoint_interval=100",
    ]
    assert (
        launch(
            [
                *steps,
                "precision=fp8_current",
                f"runs_dir={tmp_path}/ours",
                "logger.tensorboard=true",
                "logger.wandb=offline",
            ]
        )
        == 0
    )
    (ours,) = (tmp_path / "ours").iterdir()
    code = (
        "import sys; from pathlib import Path; from recipes.training import recipe, run\n"
        "trainer = recipe._trainer\n"
        "def printing(r, plan): trainer(r, plan); r.trainer.enable_progress_bar = True\n"
        "recipe._trainer = printing\n"
        "sys.exit(run.main(Path(sys.argv[1])))"
    )
    again = tmp_path / "again"
    again.mkdir()
    (again / "plan.json").write_bytes((ours / "plan.json").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", code, str(again)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours_printed = re.compile(r"tokens_per_s_per_gpu|Validation: .*val_loss")
    lines = (done.stdout + done.stderr).splitlines(keepends=True)
    (tmp_path / "log.txt").write_text(
        "".join(line for line in lines if not ours_printed.search(line))
    )
    loss, heldout = (
        [r[key] for r in rows_of(ours / "metrics.jsonl") if key in r]
        for key in ("loss", "heldout_loss")
    )
    sources = {
        "log": tmp_path / "log.txt",
        "tensorboard": ours / "tensorboard",
        "wandb": next(ours.rglob("offline-run-*")),
    }
    for name, source in sources.items():
        assert main([str(source), "--out", str(tmp_path / name), *FP8]) == 0
        run = load_run(tmp_path / name)
        printed = 5.1e-4 if name == "log" else 0
        assert run.steps["loss"] == pytest.approx(loss, abs=printed) and run.steps[
            "step"
        ].tolist() == [1, 2, 3, 4, 5, 6]
        assert run.heldout["heldout_loss"] == pytest.approx(
            heldout[: len(run.heldout["step"])], abs=printed
        )
        assert run.heldout["step"].tolist() == (
            [2, 4] if name == "log" else [2, 4, 6]
        )  # no training line follows the last evaluation
        assert ("fp8_gemms" in run.steps) == (name != "log")


def test_an_evaluation_after_the_last_line_of_our_own_log_is_kept(tmp_path: Path) -> None:
    """57 steps print every fifth and the last; of an evaluation every 19 steps, the last is beyond
    that grid.
    """
    cell = [
        "model=llama3_tiny",
        "precision=bf16",
        "gpu=cpu",
        "train.max_steps=57",
        "train.eval_interval=19",
    ]
    plan, lines = compose_plan(cell), list[str]()
    for step in range(1, 58):
        row = {
            "step": step,
            "loss": 8 - step / 57,
            "grad_norm": 1.5,
            "lr": 1e-4,
            "step_time_s": 0.25,
            "memory_gb": 1.5,
        }
        if plan.train.is_printed(step):
            lines.append(training_line({**row, "tokens_per_s_per_gpu": 1e4}, 0, plan))
        if step % plan.train.eval_interval == 0:
            lines.append(validation_line(step, 8 - step / 57, plan))
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path / "log.txt"), "--out", str(tmp_path / "run"), "--set", *cell]) == 0
    run = load_run(tmp_path / "run")
    assert run.heldout["step"].tolist() == [19, 38, 57] and run.steps["step"].tolist()[-1] >= 55
    assert run.heldout["heldout_loss"] == pytest.approx(8 - run.heldout["step"] / 57, rel=5e-7)
    assert run.steps["memory_gb"].tolist() == [1.5] * run.steps["step"].size


def test_importing_logs_loads_nothing_heavy() -> None:
    code = (
        "import sys, analysis.import_logs;print(sorted({m.split('.')[0] for m in sys.modules} &"
        " {'torch', 'nemo', 'lightning', 'launch', 'tensorboard', 'wandb', 'tensorflow'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
