"""The plan of the house, counted: circles, long files, and contracts outside core/interfaces."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.core.test_dependency_rule import ROOT, Import, imports_of, modules, write

MOST_LINES = 400
PROGRAMS = ("core", "plugins", "benchmarks", "examples")
# Contracts, and libraries that plugins are made of or tested with.
SHARED_WITH_PLUGINS = ("core.interfaces", "core.parallel", "core.layers", "core.testing")


def programs(root: Path) -> dict[str, Path]:
    """Every module by its name. A package of examples is installed alone, so its name begins in its
    own folder."""
    found = modules(root)
    bases = [root, *sorted(path for path in (root / "examples").glob("*") if path.is_dir())]
    for base in bases:
        for path in sorted((base / "benchmarks" if base == root else base).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of_programs(root: Path = ROOT) -> list[Import]:
    known = programs(root)
    tops = {name.split(".")[0] for name in known}
    return [
        found
        for name, path in known.items()
        for found in imports_of(name, path, known)
        if found.target.split(".")[0] in tops
    ]


def first_circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle, as the names along it; empty if there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(edges.get(name, ())):
                if around := search(target, [*path, name]):
                    return around
            done.add(name)
        return []

    return next((around for name in sorted(edges) if (around := search(name, []))), [])


def module_edges(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Who imports whom, however late: inside functions and for types alone as well."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if found.target != found.importer:
            edges.setdefault(found.importer, set()).add(found.target)
    return edges


def room_edges(imports: Iterable[Import]) -> dict[str, set[str]]:
    """The same between the folders and files that stand side by side, at every level."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        importer, target = found.importer.split("."), found.target.split(".")
        pairs = zip(importer, target, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if same:  # neither holds the other, and both are in one package
            mine, theirs = importer[: same + 1], target[: same + 1]
            edges.setdefault(".".join(mine), set()).add(".".join(theirs))
    return edges


def long_files(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: {count} lines"
        for folder in (*PROGRAMS, "tests")
        for path in sorted((root / folder).rglob("*.py"))
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    ]


def protocols_of(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).partition("[")[0] for base in node.bases]
            if "Protocol" in bases or "typing.Protocol" in bases:
                yield node.name


def contracts_elsewhere(root: Path) -> list[str]:
    """Protocols of core that plugins fill, but that don't stand in core/interfaces: those that a
    module under plugins or examples imports by name, or that core/plugin/hookspecs.py names as what
    a factory returns. Left out are `SHARED_WITH_PLUGINS`: libraries that plugins are made of."""
    known = modules(root)
    used: set[str] = set()
    for folder in ("plugins", "examples"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    used |= {f"{node.module}.{alias.name}" for alias in node.names}
    hooks = root / "core/plugin/hookspecs.py"
    if hooks.exists():
        used |= set(re.findall(r"core(?:\.\w+)+", hooks.read_text(encoding="utf-8")))
    return [
        f"{name}.{protocol}"
        for name, path in known.items()
        if name.startswith("core.") and not name.startswith(SHARED_WITH_PLUGINS)
        for protocol in protocols_of(path)
        if f"{name}.{protocol}" in used
    ]


def test_modules_are_in_no_circle():
    assert not first_circle(module_edges(imports_of_programs()))


def test_rooms_are_in_no_circle():
    assert not first_circle(room_edges(imports_of_programs()))


def test_files_are_short():
    assert not long_files(ROOT)


def test_contracts_stand_in_interfaces():
    assert not contracts_elsewhere(ROOT)


@pytest.mark.parametrize(
    "back", ["def f():\n    import core.a", "if TYPE_CHECKING:\n    import core.a", "import core.a"]
)
def test_late_circles_are_found(tmp_path, back):
    write(tmp_path, "core/a.py", "import core.b")
    write(tmp_path, "core/b.py", back)
    assert first_circle(module_edges(imports_of_programs(tmp_path))) == [
        "core.a",
        "core.b",
        "core.a",
    ]


@pytest.mark.parametrize("base", ["benchmarks", "examples/acme/acme"])
def test_circles_outside_core_are_found(tmp_path, base):
    package = base.split("/")[-1]
    write(tmp_path, f"{base}/a.py", f"import {package}.b")
    write(tmp_path, f"{base}/b.py", "import core.a\nimport torch")
    assert not first_circle(module_edges(imports_of_programs(tmp_path)))
    write(tmp_path, f"{base}/b.py", f"def f():\n    from {package} import a")
    around = first_circle(module_edges(imports_of_programs(tmp_path)))
    assert around == [f"{package}.a", f"{package}.b", f"{package}.a"]


def test_circles_of_rooms_are_found(tmp_path):
    write(tmp_path, "core/engine/step/a.py", "import core.engine.run.b")
    write(tmp_path, "core/engine/step/d.py", "")
    write(tmp_path, "core/engine/run/b.py", "")
    assert not first_circle(room_edges(imports_of_programs(tmp_path)))
    write(tmp_path, "core/engine/run/c.py", "def f():\n    import core.engine.step.d")
    around = first_circle(room_edges(imports_of_programs(tmp_path)))
    assert around == ["core.engine.run", "core.engine.step", "core.engine.run"]


def test_long_files_are_found(tmp_path):
    write(tmp_path, "core/a.py", "\n" * MOST_LINES)
    assert not long_files(tmp_path)
    write(tmp_path, "examples/b/c.py", "\n" * (MOST_LINES + 1))
    assert long_files(tmp_path) == [f"examples/b/c.py: {MOST_LINES + 1} lines"]


def test_contracts_elsewhere_are_found(tmp_path):
    contract = "from typing import Protocol\nclass Fills(Protocol): ...\nclass Own(Protocol): ..."
    write(tmp_path, "core/interfaces/a.py", contract)
    write(tmp_path, "core/ops/a.py", contract)
    write(tmp_path, "plugins/comm/x.py", "from core.interfaces.a import Fills")
    assert not contracts_elsewhere(tmp_path)
    write(tmp_path, "plugins/comm/y.py", "from core.ops.a import Fills")
    assert contracts_elsewhere(tmp_path) == ["core.ops.a.Fills"]


def test_contracts_that_hooks_return_are_found(tmp_path):
    contract = "from typing import Protocol\nclass Fills(Protocol): ...\nclass Fill(Protocol): ..."
    write(tmp_path, "core/interfaces/a.py", contract)
    write(tmp_path, "core/ops/a.py", contract)
    hooks = 'def register():\n    """Factory: (options) -> core.{}.a.Fills."""'
    write(tmp_path, "core/plugin/hookspecs.py", hooks.format("interfaces"))
    assert not contracts_elsewhere(tmp_path)
    write(tmp_path, "core/plugin/hookspecs.py", hooks.format("ops"))
    assert contracts_elsewhere(tmp_path) == ["core.ops.a.Fills"]
