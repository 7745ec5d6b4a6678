"""I get X; is that right?

What the throughput table says of an imported run, and that the documents keep up.
"""

import json
import re
from pathlib import Path

import pytest

from analysis.import_logs import main
from analysis.importers.detect import FORMATS
from analysis.throughput import main as throughput
from tests.analysis.foreign import LLAMA3_8B, arguments, command, megatron, nemo, write

DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYOUT = {
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 4,
    "context_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 5,
}
SEVENTY_B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "ffn_hidden_size": 28672,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "seq_length": 8192,
}
STATED = arguments(
    **SEVENTY_B,
    **LAYOUT,
    group_query_attention=True,
    world_size=64,
    micro_batch_size=1,
    fp8=None,
    recompute_granularity=None,
)


def said_of(
    lines: list[str], sets: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, object], str]:
    """Return the table's row of an imported log, and the sentence on it."""
    assert main(command(write(place / "log", lines), place / "run", sets)) == 0
    capsys.readouterr()
    assert throughput([str(place / "run"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert throughput([str(place / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert str(row["expected"]) in shown and "published" in shown and "predicted" in shown
    rows = re.findall(
        r"^\| ([\w ]+) \|",
        (DOCS / "throughput.md").read_text().split("## What usually differs")[1],
        re.MULTILINE,
    )
    causes = row["causes"]
    assert isinstance(causes, list) and {cause.split(" (")[0] for cause in causes} <= set(rows)
    return row, str(row["expected"])


@pytest.mark.parametrize(("seconds", "side"), [(14.6, "inside"), (22.0, "below"), (9.5, "above")])
def test_a_rate_is_compared_with_what_is_published_and_predicted(
    seconds: float, side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 3 70B, BF16, 64 H100s, 128 sequences: NVIDIA published 1,117 tokens/s/GPU."""
    row, sentence = said_of(
        [*STATED, *megatron(128, seconds)], ["model=llama3_70b", "gpu=h100"], tmp_path, capsys
    )
    assert (
        row["within"] == side
        and f"lies {side} the published range" in sentence
        and f"{side} the predicted range" in sentence
    )
    assert (
        row["published_low"] < row["published_value"] < row["published_high"]
        and row["predicted_low"] < row["predicted_high"]
    )  # type: ignore[operator]
    named = row["causes"]
    assert isinstance(named, list) and len(named) == (0 if side == "inside" else 3)
    if side == "below":
        assert "network (64 GPUs span nodes of 8)" in named and not any(
            "layout" in cause for cause in named
        )


def test_what_the_log_leaves_open_is_the_likeliest_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Starting with 64 processes", *nemo(128, 9.5)]
    _, sentence = said_of(
        lines, ["model=llama3_70b", "precision=bf16", "gpu=h100"], tmp_path, capsys
    )
    assert (
        "What usually differs): layout (the log does not state tp, pp, cp, vp, micro_batch)"
        in sentence
    )


def test_where_nothing_is_published_the_prediction_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *arguments(**LLAMA3_8B, world_size=8, micro_batch_size=1, fp8=None),
        *megatron(64, 7.424),
    ]
    row, sentence = said_of(lines, ["model=llama3_8b", "gpu=h100"], tmp_path, capsys)
    assert (
        row["published_value"] is None
        and "published" not in sentence
        and "the predicted range" in sentence
    )


def test_a_model_that_was_cut_is_not_compared_with_the_whole_ones_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Starting with 64 processes", *nemo(128, 2.0)]
    row, sentence = said_of(
        lines,
        ["model=llama3_70b", "model.num_layers=8", "precision=bf16", "gpu=h100"],
        tmp_path,
        capsys,
    )
    assert row["published_value"] is None and "published" not in sentence


def test_every_format_that_can_be_named_is_in_the_documents_table() -> None:
    page = (DOCS / "imports.md").read_text().lower()
    words = {
        "nemo": "nemo 2",
        "megatron": "megatron-lm",
        "progress-bar": "progress bar",
        "open-progress-bar": "progress bar without a total",
        "hugging-face": "hugging face trainer",
        "table": "csv",
        "json-rows": "json",
        "wandb": "w&b offline",
    }
    words |= {"tensorboard": "event files", "tensorboard-json": "downloads (csv, json)"}
    assert [name for name in FORMATS if words.get(name, name) not in page] == []
