"""A tokenizer without a vocabulary, for models with dummy weights: a token for each byte.

So that any model's shape can be served offline. Ids 0 to 255 are bytes, 256 ends an answer.
"""

from pathlib import Path

import msgspec

from core.disk.cache import cache_dir, publish_dir
from core.errors import ModelError
from core.model_files.tokenizer_json import (
    BYTE_LEVEL_DECODER,
    added_token,
    bpe_model,
    byte_alphabet,
    byte_level_split,
    tokenizer_json,
)

EOS_ID = 256
EOS_TEXT = "<|end|>"
_FORMAT_VERSION = "1"  # of the files below: raise it where their contents change
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def byte_tokenizer_dir(vocab_size: int) -> Path:
    """A folder of the cache with the tokenizer's files, written where it is missing."""
    if vocab_size <= EOS_ID:
        raise ModelError(
            f"vocab_size={vocab_size} is too small for the byte tokenizer of load_format=dummy; "
            f"allowed: {EOS_ID + 1} and more, or a model.path that holds a tokenizer.json"
        )
    folder = cache_dir("tokenizers") / f"bytes-{_FORMAT_VERSION}"
    if not folder.is_dir():
        publish_dir(folder, _files())
    return folder


def _files() -> dict[str, bytes]:
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = tokenizer_json(
        model=bpe_model({**vocab, EOS_TEXT: EOS_ID}, []),
        decoder=BYTE_LEVEL_DECODER,
        added_tokens=[added_token(EOS_ID, EOS_TEXT, special=True)],
        pre_tokenizer=byte_level_split(use_regex=False),
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": msgspec.json.encode(config)}
