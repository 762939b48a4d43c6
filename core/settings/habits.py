"""Command lines written as other servers have them, and slips of the hand: what to type instead.

Nothing is read as if it had been right; a user who is told once knows it from then on. Knows the
names of other servers' flags, and nothing of how a configuration is made.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.settings.schema import did_you_mean

COMMANDS = ("serve", "launch", "launch_server", "run", "server", "start")
# Flags of vLLM, SGLang and llama.cpp, as written after their dashes -> the key they set here.
MODEL_FLAGS = ("model", "model-path", "m")
KEYS = {
    "tensor-parallel-size": "parallel.tp", "tp-size": "parallel.tp", "tp": "parallel.tp",
    "expert-parallel-size": "parallel.ep", "ep-size": "parallel.ep", "ep": "parallel.ep",
    "host": "frontend.host", "port": "frontend.port",
    "served-model-name": "model.served_name", "alias": "model.served_name",
    "max-model-len": "model.max_model_len", "context-length": "model.max_model_len",
    "ctx-size": "model.max_model_len",
    "dtype": "model.dtype", "load-format": "model.load_format",
    "tokenizer-mode": "model.tokenizer_mode",
    "gpu-memory-utilization": "engine.mem_fraction", "mem-fraction-static": "engine.mem_fraction",
    "max-num-seqs": "engine.max_running_requests",
    "max-running-requests": "engine.max_running_requests",
    "max-num-batched-tokens": "engine.max_prefill_tokens",
    "max-prefill-tokens": "engine.max_prefill_tokens",
    "chunked-prefill-size": "engine.chunked_prefill_size",
    "max-total-tokens": "engine.kv_cache_tokens",
    "block-size": "engine.page_size", "page-size": "engine.page_size",
    "seed": "engine.seed", "random-seed": "engine.seed", "device": "engine.device",
    "cuda-graph-max-bs": "engine.max_graph_batch",
    "max-queued-requests": "frontend.max_queued_requests", "max-logprobs": "frontend.max_logprobs",
    "attention-backend": "attention", "moe-a2a-backend": "moe_a2a",
    "nnodes": "launch.nnodes", "node-rank": "launch.node_rank",
    "dist-init-addr": "launch.dist_init_addr", "threads": "launch.threads_per_worker",
}  # fmt: skip
SWITCHES = {
    "enforce-eager": "engine.cuda_graphs=off", "disable-cuda-graph": "engine.cuda_graphs=off",
    "disable-radix-cache": "engine.disable_prefix_cache=true",
    "no-enable-prefix-caching": "engine.disable_prefix_cache=true",
}  # fmt: skip
_OWN_TOKENIZER = "the checkpoint's own is used"
_ANYWAY = "that is so anyway"
_REPLICAS = "an engine is one replica; parallel.dp_attention=N shares attention out among DP ranks"
NOTES = {  # no key sets these; what to know instead
    "api-key": "other users of a machine see command lines; frontend.api_key_file=FILE, or the "
    "environment variable NODEWEAVE_API_KEY",
    "trust-remote-code": "a model's own code is never run",
    "enable-expert-parallel": "parallel.ep=N",
    "enable-dp-attention": "parallel.dp_attention=N",
    "data-parallel-size": _REPLICAS, "dp-size": _REPLICAS, "dp": _REPLICAS,
    "pipeline-parallel-size": "layers are not spread over ranks; parallel.tp=N may span nodes",
    "pp-size": "layers are not spread over ranks; parallel.tp=N may span nodes",
    "enable-prefix-caching": _ANYWAY, "enable-chunked-prefill": _ANYWAY, "enable-metrics": _ANYWAY,
    "tokenizer": _OWN_TOKENIZER, "tokenizer-path": _OWN_TOKENIZER, "chat-template": _OWN_TOKENIZER,
    "quantization": "it is read from the checkpoint",
    "kv-cache-dtype": "the cache has the model's dtype",
}  # fmt: skip
_TAKE_VALUE = ("api-key", "data-parallel-size", "dp-size", "dp", "pipeline-parallel-size",
               "pp-size", "tokenizer", "tokenizer-path", "chat-template", "quantization",
               "kv-cache-dtype")  # fmt: skip
_PLAIN = re.compile(
    r"[\w./:@%+~-]+", re.ASCII
)  # text that neither a shell nor Hydra reads otherwise


@dataclass(frozen=True, slots=True)
class Program:
    """A command and the flags that it has."""

    command: str
    flags: tuple[str, ...]
    flags_with_value: tuple[str, ...]  # whose value is the next word, or stands after an =

    def has(self, word: str) -> bool:
        return word.partition("=")[0] in (*self.flags, *self.flags_with_value)


NODEWEAVE = Program(
    "nodeweave",
    ("--help", "-h", "--version", "--shell-completion", "-sc", "--multirun", "-m"),
    ("--cfg", "-c", "--config-dir", "-cd"),
)


def is_ours(words: Sequence[str], program: Program = NODEWEAVE) -> bool:
    """Whether every word is a flag of the program, with its value, or key=value."""
    rest = list(_join_spaces(words))
    if rest != list(words):
        return False
    while rest:
        word = rest.pop(0)
        if word in program.flags_with_value and rest:
            rest.pop(0)
        elif not program.has(word) and (word.startswith("-") or not _is_setting(word)):
            return False
    return True


def correction(
    words: Sequence[str], groups: Mapping[str, Collection[str]], program: Program = NODEWEAVE
) -> str:
    """What is wrong with a command line that is not ours, and the line to type instead. `groups`
    has the options of every config group."""
    line = _Line(groups, program.command)
    rest = list(_join_spaces(words))
    spaced = rest != list(words)
    while rest:
        word = rest.pop(0)
        is_model = word == "-m" and rest and not _is_setting(rest[0])  # as llama.cpp has it
        if program.has(word) and not is_model:
            line.typed.append(word)
            if word in program.flags_with_value and rest:
                line.typed.append(shlex.quote(rest.pop(0)))
        elif word.startswith("-"):
            line.flag(word, rest)
        elif _is_setting(word):
            line.typed.append(shlex.quote(word))
        else:
            line.bare(word, rest)
    return line.text(spaced)


def model_words(name: str, models: Collection[str]) -> str:
    """The words that serve what a user calls a model: a preset, a folder, a file or a Hub id."""
    if name in models:
        return f"+model={name}"
    return f"+model=custom {setting('model.path', name)}"


def preset_like(name: str, models: Collection[str]) -> str | None:
    """The preset of a Hub id, if there is one: qwen3_8b of Qwen/Qwen3-8B."""
    plain = re.sub(r"[\W_]", "", name.rpartition("/")[2].lower())
    return next((model for model in models if model.replace("_", "") == plain), None)


def setting(key: str, value: str) -> str:
    """A word for the shell, with the quotes that the shell and Hydra need."""
    if _PLAIN.fullmatch(value):
        return f"{key}={value}"
    return shlex.quote(f"{key}={quoted(value)}")


def quoted(value: str) -> str:
    """Text in Hydra's quotes, in which a backslash is one, but before a quote."""
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), value)
    return f'"{escaped}"'


