"""How easily can a newcomer draw this project?  Its rooms, floors and arrows, counted from the
imports.

    python -m docs.build.house

A room is a folder of `recipes/` or `analysis/`, the files that lie directly in `recipes/` together,
`launch/`, `docs/build/`, or a single file that lies directly in `analysis/` (a command).  An arrow
is one room that imports another.  A room stands on the floor above the highest room that it
imports.  A circle is a set of rooms that import each other.  Imports inside functions count as
well.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import networkx as nx

from recipes.cli import ArgumentParser, command

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("recipes", "launch", "analysis", "docs")
UNTYPED = re.compile(r"\bdict\[str, Any\]")
COLUMNS = 100


@dataclass(frozen=True)
class House:
    """The project's structure in numbers; `chain` names the files of the longest import chain."""

    rooms: int
    floors: int
    arrows: int
    circles: list[list[str]]
    chain: list[str]
    untyped_rows: int
    wide_lines: int


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the product's modules by name; a package's own file bears the package's name."""
    found = {}
    for path in sorted(file for top in TOPS for file in (root / top).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(root: Path = ROOT) -> nx.DiGraph:
    """Return the graph of modules, an edge from each to what it imports of the project."""
    known, graph = modules(root), nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        targets = {_module(wanted, known) for wanted in _imported(path)} - {None, name}
        graph.add_edges_from((name, target) for target in targets)
    return graph


def _imported(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(name: str, known: Mapping[str, Path]) -> str | None:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str, path: Path) -> str:
    """Return the room in which a module lies."""
    top, *parts = module.split(".")
    if top in ("launch", "docs"):
        return top
    is_package = path.name == "__init__.py"
    inside = len(parts) > 1 or (len(parts) == 1 and (is_package or top == "analysis"))
    return f"{top}.{parts[0]}" if inside else top


def rooms(root: Path = ROOT) -> nx.DiGraph:
    """Return the graph of rooms."""
    known, graph, files = modules(root), nx.DiGraph(), imports(root)
    where = {name: room(name, path) for name, path in known.items()}
    graph.add_nodes_from(where[name] for name, path in known.items() if _has_code(path))
    graph.add_edges_from(
        (where[one], where[other]) for one, other in files.edges if where[one] != where[other]
    )
    return graph


def _has_code(path: Path) -> bool:
    return path.name != "__init__.py" or len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def longest_chain(graph: nx.DiGraph) -> list[str]:
    """Return the longest chain of imports; members of a circle stand side by side as one link."""
    joined = nx.condensation(graph)
    weights = {node: len(joined.nodes[node]["members"]) for node in joined}
    for _, target, data in joined.edges(data=True):
        data["weight"] = weights[target]
    links = nx.dag_longest_path(joined, weight="weight")
    return [" | ".join(sorted(joined.nodes[link]["members"])) for link in links]


def measure(root: Path = ROOT) -> House:
    """Return the numbers of a checkout."""
    graph, texts = rooms(root), [path.read_text("utf-8") for path in modules(root).values()]
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    return House(
        rooms=graph.number_of_nodes(),
        floors=len(list(nx.topological_generations(nx.condensation(graph)))),
        arrows=graph.number_of_edges(),
        circles=circles,
        chain=longest_chain(imports(root)),
        untyped_rows=sum(len(UNTYPED.findall(text)) for text in texts),
        wide_lines=sum(len(line) > COLUMNS for text in texts for line in text.splitlines()),
    )


def main(argv: list[str] | None = None) -> int:
    """Print the numbers, and each room with its floor and what it imports."""
    parser = ArgumentParser(prog="python -m docs.build.house", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    house = measure()
    if args.json:
        print(json.dumps(asdict(house), indent=1))
        return 0
    graph = rooms()
    print(
        f"{house.rooms} rooms, {house.floors} floors, {house.arrows} arrows,"
        f" {len(house.circles)} circles; longest chain {len(house.chain)} files;"
        f" {house.untyped_rows} untyped rows; {house.wide_lines} lines over {COLUMNS} columns"
    )
    for name in sorted(graph):
        print(f"{name}: {', '.join(sorted(graph[name])) or '-'}")
    print("longest chain: " + " > ".join(house.chain))
    return 0


if __name__ == "__main__":
    command(main)
