"""The contract of tokenizers: ids and text of one text agree, however an answer is cut into tokens.

    from core.testing.tokenizer import CASES, check_kind, check_tokenizer

    @pytest.fixture(scope="module")
    def tokenizer(folder):
        [registration] = acme_tokenizer.register_tokenizer()
        return check_kind(registration, folder)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(tokenizer, case):
        check_tokenizer(tokenizer, case)

What is right is told by the tokenizer's own `encode` and `decode`; that these are those of the
model is for a test against the library that trained it.
"""

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import RequestError
from core.interfaces.tokenizer import Tokenizer, TokenizerKind
from core.plugin.hookspecs import Registration
from core.tokenizers.load import load_tokenizer

REPLACEMENT = "\ufffd"
TEXTS = {
    "empty": "",
    "letter": "a",
    "words": "The capital of France is Paris.",
    "spaces": "  two  spaces, and\n\tlines\r\n ",
    "accents": "naïve über größe señor",
    "wide": "日本語 한국어 العربية",
    "pictures": "🎉🎊 👩\u200d👩\u200d👧 e\u0301",
    "control": "\x00\x01\x7f",
    "long": "one two three " * 40,
}
LOSSY = frozenset({"control"})  # of texts that even good tokenizers may change


@dataclass(frozen=True, slots=True)
class Case:
    """One property of one text."""

    check: str
    text: str  # a name in TEXTS

    def __str__(self) -> str:
        return f"{self.check}-{self.text}"


def check_kind(registration: Registration, folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """What finds the tokenizer in `folder`, and the tokenizer. Raises AssertionError, or what the
    plugin does."""
    factory = registration.factory
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        factory = getattr(importlib.import_module(module), name)
    kind: TokenizerKind = factory(registration.config())
    assert kind.recognises(folder) is True, f"{registration.name} does not recognise {folder}"
    with tempfile.TemporaryDirectory() as empty:
        for other in (Path(empty), Path(empty) / "nothing"):
            assert kind.recognises(other) is False, f"{registration.name} recognises {other}"
    code = (
        "import sys; from core.tokenizers.load import load_tokenizer\n"
        "load_tokenizer(sys.argv[1], sys.argv[2], [])\n"
        "assert 'torch' not in sys.modules, 'the frontend would import torch'"
    )
    command = [sys.executable, "-c", code, kind.loader, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(kind.loader, str(folder), eos_ids)
    first = tokenizer.eos_ids[: len(eos_ids)]
    assert first == tuple(eos_ids), f"its eos_ids begin with {first}, not {tuple(eos_ids)}"
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, case: Case, *, lossless: bool = True) -> None:
    """`lossless=False` for tokenizers that change a text (lowercase it, for example). Raises
    AssertionError."""
    if case.check == "round_trip" and not (lossless and case.text not in LOSSY):
        return
    _CHECKS[case.check](tokenizer, TEXTS[case.text])


def _ids(tokenizer: Tokenizer, text: str) -> None:
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert all(type(i) is int and 0 <= i <= tokenizer.max_token_id for i in ids), ids
        least = len(text) // max(tokenizer.max_token_characters, 1)
        assert len(ids) >= least, f"{len(ids)} tokens; max_token_characters promises {least}"


def _round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for skip in (True, False):
        found = tokenizer.decode(ids, skip_special_tokens=skip)
        assert found == text, f"{found!r} is not {text!r}"


def _special(tokenizer: Tokenizer, text: str) -> None:
    """Tokens that `encode` adds have no text where special tokens are skipped."""
    with_added = tokenizer.decode(tokenizer.encode(text))
    without = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    assert with_added == without, f"{with_added!r} is not {without!r}"


def _stream(tokenizer: Tokenizer, text: str) -> None:
    """A prompt and its answer are the whole text, wherever the cut is."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    for cut in range(0, len(ids) + 1, max(len(ids) // 40, 1)):
        before, holds = tokenizer.decode_open(ids[:cut])
        detokenizer = tokenizer.detokenizer(
            skip_special_tokens=False, prompt_ids=ids[:cut], takes_over=True
        )
        assert detokenizer.holding == holds, f"cut at {cut}: holding is {detokenizer.holding}"
        pieces = [detokenizer.add([token_id]) for token_id in ids[cut:]]
        found = before + "".join(pieces) + detokenizer.finish()
        assert found == whole, f"cut at {cut}: {found!r} is not {whole!r}"
        if REPLACEMENT not in whole:
            assert REPLACEMENT not in "".join(pieces), f"cut at {cut}: a character in two: {pieces}"


def _at_once(tokenizer: Tokenizer, text: str) -> None:
    """Tokens that come together have the text of those that come one by one."""
    ids = tokenizer.encode(text)
    alone, together = tokenizer.detokenizer(), tokenizer.detokenizer()
    one_by_one = "".join(alone.add([token_id]) for token_id in ids) + alone.finish()
    at_once = together.add(ids) + together.finish()
    assert at_once == one_by_one, f"{at_once!r} is not {one_by_one!r}"
    assert not together.holding


def _offsets(tokenizer: Tokenizer, text: str) -> None:
    for special in (True, False):
        offsets = tokenizer.offsets(text, add_special_tokens=special)
        assert len(offsets) == len(tokenizer.encode(text, add_special_tokens=special)), offsets
        assert offsets == sorted(offsets), offsets
        assert not offsets or 0 <= offsets[0] <= offsets[-1] <= len(text), offsets


def _tokens(tokenizer: Tokenizer, text: str) -> None:
    for token_id in (*tokenizer.encode(text), tokenizer.max_token_id + 1):
        piece = tokenizer.token_bytes(token_id)
        assert tokenizer.token_text(token_id) == piece.decode("utf-8", "replace"), token_id
    assert tokenizer.token_bytes(tokenizer.max_token_id + 1) == b""


def _chat(tokenizer: Tokenizer, text: str) -> None:
    """A conversation becomes text that holds what was said, or is refused; so is what is none."""
    tokenizer.compile_templates()
    messages = [{"role": "user", "content": f"a{text}z"}]
    try:
        assert tokenizer.check_chat(messages, None) >= len(text)
        rendered = tokenizer.apply_chat_template(messages)
        assert text.strip() in rendered, rendered
    except RequestError as error:
        if error.code != "no_chat_template":
            raise AssertionError(f"{error} has the code {error.code}") from error
    try:
        tokenizer.check_chat([{"content": text}], None)
    except RequestError:
        return
    raise AssertionError("a message without a role is let through; raise RequestError")


_CHECKS: dict[str, Callable[[Tokenizer, str], None]] = {
    "ids": _ids,
    "round_trip": _round_trip,
    "special": _special,
    "stream": _stream,
    "at_once": _at_once,
    "offsets": _offsets,
    "tokens": _tokens,
    "chat": _chat,
}
CASES = [Case(check, text) for check in _CHECKS for text in TEXTS]
