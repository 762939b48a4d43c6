"""A model's tokenizer, loaded in whichever process needs one. Knows no kind of tokenizers."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from core.errors import ModelError, NodeweaveError, PluginError
from core.interfaces.tokenizer import LoadTokenizer, Tokenizer


def load_tokenizer(loader: str, folder: str, eos_ids: Sequence[int]) -> Tokenizer:
    """`loader`: that of the kind, "package.module:function". Raises PluginError where it can't be
    imported, and ModelError for whatever its files make go wrong."""
    module, _, name = loader.partition(":")
    try:
        load: LoadTokenizer = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a third party's import raises
        raise PluginError(
            f"the tokenizer can't be used here: {loader} failed to import: "
            f"{type(error).__name__}: {error}\n"
            "install what it needs, or choose another by model.tokenizer_mode"
        ) from error
    try:
        return load(Path(folder), eos_ids)
    except (NodeweaveError, MemoryError):
        raise
    except Exception as error:  # a plugin's own, over a stranger's files
        raise ModelError(
            f"{loader} can't load the tokenizer in {folder}: {type(error).__name__}: {error}; "
            "repair its files or fetch them again, or choose another by model.tokenizer_mode"
        ) from error
