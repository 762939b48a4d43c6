"""The tokenizer against Nodeweave's contract of its family."""

import base64
import json
from pathlib import Path

import pytest
from acme_tokenizer import register_tokenizer

from core.interfaces.tokenizer import Tokenizer
from core.testing.tokenizer import CASES, Case, check_kind, check_tokenizer

MERGES = (b"th", b"the", b" t", b"is", b" o", b"an", "é".encode(), "🎉".encode()[:2])
END_ID = 256 + len(MERGES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("model")
    pieces = [bytes([byte]) for byte in range(256)] + list(MERGES)
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    config = {
        "added_tokens_decoder": {str(END_ID): {"content": "<|end|>"}},
        "chat_template": "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    [registration] = register_tokenizer()
    return check_kind(registration, folder, [END_ID])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_keeps_the_contract(tokenizer: Tokenizer, case: Case) -> None:
    check_tokenizer(tokenizer, case)


def test_pairs_are_joined_by_rank(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the") == [257]
    assert tokenizer.encode("this<|end|>") == [256, 259, END_ID]
