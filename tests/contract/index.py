"""The index: for each environment, what its sources say of the names that this project uses.

`python -m tests.contract --update SOURCES` makes it.  It is committed, since CI has no sources.  It
holds names, parameters, files, lines and hashes of functions, and no code.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.contract.check import Verdict, verdict
from tests.contract.sources import Fact, Sources
from tests.contract.uses import Types, Use, collect

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INDEX = HERE / "index.json"
COMMAND = "python -m tests.contract --update SOURCES"


def read(name: str) -> dict[str, Any]:
    """Return one of this folder's YAML files."""
    return _yaml(HERE / name)


def _yaml(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def our_uses() -> list[Use]:
    """Return what recipes/ uses of upstream packages in the containers.

    A rehearsal runs in this project's own environment alone, where tests/recipes/test_rehearse.py
    runs it.
    """
    declared = read("types.yaml")
    fields = ("names", "attributes", "returns", "mixed_into", "reached")
    types = Types(frozenset(declared["packages"]), **{key: declared[key] for key in fields})
    _add_recipes(types)
    rehearsal = ROOT / "recipes" / "training" / "rehearsal"
    files = sorted(
        path for path in (ROOT / "recipes").rglob("*.py") if rehearsal not in path.parents
    )
    texts = [Use(text, "text", where) for where, text in declared["texts"].items()]
    return [*collect(ROOT, files, types), *texts, *_schedules(declared["schedules"])]


def _add_recipes(types: Types) -> None:
    """Let `module` in recipe.py stand for NeMo's recipe of every model in conf/model."""
    models = [_yaml(path) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))]
    recipes = sorted({f"nemo.collections.llm.recipes.{model['nemo_recipe']}" for model in models})
    types.names["recipes/training/recipe.py"]["module"] = [f"module {name}" for name in recipes]
    for name in recipes:
        types.returns[f"{name}.pretrain_recipe"] = "config nemo.collections.llm.pretrain"


def _schedules(prefix: str) -> list[Use]:
    """Return NeMo's userbuffer schedules, whose names gpu.py puts together."""
    path = ROOT / "recipes" / "training" / "gpu.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "USERBUFFERS":
            where = f"recipes/training/gpu.py:{node.lineno}"
            templates = set(ast.literal_eval(node.value).values())
            names = {t.format(dtype=dtype) for t in templates for dtype in ("bf16", "fp8")}
            return [Use(prefix + name, "read", where) for name in sorted(names)]
    raise LookupError("recipes/training/gpu.py has no USERBUFFERS; change _schedules")


def environments(folder: Path) -> dict[str, Sources]:
    """Return every environment's sources; `folder` has a folder for each of stacks.yaml's."""
    stacks, elsewhere = read("stacks.yaml"), read("types.yaml")["elsewhere"]
    found = {}
    for name, environment in stacks["environments"].items():
        parts = [*environment["sources"], *stacks["common"]]
        roots: dict[str, Path] = {}
        for part in parts:
            roots |= dict.fromkeys(stacks["sources"][part]["packages"], folder / part)
        found[name] = Sources(roots, elsewhere)
    return found


def make(uses: Sequence[Use], folder: Path) -> dict[str, dict[str, Fact]]:
    """Return the facts of every name, by environment."""
    called = {use.name for use in uses if use.call or use.ours}
    replaced = {use.name for use in uses if use.kind in ("patch", "override")}
    names = {use.name for use in uses} | {c.name for use in uses for c in use.conditions}
    index: dict[str, dict[str, Fact]] = {}
    for environment, sources in environments(folder).items():
        facts = index[environment] = {}
        for name in sorted(names):
            facts[name] = _needed(sources.fact(name), name in called, name in replaced)
    return index


def _needed(fact: Fact, calls: bool, body: bool) -> Fact:
    return Fact(fact.kind, fact.at, fact.calls if calls else None, fact.body if body else None)


