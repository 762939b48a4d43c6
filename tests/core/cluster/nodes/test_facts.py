"""What a node tells about itself, and that each kind of difference is in it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.cluster.nodes import facts
from core.cluster.nodes.facts import FREE_KEYS, code_facts, config_facts, gather, weight_facts
from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.interfaces.launcher import Machine, NativeDtypes
from core.settings.config import (
    AppConfig,
    ExpertBalanceConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
)
from core.settings.schema import is_settable
from tests.support.models import folder_files, ignore_progress

MACHINE = Machine(
    device="cpu", num_devices=0, cpus=(0,), dtypes=NativeDtypes(native={}, lacking={})
)
CONFIG = AppConfig(model=ModelConfig(name="tiny", path="/somewhere"))


@pytest.fixture
def files(tiny_llama_folder: Path, tmp_path: Path) -> ModelFiles:
    """Of a copy that may be changed."""
    return folder_files(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def change(file: str, offset: int) -> None:
    data = bytearray(Path(file).read_bytes())
    data[offset] ^= 1
    Path(file).write_bytes(data)


def test_everything_is_there(files: ModelFiles) -> None:
    found = gather(CONFIG, {"acme": "1.0"}, files, MACHINE, ignore_progress)
    kinds = {key.partition(" ")[0] for key in found}
    assert kinds == {"config", "plugin", "code", "package", "machine", "model", "weights"}
    assert found["plugin acme"] == "1.0"
    assert found["machine device"] == "cpu"
    assert found["config engine.max_prefill_tokens"] == "8192"
    assert found["model config.json num_hidden_layers"] == "3"
    assert "code core/worker.py" in found
    assert "code plugins/comm/__init__.py" in found
    assert found["package torch"]
    assert found["weights model.safetensors"].startswith(
        f"{Path(files.weight_files[0]).stat().st_size} bytes"
    )


def flat_keys(value: Any, prefix: str = "") -> list[str]:
    if dataclasses.is_dataclass(value):
        settable = filter(is_settable, dataclasses.fields(value))
        pairs = ((field.name, getattr(value, field.name)) for field in settable)
        return [key for name, inner in pairs for key in flat_keys(inner, f"{prefix}{name}.")]
    return [prefix.rstrip(".")]


def test_every_config_key_is_compared_or_free() -> None:
    found = {key.removeprefix("config ") for key in config_facts(CONFIG)}
    for key in flat_keys(CONFIG):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)
        assert free != (key in found), key


def test_what_belongs_to_one_node_is_not_compared() -> None:
    other = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, path="/elsewhere", name="other"),
        launch=LaunchConfig(nnodes=2, node_rank=1, options={"x": 1}, threads_per_worker=3),
        frontend=dataclasses.replace(CONFIG.frontend, port=1, api_key_file="/key"),
        cluster=dataclasses.replace(CONFIG.cluster, token_file="/token"),
    )
    mine, theirs = config_facts(CONFIG), config_facts(other)
    assert {key for key in mine if mine[key] != theirs[key]} == {"config launch.nnodes"}


def test_the_contents_of_a_file_that_a_key_names_count(tmp_path: Path) -> None:
    def digest(contents: str, folder: str) -> str:
        path = tmp_path / folder / "load.json"
        path.parent.mkdir()
        path.write_text(contents)
        eplb = ExpertBalanceConfig(load_file=str(path))
        config = dataclasses.replace(CONFIG, parallel=ParallelConfig(eplb=eplb))
        return config_facts(config)["config parallel.eplb.load_file (contents)"]

    assert digest("[1]", "a") == digest("[1]", "b") != digest("[2]", "c")


def test_code_is_told_file_by_file(tmp_path: Path) -> None:
    for folder in ("core", "plugins"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before = code_facts(tmp_path)
    (tmp_path / "plugins" / "a.py").write_text("x = 2\n")
    after = code_facts(tmp_path)
    assert set(before) == {"code core/a.py", "code plugins/a.py"}
    assert [key for key in before if before[key] != after[key]] == ["code plugins/a.py"]


@pytest.mark.parametrize("full", [False, True])
def test_a_copy_has_the_same_weights(files: ModelFiles, tmp_path: Path, full: bool) -> None:
    copy = str(shutil.copy(files.weight_files[0], tmp_path / "model.safetensors"))
    other = msgspec.structs.replace(files, weight_files=[copy])
    assert weight_facts(files, full, ignore_progress) == weight_facts(other, full, ignore_progress)


@pytest.mark.parametrize("offset", [20, -1], ids=["header", "end"])
def test_headers_and_samples_are_looked_at(files: ModelFiles, offset: int) -> None:
    before = weight_facts(files, False, ignore_progress)
    change(files.weight_files[0], offset)
    assert weight_facts(files, False, ignore_progress) != before


def test_a_changed_number_between_the_samples_is_found_in_full(files: ModelFiles) -> None:
    offset = Path(files.weight_files[0]).stat().st_size // 2 + 2 * facts._SAMPLE_BYTES
    quick = weight_facts(files, False, ignore_progress)
    full = weight_facts(files, True, ignore_progress)
    change(files.weight_files[0], offset)
    assert weight_facts(files, False, ignore_progress) == quick
    assert weight_facts(files, True, ignore_progress) != full


def test_a_full_check_tells_how_far_it_is(files: ModelFiles) -> None:
    told: list[tuple[str, int, int, str]] = []
    weight_facts(files, True, lambda *progress: told.append(progress))
    size = Path(files.weight_files[0]).stat().st_size
    assert told[-1] == ("verify weights", size, size, "B")


def test_a_file_that_is_gone_is_named(files: ModelFiles) -> None:
    Path(files.weight_files[0]).unlink()
    with pytest.raises(ModelError, match=r"can't read .*model\.safetensors: No such file"):
        weight_facts(files, False, ignore_progress)
