"""Real checkpoints evaluated: their loss is training's own, the export is the same model, more
training answers more questions.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.convergence.tasks import load_evaluation, set_rows, task_rows
from launch.__main__ import main as launch
from recipes.evaluation.evaluate import checkpoints, main
from recipes.run_folder import rows_of, set_status
from recipes.training.text import documents, source_files

STEPS, QUESTIONS = 60, 100
SHORT = [
    f"train.max_steps={STEPS}",
    "train.max_lr=2e-3",
    "train.warmup_steps=10",
    "train.eval_interval=30",
    "train.eval_batches=2",
    "train.checkpoint_interval=1000",
    "train.diagnostics_interval=1000",
    "mapping.micro_batch=4",
    "mapping.global_batch=8",
    "executor.max_parallel=2",
    "logger=none",
]
TASK = """
task: continuation
dataset_path: json
dataset_kwargs:
  data_files: {{test: {questions}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_corpus(folder: Path, documents: int = 500, words: int = 200) -> Path:
    """Write text that a small model learns in seconds: walks over made-up words of which each has
    two that may follow it.
    """
    rng = random.Random(3)
    names = [
        "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3))
        for _ in range(150)
    ]
    followers = {name: rng.sample(names, 2) for name in names}
    rows = []
    for _ in range(documents):
        walk = [rng.choice(names)]
        for _ in range(words - 1):
            walk.append(rng.choice(followers[walk[-1]]))
        rows.append(json.dumps({"text": " ".join(walk)}) + "\n")
    folder.mkdir()
    (folder / "walks.jsonl").write_text("".join(rows))
    return folder


def write_task(folder: Path, corpus: Path, count: int) -> None:
    """Write a task of the harness: which of four pieces of held-out text goes on from the context?

    Three are of other documents.
    """
    rng = random.Random(5)
    texts = [
        d.text.split()
        for file in source_files((str(corpus),))
        for d in documents(file)
        if d.split == "heldout"
    ]
    rows = []
    for _ in range(count):
        starts = [(text, rng.randrange(10, len(text) - 3)) for text in rng.sample(texts, 4)]
        (true, at), choices = starts[0], [" " + " ".join(text[i : i + 3]) for text, i in starts]
        order = rng.sample(range(4), 4)
        rows.append(
            {
                "context": " ".join(true[at - 8 : at]),
                "choices": [choices[i] for i in order],
                "label": order.index(0),
            }
        )
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "continuation.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))


def run(*args: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "recipes.evaluation.evaluate", *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


LAUNCH = (
    "import sys; sys.executable = sys.argv[1]; from launch.__main__ import main;"
    " sys.exit(main(sys.argv[2:]))"
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Any]:
    """BF16 and an FP8 recipe trained, BF16 stopped after two steps; all three evaluated on held-out
    text and on questions.
    """
    root = tmp_path_factory.mktemp("evaluated")
    corpus = write_corpus(root / "corpus")
    data = [f"data.sources=[{corpus}]", f"data.root={root}/data"]
    untrained = [*SHORT, *data, "train.stop_after=2", f"runs_dir={root}/untrained"]
    beside = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, warm_python, *untrained],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        assert (
            launch(["-m", *SHORT, *data, "precision=bf16,fp8_delayed", f"runs_dir={root}/runs"])
            == 0
        )
    assert beside.wait(timeout=300) == 0
    write_task(root / "tasks", corpus, QUESTIONS)
    (root / "notes.txt").write_text(
        "import os\n\n\ndef main() -> None:\n    print(os.getcwd())\n" * 20
    )
    folders = {
        "bf16": next(root.glob("runs/*.bf16.*")),
        "fp8": next(root.glob("runs/*.fp8_delayed.*")),
        "untrained": next(root.glob("untrained/*")),
    }
    options = [
        "--tasks",
        "continuation",
        "--task-dir",
        root / "tasks",
        "--sets",
        f"notes={root}/notes.txt",
        "--max-tokens",
        8000,
    ]
    found = run(*folders.values(), *options)
    return {"root": root, "folders": folders, **dict(zip(folders, found, strict=True))}


pytestmark = pytest.mark.nemo


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_the_loss_on_trainings_own_batches_is_what_training_logged(
    name: str, evaluated: dict[str, Any]
) -> None:
    same = evaluated[name]["training_evaluation"]
    logged = [
        r["heldout_loss"]
        for r in rows_of(evaluated["folders"][name] / "metrics.jsonl")
        if "heldout_loss" in r
    ]
    assert same["logged"] == logged[-1] and same["tokens"] == 2 * 8 * 128
    assert same["loss"] == pytest.approx(same["logged"], rel=1e-6)


def test_a_run_stopped_where_nothing_was_logged_says_so(evaluated: dict[str, Any]) -> None:
    assert (
        evaluated["untrained"]["training_evaluation"] is None
        and evaluated["untrained"]["step"] == 2
    )


def test_the_export_is_the_model_that_was_trained(evaluated: dict[str, Any]) -> None:
    for name, loss, logits in (("bf16", 1e-3, 0.02), ("untrained", 1e-3, 0.02), ("fp8", 2e-2, 0.2)):
        found = evaluated[name]["export"]
        print(
            name,
            {k: found[k] for k in ("loss", "nemo_loss", "loss_difference", "logits_difference")},
        )
        assert abs(found["loss_difference"]) < loss and found["logits_difference"] < logits


def test_fp8_is_evaluated_in_fp8_and_bf16_in_bf16(evaluated: dict[str, Any]) -> None:
    assert evaluated["bf16"]["fp8_layers"] == 0 and evaluated["fp8"]["fp8_layers"] == 4 * 4
    assert (
        "inference mode" in evaluated["fp8"]["arithmetic"]["sets"]
        and evaluated["bf16"]["arithmetic"]["sets"] == "BF16"
    )


def test_longer_training_lowers_the_loss_and_answers_more_questions(
    evaluated: dict[str, Any],
) -> None:
    short, long = evaluated["untrained"], evaluated["bf16"]
    assert long["sets"]["heldout"]["loss"] < short["sets"]["heldout"]["loss"] - 0.5
    print({name: evaluated[name]["tasks"]["continuation"] for name in ("untrained", "bf16", "fp8")})
    trained, barely = long["tasks"]["continuation"], short["tasks"]["continuation"]
    assert trained["accuracy"] > barely["accuracy"] + 3 * np.hypot(
        trained["stderr"], barely["stderr"]
    )


def test_every_predicted_token_counts_once(evaluated: dict[str, Any]) -> None:
    assert {name: s["tokens"] for name, s in evaluated["bf16"]["sets"].items()} == {
        "heldout": 8000,  # 62 whole sequences of 128 and a piece
        "notes": evaluated["bf16"]["sets"]["notes"]["of_tokens"],
    }
    for s in evaluated["bf16"]["sets"].values():
        assert s["perplexity"] == pytest.approx(np.exp(s["loss"])) and s["stderr"] > 0


def test_bf16_and_fp8_are_paired_question_by_question(evaluated: dict[str, Any]) -> None:
    base, candidate = (load_evaluation(evaluated["folders"][name]) for name in ("bf16", "fp8"))
    (row,) = task_rows(base, candidate)
    print(row)
    assert row["n"] == QUESTIONS == len(rows_of(candidate.folder / "evaluation_items.jsonl"))
    assert row["accuracy"] == pytest.approx(evaluated["fp8"]["tasks"]["continuation"]["accuracy"])
    assert row["stderr"] == pytest.approx(evaluated["fp8"]["tasks"]["continuation"]["stderr"])
    assert row["verdict"] == "undecided" and row["bar"] == 0.01  # so few questions settle nothing
    heldout, notes = set_rows(base, candidate)
    assert (heldout["set"], notes["set"]) == ("heldout", "notes") and abs(
        heldout["gap_relative"]
    ) < 0.05


BAD = """
import sys
from recipes.evaluation.evaluate import main
run, root = sys.argv[1:]
cases = [[run, "--tasks", "continuatoin", "--task-dir", f"{root}/tasks"],
         [run, "--tasks", "broken", "--task-dir", f"{root}/tasks"],
         [f"{root}/cut", "--max-tokens", "100"], [f"{root}/foreign", "--max-tokens", "100"],
         [run, "--sets", f"big={root}/big", "--max-tokens", "100"]]
sys.exit(sum(main(case) != 2 for case in cases))
"""


def test_wrong_checkpoint_task_and_tokenizer_are_one_line_each(evaluated: dict[str, Any]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    root, bf16 = evaluated["root"], evaluated["folders"]["bf16"]
    (root / "tasks" / "broken.yaml").write_text(
        TASK.format(questions="/nowhere.jsonl").replace("continuation", "broken")
    )
    for name in ("cut", "foreign"):
        shutil.copytree(bf16, root / name, ignore=shutil.ignore_patterns("export_hf"))
    for shard in (root / "cut").glob("checkpoints/*/weights/*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    for tokenizer in (root / "foreign").glob("checkpoints/*/context/tokenizer/tokenizer.json"):
        tokenizer.write_text("{}")
    builder = IndexedDatasetBuilder(f"{root}/big.bin", dtype=np.int32)
    builder.add_document(np.arange(1000, 1200, dtype=np.int32), [200])
    builder.finalize(f"{root}/big.idx")
    done = subprocess.run(
        [sys.executable, "-c", BAD, str(bf16), str(root)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    print("\n".join(errors))
    assert done.returncode == 0 and len(errors) == 5, done.stderr[-3000:]
    wanted = (
        "did you mean continuation",
        "tasks broken cannot be run",
        "cannot be loaded",
        "no tokenizer",
        "another tokenizer made it",
    )
    assert all(words in line for words, line in zip(wanted, errors, strict=True)), errors


def test_what_can_be_refused_before_anything_is_loaded(
    evaluated: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16 = evaluated["folders"]["bf16"]
    assert list(checkpoints(bf16)) == [STEPS]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "plan.json").write_text((bf16 / "plan.json").read_text())
    set_status(bare, "done")
    for args, words in (
        ([tmp_path], "no run folder"),
        ([bare], "no whole checkpoint"),
        ([bf16, "--step", 7], f"it has {STEPS}"),
        ([bf16, "--sets", "notes"], "not name=path"),
        ([bf16, "--sets", "x=/nowhere"], "neither /nowhere nor"),
        ([bf16, "--sets", "heldout=/tmp"], "another name"),
        ([bf16, "--tasks", "t", "--task-dir", tmp_path / "no"], "no folder"),
    ):
        assert main([str(a) for a in args]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
