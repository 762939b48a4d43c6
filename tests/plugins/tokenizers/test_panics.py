"""The tokenizers library's panics, which are no Exceptions, end as errors of ours."""

import json
from pathlib import Path

import pytest
import tokenizers

from core.errors import ModelError
from plugins.tokenizers._hf.panics import LibraryError, without_panics
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.small_tokenizer import byte_level, write_folder


def damaged(folder: Path) -> Path:
    """A tokenizer.json over which the library panics: merges with a prefix longer than pieces."""
    write_folder(folder)
    content = json.loads(byte_level().to_str())
    content["model"]["continuing_subword_prefix"] = "ü" * 3000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_panic_while_a_tokenizer_is_built_is_the_checkpoints_fault(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    with pytest.raises(BaseException, match="out of range") as panic:
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert not isinstance(panic.value, Exception)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer: .*; repair it"):
        HfTokenizer.from_folder(folder)


def test_a_panic_over_a_text_is_an_exception() -> None:
    class Panic(BaseException):
        pass

    def fails(error: BaseException) -> None:
        raise error

    with pytest.raises(LibraryError, match="the tokenizer failed: gave up"):
        without_panics(fails)(Panic("gave up"))
    for error in (ValueError(), KeyboardInterrupt(), SystemExit(), ModelError("x")):
        with pytest.raises(type(error)):
            without_panics(fails)(error)
