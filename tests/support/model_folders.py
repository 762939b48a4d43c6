"""Folders of a model as `core.sources` finds them, and changes of their JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from core.interfaces.control import ModelFiles
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from tests.support.formats import FILE_PLUGINS
from tests.support.models import TINY, ignore_progress

Folder = Callable[[str], Path]
SHAPE = TINY | {"architectures": ["LlamaForCausalLM"]}


def resolve(path: Path | str | None = None, **fields: Any) -> ModelFiles:
    where = None if path is None else str(path)
    model = ModelConfig(name="tiny", path=where, **fields)
    return resolve_files(model, FILE_PLUGINS, ignore_progress)


def shard_weights(folder: Path) -> dict[str, str]:
    """Spread the weights over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
