"""The tokens of a GGUF file: which are found whole in a text, and which end an answer.

Knows nothing of how text is split. Where metadata is missing, tokens are told by their text as
llama.cpp tells them, and a warning says so.
"""

from dataclasses import dataclass, field
from typing import Any

from core.errors import ModelError
from core.model_files.ending import TEXT_ENDS, TURN_ENDS
from core.model_files.vocabulary import MAX_TOKEN_ID
from plugins.checkpoints._gguf.header import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types
# Others of which every known vocabulary makes control tokens.
_CONTROL_TEXTS = TURN_ENDS | TEXT_ENDS | {
    "<s>", "<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>", "[INST]", "[/INST]",
}  # fmt: skip
# Ids of a SentencePiece vocabulary that says nothing, with the text that proves them.
_SPM_IDS = {"bos": (1, "<s>"), "eos": (2, "</s>"), "unknown": (0, "<unk>")}
_END_KINDS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class GGUFTokens:
    """A file's vocabulary."""

    texts: list[str]  # by id
    special: frozenset[int]  # ids of tokens without text, found whole
    user_defined: frozenset[int]  # ids of tokens with text, found whole
    ids: dict[str, int]  # of the tokens with a role: "bos", "eos", "eot", "unknown", ...
    warnings: list[str] = field(default_factory=list)

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends an answer: those that the file names, and those of known texts."""
        named = [self.ids[kind] for kind in _END_KINDS if kind in self.ids]
        return list(
            dict.fromkeys([*named, *self._of_texts(TURN_ENDS)]) or self._of_texts(TEXT_ENDS)
        )

    def _of_texts(self, texts: frozenset[str]) -> list[int]:
        whole = sorted(self.special | self.user_defined)
        return [token_id for token_id in whole if self.texts[token_id] in texts]


def read_tokens(file: GGUFFile) -> GGUFTokens:
    """Raises ModelError where metadata contradicts itself."""
    texts: list[str] = file.sequence("tokenizer.ggml.tokens", str)
    if not 0 < len(texts) <= MAX_TOKEN_ID:
        raise ModelError(
            f"{file.path}: metadata tokenizer.ggml.tokens has {len(texts)} tokens; allowed: 1 to "
            f"{MAX_TOKEN_ID}"
        )
    ids = _role_ids(file, texts)
    types = _types(file, texts)
    warnings = []
    if types is None:
        roles = set(ids.values())
        found = {i for i, text in enumerate(texts) if i in roles or text in _CONTROL_TEXTS}
        special, user_defined = frozenset(found), frozenset[int]()
        warnings.append(
            f"{file.path} lacks metadata tokenizer.ggml.token_type: control tokens are told by "
            f"their text ({len(special)} are), and others are tokenized as plain text; convert the "
            "file anew"
        )
    else:
        special = frozenset(i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL))
        user_defined = frozenset(i for i, kind in enumerate(types) if kind == USER_DEFINED)
    tokens = GGUFTokens(texts, special, user_defined, ids, warnings)
    if not tokens.end_ids:
        warnings.append(
            f"{file.path}: no token is known to end an answer, so that all run to their "
            "max_tokens: metadata tokenizer.ggml.eos_token_id is missing, and no token has a text "
            "that is known to end a turn"
        )
    return tokens


def _role_ids(file: GGUFFile, texts: list[str]) -> dict[str, int]:
    """Ids of the tokens that have a role, checked."""
    prefix, suffix = "tokenizer.ggml.", "_token_id"
    found: dict[str, int] = {}
    for key in file.metadata:
        if not key.startswith(prefix) or not key.endswith(suffix):
            continue
        token_id = file.count(key)
        if not 0 <= token_id < len(texts):
            raise ModelError(
                f"{file.path}: metadata {key}={token_id} is not one of {len(texts)} tokens"
            )
        found[key.removeprefix(prefix).removesuffix(suffix)] = token_id
    if file.text("tokenizer.ggml.model", "") == "llama":
        for kind, (token_id, text) in _SPM_IDS.items():
            if token_id < len(texts) and texts[token_id] == text:
                found.setdefault(kind, token_id)
    return found


def _types(file: GGUFFile, texts: list[str]) -> list[Any] | None:
    if "tokenizer.ggml.token_type" not in file.metadata:
        return None
    types = file.sequence("tokenizer.ggml.token_type", int)
    if len(types) != len(texts):
        raise ModelError(
            f"{file.path}: {len(types)} token types for {len(texts)} tokens; fetch the file again"
        )
    return types
