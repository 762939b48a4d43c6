"""Tokenizers: what turns text into token ids and back. Imports no library that does it."""

from collections.abc import Sequence

from core.plugin.hookspecs import Registration, hookimpl


@hookimpl
def register_tokenizer() -> Sequence[Registration]:
    """The kinds in this package."""
    return [
        Registration(
            name="hf",
            factory="plugins.tokenizers.hf:HfTokenizers",
            summary="tokenizer.json, by the tokenizers library; GGUF files are translated to one",
        )
    ]
