"""The shipped contract of tokenizers holds for ours, and finds what is wrong with one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from core.interfaces.tokenizer import IncrementalDetokenizer, Tokenizer
from core.plugin.hookspecs import Registration
from core.testing.tokenizer import CASES, Case, check_kind, check_tokenizer
from plugins.tokenizers import register_tokenizer
from plugins.tokenizers._hf.tokenizer import HfTokenizer, load
from plugins.tokenizers.hf import HfTokenizers
from tests.support.small_tokenizer import KINDS, SMOLLM2_TEMPLATE, write_folder

LOSSLESS = {"byte_level"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_keep_it(kind: str, case: Case) -> None:
    tokenizer = HfTokenizer(KINDS[kind](), special_tokens={}, chat_templates={})
    check_tokenizer(tokenizer, case, lossless=kind in LOSSLESS)


def test_our_kind_keeps_it(folder: Path) -> None:
    [registration] = register_tokenizer()
    tokenizer = check_kind(registration, folder, [7])
    for case in CASES:
        check_tokenizer(tokenizer, case)


class OfTokensAlone:
    """A detokenizer that knows no neighbours."""

    holding = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def add(self, token_ids: Sequence[int]) -> str:
        return "".join(self._tokenizer.token_text(i) for i in token_ids)

    def finish(self) -> str:
        return ""


class KeepsSpecial(HfTokenizer):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return super().decode(token_ids, skip_special_tokens=False)


class CutsCharacters(HfTokenizer):
    def detokenizer(self, **_: Any) -> IncrementalDetokenizer:
        return OfTokensAlone(self)


class ForgetsThePrompt(HfTokenizer):
    def detokenizer(self, *, skip_special_tokens: bool = True, **_: Any) -> IncrementalDetokenizer:
        return super().detokenizer(skip_special_tokens=skip_special_tokens)


class CountsBytes(HfTokenizer):
    def offsets(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        return [sum(len(self.token_bytes(i)) for i in ids[:n]) for n in range(len(ids))]


class PromisesShortTokens(HfTokenizer):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.max_token_characters = 1


class TextBeyondTheVocabulary(HfTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return super().token_bytes(min(token_id, self.max_token_id))


class TakesAnyMessage(HfTokenizer):
    def check_chat(self, messages: Any, tools: Any) -> int:
        return sum(len(str(message)) for message in messages)


class StripsSpaces(HfTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.strip(), add_special_tokens=add_special_tokens)


@pytest.mark.parametrize(
    ("broken", "checks"),
    [
        (KeepsSpecial, {"special"}),
        (CutsCharacters, {"stream"}),
        (ForgetsThePrompt, {"stream"}),
        (CountsBytes, {"offsets"}),
        (PromisesShortTokens, {"ids"}),
        (TextBeyondTheVocabulary, {"tokens"}),
        (TakesAnyMessage, {"chat"}),
        (StripsSpaces, {"round_trip", "offsets"}),
    ],
)
def test_what_is_wrong_is_found(broken: type[HfTokenizer], checks: set[str], folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer = broken(backend, special_tokens={}, chat_templates={"default": SMOLLM2_TEMPLATE})
    found = set()
    for case in CASES:
        try:
            check_tokenizer(tokenizer, case)
        except AssertionError:
            found.add(case.check)
    assert found == checks


def load_with_torch(folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
    import torch  # noqa: F401

    return load(folder, eos_ids)


def load_without_ends(folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
    return load(folder, [])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"recognises": lambda self, folder: False}, "does not recognise"),
        ({"recognises": lambda self, folder: True}, "recognises"),
        ({"loader": f"{__name__}:load_with_torch"}, "the frontend would import torch"),
        ({"loader": f"{__name__}:load_without_ends"}, "eos_ids begin with"),
    ],
)
def test_what_is_wrong_with_a_kind_is_found(
    kind: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    made = type("Broken", (HfTokenizers,), kind)
    with pytest.raises(AssertionError, match=message):
        check_kind(Registration(name="broken", factory=made), folder, [7])
