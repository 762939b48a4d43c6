"""Renders a checkpoint's chat template. Knows nothing of tokens, of HTTP, or of one model.

The result equals transformers' `apply_chat_template`: the same jinja2 options, filters, globals
and treatment of None (see transformers/utils/chat_template_utils.py). Templates come only from
the checkpoint, never from a request, and still run in the immutable sandbox, within limits of CPU
time and size: loops, macros and calls count as steps, at which both are checked. The process that
renders is ended by the kernel where a template gets around that (core.serve.text.process).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from core.errors import ModelError, RequestError
from core.tokenizers.messages import MessageForm, shape_messages
from core.tokenizers.template_probe import probe
from core.tokenizers.template_sandbox import TemplateEnvironment, TemplateLimit

DEADLINE_S = 2.0
MAX_CHARACTERS = 64 * 1024 * 1024
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
# What a request may not set: they are ours, or the checkpoint's.
RESERVED_VARIABLES = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "chat_template", "tokenize", "bos_token", "eos_token", "unk_token", "pad_token",
    }
)  # fmt: skip


class ChatTemplate:
    """One compiled template with the special tokens it may name. Threads may share it."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        deadline_s: float = DEADLINE_S,
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        """Raises ModelError where the template can't be compiled."""
        self._environment = TemplateEnvironment(deadline_s, max_characters)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except Exception as error:  # jinja2's own, and Python's where what jinja2 makes of it fails
            words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ModelError(
                f"the checkpoint's chat template is broken: {words[:300] or type(error).__name__}; "
                "repair it where the checkpoint keeps it (chat_template.jinja, "
                "tokenizer_config.json, or a GGUF file's tokenizer.chat_template)"
            ) from error
        undeclared = jinja2.meta.find_undeclared_variables(tree)
        self.variables = frozenset(undeclared - self._environment.globals.keys())
        self.form: MessageForm = probe(
            lambda messages, tools: self._render(messages, tools, True, {}), source
        )

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation that `check_messages` let pass.

        `variables` beyond those the template reads are ignored, reserved ones refused. Raises
        RequestError where the template refuses the messages, with its own words.
        """
        chosen = self._allowed(variables or {})
        chat = shape_messages(messages, self.form)
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other; "
                    "set add_generation_prompt to false",
                    param="continue_final_message",
                )
            final_text = _tag_final_message(chat)
        try:
            text = self._render(chat, tools, add_generation_prompt, chosen)
        except TemplateLimit as error:
            raise RequestError(f"the chat template {error}", param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # A template that meets what it was not written for fails with a plain Python error.
            words = str(error)[:300] or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages: {words}", param="messages"
            ) from error
        except RecursionError as error:
            raise RequestError("the chat template recursed too deeply", param="messages") from error
        return _cut_at_tag(text, final_text) if continue_final_message else text

    def _render(
        self,
        chat: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        arguments = {**self._special_tokens, **variables}
        pieces: list[str] = []
        with self._environment.limits:
            for piece in self._template.generate(
                messages=chat,
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            ):
                self._environment.limits.step(len(piece))
                pieces.append(piece)
        return "".join(pieces)

    def check_reads(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> None:
        """Raise RequestError for what the template would drop without a word."""
        if tools and not self.form.reads_tools:
            raise RequestError(
                "this model's chat template does not read tools, so that the model would not see "
                'them; leave tools out, or send tool_choice="none"',
                param="tools",
                code="unsupported",
            )
        if self.form.reads_system:
            return
        named = {"system"} if self.form.reads_developer else {"system", "developer"}
        for index, message in enumerate(messages):
            if message.get("role") in named:
                raise RequestError(
                    "this model's chat template does not read messages of role "
                    f"{message['role']}; put the text into the first message of role user",
                    param=f"messages[{index}]",
                    code="unsupported",
                )

    def _allowed(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in RESERVED_VARIABLES:
                raise RequestError(
                    f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs"
                )
        return {name: value for name, value in variables.items() if name in self.variables}


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; returns that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content or []):
        if "text" in part:
            text = part["text"]
            part["text"] = text + _CONTINUE_TAG
            return str(text)
    raise RequestError(
        "continue_final_message is set but the last message has no text to continue",
        param="continue_final_message",
    )


def _cut_at_tag(text: str, final_text: str) -> str:
    if final_text.strip() not in text or _CONTINUE_TAG.strip() not in text:
        raise RequestError(
            "the chat template drops the last message's text, so it can't be continued",
            param="continue_final_message",
        )
    at = text.rindex(_CONTINUE_TAG.strip())
    if text[at : at + len(_CONTINUE_TAG)] == _CONTINUE_TAG:
        return text[:at]
    return text[:at].rstrip()  # the template trims its messages
