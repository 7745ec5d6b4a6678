"""What a plan leaves open: values that depend on more than one axis, filled in after the axes were
composed.

A recommended mapping belongs to a model, a GPU, a stack and a number format together, so no single
YAML file can hold it; it is looked up in `reference/recommended_mappings.csv` (NVIDIA's own tables,
by NeMo tag).  Whatever the user gave stays as given: only what is null is filled, and the rules
check the outcome.
"""

from __future__ import annotations

import csv
import functools
from typing import Any

from recipes.compose.layout_rules import OFF, excluded
from recipes.estimate.schedule import fill_batch, fill_rates
from recipes.nemo_recipes import with_architecture
from recipes.paths import REFERENCE

Tree = dict[str, Any]
RECOMMENDED = REFERENCE / "recommended_mappings.csv"
FOR_BF16 = "recommended_for_bf16"
LOOKED_UP = ("recommended", FOR_BF16)  # a mapping's source where its row is looked up
DROPPED = "dropped: "  # begins the note of what a layout gave up for a field that was asked for
FLAGS = ("cuda_graphs", "fsdp")
SIZES = (
    "tp",
    "pp",
    "cp",
    "vp",
    "micro_batch",
    "global_batch",
    "recompute_layers",
    "offload_layers",
)


def fill(tree: Tree) -> Tree:
    """Return the composed tree with every null filled that has a known value."""
    tree = with_architecture(tree)
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    try:
        fill_rates(filled)
        asked_batch, asked_graphs = (
            filled["mapping"][key] for key in ("global_batch", "cuda_graphs")
        )
        for step in (_mapping, _executor, _settings, _precision):
            step(filled)
        fill_batch(filled, asked_batch)
        if asked_graphs is None:
            _graphs(filled)
    except (KeyError, TypeError, AttributeError):
        return tree  # a part is missing or no mapping: the plan's types say which
    return filled


@functools.cache
def recommended() -> list[dict[str, str]]:
    """Return NVIDIA's recommended mappings, a row a NeMo tag, model, GPU and number format ("*":
    any).
    """
    with RECOMMENDED.open(newline="") as file:
        return list(csv.DictReader(file))


def _row(tree: Tree) -> dict[str, str]:
    """Return the recommended row of a tree's cell: that of its GPU, of one mapped like it, or the
    last, which fits any.
    """
    gpu, as_bf16 = (
        tree["gpu"],
        tree["precision"]["fp8"] is None or tree["mapping"]["source"] == FOR_BF16,
    )
    wanted = {
        "nemo_ref": (tree["stack"]["recommended"],),
        "model": (tree["model"]["name"],),
        "gpu": (gpu["name"], gpu.get("mapped_like")),
        "dtype": ("bf16",) if as_bf16 else (tree["precision"]["name"], "fp8"),
    }
    for row in recommended():
        if all(row[key] == "*" or row[key] in values for key, values in wanted.items()):
            return row
    raise AssertionError("the last row fits any cell")


def recommended_layout(tree: Tree) -> dict[str, int | bool]:
    """Return the fields of the layout that a tree's recommended row has."""
    row = _row(tree)
    return {**{key: int(row[key] or 1) for key in SIZES}, **{key: row[key] == "1" for key in FLAGS}}


def _mapping(tree: Tree) -> None:
    """Fill the layout from its recommended row; its source names the row, and what was given
    otherwise.
    """
    mapping = tree["mapping"]
    given = None not in [mapping[key] for key in (*SIZES, *FLAGS)]
    if given and tree["num_gpus"] is None:
        tree["num_gpus"] = _smallest(mapping)
    if given and mapping["source"] not in LOOKED_UP:
        return
    row, known = _row(tree), recommended_layout(tree)
    changed = [key for key, value in known.items() if mapping[key] not in (None, value)]
    changed += ["num_gpus"] if tree["num_gpus"] not in (None, int(row["num_gpus"])) else []
    asked = {key for key in known if mapping[key] is not None}
    mapping.update({key: value for key, value in known.items() if key not in asked})
    dropped = _drop_excluded(mapping, asked, tree["model"])
    notes = [f"changed: {', '.join(changed)}"] * bool(changed) + [
        f"{DROPPED}{', '.join(dropped)}"
    ] * bool(dropped)
    mapping["source"] = "; ".join([f"{mapping['source']}: {row['source']}", *notes])
    tree["num_gpus"] = int(row["num_gpus"]) if tree["num_gpus"] is None else tree["num_gpus"]


