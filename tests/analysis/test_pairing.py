"""What pairs are compared on: every field has a declared effect, and what differs, or is not
recorded, is refused or named.

The folders are made from shipped runs by editing their plans and manifests, and go through the
commands.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from analysis import compare, report, throughput, tuning
from analysis.runs.effects import MANIFEST_FIELDS, PLAN_FIELDS
from analysis.speed import layouts
from recipes.manifest_record import Manifest
from recipes.plan import Plan

RESULTS = Path(__file__).parents[2] / "analysis" / "results"
DEMO = ("demo/llama3_tiny.bf16.cpu.seed1", "demo/llama3_tiny.fp8_current.cpu.seed1")
H200 = tuple(
    f"kernels_h200_a/{path.name}" for path in sorted((RESULTS / "kernels_h200_a").iterdir())
)
FIG2 = ("fig2_h200/llama3_130m.bf16.h200.seed1", "fig2_h200/llama3_130m.fp8_delayed.h200.seed1")
Edit = Callable[[dict[str, Any]], Any]


# Every field has an effect


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted fields of a model; `*` stands for the entries of a dictionary."""
    for name, field in model.model_fields.items():
        inner = [each for each in parts(field.annotation) if each is not model]
        for each in inner:
            yield from leaves(each, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}" + (
                ".*"
                if dict in {get_origin(t) for t in (field.annotation, *get_args(field.annotation))}
                else ""
            )


def parts(kind: Any) -> list[type[BaseModel]]:
    """Return the models in a type, those within lists of records too."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return (
        [each for inner in get_args(kind) for each in parts(inner)]
        if get_origin(kind) in (Annotated, Union, UnionType, list)
        else []
    )


def declared(model: type[BaseModel]) -> set[str]:
    """Return a model's fields as the declaration names them: sessions and what was seen of other
    processes as one.
    """
    whole = ("before.", "gpus.others_at_start.", "gpus.others_during.", "gpus.others_at_end.")
    return {
        next((part.rstrip(".") for part in whole if key.startswith(part)), key)
        for key in leaves(model)
    }


@pytest.mark.parametrize(
    ("model", "fields"),
    [(Plan, PLAN_FIELDS), (Manifest, MANIFEST_FIELDS)],
    ids=["plan", "manifest"],
)
def test_every_field_of_plan_and_manifest_has_a_declared_effect(
    model: type[BaseModel], fields: dict[str, Any]
) -> None:
    assert declared(model) == set(fields), (
        "declare its effect in analysis/runs/effects.py, and remove what is gone"
    )


# Through the commands


@pytest.fixture
def copies(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a maker of copies of shipped runs, the second of which (or those that `which` names)
    an edit changes.
    """

    def make(
        runs: tuple[str, ...],
        edit: Edit | None = None,
        which: tuple[int, ...] = (1,),
        file: str = "manifest.json",
    ) -> list[str]:
        folders = []
        for n, run in enumerate(runs):
            folder = tmp_path / f"{n}"
            if not folder.exists():
                shutil.copytree(RESULTS / run, folder)
                folder.chmod(0o700)
            if edit and n in which:
                tree = json.loads((folder / file).read_text())
                edit(tree)
                (folder / file).write_text(json.dumps(tree))
            folders.append(str(folder))
        return folders

    return make


def at(path: str, value: Any) -> Edit:
    """Return an edit that sets a dotted key; None removes it."""

    def edit(tree: dict[str, Any]) -> None:
        *parts, last = path.split("/")
        for part in parts:
            tree = tree[int(part)] if isinstance(tree, list) else tree.setdefault(part, {})
        tree.pop(last, None) if value is None else tree.__setitem__(last, value)

    return edit


def said(
    main: Callable[[list[str]], int],
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
    *options: str,
) -> tuple[int, str]:
    """Return a command's exit code, and what it printed with line ends folded."""
    code = main([*folders, *options])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and (code != 2 or printed.err.count("\n") == 1)
    return code, " ".join((printed.out + printed.err).split())


NAMED = {
    "environment/NVTE_FUSED_ATTN": ("0", "environment.NVTE_FUSED_ATTN 1 → 0"),
    "environment/NCCL_ALGO": ("Ring", "environment.NCCL_ALGO unset → Ring"),
    "environment/CUBLAS_WORKSPACE_CONFIG": (
        ":4096:8",
        "environment.CUBLAS_WORKSPACE_CONFIG not recorded → :4096:8",
    ),  # nobody looked
    "versions/torch": ("2.0.0", "versions.torch 2.13.0+cpu → 2.0.0"),
    "versions/megatron-core": ("0.13.0", "versions.megatron-core 0.12.3 → 0.13.0"),
    "device": (
        "AMD EPYC, 8 threads a process",
        "device AMD EPYC, 1 threads a process → AMD EPYC, 8 threads a process",
    ),
    "attention": ("flash-attn 2.7", None),
    "code/commit": ("0" * 40, "→ 0000000"),
    "code/dirty": (True, "with changes"),
}


