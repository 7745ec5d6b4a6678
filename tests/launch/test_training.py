"""Real runs through NeMo's llm.pretrain on this machine: what they write, that they resume, that
two processes agree.
"""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

from analysis import import_logs
from analysis.runs.load import load_run
from launch.__main__ import main
from recipes.estimate.fp8_gemms import fp8_gemms
from recipes.run_folder import read_plan, rows_of, sha256, status_of
from recipes.training.data import main as prepare
from tests.recipes.test_evaluate import write_corpus

SHORT = [
    "train.max_steps=6",
    "train.warmup_steps=1",
    "train.eval_interval=2",
    "train.eval_batches=1",
    "train.checkpoint_interval=100",
    "train.diagnostics_interval=3",
    "executor.max_parallel=2",
]
PRECISIONS = ["bf16", "fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8"]
TWICE = ["bf16", "fp8_delayed"]  # are paused; the one without and the one with state of its own
FP8_LINEARS = {
    "bf16": 0,
    "fp8_current": 2 * 4,
}  # the rest: 4 layers of 4 linear layers; current keeps the outer two in BF16

pytestmark = pytest.mark.nemo


@pytest.fixture(scope="module", autouse=True)
def environment(warm_python: str) -> Iterator[None]:
    """A Python that need not import NeMo, and a variable of the shell that names a port of another
    process's.

    No run of this machine may end for that port.
    """
    with socket.socket() as other, pytest.MonkeyPatch.context() as patch:
        other.bind(("", 0))
        other.listen()
        patch.setattr(sys, "executable", warm_python)
        patch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every precision, once unbroken and once paused after two steps, where an evaluation is due;
    some paused again after five.
    """
    root = tmp_path_factory.mktemp("runs")

    def sweep(precisions: list[str], kind: str, *more: str) -> None:
        assert (
            main(
                [
                    "-m",
                    *SHORT,
                    f"precision={','.join(precisions)}",
                    f"runs_dir={root}/{kind}",
                    *more,
                ]
            )
            == 0
        )

    sweep(PRECISIONS, "whole")
    for precisions, step in ((PRECISIONS, 2), (TWICE, 5)):
        sweep(precisions, "cut", f"train.stop_after={step}")
        assert {status_of(folder) for folder in (root / "cut").iterdir()} == {"paused"}
    sweep(PRECISIONS, "cut")
    return root


def folder(runs: Path, kind: str, precision: str) -> Path:
    return next((runs / kind).glob(f"*.{precision}.*"))


def numbers(folder: Path) -> list[Any]:
    return [
        (r["step"], r.get("loss"), r.get("grad_norm"), r.get("heldout_loss"))
        for r in rows_of(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_paused_run_continues_to_the_numbers_of_an_unbroken_one(
    precision: str, runs: Path
) -> None:
    whole, cut = (numbers(folder(runs, kind, precision)) for kind in ("whole", "cut"))
    assert [step for step, loss, *_ in cut if loss is not None] == [1, 2, 3, 4, 5, 6]
    assert whole == cut
    assert [e["event"] for e in rows_of(folder(runs, "cut", precision) / "events.jsonl")] == [
        "start",
        *["pause", "resume"] * (2 if precision in TWICE else 1),
        "end",
    ]


@pytest.mark.parametrize("kind", ["whole", "cut"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_can_be_true_and_leaves_the_digest_of_its_metrics(
    precision: str, kind: str, runs: Path
) -> None:
    run = folder(runs, kind, precision)
    assert len(load_run(run).steps["lr"]) == 6
    assert rows_of(run / "events.jsonl")[-1]["metrics_sha256"] == sha256(run / "metrics.jsonl")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_step_counts_its_fp8_gemms(precision: str, runs: Path) -> None:
    rows = [r for r in rows_of(folder(runs, "whole", precision) / "metrics.jsonl") if "loss" in r]
    micro_batches, gemms = 2, 3
    expected = FP8_LINEARS.get(precision, 4 * 4) * gemms * micro_batches
    run = folder(runs, "whole", precision)
    assert {r["fp8_gemms"] for r in rows} == {expected} == {fp8_gemms(read_plan(run))}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_diagnostics_name_every_fp8_layer_and_role(precision: str, runs: Path) -> None:
    rows = rows_of(folder(runs, "whole", precision) / "fp8.jsonl")
    assert len(rows) == 3 * 3 * FP8_LINEARS.get(precision, 4 * 4)  # steps 1, 3, 6; three roles
    assert all(r["amax"] > 0 for r in rows)


# What a log prints with fewer digits than the run folder holds: relative rounding of seven and of
# six significant digits.
PRINTED = {
    "loss": 5e-7,
    "heldout_loss": 5e-7,
    "grad_norm": 5e-6,
    "lr": 5e-6,
    "step_time_s": 5e-6,
    "memory_gb": 5e-7,
}


@pytest.mark.parametrize("kind", ["whole", "cut"])
@pytest.mark.parametrize("precision", TWICE)
def test_the_log_of_a_run_holds_the_numbers_of_its_folder(
    precision: str, kind: str, runs: Path, tmp_path: Path
) -> None:
    """Read by our own importer, of a run that was resumed too; also with the labels of srun, which
    writes one log for all.
    """
    run, labelled = folder(runs, kind, precision), tmp_path / "log.txt"
    text = (run / "log.txt").read_text()
    labelled.write_text("".join(f"0: {line}" for line in text.splitlines(keepends=True)))
    cell = [
        "model=llama3_tiny",
        "gpu=cpu",
        f"precision={precision}",
        *(o for o in SHORT if o.startswith("train.")),
    ]
    written = rows_of(run / "metrics.jsonl")
    for log in (run / "log.txt", labelled):
        out = tmp_path / f"imported-{log.parent.name}"
        assert import_logs.main([str(log), "--out", str(out), "--set", *cell]) == 0
        for kept in ("loss", "heldout_loss"):
            found = [row for row in rows_of(out / "metrics.jsonl") if kept in row]
            expected = [row for row in written if kept in row]
            assert [row["step"] for row in found] == [row["step"] for row in expected] and found
            for name, rounding in PRINTED.items():
                wanted = [row[name] for row in expected if name in row]
                assert [row[name] for row in found if name in row] == pytest.approx(
                    wanted, rel=rounding
                )


def test_every_precision_saw_the_same_batches(runs: Path) -> None:
    manifests = [
        json.loads((folder(runs, "whole", p) / "manifest.json").read_text()) for p in PRECISIONS
    ]
    assert len({m["order_sha256"] for m in manifests}) == 1
    assert len({json.dumps(m["data"]) for m in manifests}) == 1
    assert manifests[0]["order_sha256"] and manifests[0]["versions"]["nemo-toolkit"]


def test_another_seed_starts_from_other_weights_and_sees_the_same_batches(
    runs: Path, tmp_path: Path
) -> None:
    assert main([*SHORT, "seed=2", f"runs_dir={tmp_path}"]) == 0
    first, second = folder(runs, "whole", "bf16"), next(tmp_path.iterdir())
    assert numbers(first)[0][1] != numbers(second)[0][1]
    orders = [
        json.loads((run / "manifest.json").read_text())["order_sha256"] for run in (first, second)
    ]
    assert orders[0] == orders[1]


def test_wandb_and_tensorboard_hold_the_numbers_of_the_run_folder(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder(runs, "whole", "mxfp8")
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    rows = [r for r in rows_of(run / "metrics.jsonl") if "loss" in r]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (r["step"], r["loss"]) for r in rows
    ]
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_two_processes_give_the_loss_of_one(runs: Path, tmp_path: Path) -> None:
    assert main([*SHORT, "precision=fp8_subchannel", "num_gpus=2", f"runs_dir={tmp_path}"]) == 0
    one, two = (
        numbers(run) for run in (folder(runs, "whole", "fp8_subchannel"), next(tmp_path.iterdir()))
    )
    assert [r[0] for r in one] == [r[0] for r in two]
    # The gradients of the two micro-batches are added in another order: FP32 rounding, and what
    # BF16 makes of it
    for a, b in zip(one, two, strict=True):
        assert [v for v in a if v is not None] == pytest.approx(
            [v for v in b if v is not None], rel=2e-3
        )
    assert one[0][1] == pytest.approx(
        two[0][1], rel=1e-6
    )  # before the first update only the loss's sum differs


def test_documents_are_masked_as_the_plan_says(tmp_path: Path) -> None:
    """Same weights and batch of short documents: masking attention, and leaving their ends out of
    the loss, each change it.

    The documents are one prefix that `data.split` parts, made with a SentencePiece model.
    """
    corpus = write_corpus(tmp_path / "corpus", words=10)
    model = sentencepiece_model(corpus, tmp_path)
    assert (
        prepare(
            [f"data.sources=[{corpus}]", f"data.root={tmp_path}/data", f"data.tokenizer={model}"]
        )
        == 0
    )
    data = [
        "data=indexed",
        f"data.train=[{tmp_path}/data/vocab1024/train]",
        "data.split=[8,2,0]",
        f"data.tokenizer={model}",
    ]
    data += [f"runs_dir={tmp_path}/runs", "train.stop_after=1"]
    assert (
        main(
            [
                "-m",
                *SHORT,
                *data,
                "data.reset_attention_mask=true,false",
                "run_name=mask-${data.reset_attention_mask}",
            ]
        )
        == 0
    )
    assert main([*SHORT, *data, "data.eod_mask_loss=true", "run_name=loss"]) == 0
    first = [
        rows_of(tmp_path / "runs" / run / "metrics.jsonl")[0]["loss"]
        for run in ("mask-True", "mask-False", "loss")
    ]
    assert len(set(first)) == 3 and max(first) - min(first) < 0.1


def sentencepiece_model(corpus: Path, folder: Path) -> Path:
    texts = [json.loads(line)["text"] for line in (corpus / "walks.jsonl").read_text().splitlines()]
    sizes = {"vocab_size": 200, "model_type": "bpe", "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "pieces"), **sizes
    )
    return folder / "pieces.model"
