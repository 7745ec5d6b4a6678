"""docs/contract.md: what was checked for which stack, and what the code asks for first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.contract.index import Result, load, read

PAGE = "docs/contract.md"
HOOKS = "lightning/pytorch/callbacks/callback.py"  # empty methods, made to be overridden
OUTCOMES = ("holds", "guarded", "unknown", "fails")
HEAD = """# Names and signatures of upstream packages, per stack

The GPU path of a stack runs in a container that no test machine has.  `python -m tests.contract`
reads what `recipes/` uses of NeMo, Megatron-Core, Transformer Engine, PyTorch, Lightning and
others.  These are imports, attributes, calls with their arguments, fields of NeMo's recipes,
overridden methods and replaced functions.  The command compares each use with the sources of the
versions that a stack has.  It parses sources and does not import them.  CI compares with
`tests/contract/index.json`, which holds the used names with parameters, file and line.
CONTRIBUTING.md says how to make the index anew.

A use *holds*, *fails*, is *guarded*, or is *unknown*.  Guarded: the name is missing, and the code
asks first, or no plan of the stack reaches it.  Unknown: the package makes the name when it runs.
The command writes this page.  Nothing here was run on a GPU.
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
            rows.setdefault((_file(r), r.use.name, r.verdict.why), []).append(r.environment)
    lines = [
        "## Guarded",
        "",
        "| where | name | why it is not used | environments |",
        "|---|---|---|---|",
    ]
    for (where, name, why), environments in rows.items():
        lines.append(_row([where, f"`{name}`", why, ", ".join(dict.fromkeys(environments))]))
    return lines


def _patches(found: Sequence[Result]) -> list[str]:
    index, patches, reference = load(), read("patches.yaml"), read("stacks.yaml")["reference"]
    holding = [r for r in found if r.verdict.outcome == "holds"]
    files = {r.use.name: _file(r) for r in holding if r.use.kind in ("patch", "override")}
    lines = [
        "## Replaced and overridden functions",
        "",
        f"Written against the sources of {reference}.",
        "",
    ]
    lines += ["| ours | upstream | written against | where its code differs |", "|---|---|---|---|"]
    for name, file in sorted(files.items()):
        fact = index[reference][name]
        if fact.kind != "missing" and not fact.at.startswith(HOOKS):
            differs = "; ".join(patches.get(name, {}).values())
            lines.append(_row([file, f"`{name}`", fact.at, differs]))
    return lines


def _unknown(found: Sequence[Result]) -> list[str]:
    names = sorted({r.use.name for r in found if r.verdict.outcome == "unknown"})
    return ["## Unknown", "", ", ".join(f"`{name}`" for name in names) + "."]


def _file(result: Result) -> str:
    """Return our file, without the line, which every change above it moves."""
    return result.use.where.partition(":")[0]


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
