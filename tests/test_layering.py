"""Imports go one way; read from the source, so that it also holds for imports inside functions."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hf_linattn"

# Each part may import itself and the parts before it.
ORDER = [
    "errors",
    "_version",
    "kernels",
    "ops",
    "functional",
    "modules",
    "distributed",
    "hub",
    "integrations",
    "models",
    "training",
    "conversion",
    "data",
    "bench",
    "cli",
]
# Parts that must work without Transformers.
NO_TRANSFORMERS = {"errors", "_version", "kernels", "ops", "functional", "modules", "distributed", "hub"}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in a file."""
    package = ("hf_linattn", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                # What is taken from a package is one of its files, or what its `__init__.py` hands on.
                name = f"{module}.{alias.name}"
                found.append((node.lineno, name if file_of(name) or module == "hf_linattn" else module))
    return found


def file_of(name: str) -> Path | None:
    """The file of a module of the package."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_imports_go_one_way() -> None:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    assert len(files) > 20
    wrong = []
    for path in files:
        own = part(path)
        assert own in ORDER, f"{own} has no place in the order: add it to ORDER and to docs/architecture.md"
        for line, name in imports(path):
            where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
            parts = name.split(".")
            if parts[0] == "hf_linattn" and len(parts) > 1 and ORDER.index(parts[1]) > ORDER.index(own):
                wrong.append(where)
            if parts[0] == "transformers" and own in NO_TRANSFORMERS:
                wrong.append(where)
            if parts[0] in ("recipes", "tests", "experiments"):
                wrong.append(where)
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_through_others() -> None:
    """Also not for annotations alone (TYPE_CHECKING) or inside functions. Raises CycleError with the circle."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    graph = {path: {file_of(name) for _, name in imports(path)} - {None, PACKAGE / "__init__.py"} for path in files}
    assert sum(map(len, graph.values())) > len(files)
    TopologicalSorter(graph).prepare()
