"""What stands in for a model's files where only its shape is known: byte tokens, no weights."""

from collections.abc import Mapping
from typing import Any

from core.errors import ConfigError
from core.interfaces.control import ModelFiles
from core.model_files.byte_tokenizer import EOS_ID, byte_tokenizer_dir


def dummy_from_shape(shape: Mapping[str, Any]) -> ModelFiles:
    """Files of a model of `shape` (as config.json says it). Raises ConfigError."""
    vocab_size = shape.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"model.shape.vocab_size={vocab_size!r} must be a whole number")
    return ModelFiles(
        hf_config=dict(shape),
        weight_files=[],
        weight_format="dummy",
        tokenizer_dir=str(byte_tokenizer_dir(vocab_size)),
        eos_ids=[EOS_ID],
        default_sampling={},
    )
