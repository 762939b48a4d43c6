"""A kind of tokenizers that a package brings is found, loaded and served as ours is.

The oracle is the tokenizers library, with the same vocabulary in a tokenizer.json.
"""

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from core import LLM, SamplingParams
from core.checkpoints.formats import find_format
from core.errors import ModelError, PluginError, RequestError
from core.interfaces.control import HF_TOKENIZER
from core.interfaces.tokenizer import Tokenizer as TokenizerProtocol
from core.llm.settings import configure
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.run import main
from core.serve.text.pool import TextPool
from core.serve.text.process import TextBoot
from core.settings.config import ModelConfig, PluginChoice
from core.sources.files import resolve_files
from core.tokenizers.find import find_kind
from core.tokenizers.load import load_tokenizer
from plugins.tokenizers._hf.byte_table import byte_table
from tests.support.models import VOCAB_SIZE, edit_config, ignore_progress, write_tiny_model
from tests.support.oracle import TransformersOracle
from tests.support.small_tokenizer import CORPUS
from tests.support.third_party import install_example

RANKS = "acme_tokenizer.ranks:load"
END, END_ID = "<|end|>", VOCAB_SIZE - 1
TEXTS = [
    *CORPUS,
    "",
    "a",
    "  two  spaces ",
    "🎉",
    f"{END}a{END}",
    "naïve\n\tüber 日本語",
    "\x00\x7f",
]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """Byte-pair encoding of words: 256 bytes, what a tiny model has room for, and an end."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=END_ID,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([END])
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path, backend: Tokenizer) -> Path:
    """A tiny model whose tokenizer lies in a file of ranks only."""
    folder = write_tiny_model(tmp_path / "model", "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_config(folder, eos_token_id=END_ID)
    write_ranks(folder, backend)
    return folder


def write_ranks(folder: Path, backend: Tokenizer) -> None:
    table = byte_table(backend)
    assert table is not None
    lines = [base64.b64encode(table.of_token[i]) + b" %d\n" % i for i in range(END_ID)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    config = {
        "eos_token": END,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {str(END_ID): {"content": END, "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginManager:
    """Where the example's package is installed."""
    install_example("acme_tokenizer", tmp_path / "site", monkeypatch)
    return PluginManager.load()


@pytest.fixture
def both(
    folder: Path, backend: Tokenizer, plugins: PluginManager
) -> tuple[TokenizerProtocol, TokenizerProtocol]:
    """The package's tokenizer and ours, of one vocabulary."""
    theirs = load_tokenizer(RANKS, str(folder), [END_ID])
    backend.save(str(folder / "tokenizer.json"))
    return theirs, load_tokenizer(HF_TOKENIZER, str(folder), [END_ID])


