"""Reads the signatures of DeepEP's Buffer out of a wheel or an installed package, without
importing it: the package refuses machines without a GPU.

    python -m tests.support.deep_ep_signatures WHEEL... > tests/support/deep_ep_signatures.json

writes the table that the fake is held to. A signature is a list of [name, default or null], in
order, `self` included; a default is its source text.
"""

import ast
import inspect
import json
import sys
import zipfile
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
SOURCES = ("deep_ep/buffer.py", "deep_ep/buffers/legacy.py")  # of V1, and of V2's legacy buffer

Signature = list[list[str | None]]


def table() -> dict[str, dict[str, Signature]]:
    """The kept signatures: version of sgl-deep-ep -> method of Buffer -> signature."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def read_source(package: Path) -> str:
    """The module that defines Buffer, of a wheel or of a folder that holds `deep_ep`."""
    if package.is_file():
        with zipfile.ZipFile(package) as wheel:
            name = next(name for name in SOURCES if name in wheel.namelist())
            return wheel.read(name).decode()
    return next(package / name for name in SOURCES if (package / name).exists()).read_text()


def signatures(source: str) -> dict[str, Signature]:
    """Every public method of Buffer, and how it is made."""
    buffer = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Buffer"
    )
    found = {}
    for node in buffer.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        if node.name != "__init__" and node.name.startswith("_"):
            continue
        others = (node.args.posonlyargs, node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        assert not any(others), "arguments that the table has no place for"
        defaults = [None] * (len(node.args.args) - len(node.args.defaults))
        defaults += [ast.unparse(default) for default in node.args.defaults]
        names = [argument.arg for argument in node.args.args]
        found[node.name] = [list(pair) for pair in zip(names, defaults, strict=True)]
    return found


def of_class(buffer: type) -> dict[str, Signature]:
    """The same of a class that can be imported."""
    found = {}
    for name, member in vars(buffer).items():
        plain = member.__func__ if isinstance(member, staticmethod) else member
        if not inspect.isfunction(plain) or (name != "__init__" and name.startswith("_")):
            continue
        found[name] = [
            [
                parameter.name,
                None if parameter.default is parameter.empty else str(parameter.default),
            ]
            for parameter in inspect.signature(plain).parameters.values()
        ]
    return found


def main(packages: list[str]) -> None:
    """Print the table of some packages, one method a line."""
    versions = []
    for package in map(Path, packages):
        version = package.name.split("-")[1] if package.is_file() else "installed"
        found = signatures(read_source(package))
        lines = (f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in found.items())
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    print("{\n" + ",\n".join(versions) + "\n}")


if __name__ == "__main__":
    main(sys.argv[1:])
