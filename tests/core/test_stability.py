"""docs/stability.md names what is there, and what is said to be stable is complete."""

import importlib
import pkgutil
import re
from pathlib import Path

import core
import core.interfaces

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "stability.md").read_text()


def resolve(name: str) -> object:
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is not there")


def test_every_name_on_the_page_is_there():
    names = set(re.findall(r"`(core(?:\.\w+)+)`", PAGE))
    assert len(names) > 12
    for name in names:
        resolve(name)


def test_the_packages_public_names_are_on_the_page():
    stable = PAGE[PAGE.index("## Stable") : PAGE.index("## Usable")]
    for name in core.__all__:
        assert f"`core.{name}`" in stable
        assert getattr(core, name) is resolve(f"core.{name}")
    assert set(core.__all__) <= set(dir(core))


def test_every_interface_has_a_docstring():
    for module in pkgutil.iter_modules(core.interfaces.__path__):
        assert importlib.import_module(f"core.interfaces.{module.name}").__doc__


def test_linked_pages_are_there():
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_glossary_points_at_what_is_there():
    rows = [line for line in (DOCS / "glossary.md").read_text().splitlines() if line[:2] == "| "]
    words = [row.split("|")[1].strip() for row in rows if not row.startswith("| word")]
    assert len(words) == len(set(words)) > 40
    for row in rows:
        for path in re.findall(r"`((?:core|tests)/[\w/.]+)`", row):
            assert (DOCS.parent / path).exists(), path