@pytest.mark.slow
def test_a_tokenizer_from_elsewhere_is_served(
    folder: Path,
    backend: Tokenizer,
    plugins: PluginManager,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By processes of their own: texts, conversations and answers."""
    engine = {"device": "cpu", "page_size": 4, "kv_cache_tokens": 512}
    settings: dict[str, Any] = {"model.dtype": "float32", "model.max_model_len": 128}
    prompt = "The capital of France is über 🎉"
    with LLM(folder, engine=engine, **settings) as llm:
        [answer] = llm.generate(prompt, GREEDY)
        [said] = llm.chat([{"role": "user", "content": "hello"}], GREEDY)
        with pytest.raises(RequestError, match=r"messages\[0\]\.content must be text"):
            llm.chat([{"role": "user", "content": {"no": "text"}}])  # checked as ever
    assert answer.prompt_token_ids == backend.encode(prompt).ids
    assert len(answer.prompt_token_ids) < len(prompt.encode())  # pairs are joined
    TransformersOracle(folder).check_greedy(answer.prompt_token_ids, answer.token_ids)
    whole = backend.decode(answer.prompt_token_ids + answer.token_ids)
    assert answer.text == whole.removeprefix(prompt)
    assert said.prompt_token_ids == backend.encode(f"user hello{END}").ids
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "acme_tokenizer (acme_tokenizer 1.0, module acme_tokenizer)" in listed
    assert "  tokenizer: ranks - tiktoken.model" in listed
    assert "  tokenizer: hf - tokenizer.json" in listed


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_table_gives_what_the_library_gives(
    both: tuple[TokenizerProtocol, TokenizerProtocol], text: str
) -> None:
    theirs, ours = both
    ids = theirs.encode(text)
    assert ids == ours.encode(text)
    for skip in (True, False):
        assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(
            ids, skip_special_tokens=skip
        )
        for cut in range(len(ids) + 1):  # in the middle of characters too
            for takes_over in (True, False):
                found = [
                    each.detokenizer(
                        skip_special_tokens=skip, prompt_ids=ids[:cut], takes_over=takes_over
                    )
                    for each in both
                ]
                for token_id in ids[cut:]:
                    assert found[0].add([token_id]) == found[1].add([token_id])
                    assert found[0].holding == found[1].holding
                assert found[0].finish() == found[1].finish()
    assert theirs.decode_open(ids[:-1]) == ours.decode_open(ids[:-1])
    assert theirs.offsets(text) == ours.offsets(text)
    assert [theirs.token_text(i) for i in ids] == [ours.token_text(i) for i in ids]


def test_a_byte_table_says_of_itself_what_ours_does(
    both: tuple[TokenizerProtocol, TokenizerProtocol],
) -> None:
    theirs, ours = both
    for name in ("vocab_size", "max_token_id", "eos_ids", "max_token_characters"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.token_bytes(10**6) == ours.token_bytes(10**6) == b""
    messages = [{"role": "user", "content": "x"}]
    assert theirs.check_chat(messages, None) == ours.check_chat(messages, None)
    assert theirs.apply_chat_template(messages) == ours.apply_chat_template(messages)


def loader_of(model: ModelConfig, plugins: PluginManager) -> str:
    return resolve_files(model, plugins, ignore_progress).tokenizer


def test_which_kind_a_folder_s_tokenizer_is_of(
    folder: Path, backend: Tokenizer, plugins: PluginManager
) -> None:
    auto = ModelConfig(name="m", path=str(folder))
    ranks = ModelConfig(name="m", path=str(folder), tokenizer_mode="ranks")
    dummy = ModelConfig(name="m", path=str(folder), load_format="dummy")
    assert {loader_of(model, plugins) for model in (auto, ranks, dummy)} == {RANKS}
    files = resolve_files(auto, plugins, ignore_progress)
    assert (files.eos_ids, files.warnings) == ([END_ID], [])  # config.json says it
    backend.save(str(folder / "tokenizer.json"))
    assert loader_of(auto, plugins) == HF_TOKENIZER  # as if the package weren't there
    assert loader_of(ranks, plugins) == RANKS


def test_a_folder_without_a_tokenizer(folder: Path, plugins: PluginManager) -> None:
    (folder / "tiktoken.model").unlink()
    model = ModelConfig(name="m", path=str(folder))
    with pytest.raises(
        ModelError, match=r"has no tokenizer\.json; copy .*; other kinds .* need: tiktoken\.model"
    ):
        loader_of(model, plugins)
    dummy = ModelConfig(name="m", path=str(folder), load_format="dummy")
    files = resolve_files(dummy, plugins, ignore_progress)
    assert files.tokenizer == HF_TOKENIZER
    assert files.tokenizer_dir != str(folder)  # a token for each byte


class Hasty:
    """Looks without care."""

    needs, hub_files, loader = "", (), ""

    def recognises(self, place: Path) -> bool:
        return bool((place / "none.txt").read_text())

    stands_in = recognises

    @hookimpl
    def register_tokenizer(self) -> list[Registration]:
        return [Registration(name="hasty", factory=lambda options: self)]

    register_checkpoint_format = register_tokenizer


def test_a_look_that_fails_names_its_package(tmp_path: Path) -> None:
    builtins = ["plugins.checkpoints", "plugins.tokenizers"]
    plugins = PluginManager.load(builtins=builtins, objects={"acme": Hasty()})
    fragment = r"'hasty' \(from acme\) failed to look at .*blocklist=\[acme\]"
    with pytest.raises(PluginError, match=f"(?s)tokenizer plugin {fragment}"):
        find_kind(tmp_path, "auto", plugins.table("tokenizer"))
    with pytest.raises(PluginError, match=f"(?s)checkpoint_format plugin {fragment}"):
        find_format(tmp_path, PluginChoice(), plugins.table("checkpoint_format"))


def test_an_unknown_kind_is_answered_with_those_there_are(plugins: PluginManager) -> None:
    with pytest.raises(PluginError) as caught:
        configure("smollm2", {"model.tokenizer_mode": "mistral"})
    assert str(caught.value) == (
        "model.tokenizer_mode=mistral: there is no tokenizer plugin 'mistral'\n"
        "tokenizer plugins: hf, ranks"
    )


@pytest.mark.parametrize(
    ("wanted", "patterns"),
    [("auto", ["tokenizer.model", "tiktoken.model"]), ("ranks", ["tiktoken.model"])],
)
def test_the_hub_is_asked_for_the_files_of_the_kind(
    folder: Path,
    plugins: PluginManager,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    patterns: list[str],
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = ModelConfig(name="m", path="owner/name", tokenizer_mode=wanted)
    assert loader_of(model, plugins) == RANKS
    assert asked == [["*.json", "*.jinja", *patterns, "*.safetensors"]]


def load_badly(folder: Path, eos_ids: list[int]) -> TokenizerProtocol:
    return {}["merges"]


@pytest.mark.parametrize(
    ("loader", "fragment"),
    [
        ("nowhere.at_all:load", "can't be used here: nowhere.at_all:load failed to import: Module"),
        ("acme_tokenizer.ranks:gone", "has no attribute 'gone'"),
        (RANKS, "line 2: needed: a token in base64 and its id"),
        (f"{__name__}:load_badly", "load_badly can't load the tokenizer in .*: KeyError: 'merges'"),
    ],
)
def test_what_does_not_load_ends_the_start(
    folder: Path, plugins: PluginManager, loader: str, fragment: str
) -> None:
    (folder / "tiktoken.model").write_text("YQ== 0\nnot base64\n")

    async def start() -> None:
        await TextPool.start(TextBoot(folder=str(folder), eos_ids=[], tokenizer=loader))

    with pytest.raises(ModelError, match=fragment):
        asyncio.run(start())