def _drop_excluded(mapping: Tree, asked: set[str], model: Tree) -> list[str]:
    """Take back what came from the recommended row and what the fields that were asked for exclude.

    Nothing is taken back that was asked for, nor where nothing was: then the row is used as it
    stands. Returns what was dropped, each with the reason.
    """
    m, dropped = mapping, []

    def drop(key: str, value: int | bool, because: str) -> None:
        if key not in asked and m[key] != value:
            dropped.append(f"{key}={_text(m[key])} ({because})")
            m[key] = value

    if not asked:
        return []
    for key in (key for key in (*SIZES, *FLAGS) if key in asked):
        for other in list(excluded(m, key)):
            drop(other, OFF[other], f"{key}={_text(m[key])}")
    chunks = (model["num_layers"] + 2 * model.get("embedding_and_loss_count_as_layers", False)) / m[
        "pp"
    ]
    if m["pp"] == 1:
        drop("vp", 1, "pp=1")
    elif chunks % 1 == 0 and chunks % m["vp"]:
        drop("vp", 1, f"it does not divide the {chunks:.0f} layers of a stage")
    if m["recompute_layers"] * m["vp"] > chunks:
        drop("recompute_layers", int(chunks // m["vp"]), "a stage has no more layers")
    return dropped


def _text(value: int | bool) -> str:
    return str(value).lower()


def _smallest(mapping: Tree) -> int:
    return int(mapping["tp"] * mapping["pp"] * mapping["cp"])


def _executor(tree: Tree) -> None:
    if tree["executor"].get("kind") is None:
        tree["executor"]["kind"] = "slurm" if tree["gpu"].get("compute_capability") else "local"


def _settings(tree: Tree) -> None:
    """NeMo v2.3.2 scripts/performance/utils.py:293 (overlap) and :339 (precision-aware optimizer,
    for BF16 alone).
    """
    settings, mapping = tree["settings"], tree["mapping"]
    if settings.get("precision_aware_optimizer", False) is None:
        dropped = bool(mapping["fsdp"] and tree["stack"].get("fsdp_drops_gradients"))
        settings["precision_aware_optimizer"] = tree["precision"]["fp8"] is None and not dropped
    if settings.get("overlap_param_gather_with_optimizer_step", False) is None:
        settings["overlap_param_gather_with_optimizer_step"] = bool(
            mapping["pp"] > 1 and mapping["vp"] > 1 and tree["num_gpus"] > _smallest(mapping)
        )
    if settings.get("check_gradients", False) is None:
        settings["check_gradients"] = _scripts(tree).get("check_gradients", True)


def _scripts(tree: Tree) -> Tree:
    """Return what the stack's file says of its performance scripts."""
    return dict(tree["stack"].get("scripts") or {})


def _precision(tree: Tree) -> None:
    precision = tree["precision"]
    if not isinstance(precision["fp8"], dict):
        return
    fp8 = precision["fp8"] = dict(precision["fp8"])
    if fp8.get("param_gather", False) is None:
        fp8["param_gather"] = _keeps_fp8_parameters(tree, fp8)
    if tree["settings"]["bf16_layers"] is False:
        fp8["first_layers_bf16"] = fp8["last_layers_bf16"] = 0


def _keeps_fp8_parameters(tree: Tree, fp8: Tree) -> bool:
    """Whether parameters are kept in FP8 by default: where stack, optimizer and layout can.

    Under MXFP8 not where checkpoints are written.  Its values by columns come from the main
    parameters; read back from a checkpoint they would come from those by rows, and a run would not
    continue to the numbers of an unbroken one.
    """
    stack, settings, fsdp = tree["stack"], tree["settings"], tree["mapping"]["fsdp"]
    if stack.get("emulates_fp8") or settings["precision_aware_optimizer"]:
        return False
    if fp8["scaling"] == "mxfp8":
        return (
            bool(_scripts(tree).get("mxfp8_parameters"))
            and not fsdp
            and not settings["checkpoints"]
        )
    return bool(stack["fp8_parameters_with_fsdp"] or not fsdp)


def _graphs(tree: Tree) -> None:
    """Turn recommended CUDA graphs off where they would run layers in FP8 that are kept in BF16."""
    mapping, fp8, dropped = (
        tree["mapping"],
        tree["precision"]["fp8"],
        tree["stack"].get("graphs_drop_bf16_layers"),
    )
    if (
        mapping["cuda_graphs"]
        and dropped
        and fp8
        and fp8["first_layers_bf16"] + fp8["last_layers_bf16"]
    ):
        mapping["cuda_graphs"] = False
        mapping["source"] += f"; CUDA graphs off: {dropped}"
