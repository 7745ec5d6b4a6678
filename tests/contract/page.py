"""docs/contract.md: what was checked for which stack, and what the code asks for before it uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.contract.index import Result, load, read

PAGE = "docs/contract.md"
OUTCOMES = ("holds", "guarded", "unknown", "fails")
HEAD = """# Names and signatures of upstream packages, per stack

The GPU path of a stack runs in a container that no test machine has.  `python -m tests.contract` reads what `recipes/` uses of
NeMo, Megatron-Core, Transformer Engine, PyTorch, Lightning and others: imports, attributes, calls with their arguments, fields of
NeMo's recipes, methods that are overridden, functions that are replaced.  Each use is compared with the sources of the versions
that a stack has.  Sources are parsed, not imported.  CI compares with `tests/contract/index.json`, which holds the names
that are used, with parameters, file and line; CONTRIBUTING.md says how to make it anew.

A use *holds*, *fails*, is *guarded* (the name is missing and the code asks first, or no plan of the stack reaches it), or is
*unknown* (the name is made when the package runs).  This page is written by the command.  Nothing here was run on a GPU.
"""


def text(found: Sequence[Result]) -> str:
    """Return the page."""
    return "\n".join(
        [
            HEAD,
            *_stacks(found),
            "",
            *_guarded(found),
            "",
            *_patches(found),
            "",
            *_unknown(found),
            "",
        ]
    )


def _stacks(found: Sequence[Result]) -> list[str]:
    stacks = read("stacks.yaml")
    lines = [
        "## Stacks",
        "",
        "| environment | stacks | sources | names | uses | guarded | unknown | failures |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, environment in stacks["environments"].items():
        here = [r for r in found if r.environment == name]
        counts = Counter(r.verdict.outcome for r in here)
        cells = [
            name,
            ", ".join(environment["stacks"]),
            ", ".join(environment["sources"]),
            len({r.use.name for r in here}),
            len(here),
        ]
        lines.append(_row([*cells, *(counts[outcome] for outcome in OUTCOMES[1:])]))
    return [*lines, "", f"All have beside these: {', '.join(stacks['common'])}."]


def _guarded(found: Sequence[Result]) -> list[str]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for r in found:
        if r.verdict.outcome == "guarded":
            rows.setdefault((r.use.where, r.use.name, r.verdict.why), []).append(r.environment)
    lines = [
        "## Guarded",
        "",
        "| where | name | why it is not used | environments |",
        "|---|---|---|---|",
    ]
    return [
        *lines,
        *(_row([where, f"`{name}`", why, _short(names)]) for (where, name, why), names in rows.items()),
    ]


def _patches(found: Sequence[Result]) -> list[str]:
    index, patches, reference = load(), read("patches.yaml"), read("stacks.yaml")["reference"]
    uses = {r.use.name: r.use for r in found if r.use.kind in ("patch", "override") and r.verdict.outcome == "holds"}
    lines = [
        "## Replaced and overridden functions",
        "",
        f"Written against the sources of {reference}.",
        "",
    ]
    lines += ["| ours | upstream | written against | where its code differs |", "|---|---|---|---|"]
    for name, use in sorted(uses.items()):
        fact = index[reference][name]
        if fact.kind != "missing" and not fact.at.startswith("lightning/pytorch/callbacks/callback.py"):
            lines.append(_row([use.where, f"`{name}`", fact.at, "; ".join(patches.get(name, {}).values())]))
    return lines


def _unknown(found: Sequence[Result]) -> list[str]:
    names = sorted({r.use.name for r in found if r.verdict.outcome == "unknown"})
    return ["## Unknown", "", ", ".join(f"`{name}`" for name in names) + "."]


def _short(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
