"""Every key that transformers reads of generation_config.json and tokenizer_config.json is applied,
harmless or warned of."""

import inspect
import re

import pytest
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from core.model_files import generation, tokenizer_settings

TABLES = (generation, tokenizer_settings)
# What transformers passes on between its own functions, and no file holds.
INTERNAL = re.compile(
    r"_json_.*|_spm_.*|tokenizer_object|gguf_file|tokenizer_truncation|tokenizer_padding|unk_id"
    r"|tokenizer|post_processor|vocab|merges|_commit_hash|token|tokenizer_class"
)


def test_every_key_of_a_generation_config_is_in_one_table() -> None:
    config = GenerationConfig()
    keys = set(vars(config)) | set(GenerationConfig._get_default_generation_params())
    known = generation.READ | generation.NEUTRAL.keys() | generation.IGNORED.keys()
    assert len(keys) > 60
    assert keys <= known, keys - known


def test_every_key_of_a_tokenizer_config_is_in_one_table() -> None:
    source = inspect.getsource(PreTrainedTokenizerBase.__init__)
    source += inspect.getsource(TokenizersBackend.__init__)
    keys = set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', source))
    keys |= set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    found = {key for key in keys if not INTERNAL.fullmatch(key)}
    settings = tokenizer_settings
    known = settings.READ | settings.NEUTRAL.keys() | settings.IGNORED.keys()
    assert len(found) > 25
    assert found <= known, found - known


@pytest.mark.parametrize("tables", TABLES)
def test_a_key_is_in_one_table(tables: object) -> None:
    read, neutral, ignored = (set(getattr(tables, name)) for name in ("READ", "NEUTRAL", "IGNORED"))
    assert not read & neutral
    assert not read & ignored
    assert not neutral & ignored
    assert all(tables.IGNORED.values())  # type: ignore[attr-defined]
