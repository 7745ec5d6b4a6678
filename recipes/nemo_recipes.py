"""Which recipes a stack's NeMo has, and what model each of them builds.

The list is data, so that a login node knows it without NeMo: `reference/nemo_recipes.csv`, a row
for a version of NeMo and a recipe, written by `python -m recipes.upstream.nemo_source`.
`ARCHITECTURE` names the fields of `model` that a plan takes from it; NeMo's own configuration of
the recipe sets them in the job.
"""

from __future__ import annotations

import csv
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from recipes.paths import CONF, REFERENCE

NEMO_RECIPES = REFERENCE / "nemo_recipes.csv"
STACKS = CONF / "stack"

# A kind of scaling -> `fp8_recipe` of NeMo and Megatron-Core.
NEMO_NAMES = {
    "delayed": "delayed",
    "current": "tensorwise",
    "subchannel": "blockwise",
    "mxfp8": "mxfp8",
}
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
    "seq_length",
)
CHOSEN = (
    "head_size",
    "tied_embeddings",
    "sliding_window",
)  # a plan may choose other values, NeMo's layers take them
FIXED = (
    "activation",
    "fused_activation",
    "normalization",
    "post_norms",
    "linear_bias",
    "qkv_bias",
    "qk_norm",
    "position_embedding",
    "rotary_base",
    "rotary_percent",
    "rope_scaling",
    "attention_softcap",
    "logit_softcap",
    "embedding_scaling",
    "dropout",
)
ARCHITECTURE = (*CHOSEN, *FIXED)
TEXTS = (
    "nemo",
    "recipe",
    "refused",
    "config",
    "activation",
    "normalization",
    "position_embedding",
    "attention_backend",
)
COLUMNS = (
    "nemo",
    "recipe",
    "refused",
    "config",
    "performance_mode",
    *SIZES,
    *ARCHITECTURE,
    "attention_backend",
)

Value = str | int | float | bool | None


@dataclass(frozen=True)
class NemoRecipe:
    """A module of nemo.collections.llm.recipes.

    `refused`: why this project does not train it; empty for a dense decoder.  `config`: NeMo's
    class of its configuration.  `performance_mode`: whether its `pretrain_recipe` takes that
    argument.  `model`: sizes and architecture, by the names of the plan's fields; a size that is
    None comes from the tokenizer.
    """

    name: str
    refused: str
    config: str
    performance_mode: bool
    attention_backend: str
    model: Mapping[str, Value]


@functools.cache
def by_version() -> dict[str, dict[str, NemoRecipe]]:
    """Return the recipes by version of NeMo ("2.3") and name."""
    found: dict[str, dict[str, NemoRecipe]] = {}
    with NEMO_RECIPES.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["nemo"], {})[row["recipe"]] = _recipe(row)
    return found


def _recipe(row: dict[str, str]) -> NemoRecipe:
    model = {name: value_of(name, row[name]) for name in (*SIZES, *ARCHITECTURE)}
    performance_mode = row["performance_mode"] == "true"
    return NemoRecipe(
        row["recipe"],
        row["refused"],
        row["config"],
        performance_mode,
        row["attention_backend"],
        model,
    )


def value_of(name: str, text: str) -> Value:
    """Return the value that a cell of the list holds; an empty one is None."""
    if text == "" or name in TEXTS:
        return text or None
    if text in ("true", "false"):
        return text == "true"
    return float(text) if "." in text or "e" in text else int(text)


def recipes_of(nemo: str) -> dict[str, NemoRecipe] | None:
    """Return the recipes of a version of NeMo; None where the list does not have it."""
    return by_version().get(nemo)


def recipe_of(nemo: str, name: str) -> NemoRecipe | None:
    """Return a recipe of a version of NeMo; None where it, or the version, is not in the list."""
    return (recipes_of(nemo) or {}).get(name)


def with_architecture(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a plan's tree whose model states what its NeMo recipe has, where the tree leaves it
    open.

    Plans of older versions lack these fields; what they trained is what the recipe had.
    """
    model, stack = tree.get("model"), tree.get("stack")
    versions = stack.get("versions") if isinstance(stack, dict) else None
    if not isinstance(model, dict) or not isinstance(versions, dict):
        return tree
    recipe = recipe_of(str(versions.get("nemo")), str(model.get("nemo_recipe")))
    if recipe is None or recipe.refused:
        return tree
    known = {name: recipe.model[name] for name in ARCHITECTURE if model.get(name) is None}
    return {**tree, "model": {**model, **known}}


def _stacks_with(nemo: str) -> list[str]:
    """Return the shipped stacks with a version of NeMo, as overrides."""
    stacks = [yaml.safe_load(path.read_text()) for path in sorted(STACKS.glob("*.yaml"))]
    return [f"stack={stack['name']}" for stack in stacks if stack["versions"]["nemo"] == nemo]


def unknown(name: str, stack: str, nemo: str) -> str:
    """Return the sentence that refuses a recipe which NeMo does not have, with the names that come
    close.
    """
    elsewhere = next(
        (version for version, recipes in by_version().items() if name in recipes), None
    )
    what = f"model.nemo_recipe={name}: {stack} has NeMo {nemo}, which has no such recipe"
    if elsewhere:
        return (
            f"{what}; NeMo {elsewhere} has it, use"
            f" {' or '.join(_stacks_with(elsewhere)) or 'a stack with that version'}"
        )
    close = difflib.get_close_matches(name, recipes_of(nemo) or (), n=3)
    return (
        f"{what};"
        f" {'use ' + ' or '.join(close) if close else 'docs/models.md lists those that there are'}"
    )
