"""What stands beside the weights in a Hugging Face folder, and what in its place.

For every format whose weights lie in such a folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.disk.plain_files import read_config
from core.errors import ConfigError, ModelError
from core.interfaces.control import ModelFiles
from core.model_files.byte_tokenizer import EOS_ID, byte_tokenizer_dir
from core.model_files.ending import read_ending


def folder_config(folder: Path, weights: str) -> dict[str, Any]:
    """The contents of config.json. `weights`: what else the folder should hold, for the error:
    "*.safetensors". Raises ModelError."""
    if not (folder / "config.json").exists():
        raise ModelError(
            f"{folder} has no config.json; needed: a Hugging Face model folder with "
            f"config.json, {weights} and tokenizer.json"
        )
    return read_config(folder / "config.json")


def folder_files(folder: Path, config: dict[str, Any]) -> ModelFiles:
    """A folder's files as a format gives them, to which it adds its weight files. `config` is the
    contents of config.json. Raises ModelError."""
    ending = read_ending(folder, config)
    return ModelFiles(
        hf_config=config,
        weight_files=[],
        weight_format="",
        tokenizer_dir=str(folder),
        eos_ids=ending.eos_ids,
        default_sampling=ending.default_sampling,
        warnings=ending.warnings,
    )


def dummy_from_shape(shape: Mapping[str, Any]) -> ModelFiles:
    """Files of a model of `shape` (as config.json says it): byte tokens, no weights. Raises
    ConfigError."""
    vocab_size = shape.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"model.shape.vocab_size={vocab_size!r} must be a whole number")
    return ModelFiles(
        hf_config=dict(shape),
        weight_files=[],
        weight_format="",
        tokenizer_dir=str(byte_tokenizer_dir(vocab_size)),
        eos_ids=[EOS_ID],
        default_sampling={},
    )


def missing_tokenizer(folder: Path, needs: Sequence[str]) -> ModelError:
    """What to say of a folder without tokenizer.json. `needs`: what kinds of tokenizers besides
    would be found by."""
    others = f"; other kinds of tokenizers need: {', '.join(needs)}" if needs else ""
    if (folder / "tokenizer.model").exists():
        return ModelError(
            f"{folder} has a tokenizer.model but no tokenizer.json; convert it once: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) of "
            f"transformers{others}"
        )
    return ModelError(
        f"missing tokenizer: {folder} has no tokenizer.json; copy tokenizer.json and "
        f"tokenizer_config.json of the model there{others}"
    )
