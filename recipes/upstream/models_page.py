"""docs/models.md: which of NeMo's recipes train here, and why the others do not; made from the list
by `python -m recipes.upstream.nemo_source --write`.
"""

from __future__ import annotations

from pathlib import Path

from recipes.nemo_recipes import NemoRecipe, by_version

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEAD = """# Models

This page is made by `python -m recipes.upstream.nemo_source --write` from `recipes/reference/nemo_recipes.csv`. That list is read from
the source of NeMo, a version at a time: 2.3 is in stack `nemo_25_04`, 2.4 in `nemo_25_07`.

A model's file in `conf/model/` names one of these recipes as `nemo_recipe` and chooses the sizes. The architecture is NeMo's.
A plan that states another one is refused, and so is a recipe of another kind of model.

    python -m recipes.upstream.nemo_source --model mistral_nemo_12b > conf/model/mistral_nemo_12b.yaml

prints such a file. `vocab_size` is the tokenizer's where NeMo leaves it to the tokenizer: fill it in.

What was run: each dense decoder of NeMo 2.3 trained a few steps on the CPU, cut in depth and width, in BF16 and MXFP8, and each
recipe builds for a GPU. `tests/recipes/test_models.py` repeats it for one recipe of each architecture, and compares the logits of
nine with Hugging Face's model of the same weights: they agree within FP32 rounding. Of NeMo 2.4 all recipes below were built, and
Qwen3 8B was trained and compared in the same way, once, on the sources of NeMo 2.4.0 and Megatron-Core 0.13.0rc1 in this project's
environment. On GPUs Llama 3, Llama 3.1 405B and Nemotron-4 were run ([h200.md](h200.md)), no other architecture.

## Limits

- Gemma 2: sequences are at most as long as the sliding window (4,096). NeMo's attention of this model applies no window without
  an attention mask, and gives the window to other layers than the published model does. Context parallelism is refused.
- Gemma 2 keeps all attention scores, for NeMo computes its softcap without a fused kernel: about 1.1 GB per layer and sequence of
  4,096 tokens in the 9B model (counted from the source, not measured).
- Gemma 2 27B: NeMo gives it heads of 256 values, the published model has 128. `model.head_size=128` sets it.
- A sliding window of 4,096 lets a token see 4,096 tokens before itself, as Transformer Engine counts. Hugging Face's includes the
  token itself and sees one fewer.
- Recommended layouts exist for the five models of NVIDIA's tables. The others start from no model parallelism.
"""  # noqa: E501


def text() -> str:
    """Return the page."""
    versions = sorted(by_version())
    names = sorted({name for version in versions for name in by_version()[version]})
    rows = [_row(name, versions) for name in names]
    works = [row for row, refused in rows if not refused]
    others = [row for row, refused in rows if refused]
    return "\n".join(
        [
            HEAD,
            "## Recipes that work",
            "",
            f"| recipe | {' | '.join(f'NeMo {version}' for version in versions)} | architecture |",
            f"|---|{'---|' * len(versions)}---|",
            *works,
            "",
            "## Recipes that are refused, and why",
            "",
            "| recipe | it is |",
            "|---|---|",
            *others,
            "",
        ]
    )


def _row(name: str, versions: list[str]) -> tuple[str, bool]:
    """Return the row of a recipe, and whether it is refused."""
    recipes = [by_version()[version].get(name) for version in versions]
    newest = next(recipe for recipe in reversed(recipes) if recipe)
    if newest.refused:
        return f"| {name} | {newest.refused} |", True
    there = " | ".join("works" if recipe else "–" for recipe in recipes)
    return f"| {name} | {there} | {_architecture(newest)} |", False


def _architecture(recipe: NemoRecipe) -> str:
    """Return what a model has, in words."""
    model = recipe.model
    places = (
        "learned positions"
        if model["position_embedding"] == "learned_absolute"
        else f"RoPE base {model['rotary_base']:,.0f}"
    )
    parts = [str(model["activation"]), str(model["normalization"]), places]
    if model["rotary_percent"] not in (None, 1.0):
        parts.append(f"on {model['rotary_percent']:.0%} of a head")
    named = {
        "rope_scaling": "Llama 3.1 scaling by {:g}",
        "head_size": "heads of {:g}",
        "sliding_window": "sliding window {:,g}",
        "attention_softcap": "softcap {:g} on scores",
        "logit_softcap": "softcap {:g} on logits",
        "dropout": "dropout {:g}",
    }
    parts += [words.format(model[field]) for field, words in named.items() if model[field]]
    flags = {
        "tied_embeddings": "tied embeddings",
        "linear_bias": "biases",
        "qkv_bias": "QKV bias",
        "qk_norm": "QK norm",
        "post_norms": "post norms",
        "embedding_scaling": "scaled embeddings",
    }
    parts += [
        words
        for field, words in flags.items()
        if model[field] and not (field == "qkv_bias" and model["linear_bias"])
    ]
    return ", ".join(parts)
