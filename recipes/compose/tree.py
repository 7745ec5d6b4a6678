"""From the command line to plans: Hydra composes conf/, pydantic types the result, the rules check
it.

Every command takes Hydra overrides (`model=… precision=… mapping.tp=4`); `a,b` values make a sweep.
All errors of a wrong input leave here as one InputError line.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError  # type: ignore[import-untyped]

from recipes.compose.defaults import fill
from recipes.compose.fit import State, state
from recipes.compose.fitting import fitted
from recipes.compose.hydra_loader import composed, without_hydra
from recipes.compose.layout_rules import Rule
from recipes.compose.origin import check_site, file_of
from recipes.compose.remedies import Change
from recipes.compose.remedies import overrides as of_change
from recipes.compose.rules import RULES, check, model_fits_gpu
from recipes.compose.secrets import refuse_secrets
from recipes.data.files import wrong_data
from recipes.errors import InputError, one_line
from recipes.overlap import resolved
from recipes.paths import CONF as CONF
from recipes.plan import Data, Frozen, Plan, Positive

# What composing raises on values that cannot be used: Hydra checks few of them before it takes them
# for names of files or for lists.
UNUSABLE = (
    HydraException,
    OmegaConfBaseException,
    YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    RecursionError,
)
# Mappings whose keys are the user's own.  Hydra adds a key to a composed mapping only where the
# override begins with + or ++.
FREE = tuple(
    f"{group}.{name}"
    for group, part in Plan.model_fields.items()
    for name, field in getattr(part.annotation, "model_fields", {}).items()
    if get_origin(field.annotation) is dict
)
FULL_KEY = re.compile(r"full_key: (\S+)")
BF16_LAYERS = ("precision.fp8.first_layers_bf16", "precision.fp8.last_layers_bf16")
COMMAND_KEYS = (
    "experiment",
    "dry_run",
)  # keys of conf/config.yaml that steer a command and are no part of the plan


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the override lists of a multirun: the product of every `key=a,b` (Hydra's basic
    sweeper).
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        axes = [
            (
                [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
                if o.is_sweep_override()
                else [o.input_line or ""]
            )
            for o in parsed
        ]
    except (
        HydraException,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: a number of more digits than Python converts
        raise InputError(
            f"cannot read the overrides: {one_line(str(error))}; write key=value"
        ) from None
    return [list(choice) for choice in itertools.product(*axes)]


def compose_tree(overrides: Sequence[str], conf: Path = CONF) -> dict[str, Any]:
    """Return the composed tree as plain Python values; raise InputError on an unknown key, group or
    option.
    """
    check_site(overrides, conf)
    try:
        config = without_hydra(composed([_free(override) for override in overrides], conf))
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise _missing(error.full_key or "a value", overrides, conf) from None
    except UNUSABLE as error:
        raise InputError(_explain(error, overrides, conf)) from None
    assert isinstance(tree, dict)
    if "made_with" in tree:
        raise InputError(
            f"this experiment trains nothing; make its figure with {tree['made_with']}"
        )
    return {
        str(key): value for key, value in tree.items() if (key, value) != ("local", {})
    }  # an empty site file


def compose_plan(
    overrides: Sequence[str] = (), conf: Path = CONF, rules: Sequence[Rule] = RULES
) -> Plan:
    """Return the plan for `overrides`, checked by `rules`; InputError with one clear line
    otherwise.

    A recommended layout may give way to one that fits (recipes.compose.fitting), unless memory is
    not among the rules: that of a run which has happened stays.
    """

    def accepts(change: Change) -> State:
        try:
            kept = [
                override
                for override in overrides
                if override.lstrip("+").partition("=")[0] not in change
            ]
            changed = check(_composed([*kept, *of_change(change).split()], conf, rules), rules)
        except InputError:
            return "refused"
        return state(changed) if model_fits_gpu in rules else "fits"

    return check(_composed(overrides, conf, rules), rules, accepts)


def _composed(overrides: Sequence[str], conf: Path, rules: Sequence[Rule]) -> Plan:
    """Return the typed plan that is to be checked."""
    tree = _without_secrets(compose_tree(overrides, conf))
    _sizes_are_numbers(tree)
    _bf16_layers_are_kept(tree, overrides)
    _shorten_warmup(tree, overrides)
    tree = {k: v for k, v in tree.items() if k not in COMMAND_KEYS}
    plan = plan_from_tree(fill(tree), overrides, conf)
    return resolved(fitted(plan, tree, conf) if model_fits_gpu in rules else plan)


def _without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return `tree`; InputError where a value is no text or looks like a secret."""
    try:
        json.dumps(tree, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError:
        raise InputError(
            "an override, or a file of conf/, has bytes in it that are no UTF-8; write it anew"
        ) from None
    refuse_secrets(tree)
    return tree


class _Tokens(Frozen):
    """The part of a plan that decides which data sets are made."""

    data: Data
    vocab_size: Positive


def compose_data(overrides: Sequence[str] = (), conf: Path = CONF) -> tuple[Data, int]:
    """Return the data that `overrides` name and model.vocab_size, checked apart from the rest.

    Preparing data needs neither a plan's memory nor its layout.  InputError as `compose_plan`.
    """
    tree = _without_secrets(compose_tree(overrides, conf))
    model = tree.get("model")
    size = model.get("vocab_size") if isinstance(model, dict) else None
    try:
        found = _Tokens.model_validate({"data": tree.get("data"), "vocab_size": size})
    except ValidationError as error:
        raise _wrong(error, overrides, conf) from None
    if wrong := wrong_data(found.data):
        raise InputError(wrong)
    return found.data, found.vocab_size


def _free(override: str) -> str:
    """Return an override that may add keys where its key, or one within its value, may be the
    user's own.

    A key that is not is refused by the plan's types, which know the fields beside it.
    """
    key, _, value = override.partition("=")
    is_free = value.startswith("{") or any(
        key == free or key.startswith(f"{free}.") for free in FREE
    )
    return f"++{override}" if is_free and key[:1] not in "+~" else override


def _sizes_are_numbers(tree: dict[str, Any]) -> None:
    """The sizes of a mapping are multiplied before the plan's types are looked at, and a text times
    a number is a longer text.
    """
    mapping = tree.get("mapping")
    for name in ("tp", "pp", "cp"):
        size = mapping.get(name) if isinstance(mapping, dict) else None
        if not isinstance(size, int | None):
            raise InputError(
                f"mapping.{name} is no whole number (given: {one_line(repr(size))[:80]}); see conf/"
                " for what it takes"
            )


def _bf16_layers_are_kept(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Settings that drop the layers in BF16 must not drop those that a command line asks for."""
    settings = tree.get("settings")
    if not isinstance(settings, dict) or settings.get("bf16_layers") is not False:
        return
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in BF16_LAYERS and value != "0":
            raise InputError(
                f"{override}: settings.bf16_layers=false keeps no layer in BF16; set"
                " settings.bf16_layers=true, or leave it out"
            )


def _shorten_warmup(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """An experiment's warm-up that is as long as the run gives way to the model's own; one from the
    command line stays.
    """
    asked = any(
        override.lstrip("+").partition("=")[0] == "train.warmup_steps" for override in overrides
    )
    train = tree.get("train")
    if asked or not isinstance(train, dict):
        return
    steps, warmup = train.get("max_steps"), train.get("warmup_steps")
    if type(steps) is int and type(warmup) is int and warmup >= steps:
        train["warmup_steps"] = None


def plan_from_tree(
    tree: dict[str, Any], overrides: Sequence[str] | None = None, conf: Path = CONF
) -> Plan:
    """Return the typed plan of a plain tree; InputError names the file that is wrong where
    `overrides` composed the tree.
    """
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise _wrong(error, overrides, conf) from None


def _wrong(error: ValidationError, overrides: Sequence[str] | None, conf: Path) -> InputError:
    key, problem = _problem(error)
    file = None if overrides is None else file_of(key, overrides, conf)
    return InputError(f"{file}: {problem}" if file else problem)


def _missing(key: str, overrides: Sequence[str], conf: Path) -> InputError:
    """Return the error for a value that must be given; a misspelt key is named before what
    lacks.
    """
    tree = {
        name: part
        for name, part in _with_gaps(overrides, conf).items()
        if name not in (*COMMAND_KEYS, "local")
    }
    try:
        Plan.model_validate(tree)
    except ValidationError as error:
        if any(map(_is_unknown, error.errors(include_url=False))):
            return _wrong(error, overrides, conf)
    return InputError(
        f"{key} has no default and must be given; add {key}=…, see conf/ for what it takes"
    )


def _with_gaps(overrides: Sequence[str], conf: Path) -> dict[str, Any]:
    """Return the composed tree with "???" where a value that must be given is missing."""
    config = without_hydra(composed([_free(override) for override in overrides], conf))
    tree = OmegaConf.to_container(config)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _is_unknown(problem: ErrorDetails) -> bool:
    return problem["type"] == "extra_forbidden"


def _problem(error: ValidationError) -> tuple[str, str]:
    """Return the key of a value that the plan's types refuse, and what is wrong: a key too many
    before one that lacks.
    """
    problems = error.errors(include_url=False)
    problem = next(filter(_is_unknown, problems), problems[0])
    where = ".".join(str(part) for part in problem["loc"])
    if _is_unknown(problem):
        near = _near(str(problem["loc"][-1]), _siblings(problem["loc"]))
        return (
            where,
            (
                f"{where}: no such field in the plan{near}; remove it, or see conf/ for the fields"
                " that there are"
            ),
        )
    if problem["type"] == "missing":
        return (
            where.rpartition(".")[0] or where,
            f"{where}: {problem['msg']}; see conf/ for what it takes",
        )
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    given = one_line(repr(problem["input"]))[:80]
    is_bare = problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float)
    return (
        where,
        (
            f"{where}: {message} (given: {given});"
            f" {'put it in quotes' if is_bare else 'see conf/ for what it takes'}"
        ),
    )


def _siblings(where: Sequence[str | int]) -> list[str]:
    """Return the fields of the part of the plan in which a key stands."""
    part: Any = Plan
    for name in where[:-1]:
        field = getattr(part, "model_fields", {}).get(str(name))
        options = get_args(field.annotation) if field else ()
        part = next((a for a in options if hasattr(a, "model_fields")), field and field.annotation)
    return list(getattr(part, "model_fields", {}))


def _explain(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    text = one_line(str(error))
    if "Config group override must be a string" in text:
        return (
            "a group of conf/ must name one of its files, as in mapping=single; see conf/ for them"
        )
    swept = next((o for o in overrides if "," in o and "[" not in o and "{" not in o), None)
    if swept:
        key, _, values = swept.partition("=")
        return (
            f"{swept}: several values make a sweep, and one is wanted here; give one, "
            f"a list as {key}=[{values}], or python -m launch -m for a run of each"
        )
    full = FULL_KEY.search(text)
    if full and (file := file_of(full[1], overrides, conf)):
        return f"{file}: {full[1]}: {text}; correct it"
    if full and isinstance(error, InterpolationResolutionError):
        return f"{full[1]}: {text.partition(' full_key')[0]}; correct its ${{…}}, or give a value"
    wrong = next((o for o in overrides if o.split("=")[0].lstrip("+~") in text), "")
    key, _, value = wrong.partition("=")
    key = key.lstrip("+~")
    if wrong.startswith("+") and (conf / key).is_dir():
        return f"{wrong}: {key} is chosen already, and + would add it; write it without the +"
    if key and (conf / key).is_dir():
        options = sorted(p.stem for p in (conf / key).glob("*.yaml"))
        if value in options:
            return _not_there(text, overrides, conf)
        return (
            f"{wrong}: conf/{key} has no such option; choose one of"
            f" {', '.join(options)}{_near(value, options)}"
        )
    if key in FREE:
        return (
            f"{wrong}: it takes names with values; write {key}.NAME=value or {key}={{NAME: value}}"
        )
    if key:
        inner = full[1] if full and full[1].startswith(f"{key}.") else key
        if others := _elsewhere(inner, conf):
            return f"{wrong}: no such key with these options; it takes {others}"
        return (
            f"{wrong}: no such key in conf/; check its"
            f" spelling{_near_key(inner, _known_keys(conf))}"
        )
    return f"cannot compose the plan: {text}"


def _not_there(text: str, overrides: Sequence[str], conf: Path) -> str:
    """Return what to say where the options exist and a key does not, or only under other options
    (precision=bf16 has no precision.fp8).
    """
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    keys = [o for o in overrides if o.split("=")[0] not in groups]
    if not keys:
        return f"cannot compose the plan: {text}"
    known = set(_paths(_with_gaps([o for o in overrides if o not in keys], conf)))
    wrong = next((o for o in keys if "=" in o and o.split("=")[0].lstrip("+~") not in known), None)
    if wrong is None:
        return f"cannot compose the plan: {text}"
    key = wrong.split("=")[0].lstrip("+~")
    if others := _elsewhere(key, conf):
        return f"{wrong}: no such key with these options; it takes {others}"
    return (
        f"{wrong}: no such key with these options; check its"
        f" spelling{_near_key(key, sorted(known))}"
    )


def _elsewhere(key: str, conf: Path) -> str:
    """Return the options of a key's group that have the key, as overrides: `data=text` for
    data.root; "" for none.
    """
    group, _, inner = key.partition(".")
    having = []
    for path in sorted((conf / group).glob("*.yaml")) if inner else []:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(tree, dict) and inner in _paths(
            {str(name): value for name, value in tree.items()}
        ):
            having.append(f"{group}={path.stem}")
    return " or ".join(having)


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _near_key(key: str, known: Sequence[str]) -> str:
    """As `_near`; where the part of the plan is right, by the last name alone."""
    part, _, name = key.rpartition(".")
    if part not in known:
        return _near(key, known)
    names = {one.removeprefix(f"{part}."): one for one in known if one.startswith(f"{part}.")}
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {names[close[0]]}?)" if close else ""


def _known_keys(conf: Path) -> list[str]:
    try:
        return list(_paths(compose_tree((), conf)))
    except InputError:
        return []


def _paths(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
