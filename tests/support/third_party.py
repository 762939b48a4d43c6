"""A package as if it were installed: found by its entry point, here and in child processes."""

import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def install_example(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package in `examples/<name>` one that importlib.metadata finds. `site`: a folder
    for what pip would write of it."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nodeweave]\n{name} = {name}\n")
    paths = [str(site), str(ROOT / "examples" / name)]
    for path in paths:
        monkeypatch.syspath_prepend(path)
    inherited = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT)) if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *inherited]))
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    importlib.invalidate_caches()