def write(index: dict[str, dict[str, Fact]], path: Path = INDEX) -> None:
    """Write the index, a line per name; a fact stands once, under its environments' numbers."""
    numbers = list(index)
    lines = []
    for name in sorted({name for facts in index.values() for name in facts}):
        shared: dict[Fact, str] = {}
        for number, environment in enumerate(numbers):
            fact = index[environment][name]
            shared[fact] = shared.get(fact, "") + str(number)
        row = {where: _row(fact) for fact, where in shared.items()}
        lines.append(f" {json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}")
    made_of = {name: _sources_of(name) for name in numbers}
    head = json.dumps({"environments": made_of}, indent=1)[2:-2]
    names = ",\n".join(lines)
    path.write_text(f'{{\n{head},\n "names": {{\n{names}\n }}\n}}\n', encoding="utf-8")


def _row(fact: Fact) -> list[Any]:
    row = [fact.kind, fact.at, list(fact.calls) if fact.calls is not None else None, fact.body]
    while row[-1] is None:
        row.pop()
    return row


def _sources_of(environment: str) -> dict[str, str]:
    """Return what an environment is made of: folder -> commit or wheel."""
    stacks = read("stacks.yaml")
    parts = [*stacks["environments"][environment]["sources"], *stacks["common"]]
    known = {part: stacks["sources"][part] for part in parts}
    return {part: source.get("commit") or source["wheel"] for part, source in known.items()}


def load(path: Path = INDEX) -> dict[str, dict[str, Fact]]:
    """Return the committed index."""
    text = json.loads(path.read_text(encoding="utf-8"))
    names = list(text["environments"])
    index: dict[str, dict[str, Fact]] = {name: {} for name in names}
    for name, rows in text["names"].items():
        for numbers, row in rows.items():
            kind, at, calls, body = [*row, None, None][:4]
            fact = Fact(kind, at, tuple(calls) if calls is not None else None, body)
            for number in numbers:
                index[names[int(number)]][name] = fact
    return index


@dataclass(frozen=True)
class Result:
    """A use in an environment, and what becomes of it there."""

    use: Use
    environment: str
    verdict: Verdict


def results(uses: Iterable[Use], index: dict[str, dict[str, Fact]]) -> list[Result]:
    """Return what becomes of every use in every environment."""
    patches, stacks = read("patches.yaml"), read("stacks.yaml")
    reference = index[stacks["reference"]]
    found = []
    for environment, facts in index.items():
        known = lambda name, facts=facts: facts.get(name, Fact("unlisted", ""))  # noqa: E731
        here = absent_names(stacks["environments"][environment]["stacks"])
        for use in uses:
            found.append(Result(use, environment, _judged(use, known, here, reference, patches)))
    return found


def absent_names(stacks: Sequence[str]) -> dict[str, str]:
    """Return the names that may be missing on these stacks, as no plan of theirs reaches them."""
    return {
        name: f"{entry['refused']} is refused on stack={' and '.join(stacks)}"
        for name, entry in read("types.yaml")["absent"].items()
        if all(refuses(stack, entry["refused"]) for stack in stacks)
    }


def refuses(stack: str, what: str) -> bool:
    """Return whether a stack's own file refuses a scaling, the emulation of FP8, or parameters kept
    in MXFP8.
    """
    text = _yaml(ROOT / "conf" / "stack" / f"{stack}.yaml")
    if what == "parameters in MXFP8":
        return not text["scripts"]["mxfp8_parameters"]
    return not text["emulates_fp8"] if what == "emulation" else what in text["missing"]


def _judged(
    use: Use,
    facts: Any,
    absent: dict[str, str],
    reference: dict[str, Fact],
    patches: dict[str, Any],
) -> Verdict:
    names = (use.name, *(condition.name for condition in use.conditions))
    unlisted = [name for name in names if facts(name).kind == "unlisted"]
    if unlisted:
        return Verdict("fails", f"{use.where}: {unlisted[0]} is not in the index; run {COMMAND}")
    found = verdict(use, facts, absent)
    if found.outcome != "holds" or use.kind not in ("patch", "override"):
        return found
    here, written = facts(use.name), reference[use.name]
    if here.body == written.body or here.body in patches.get(use.name, {}):
        return found
    differs = f"its code at {here.at} is not that at {written.at}, which ours was written against"
    remedy = f"read both, then add {here.body} to tests/contract/patches.yaml, or adapt ours"
    return Verdict(
        "fails",
        f"{use.where}: {use.name}: {differs}; {remedy}",
    )
