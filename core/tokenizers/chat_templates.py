"""A model's chat templates: found in a folder in Hugging Face form, and the one of a conversation.

Knows nothing of tokens' ids.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.disk.plain_files import MAX_TEMPLATE_BYTES, read_json, read_plain
from core.errors import ModelError, RequestError
from core.model_files.tokenizer_settings import SPECIAL_TOKENS, check_settings
from core.tokenizers.chat_template import ChatTemplate
from core.tokenizers.messages import check_messages, text_size


class ChatTemplates:
    """Templates by name: "default", and "tool_use" where the checkpoint has one."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: texts that templates may name, "bos_token" for one."""
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, ChatTemplate] = {}  # by name, once they are asked for

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplates":
        """Those that stand beside a tokenizer; none is no error. Raises ModelError naming the file
        that is broken."""
        path = folder / "tokenizer_config.json"
        config = read_optional(path)
        check_settings(path, config)
        tokens_map = read_optional(folder / "special_tokens_map.json")
        return cls(read_chat_templates(folder, config), special_tokens_of(config, tokens_map))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text of a conversation (core.interfaces.tokenizer.Tokenizer)."""
        return self._template(tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def check(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
    ) -> int:
        """The characters of a conversation. Raises RequestError where a message is not in order or
        the template would drop a part of it."""
        size = check_messages(messages)
        self._template(tools).check_reads(messages, tools)
        return size + text_size(tools)

    def compile(self) -> None:
        """Compile and probe all of them now. Raises ModelError where one is broken.

        They are a checkpoint's programs: call it, and render, where a program that doesn't end
        can be stopped (core.serve.text.process)."""
        for name, source in self._sources.items():
            self._templates[name] = ChatTemplate(source, self._special_tokens)

    def _template(self, tools: Sequence[dict[str, Any]] | None) -> ChatTemplate:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise RequestError(
                "this model has no chat template; send the prompt to /v1/completions instead",
                code="no_chat_template",
            )
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._sources[name], self._special_tokens)
        return self._templates[name]


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a file that may be absent."""
    return read_json(path) if path.exists() else {}


def special_tokens_of(config: dict[str, Any], tokens_map: dict[str, Any]) -> dict[str, str]:
    """Name -> text of tokenizer_config.json, else special_tokens_map.json. A value is a string or
    an AddedToken's object."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name, tokens_map.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def read_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name, in transformers' order of precedence: files before the config's.
    `config`: the contents of tokenizer_config.json."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    legacy = read_optional(folder / "chat_template.json").get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        templates.update({entry["name"]: entry["template"] for entry in value})
    if isinstance(legacy, str):
        templates["default"] = legacy
    file = folder / "chat_template.jinja"
    if file.exists():
        templates["default"] = _read_template(file)
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = _read_template(extra)
    return templates


def _read_template(path: Path) -> str:
    try:
        return read_plain(path, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error.reason}") from error
