"""What a GGUF file says of its tokens, and what is made of files that say less."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from core.errors import ModelError
from core.interfaces.control import ModelFiles
from core.model_files.tokenizer_json import byte_alphabet
from core.plugin.plugin_manager import PluginManager
from core.resolve import find_family
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from plugins.checkpoints._gguf.config import hf_config, metadata_warnings
from plugins.checkpoints._gguf.header import GGUFFile, read_gguf
from plugins.checkpoints._gguf.tokenizer import splitting_warnings
from plugins.checkpoints._gguf.tokens import read_tokens
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.engine import app_config
from tests.support.formats import FILE_PLUGINS
from tests.support.gguf_files import write_gguf
from tests.support.models import ignore_progress

Folder = Callable[[str], Path]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def chatml_file(**changes: Any) -> GGUFFile:
    """A vocabulary in the manner of ChatML; None takes metadata out."""
    metadata = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*byte_alphabet(), *CHATML, "<think>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 3, 4],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return GGUFFile("m.gguf", {k: v for k, v in metadata.items() if v is not None}, {})


def test_end_of_turn_tokens_end_an_answer_by_their_text() -> None:
    tokens = read_tokens(chatml_file())
    assert tokens.end_ids == [256, 258]  # the one that is named first, and <|im_end|>
    assert tokens.special == {256, 257, 258}
    assert tokens.user_defined == {259}
    assert tokens.warnings == []


def test_ids_of_turns_and_messages_end_an_answer() -> None:
    tokens = read_tokens(chatml_file(eot_token_id=257, eom_token_id=3))
    assert tokens.end_ids == [256, 257, 3, 258]


def test_a_text_of_plain_type_ends_nothing() -> None:
    types = [1] * 256 + [3, 3, 1, 4]
    assert read_tokens(chatml_file(token_type=types)).end_ids == [256]


def test_without_an_eos_id_texts_end_answers_or_a_warning_says_that_none_does() -> None:
    tokens = read_tokens(chatml_file(eos_token_id=None))
    assert tokens.end_ids == [258]
    assert tokens.warnings == []
    names = [*byte_alphabet(), "<|endoftext|>", "<|a|>", "<|b|>", "<|c|>"]
    tokens = read_tokens(chatml_file(eos_token_id=None, tokens=names))
    assert tokens.end_ids == [256]
    assert tokens.warnings == []
    names = [*byte_alphabet(), "<|a|>", "<|b|>", "<|c|>", "<|d|>"]
    tokens = read_tokens(chatml_file(eos_token_id=None, tokens=names))
    assert tokens.end_ids == []
    (warning,) = tokens.warnings
    assert "m.gguf" in warning
    assert "tokenizer.ggml.eos_token_id" in warning


def test_without_token_types_control_tokens_are_told_by_text_with_a_warning() -> None:
    tokens = read_tokens(chatml_file(token_type=None))
    assert tokens.special == {256, 257, 258}
    assert tokens.end_ids == [256, 258]
    (warning,) = tokens.warnings
    assert "tokenizer.ggml.token_type" in warning


def test_a_sentencepiece_file_without_ids_has_the_usual_ones() -> None:
    texts = ["<unk>", "<s>", "</s>", "a"]
    types = [2, 3, 3, 1]
    changes = {"model": "llama", "tokens": texts, "token_type": types, "eos_token_id": None}
    tokens = read_tokens(chatml_file(**changes))
    assert (tokens.ids["bos"], tokens.ids["eos"], tokens.end_ids) == (1, 2, [2])


@pytest.mark.parametrize(
    ("architecture", "num_tokens", "pre"),
    [
        ("qwen2", 300, "qwen2"),
        ("qwen3", 300, "qwen2"),
        ("llama", 300, "default"),
        ("llama", 128_256, "llama-bpe"),
    ],
)
def test_a_missing_pre_is_guessed_with_a_warning(
    architecture: str, num_tokens: int, pre: str
) -> None:
    file = chatml_file(pre=None, tokens=["x"] * num_tokens, token_type=None)
    file = replace(file, metadata={**file.metadata, "general.architecture": architecture})
    (warning,) = splitting_warnings(file)
    assert "tokenizer.ggml.pre" in warning
    assert f"{pre!r} is taken" in warning
    assert splitting_warnings(chatml_file()) == []
    assert splitting_warnings(chatml_file(pre=None, model="llama")) == []


def resolved(path: Path) -> ModelFiles:
    return resolve_files(ModelConfig(name="m", path=str(path)), FILE_PLUGINS, ignore_progress)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "cache"))


def test_named_templates_are_used(own_cache: None, tiny_folder: Folder, tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template": "plain{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "tools{{ tools | length }}",
    }
    path = write_gguf(tiny_folder("llama"), tmp_path / "m.gguf", metadata=templates)
    files = resolved(path)
    assert files.warnings == []
    assert files.num_tensors > 0
    tokenizer = HfTokenizer.from_folder(files.tokenizer_dir, files.eos_ids)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "plainx"
    assert tokenizer.apply_chat_template(messages, tools=[{}, {}]) == "tools2"
    del templates["tokenizer.chat_template"]
    templates["tokenizer.chat_template.default"] = "named"
    path = write_gguf(tiny_folder("llama"), tmp_path / "n.gguf", metadata=templates)
    named = HfTokenizer.from_folder(resolved(path).tokenizer_dir)
    assert named.apply_chat_template(messages) == "named"


def edited(
    patch: pytest.MonkeyPatch, folder: Path, path: Path, edit: Callable[[Any], None]
) -> Path:
    """A file whose metadata is changed before it is written."""
    writes = GGUFWriter.write_header_to_file

    def write(self: Any, *args: Any) -> None:
        edit(self.kv_data[0])
        writes(self, *args)

    with patch.context() as patched:
        patched.setattr(GGUFWriter, "write_header_to_file", write)
        return write_gguf(folder, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", 0),
        ("llama.block_count", 0),
        ("llama.context_length", 0),
        ("llama.attention.head_count_kv", 5),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
    ],
)
def test_errors_name_the_files_own_key(
    own_cache: None,
    tiny_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: float,
) -> None:
    def edit(metadata: Any) -> None:
        metadata[key].value = value

    path = edited(monkeypatch, tiny_folder("llama"), tmp_path / "m.gguf", edit)
    config = app_config(ModelConfig(name="m"))
    with pytest.raises(ModelError) as error:
        find_family(config, PluginManager.load([]), resolved(path))
    assert f"m.gguf: metadata {key}={value}" in str(error.value)
    assert "config.json" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("attention.value_length", 8, "attention.value_length=8.*16, the size of a head"),
        ("rope.dimension_count", 8, "rope.dimension_count=8.*16, the size of a head"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping=30.0.*allowed: 0"),
        ("attention.sliding_window", 64, "attention.sliding_window=64.*context of 512"),
    ],
)
def test_metadata_that_is_not_computed_is_refused(
    tiny_folder: Folder, tmp_path: Path, name: str, value: float, words: str
) -> None:
    file = read_gguf(str(write_gguf(tiny_folder("llama"), tmp_path / "m.gguf")))
    metadata = {**file.metadata, f"llama.{name}": value}
    with pytest.raises(ModelError, match=rf"m\.gguf: metadata llama\.{words}"):
        hf_config(replace(file, metadata=metadata))


def test_unknown_metadata_of_the_model_is_warned_of(tiny_folder: Folder, tmp_path: Path) -> None:
    file = read_gguf(str(write_gguf(tiny_folder("llama"), tmp_path / "m.gguf")))
    assert metadata_warnings(file) == []
    changed = replace(file, metadata={**file.metadata, "llama.novelty": 3, "other.x": 1})
    (warning,) = metadata_warnings(changed)
    assert "llama.novelty" in warning
    assert "other.x" not in warning


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),  # llama.cpp's type
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # its old name
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, {"rope_type": "default"}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * 1.1386294361119891,
            },
        ),
    ],
)
def test_scaling_is_read_as_llama_cpp_reads_it(
    tiny_folder: Folder, tmp_path: Path, scaling: dict[str, Any], rope: dict[str, Any]
) -> None:
    file = read_gguf(str(write_gguf(tiny_folder("llama"), tmp_path / "m.gguf")))
    changes = {f"llama.{key}": value for key, value in scaling.items()}
    config = hf_config(replace(file, metadata={**file.metadata, **changes}))
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | rope
