"""Imports of the package. `python tests/helpers/import_graph.py` prints CONTRIBUTING's diagram of them."""

import ast
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[2] / "peft_quant"
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "hub_cards")
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("__"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, nested: bool = False) -> Iterator[str]:
    """The modules that a file imports, by absolute names: at its top level or, with `nested`, anywhere in it."""
    package = ("peft_quant", *path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            if node.module is None:
                yield from (".".join([*module, alias.name]) for alias in node.names)
            else:
                yield ".".join(module)


def edges() -> dict[str, set[str]]:
    """The rooms that each room imports; `modules` stands for the single modules beside the rooms."""
    found: dict[str, set[str]] = {room: set() for room in (*ROOMS, "modules")}
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room not in (*ROOMS, *MODULES):
            continue
        importing = room if room in ROOMS else "modules"
        for module in imports(path, nested=True):
            top, _, rest = module.partition(".")
            imported = rest.partition(".")[0]
            imported = "modules" if imported in MODULES else imported
            if top == "peft_quant" and imported in found and imported != importing:
                found[importing].add(imported)
    return found


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What can be reached from a room in one step or more."""
    seen: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        room = waiting.pop()
        if room not in seen:
            seen.add(room)
            waiting += graph[room]
    return seen


def mermaid() -> str:
    """The diagram, without arrows that follow from others."""
    graph = edges()
    lines = ["graph TD", f'    modules["{", ".join(MODULES)}"]']
    for room in sorted(graph, key=lambda room: (-len(reachable(graph, room)), room)):
        implied = set().union(*(reachable(graph, imported) for imported in graph[room]))
        direct = sorted(graph[room] - implied)
        if direct:
            lines.append(f"    {room} --> {' & '.join(direct)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())
