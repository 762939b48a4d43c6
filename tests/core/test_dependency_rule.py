"""The dependency rule, read from the imports themselves: who may import whom, and no cycles."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module of core imports only from its left (and from its own unit).
LAYERS = (
    "errors",
    "parallel",
    "settings",
    "interfaces",
    "plugin",
    "resolve",
    "wire",
    "disk",
    "gpu_tools",
    "ops",
    "devices",
    "layers",
    "weights",
    "model_files",
    "tokenizers",
    "checkpoints",
    "sources",
    "engine",
    "cluster",
    "frontend",
    "serve",
    "worker",
    "plugin_list",
    "plan_report",
    "plan",
    "start",
    "llm",
    "run",
    "testing",  # of which nobody else may import
)
PLUGINS_MAY_IMPORT = {"errors", "settings", "parallel", "interfaces", "plugin", "ops", "gpu_tools"}
PLUGIN_EXTRAS = {
    "checkpoints": {"disk", "model_files", "weights"},
    "models": {"layers"},
    "tokenizers": {"disk", "model_files", "tokenizers"},
    "frontends": {"frontend"},
}
# Packages that may be imported in these modules only.
RESERVED = {
    "hydra": {"core.settings.compose", "core.run"},
    "omegaconf": {"core.settings.compose", "core.run"},
    "pluggy": {"core.plugin.hookspecs", "core.plugin.plugin_manager", "core.plugin.sources"},
}


@dataclass(frozen=True)
class Import:
    """`importer` imports `target`; `runs_on_import` where that happens while it is imported."""

    importer: str
    target: str
    line: int
    runs_on_import: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules(root: Path = ROOT) -> dict[str, Path]:
    found = {}
    for package in ("core", "plugins"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, child.lineno, runs)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:  # relative: from the package this module is in
                    parents = name.split(".")
                    drop = child.level - (path.name == "__init__.py")
                    package = ".".join(parents[: len(parents) - drop])
                    base = f"{package}.{base}" if base else package
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield Import(name, full if full in known else base, child.lineno, runs)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from visit(child, False)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from visit(ast.Module([statement], []), False)
                for statement in child.orelse:
                    yield from visit(ast.Module([statement], []), runs)
            else:
                yield from visit(child, runs)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def all_imports(root: Path = ROOT) -> list[Import]:
    known = modules(root)
    return [found for name, path in known.items() for found in imports_of(name, path, known)]


def layer_problems(imports: list[Import]) -> list[str]:
    problems = []
    for found in imports:
        importer, target = found.importer.split("."), found.target.split(".")
        if importer[0] == "core" and target[0] == "plugins":
            problems.append(f"{found}: core names plugins as strings")
        elif importer[0] == "core" and target[0] == "core" and len(importer) > 1 < len(target):
            mine, theirs = importer[1], target[1]
            if {mine, theirs} - set(LAYERS):
                continue  # test_every_core_module_has_a_layer says which
            if mine != theirs and LAYERS.index(theirs) > LAYERS.index(mine):
                problems.append(f"{found}: {theirs} is not left of {mine}")
        elif importer[0] == "plugins" and target[0] == "core" and len(target) > 1:
            allowed = PLUGINS_MAY_IMPORT | PLUGIN_EXTRAS.get(importer[1], set())
            if target[1] not in allowed:
                problems.append(f"{found}: plugins import only {', '.join(sorted(allowed))}")
        elif importer[0] == "plugins" and target[0] == "plugins":
            problems += plugin_problem(found, importer, target)
        if target[0] in RESERVED and found.importer not in RESERVED[target[0]]:
            problems.append(f"{found}: only {', '.join(sorted(RESERVED[target[0]]))} may")
    return problems


def plugin_problem(found: Import, importer: list[str], target: list[str]) -> list[str]:
    """A family's __init__ knows its members, members share what begins with _, and _openai or
    _cpu_backend are the inside of openai and cpu; no more."""
    same_family = importer[1:2] == target[1:2]
    registers = len(importer) == 2
    same_plugin = importer[:3] == target[:3]
    shared = len(target) > 2 and target[2].startswith("_")
    both_named = len(importer) > 2 and len(target) > 2
    inside = both_named and f"{importer[2]}_".startswith(f"_{target[2]}_")
    if same_family and (registers or same_plugin or shared or inside):
        return []
    return [f"{found}: plugins never import each other"]


def cycle(imports: list[Import]) -> list[str]:
    """A cycle of module-level imports, as the modules along it; empty if there is none."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        inside = found.target.split(".")[0] in ("core", "plugins")
        if found.runs_on_import and inside and found.target != found.importer:
            edges.setdefault(found.importer, set()).add(found.target)
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if around := search(target, [*path, module]):
                return around
        done.add(module)
        return []

    for module in sorted(edges):
        if around := search(module, []):
            return around
    return []


