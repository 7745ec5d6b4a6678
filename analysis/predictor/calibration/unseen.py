"""How far off is the predictor on published steps that are in none of the reference files?

`reference/unseen_rows.csv` holds them: MLPerf Training logs of NVIDIA's stack with the layout of
their configuration files, NeMo's tables of older containers, its long sequences, packed batches,
and step times that stand in the text of READMEs.  Sizes of models that `conf/model` lacks are in
`unseen_models.csv`. No row is fitted.  The half `choose` (`halves`) chose forms and makes
intervals.  Left out: NVFP4, FP8 attention and LoRA, which the predictor cannot say.
"""

from __future__ import annotations

import csv
import functools

from analysis.predictor.calibration.published_steps import Row, base_plan
from analysis.runs.published import REFERENCE
from recipes.plan import Plan

ROWS, MODELS = "unseen_rows.csv", "unseen_models.csv"
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)
UNEVEN = "embedding_and_loss_count_as_layers"
Raw = dict[str, str]


@functools.cache
def unseen_rows() -> tuple[Row, ...]:
    """Return the rows of the file, each held in its family; their plans are the layouts as they
    ran.
    """
    found = []
    for raw in _lines(ROWS):
        plan = _plan(raw)
        held, seconds = raw["family"], float(raw["step_time_s"])
        found.append(Row(plan, seconds, raw["release"], raw["source"], held, raw["submitter"]))
    return tuple(found)


def _lines(name: str) -> list[Raw]:
    with (REFERENCE / name).open(newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def _models() -> dict[str, Raw]:
    return {raw["name"]: raw for raw in _lines(MODELS)}


def _plan(raw: Raw) -> Plan:
    name = raw["model"]
    sizes = _models().get(name)
    base = base_plan(sizes["like"] if sizes else name, raw["precision"], raw["gpu"])
    changed: dict[str, object] = {}
    if sizes:
        changed = {"name": name, "head_size": None, "tied_embeddings": name.startswith("gpt3")}
        changed |= {key: int(sizes[key]) for key in SIZES}
        changed |= {key: sizes[key] for key in ("activation", "position_embedding")}
    if raw["vocab_size"]:
        changed["vocab_size"] = int(raw["vocab_size"])
    model = base.model.model_copy(update=changed)
    uneven = model.num_layers % (int(raw["pp"]) * int(raw["vp"])) != 0
    return base.model_copy(
        update={
            "model": model.model_copy(update={UNEVEN: uneven}),
            "mapping": base.mapping.model_copy(update=_mapping(raw)),
            "num_gpus": int(raw["num_gpus"]),
            "seq_length": int(raw["seq_length"]),
        }
    )


def _mapping(raw: Raw) -> dict[str, object]:
    sizes = ("tp", "pp", "cp", "vp", "micro_batch", "global_batch", "offload_layers")
    switches = ("fsdp", "cuda_graphs", "tp_overlap")
    return {
        **{name: int(raw[name]) for name in sizes},
        **{name: raw[name] == "1" for name in switches},
        "recompute_layers": 0,
        "source": "published",
    }
