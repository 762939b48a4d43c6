"""Files and links that the documentation names are there. Knows nothing of what it says of them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
# A path below one of our folders that ends in a suffix or in a slash; not one with a place to fill.
NAMED_PATH = re.compile(
    r"(?<![\w/.\-])(?:core|plugins|conf|tests|benchmarks|examples|docs)/"
    r"(?:[\w\-.]+/)*(?:[\w\-]+\.(?:py|md|yaml|json|toml|txt)(?!\w)|(?=[`\s,;)]))"
)
# By the command that the page gives, or as the page says.
WRITTEN_BY_USERS = {"core/gpu_tools/tuned/moe_a2a.json", "tests/test_acme.py"}
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def missing(text: str, folder: Path, root: Path) -> Iterator[str]:
    """What a page in `folder` names and `root` does not have."""
    for path in sorted(set(NAMED_PATH.findall(LINK.sub("]()", text))) - WRITTEN_BY_USERS):
        if not (root / path).exists():
            yield path
    for link in sorted(set(LINK.findall(text))):
        if not (folder / link).exists():
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_are_there(page):
    assert list(missing(page.read_text(), page.parent, ROOT)) == []


def test_what_is_not_there_is_found(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").touch()
    text = (
        "`core/a.py`, core/b.py; `core/c/` and [d](d.md#part), [e](https://e.org), [a](core/a.py)"
    )
    text += ", [e](docs/e.md)"
    assert list(missing(text, tmp_path, tmp_path)) == ["core/b.py", "core/c/", "d.md", "docs/e.md"]