def test_every_core_module_has_a_layer():
    units = {name.split(".")[1] for name in modules() if name.startswith("core.")}
    assert units <= set(LAYERS), f"give these a place in LAYERS: {units - set(LAYERS)}"


def test_imports_follow_the_layers():
    assert not layer_problems(all_imports())


def test_examples_import_what_third_parties_may():
    """What is private of core is so for packages of others as well; their tests may use contracts
    and what composes a configuration."""
    allowed = PLUGINS_MAY_IMPORT.union(*PLUGIN_EXTRAS.values())
    in_tests = allowed | {"testing", "run"}
    known = modules()
    problems = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for found in imports_of(name, path, known):
            top, _, rest = found.target.partition(".")
            units = in_tests if "tests" in path.parts else allowed
            is_private = top == "core" and rest and rest.partition(".")[0] not in units
            if is_private or top == "plugins":
                problems.append(str(found))
    assert not problems


def test_no_import_cycles():
    assert not cycle(all_imports())


@pytest.mark.parametrize(
    ("file", "source", "fragment"),
    [
        ("core/errors.py", "from core.engine import loop", "engine is not left of errors"),
        ("core/errors.py", "import core.settings.config", "settings is not left of errors"),
        ("core/engine/x.py", "def f():\n    import plugins.comm", "names plugins as strings"),
        ("core/engine/x.py", "import hydra", "only core.run, core.settings.compose may"),
        ("core/settings/x.py", "from pluggy import HookspecMarker", "only core.plugin.hookspecs"),
        ("plugins/comm/x.py", "from core.layers import linear", "plugins import only"),
        ("plugins/models/x.py", "from core.serve import tokenizer", "plugins import only"),
        ("plugins/models/x.py", "from core.frontend import answer", "plugins import only"),
        ("plugins/frontends/x.py", "from core.serve import guard", "plugins import only"),
        ("plugins/comm/x.py", "from plugins.attention import cpu", "never import each other"),
        ("plugins/comm/x.py", "from plugins.comm.y import f", "never import each other"),
        ("plugins/comm/x.py", "from .y import f", "never import each other"),
        ("plugins/comm/_x.py", "from plugins.comm.y import f", "never import each other"),
        (
            "core/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import core.run",
            "run is not left of errors",
        ),
    ],
)
def test_breaches_are_found(tmp_path, file, source, fragment):
    write(tmp_path, file, source)
    write(tmp_path, "plugins/comm/y.py", "")
    problems = layer_problems(all_imports(tmp_path))
    assert len(problems) == 1
    assert fragment in problems[0]


def test_allowed_imports_pass(tmp_path):
    write(tmp_path, "plugins/models/x.py", "import core.layers.norm\nfrom core import errors")
    write(tmp_path, "plugins/comm/__init__.py", "from plugins.comm.y import f")
    write(tmp_path, "plugins/comm/y.py", "from plugins.comm._shared import g")
    write(tmp_path, "plugins/comm/_shared.py", "")
    write(tmp_path, "plugins/comm/_y/inner.py", "from plugins.comm.y import f")
    write(tmp_path, "plugins/comm/_y_backend.py", "from plugins.comm.y import f")
    write(tmp_path, "core/errors.py", "")
    assert not layer_problems(all_imports(tmp_path))


def test_cycles_are_found_and_type_checking_is_not_one(tmp_path):
    write(tmp_path, "core/engine/a.py", "from core.engine import b")
    write(
        tmp_path,
        "core/engine/b.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import core.engine.a\n"
        "def f():\n    import core.engine.a",
    )
    assert not cycle(all_imports(tmp_path))
    write(tmp_path, "core/engine/b.py", "try:\n    import core.engine.a\nfinally:\n    pass")
    assert cycle(all_imports(tmp_path)) == ["core.engine.a", "core.engine.b", "core.engine.a"]


def write(root: Path, file: str, source: str) -> None:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
