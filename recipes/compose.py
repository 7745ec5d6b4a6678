"""From the command line to plans: Hydra composes conf/, pydantic types the result, the rules check it.

Every command takes Hydra overrides (`model=… precision=… mapping.tp=4`); `a,b` values make a sweep.  All errors that
a user can mend leave here as one InputError line.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from recipes.data_files import wrong_data
from recipes.defaults import fill
from recipes.errors import InputError, one_line
from recipes.plan import Data, Frozen, Plan, Positive
from recipes.rules import check
from recipes.secret_values import refuse_secrets

CONF = Path(__file__).resolve().parent.parent / "conf"
# What composing raises on values that cannot be used: Hydra checks few of them before it takes them for names of files or for lists.
UNUSABLE = (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, OSError, RecursionError)
COMMAND_KEYS = ("experiment", "dry_run")  # keys of conf/config.yaml that steer a command and are no part of the plan


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the override lists of a multirun: the product of every `key=a,b` (Hydra's basic sweeper)."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        axes = [[f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line or ""] for o in parsed]
    except (HydraException, ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python converts
        raise InputError(f"cannot read the overrides: {one_line(str(error))}; write key=value") from None
    return [list(choice) for choice in itertools.product(*axes)]


def compose_tree(overrides: Sequence[str], conf: Path = CONF) -> dict[str, Any]:
    """Return the composed tree as plain Python values; raise InputError on an unknown key, group or option."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
            tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or "a value"
        raise InputError(f"{key} has no default and must be given; add {key}=…, see conf/ for what it takes") from None
    except UNUSABLE as error:
        raise InputError(_explain(error, overrides, conf)) from None
    assert isinstance(tree, dict)
    if "made_with" in tree:
        raise InputError(f"this experiment trains nothing; make its figure with {tree['made_with']}")
    return {str(key): value for key, value in tree.items()}


def compose_plan(overrides: Sequence[str] = (), conf: Path = CONF) -> Plan:
    """Return the checked plan for `overrides`; raise InputError with one clear line otherwise."""
    tree = _without_secrets(compose_tree(overrides, conf))
    _sizes_are_numbers(tree)
    return check(plan_from_tree(fill({k: v for k, v in tree.items() if k not in COMMAND_KEYS})))


def _without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return `tree`; InputError where a value is no text or looks like a secret."""
    try:
        json.dumps(tree, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError:
        raise InputError("an override, or a file of conf/, has bytes in it that are no UTF-8; write it anew") from None
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
        raise InputError(_first_problem(error)) from None
    if wrong := wrong_data(found.data):
        raise InputError(wrong)
    return found.data, found.vocab_size


def _sizes_are_numbers(tree: dict[str, Any]) -> None:
    """The sizes of a mapping are multiplied before the plan's types are looked at, and a text times a number is a longer text."""
    mapping = tree.get("mapping")
    for name in ("tp", "pp", "cp"):
        size = mapping.get(name) if isinstance(mapping, dict) else None
        if not isinstance(size, int | None):
            raise InputError(f"mapping.{name} is no whole number (given: {one_line(repr(size))[:80]}); see conf/ for what it takes")


def plan_from_tree(tree: dict[str, Any]) -> Plan:
    """Return the typed plan of a plain tree (composed, or read back from a run folder)."""
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise InputError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such field in the plan; remove it, or see conf/ for the fields that there are"
    given = "" if problem["type"] == "missing" else f" (given: {one_line(repr(problem['input']))[:80]})"
    what = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}{given}; see conf/ for what it takes"


def _explain(error: Exception, overrides: Sequence[str], conf: Path) -> str:
    text = one_line(str(error))
    if "Config group override must be a string" in text:
        return "a group of conf/ must name one of its files, as in mapping=single; see conf/ for them"
    swept = next((o for o in overrides if "," in o and "[" not in o and "{" not in o), None)
    if swept:
        key, _, values = swept.partition("=")
        return (
            f"{swept}: several values make a sweep, and one is wanted here; give one, "
            f"a list as {key}=[{values}], or python -m launch -m for a run of each"
        )
    wrong = next((o for o in overrides if o.split("=")[0].lstrip("+~") in text), "")
    key, _, value = wrong.partition("=")
    key = key.lstrip("+~")
    if key and (conf / key).is_dir():
        options = sorted(p.stem for p in (conf / key).glob("*.yaml"))
        if value in options:
            return _not_there(text, overrides, conf)
        return f"{wrong}: conf/{key} has no such option; choose one of {', '.join(options)}{_near(value, options)}"
    if key:
        return f"{wrong}: no such key in conf/; check its spelling{_near(key, _known_keys(conf))}"
    return f"cannot compose the plan: {text}"


def _not_there(text: str, overrides: Sequence[str], conf: Path) -> str:
    """Return what to say where the options exist and a key does not, or only under other options (precision=bf16 has no precision.fp8)."""
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    keys = [o for o in overrides if o.split("=")[0] not in groups]
    if not keys:
        return f"cannot compose the plan: {text}"
    known = set(_paths(compose_tree([o for o in overrides if o not in keys], conf)))
    wrong = next((o for o in keys if "=" in o and o.split("=")[0].lstrip("+~") not in known), None)
    if wrong is None:
        return f"cannot compose the plan: {text}"
    key = wrong.split("=")[0].lstrip("+~")
    return f"{wrong}: no such key with these options; check its spelling{_near(key, sorted(known))}"


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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
