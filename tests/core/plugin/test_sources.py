"""Where plugins come from: entry points of installed distributions."""

import importlib.metadata
import subprocess
import sys
import textwrap

import pytest

from core.errors import PluginError
from core.plugin.plugin_manager import PluginManager


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs a made-up distribution: (name, {entry point: source of its module})."""

    def install(name, modules):
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        points = "".join(f"{point} = {name}_{point}\n" for point in modules)
        (info / "entry_points.txt").write_text(f"[nodeweave]\n{points}")
        for point, source in modules.items():
            (tmp_path / f"{name}_{point}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, f"{name}_{point}", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    return install


GOOD = """
    from core.plugin.hookspecs import Registration, hookimpl

    @hookimpl
    def register_comm():
        return [Registration(name="acme", factory="acme:make")]
"""


def test_entry_points_are_loaded_with_their_version(distribution):
    distribution("acmedist", {"acme": GOOD})
    manager = PluginManager.load(builtins=())
    assert "acme" in manager.table("comm")
    assert manager.fingerprint()["acme"] == "1.5"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plugin_that_fails_to_import_stops_the_start_and_can_be_blocked(
    distribution, source, cause
):
    distribution("acmedist", {"acme": source})
    with pytest.raises(PluginError) as caught:
        PluginManager.load(builtins=())
    for fragment in (
        "plugin 'acme' (acmedist 1.5) failed to load",
        cause,
        "plugins.blocklist=[acme]",
    ):
        assert fragment in str(caught.value)
    assert "acme" not in PluginManager.load(["acme"], builtins=()).fingerprint()


def test_two_plugins_of_one_name_are_refused(distribution):
    distribution("first", {"acme": GOOD})
    distribution("second", {"acme": GOOD})
    with pytest.raises(PluginError, match=r"two plugins are called 'acme'.*first|second"):
        PluginManager.load(builtins=())


def test_discovery_imports_no_torch():
    code = (
        "import sys; from core.plugin.plugin_manager import PluginManager; "
        "m = PluginManager.load(); "
        "m.config_searchpath(); print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