@pytest.mark.parametrize("key", NAMED)
def test_what_can_move_a_loss_is_named_with_both_values(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    value, text = NAMED[key]
    code, printed = said(compare.main, copies(DEMO, at(key, value)), capsys)
    assert code in (0, 1, 3)
    if text:
        assert (
            f"not only precision differs from BF16, but also {text}" in printed or text in printed
        )
    else:  # of the base it is not recorded, and so it is no difference and no match
        assert (
            "not only precision differs" not in printed
            and "Not recorded by llama3_tiny.bf16.cpu.seed1" in printed
        )


REFUSED = {
    "order_sha256": ("1" * 64, "the order of the batches"),
    "data/sha256/train.bin": ("1" * 64, "differ in the data"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_batches_and_batches_that_nothing_proves_are_refused(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    value, text = REFUSED[key]
    code, printed = said(compare.main, copies(DEMO, at(key, value)), capsys)
    assert code == 2 and text in printed
    for n, absent in enumerate((None, "")):  # of one run, then of both
        code, printed = said(
            compare.main, copies(DEMO, at(key, absent), which=(1, 0)[: n + 1]), capsys
        )
        assert code == 2 and "has no hash of" in printed and printed.startswith("error: ")


def test_a_manifest_without_any_hash_proves_nothing(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = said(compare.main, copies(DEMO, at("data", None), which=(0, 1)), capsys)
    assert code == 2 and "data.sha256 of train.bin" in printed


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)])
def test_a_held_out_set_without_a_hash_is_not_proved_to_be_the_same(
    which: tuple[int, ...], copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for absent in (None, ""):
        edited = copies(DEMO, at("data/sha256/heldout.bin", absent), which=which)
        code, printed = said(compare.main, edited, capsys)
        assert code in (0, 1, 3), printed
        assert "so not proved to be the same: data.sha256 of heldout.bin" in printed


def test_another_held_out_set_is_refused(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = said(compare.main, copies(DEMO, at("data/sha256/heldout.bin", "1")), capsys)
    assert code == 2 and "differ in the data" in printed


@pytest.mark.parametrize("key", ["bar/relative", "bar/tail_fraction", "bar/absolute"])
def test_a_candidate_with_another_tolerance_is_refused(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (compare.main, lambda folders: report.main([*folders, "--out", "/dev/null"])):
        code, printed = said(command, copies(DEMO, at(key, 0.5), file="plan.json"), capsys)
        assert code == 2 and key.replace("/", ".") in printed and "→ 0.5" in printed


@pytest.mark.parametrize(
    "key", ["train/clip_grad", "data/seed", "settings/adam_kernel", "model/dropout"]
)
def test_a_plan_that_trains_otherwise_is_refused(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    value = {"settings/adam_kernel": "triton", "data/seed": 7}.get(key, 0.5)
    code, printed = said(compare.main, copies(DEMO, at(key, value), file="plan.json"), capsys)
    assert code == 2 and key.replace("/", ".") in printed


def test_a_layout_of_more_gpus_than_there_are_is_one_line(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = said(compare.main, copies(DEMO, at("mapping/tp", 2), file="plan.json"), capsys)
    assert code == 2 and "tp 2 x pp 1 x cp 1 are more than num_gpus=1" in printed


WRONG = {
    "environment": [],
    "environment/NVTE_FUSED_ATTN": 1,
    "versions": "new",
    "attention": 3,
    "before": {},
    "code/sha256": 1,
    "device": {},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_manifest_of_other_types_is_one_line(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = said(compare.main, copies(DEMO, at(key, WRONG[key])), capsys)
    assert code == 2 and f"manifest.json: {key.replace('/', '.')}" in printed


def test_what_no_run_recorded_is_named_once_and_what_some_lack_by_run(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tuple(f"demo/{path.name}" for path in sorted((RESULTS / "demo").iterdir()))
    _, printed = said(compare.main, copies(runs), capsys)
    assert (
        printed.count("Not recorded by") == 1
        and "by any run, and so not proved to be the same: environment beyond NCCL_*" in printed
    )
    _, printed = said(compare.main, copies(runs, at("versions/torch", None), which=(2, 3)), capsys)
    names = ", ".join(Path(run).name for run in runs[2:4])
    assert (
        printed.count("Not recorded by") == 2
        and f"Not recorded by {names}, and so not proved to be the same: versions (torch)"
        in printed
    )


def test_a_run_that_was_continued_with_something_else_is_named(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((RESULTS / DEMO[1] / "manifest.json").read_text())
    before = {**manifest, "versions": {**manifest["versions"], "torch": "2.0.0"}}
    _, printed = said(compare.main, copies(DEMO, at("before", [before, {}])), capsys)
    assert (
        "seed1: was continued after a session with other versions.torch 2.0.0 → 2.13.0+cpu, a"
        " session of which nothing is recorded" in printed
    )


def test_another_tokenizer_is_named(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    copies(DEMO, at("data/tokenizer_sha256", "a" * 64), which=(0,))
    _, printed = said(compare.main, copies(DEMO, at("data/tokenizer_sha256", "b" * 64)), capsys)
    assert "but also data.tokenizer_sha256 aaaaaaa → bbbbbbb" in printed


def test_code_is_the_same_where_its_files_are_and_only_there(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    dirty = {"commit": "a" * 40, "dirty": True}
    _, printed = said(compare.main, copies(DEMO, at("code", dirty), which=(0, 1)), capsys)
    assert "code (its uncommitted changes)" in printed and "code." not in printed
    _, printed = said(
        compare.main, copies(DEMO, at("code", {**dirty, "sha256": "1" * 64}), which=(0, 1)), capsys
    )
    assert "code" not in printed
    _, printed = said(compare.main, copies(DEMO, at("code/sha256", "2" * 64)), capsys)
    assert (
        "code.sha256 1111111 → 2222222 (commit aaaaaaa with changes → aaaaaaa with changes)"
        in printed
    )


def test_the_base_is_the_one_that_differs_least(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = copies((DEMO[0], *DEMO), at("versions/torch", "2.0.0"), which=(0,))
    copies((DEMO[0], *DEMO), at("run_name", "other"), which=(0,), file="plan.json")
    assert compare.main([*folders, "--json"]) in (0, 1, 3)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["base"] == "llama3_tiny.bf16.cpu.seed1" and "versions.torch" not in " ".join(
        row["differs"]
    )


# Where speed is compared

SPEED = {
    "environment/CUDA_DEVICE_MAX_CONNECTIONS": (
        "8",
        "environment.CUDA_DEVICE_MAX_CONNECTIONS unset → 8",
    ),
    "environment/NVTE_FUSED_ATTN": ("0", "environment.NVTE_FUSED_ATTN 1 → 0"),
    "gpus/0/driver": ("1.0", "→ 1.0"),
    "gpus/0/power_limit_w": (500.0, "gpus.power_limit_w 700.0 → 500.0"),
    "cudnn/torch": ("9.1.0", "cudnn.torch 9.14.0 → 9.1.0"),
    "code/commit": ("0" * 40, "→ 0000000"),
}


@pytest.mark.parametrize("key", SPEED)
def test_what_can_move_a_step_time_is_named_in_the_tables_of_speed(
    key: str, copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    value, text = SPEED[key]
    last = len(H200) - 1
    folders = copies(H200, at(key, value), which=(last,))
    code, printed = said(throughput.main, folders, capsys)
    assert (
        code == 0
        and f"Beside precision and layout: {key.split('/')[0]}" in printed
        and text in printed
    )


def test_a_variable_that_the_shell_set_is_a_change_of_settings(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    same = (H200[0], H200[0])
    _, printed = said(tuning.main, copies(same), capsys)
    assert tuning.AGAIN in printed
    code, printed = said(
        tuning.main, copies(same, at("environment/NVTE_NORM_FWD_USE_CUDNN", "1")), capsys
    )
    assert code == 0 and "NVTE_NORM_FWD_USE_CUDNN=1" in printed and tuning.AGAIN not in printed


@pytest.mark.parametrize("command", [throughput.main, tuning.main, compare.main])
def test_a_run_that_shared_its_gpu_is_named_without_a_pair_too(
    command: Callable[[list[str]], int],
    copies: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    runs = {throughput.main: H200[:1], tuning.main: (H200[0], H200[0]), compare.main: FIG2}[command]
    folders = copies(
        runs,
        at("gpus", [{"rank": 0, "others_during": {"processes": 2, "memory_gb": 3.0}}]),
        which=(0,),
    )
    out = tmp_path / "table.md"
    code, printed = said(
        command, folders, capsys, *([] if command is compare.main else ["--out", str(out)])
    )
    assert code in (0, 3) and "at most 2 on a GPU, 3.0 GB" in printed
    assert command is compare.main or "(shared GPU)" in out.read_text()


def test_layouts_name_what_differs_beside_the_layout(
    copies: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tuple(
        f"layouts_h200/{path.name}"
        for path in sorted((RESULTS / "layouts_h200").iterdir())
        if path.name.startswith("bf16")
    )
    code, printed = said(
        layouts.main, copies(runs, at("environment/NCCL_ALGO", "Tree"), which=(1,)), capsys
    )
    assert code == 0 and "environment.NCCL_ALGO unset → Tree" in printed
