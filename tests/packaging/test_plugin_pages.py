"""The pages about plugins are followed to the letter: their files are written into an empty folder,
found by their entry point, and their tests are run."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs/plugins.md"
# `name.py`: alone on a line, and the indented block behind it.
FILE = re.compile(r"^`([\w./]+\.(?:py|toml))`:\n\n((?:(?:    .*)?\n)+)", re.MULTILINE)
PAGES = sorted(path.stem for path in (ROOT / "docs/plugins").glob("*.md"))


def files_of(page: Path) -> dict[str, str]:
    found = FILE.findall(page.read_text())
    return {name: re.sub("^    ", "", block, flags=re.MULTILINE) for name, block in found}


def distribution(pyproject: str) -> Iterator[tuple[str, str]]:
    """What an installer writes of a project."""
    project = tomllib.loads(pyproject)["project"]
    identity = f"Name: {project['name']}\nVersion: {project['version']}\n"
    yield "METADATA", f"Metadata-Version: 2.1\n{identity}"
    points = "\n".join(f"{k} = {v}" for k, v in project["entry-points"]["nodeweave"].items())
    yield "entry_points.txt", f"[nodeweave]\n{points}\n"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_followed_to_the_letter_works(page: str, tmp_path: Path) -> None:
    [pyproject] = files_of(INDEX).values()
    files = files_of(ROOT / "docs/plugins" / f"{page}.md")
    assert {"acme/__init__.py", "tests/test_acme.py"} <= files.keys()
    written = {f"acme-0.1.0.dist-info/{name}": text for name, text in distribution(pyproject)}
    for name, text in {**files, **written}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
