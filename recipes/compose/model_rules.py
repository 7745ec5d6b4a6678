"""Which models a stack's NeMo trains as the plan states them: asked before a job is queued, from
NeMo's recipes as data.

NeMo's configuration of the recipe decides what is built (recipes/nemo_recipes.py); the plan chooses
sizes.  A plan that states another architecture than NeMo builds is refused, for its estimates and
its results would be of another model.
"""

from __future__ import annotations

from recipes.compose.layout_rules import Rule
from recipes.compose.remedies import Refusal, divisors
from recipes.nemo_recipes import FIXED, NemoRecipe, recipe_of, recipes_of, unknown
from recipes.plan import Plan


def recipe_is_trained(plan: Plan) -> str | None:
    """The recipe must be one of the stack's NeMo, and of a dense decoder; a version that the list
    lacks is not judged.
    """
    name, nemo = plan.model.nemo_recipe, plan.stack.versions["nemo"]
    if recipes_of(nemo) is None:
        return None
    recipe = recipe_of(nemo, name)
    if recipe is None:
        return unknown(name, plan.stack.name, nemo)
    if recipe.refused:
        return (
            f"model.nemo_recipe={name}: this recipe of NeMo is {recipe.refused}; docs/models.md"
            " lists those that work"
        )
    return None


def architecture_is_the_recipes(plan: Plan) -> str | None:
    """What the plan states of the architecture must be what NeMo's configuration of the recipe
    has.
    """
    recipe = recipe_of(plan.stack.versions["nemo"], plan.model.nemo_recipe)
    if recipe is None or not (different := contradictions(plan, recipe)):
        return None
    ours = ", ".join(f"model.{name}={_yaml(getattr(plan.model, name))}" for name in different)
    theirs = " ".join(f"model.{name}={_yaml(recipe.model[name])}" for name in different)
    return (
        f"{ours} is not what NeMo's recipe {recipe.name} builds; set {theirs}, or another"
        " model.nemo_recipe"
    )


def contradictions(plan: Plan, recipe: NemoRecipe) -> list[str]:
    """Return the fields that the plan states otherwise than NeMo builds them; a window may have
    another size, not come or go.
    """
    different = [name for name in FIXED if getattr(plan.model, name) != recipe.model[name]]
    windows = plan.model.sliding_window, recipe.model["sliding_window"]
    return different + ["sliding_window"] * ((windows[0] is None) != (windows[1] is None))


def _yaml(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def softcapped_attention_is_possible(plan: Plan) -> str | None:
    """NeMo v2.3.2 and v2.4.0 gpt/model/gemma2.py: attention with a softcap is NeMo's own, without
    Transformer Engine's kernels.

    It asserts that there is no context parallelism, and applies its window only where the batch
    brings an attention mask, which NeMo's data modules do not make beside Transformer Engine: a
    longer sequence would be seen whole.
    """
    model, window = plan.model, plan.model.sliding_window
    if model.attention_softcap is None:
        return None
    if plan.mapping.cp > 1:
        return (
            f"mapping.cp={plan.mapping.cp}: NeMo's attention of {model.nemo_recipe} (softcap) has"
            " no context parallelism; set mapping.cp=1"
        )
    if window and plan.seq_length > window:
        what = (
            f"seq_length={plan.seq_length} is beyond the sliding window of {model.name} ({window})"
        )
        return (
            f"{what}, and NeMo's attention of {model.nemo_recipe} applies no window; use"
            f" seq_length={window} or less"
        )
    return None


def windowed_attention_divides(plan: Plan) -> str | None:
    """NeMo gpt/model/mistral.py passes keys by all-to-all (cp_comm_type a2a), which shares the
    heads over the ranks.

    Transformer Engine (pytorch attention, AttnFuncWithCPAndQKVOA2A) asserts that heads and query
    groups divide by cp.
    """
    m, model = plan.mapping, plan.model
    if model.sliding_window and m.cp > 1 and (model.num_query_groups // m.tp) % m.cp:
        groups = f"the {model.num_query_groups} query groups of {model.name}"
        what = (
            f"mapping.cp={m.cp} with a sliding window shares the heads, and tp*cp={m.tp * m.cp}"
            f" does not divide {groups}"
        )
        return Refusal(
            what, "lower one", *({"mapping.cp": cp} for cp in reversed(divisors(m.cp)[:-1]))
        )
    return None


MODEL_RULES: tuple[Rule, ...] = (
    recipe_is_trained,
    architecture_is_the_recipes,
    softcapped_attention_is_possible,
    windowed_attention_divides,
)
