"""The plugin: what it registers. Importing it imports nothing that tokenizes."""

from collections.abc import Sequence
from pathlib import Path

from core.plugin.hookspecs import NoOptions, Registration, hookimpl


class RankFiles:
    """Implements core.interfaces.tokenizer.TokenizerKind."""

    needs = "tiktoken.model"
    hub_files = ("tiktoken.model",)
    loader = "acme_tokenizer.ranks:load"

    def __init__(self, options: NoOptions) -> None:
        pass

    def recognises(self, folder: Path) -> bool:
        return (folder / "tiktoken.model").exists()


@hookimpl
def register_tokenizer() -> Sequence[Registration]:
    """One kind."""
    return [
        Registration(
            name="ranks",
            factory=RankFiles,
            summary="tiktoken.model: a token and its rank in each line",
        )
    ]