def key_of_flag(name: str) -> str | None:
    """The key here of a setting's name elsewhere: parallel.tp of tensor_parallel_size."""
    return KEYS.get(name.replace("_", "-"))


class _Line:
    """A command line being put right: words to type, and what is said of those that are wrong."""

    def __init__(self, groups: Mapping[str, Collection[str]], command: str) -> None:
        self.typed: list[str] = []
        self._flags: list[str] = []
        self._bare: list[str] = []
        self._notes: list[str] = []
        self._groups = groups
        self._command = command
        self._models = groups["model"]

    def text(self, spaced: bool) -> str:
        """The whole answer. `spaced`: words were joined around an =."""
        wrong = []
        if spaced:
            wrong.append("settings are written key=value, without spaces around the =")
        if self._flags:
            be = "is not a flag" if len(self._flags) == 1 else "are not flags"
            wrong.append(
                f"{_and(self._flags)} {be} of {self._command}, "
                "which has settings instead: key=value"
            )
        if self._bare:
            be = "is not a setting" if len(self._bare) == 1 else "are not settings"
            wrong.append(f"{_and(map(repr, self._bare))} {be}; settings are written key=value")
        asks = any(word in ("--help", "--version") for word in self.typed)
        if not asks and not any("model=" in word for word in self.typed):
            self.typed.insert(0, "+model=NAME")
        lines = [*wrong, "write:", f"  {self._command} {' '.join(self.typed)}", *self._notes]
        return "\n".join([*lines, "--help shows the flags and groups"])

    def flag(self, word: str, rest: list[str]) -> None:
        """A flag that is not ours. Takes its value from `rest` where it has one."""
        shown, is_given, value = word.partition("=")
        self._flags.append(shown)
        name = shown.lstrip("-").replace("_", "-")
        is_key = name in MODEL_FLAGS or name in KEYS or "." in name
        has_value = bool(rest) and not rest[0].startswith("-") and not _is_setting(rest[0])
        known = is_key or name in SWITCHES or name in NOTES
        if not is_given and has_value and (is_key or name in _TAKE_VALUE or not known):
            value = rest.pop(0)
        value = value or "VALUE"
        if name in MODEL_FLAGS:
            self._model(value)
        elif is_key:
            self.typed.append(setting(KEYS.get(name, shown.lstrip("-")), value))
        elif name in SWITCHES:
            self.typed.append(SWITCHES[name])
        elif name in NOTES:
            self._notes.append(f"{shown}: {NOTES[name]}")
        else:
            hint = did_you_mean(name, [*MODEL_FLAGS, *KEYS, *SWITCHES])
            self._notes.append(f"{shown}: no setting is known by this name{hint}")

    def bare(self, word: str, rest: list[str]) -> None:
        """A word alone: another server's command, a group, or a model."""
        self._bare.append(word)
        if word in ("help", "version"):
            self.typed.append(f"--{word}")
        elif word in self._groups and rest and rest[0] in self._groups[word]:
            self.typed.append(f"{'+' * (word == 'model')}{word}={rest.pop(0)}")
        elif word not in COMMANDS or self.typed:
            looks_like_model = word in self._models or "/" in word or word.endswith(".gguf")
            if word and (looks_like_model or Path(word).exists()):
                self._model(word)

    def _model(self, name: str) -> None:
        self.typed.insert(0, model_words(name, self._models))
        preset = preset_like(name, self._models)
        if preset not in (None, name):
            self._notes.append(f"+model={preset} is the preset of that model")


def _and(words: Iterable[str]) -> str:
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} and {last}" if others else last


def _is_setting(word: str) -> bool:
    return "=" in word or word.startswith("~")


def _join_spaces(words: Sequence[str]) -> Iterator[str]:
    """`key = value`, `key= value` and `key =value` as one word."""
    waiting = ""
    for index, word in enumerate(words):
        if waiting:
            waiting, word = "", waiting + word
        after = words[index + 1] if index + 1 < len(words) else ""
        is_key = re.fullmatch(r"\+{0,2}\w[\w.@/]*", word) is not None
        open_key = re.fullmatch(r"\+{0,2}\w[\w.@/]*=", word) is not None
        has_value = after and "=" not in after and not after.startswith("-")
        if (is_key and after.startswith("=")) or (open_key and has_value):
            waiting = word
        else:
            yield word
