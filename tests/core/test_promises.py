"""What SECURITY.md promises of the source as a whole: nothing is unpickled, evaluated or run by a
shell, whatever it was given."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {
    "eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
    "torch.hub.load", "numpy.load", "np.load",
}  # fmt: skip
OBJECT_COLLECTIVES = {  # torch.distributed's, which pickle
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip


def breaches(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield f"{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield f"{node.lineno}: from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.rpartition(".")[2] in OBJECT_COLLECTIVES:
                yield f"{node.lineno}: {name}()"
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    yield f"{node.lineno}: {keyword.arg}=True"


def test_nothing_is_unpickled_evaluated_or_run_by_a_shell():
    found = [
        f"{path.relative_to(ROOT)}:{breach}"
        for top in ("core", "plugins", "conf", "examples")
        for path in sorted((ROOT / top).rglob("*.py"))
        for breach in breaches(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval(x)",
        "torch.load(path, weights_only=True)",
        "dist.broadcast_object_list(x)",
        "subprocess.run(x, shell=True)",
        "np.load(x)",
    ],
)
def test_breaches_are_found(source):
    assert len(list(breaches(source))) == 1


def test_what_looks_alike_is_none():
    assert not list(breaches("model.eval()\nsafetensors.torch.load_file(x)\nre.compile(x)"))
