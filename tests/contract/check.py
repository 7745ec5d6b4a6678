"""Does a use hold in an environment, given what the environment's sources say of the name?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.contract.sources import Fact
from tests.contract.uses import Call, Condition, Use

Facts = Callable[[str], Fact]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a use: `holds`, `fails`, `guarded` (absent, and not used), `unknown`."""

    outcome: str
    why: str = ""


HOLDS = Verdict("holds")


def verdict(use: Use, facts: Facts, absent: Mapping[str, str]) -> Verdict:
    """Return what becomes of a use; `absent`: names that may be missing here, with the reason."""
    fact = facts(use.name)
    if use.kind == "patch" and Condition(use.name, False) in use.conditions:
        return HOLDS  # the code adds what is missing
    for condition in use.conditions:
        kind = facts(condition.name).kind
        if kind != "unknown" and (kind != "missing") != condition.present:
            state = "missing" if condition.present else "there"
            return Verdict("guarded", f"{condition.name} is {state}")
    if fact.kind == "missing":
        return _missing(use, fact, absent)
    if fact.kind == "unknown":
        return Verdict("unknown", fact.at)
    wrong = _wrong(use, fact)
    keywords = use.call.keywords if wrong and use.call else ()
    for parameter in (f"{use.name}({keyword})" for keyword in keywords):
        if parameter in absent:
            return Verdict("guarded", absent[parameter])
    return Verdict("fails", f"{use.where}: {use.name} at {fact.at} {wrong}") if wrong else HOLDS


def _wrong(use: Use, fact: Fact) -> str | None:
    if use.call:
        return _called_wrong(use.call, fact)
    return _replaced_wrong(use.ours, fact) if use.ours else None


def _missing(use: Use, fact: Fact, absent: Mapping[str, str]) -> Verdict:
    if use.optional:
        return HOLDS if use.kind == "override" else Verdict("guarded", "the code asks first")
    for name, why in absent.items():
        if f"{use.name}.".startswith(f"{name}."):
            return Verdict("guarded", why)
    what = f"is missing from {fact.at}"
    if use.kind == "override":
        what = "overrides nothing, and nothing of ours calls it"
    return Verdict("fails", f"{use.where}: {use.name} {what}")


def _called_wrong(call: Call, fact: Fact) -> str | None:
    """Return why a call does not fit a function's parameters; None where they are not known."""
    if not fact.calls:
        return None
    errors = [_bind_error(call, signature(text), fact.kind) for text in fact.calls]
    return None if None in errors else f"takes ({' | '.join(fact.calls)}): {errors[0]}"


def _bind_error(call: Call, known: inspect.Signature, kind: str) -> str | None:
    skipped = kind in ("class", "classmethod", "bound") or (kind == "method" and call.bound)
    arguments = [None] * (call.positional + skipped)
    bind = known.bind_partial if call.partial or call.open else known.bind
    return _error(bind, arguments, call.keywords)


def _replaced_wrong(ours: str, fact: Fact) -> str | None:
    """Return how a function could be called that ours, in its place, does not take."""
    for text in fact.calls or ():
        mine, theirs = signature(ours), signature(text)
        if error := _narrower(mine, theirs):
            return f"takes ({text}), ours takes ({ours}): {error}"
    return None


def _narrower(mine: inspect.Signature, theirs: inspect.Signature) -> str | None:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if {p.kind for p in theirs.parameters.values()} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }:
        return None  # any function will do
    positional = [p for p in theirs.parameters.values() if p.kind in kinds]
    required = [p for p in positional if p.default is p.empty]
    keywords = [p for p in theirs.parameters.values() if p.kind is p.KEYWORD_ONLY]
    only = {p.name for p in keywords if p.default is p.empty}
    for count in range(len(required), len(positional) + 1):
        if error := _error(mine.bind, [None] * count, only):
            return error
    named = [p.name for p in keywords]
    named += [p.name for p in positional[max(1, len(required)) :]]
    for name in named:
        if error := _error(mine.bind, [None] * len(required), only | {name}):
            return error
    return None


def _error(bind: Callable[..., object], arguments: list[None], keywords: object) -> str | None:
    try:
        bind(*arguments, **dict.fromkeys(keywords))  # type: ignore[call-overload]
    except TypeError as error:
        return str(error)
    return None


def signature(text: str) -> inspect.Signature:
    """Return parameters that were written as text (sources.parameters) as a signature."""
    found: dict[str, inspect.Parameter] = {}
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for part in filter(None, text.split(", ")):
        if part == "/":
            found = {n: p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for n, p in found.items()}
        elif part.startswith("**"):
            found[part] = inspect.Parameter(part[2:], inspect.Parameter.VAR_KEYWORD)
        elif part.startswith("*"):
            if part != "*":
                found[part] = inspect.Parameter(part[1:], inspect.Parameter.VAR_POSITIONAL)
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            default = None if part.endswith("=") else inspect.Parameter.empty
            found[part] = inspect.Parameter(part.rstrip("="), kind, default=default)
    return inspect.Signature(list(found.values()))
