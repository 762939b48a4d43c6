"""Answers of some tokens only. What a request may ask for; imports no torch."""

from core.interfaces.sampling import LogitsProcessor, ProcessorSpec
from core.plugin.hookspecs import NoOptions
from core.settings.config import AppConfig
from plugins.logits_processors._allowed_params import AllowedTokens

NAME = "allowed_token_ids"


class AllowedTokenIds:
    """See LogitsProcessorKind."""

    params = AllowedTokens
    needs_whole_rows = False
    is_mask = True

    def check(self, params: AllowedTokens, vocab_size: int) -> None:
        """Every id is a token of the model."""
        for token_id in params.ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"ids holds {token_id}, which is no token; allowed: 0 to {vocab_size - 1}"
                )

    def build(self, spec: ProcessorSpec) -> LogitsProcessor:
        from plugins.logits_processors._allowed_mask import AllowedMask

        return AllowedMask(spec.device)


def make_allowed(options: NoOptions, config: AppConfig) -> AllowedTokenIds:
    return AllowedTokenIds()
