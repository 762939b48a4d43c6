"""Tokenizers in Hugging Face form (core.interfaces.tokenizer.TokenizerKind)."""

from pathlib import Path

from core.interfaces.control import HF_TOKENIZER
from core.plugin.hookspecs import NoOptions


class HfTokenizers:
    """A folder with tokenizer.json."""

    needs = "tokenizer.json"
    hub_files = ("tokenizer.model",)  # to say what became of it: it has to be converted
    loader = HF_TOKENIZER

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, folder: Path) -> bool:
        return (folder / "tokenizer.json").exists()
