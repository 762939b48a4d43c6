"""Renders a checkpoint's chat template. Knows nothing of tokens, of HTTP, or of one model.

The result equals transformers' `apply_chat_template`: the same jinja2 options, filters, globals
and treatment of None (see transformers/utils/chat_template_utils.py). Templates come only from
the checkpoint, never from a request, and still run in the immutable sandbox, within a deadline
and a size limit: loops, macros and calls count as steps, at which both are checked.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes as nodes
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import ModelError, RequestError

DEADLINE_S = 2.0
MAX_CHARACTERS = 64 * 1024 * 1024
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "nodeweave-probe"
# What a request may not set: they are ours, or the checkpoint's.
RESERVED_VARIABLES = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "chat_template", "tokenize", "bos_token", "eos_token", "unk_token", "pad_token",
    }
)  # fmt: skip


class TemplateLimit(Exception):
    """A template ran too long or grew too large. Not a jinja2 error: templates can't catch it."""


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
        """Raises ModelError where the template has a syntax error."""
        self._environment = _Environment(deadline_s, max_characters)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = self._environment.from_string(source)
            tree = self._environment.parse(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the checkpoint's chat template is broken: {error}") from error
        undeclared = jinja2.meta.find_undeclared_variables(tree)
        self.variables = frozenset(undeclared - self._environment.globals.keys())
        self._content_in_parts, self._content_as_text = self._probe_content_forms()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        `variables` beyond those the template reads are ignored, reserved ones refused. Raises
        RequestError where the template refuses the messages, with its own words.
        """
        chosen = self._allowed(variables or {})
        chat = [self._normalise(message) for message in messages]
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

    def _allowed(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in RESERVED_VARIABLES:
                raise RequestError(
                    f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs"
                )
        return {name: value for name, value in variables.items() if name in self.variables}

    def _normalise(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy without None values, reasoning under the standard name, and the content in the
        form that this template understands."""
        plain = {key: value for key, value in message.items() if value is not None}
        for name in ("reasoning_content", "thinking", "reasoning"):
            if name in plain:
                plain = {"thinking": plain[name], **plain, "reasoning_content": plain[name]}
                break
        content = plain.get("content")
        if isinstance(content, list) and not self._content_in_parts:
            plain["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and not self._content_as_text:
            plain["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list):
            plain["content"] = [dict(part) for part in content]
        return plain

    def _probe_content_forms(self) -> tuple[bool, bool]:
        """Whether a list of text parts, and whether a string, is rendered as its text.

        A template that understands neither (it refuses a lone user message) gets strings.
        """
        parts = self._renders_probe([{"type": "text", "text": _PROBE}])
        text = self._renders_probe(_PROBE)
        return parts, text or not parts

    def _renders_probe(self, content: Any) -> bool:
        try:
            text = self._render([{"role": "user", "content": content}], None, True, {})
        except Exception:  # whatever a template does to a form of content it doesn't expect
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


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


class _Limits(threading.local):
    """Time and size left to the rendering under way in this thread."""

    def __init__(self, deadline_s: float, max_characters: int) -> None:
        self.deadline_s = deadline_s
        self.max_characters = max_characters
        self.ends_at = float("inf")
        self.characters = 0

    def __enter__(self) -> None:
        self.ends_at = time.monotonic() + self.deadline_s
        self.characters = 0

    def __exit__(self, *_: object) -> None:
        self.ends_at = float("inf")

    def step(self, characters: int = 0) -> str:
        self.characters += characters
        if self.characters > self.max_characters:
            raise TemplateLimit(f"made more than {self.max_characters} characters")
        if time.monotonic() > self.ends_at:
            raise TemplateLimit(f"took more than {self.deadline_s} s")
        return ""

    def check_size(self, size: int) -> None:
        if size > self.max_characters:
            raise TemplateLimit(f"made a value of more than {self.max_characters} elements")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, plus limits."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, deadline_s: float, max_characters: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self.limits = _Limits(deadline_s, max_characters)
        self.count_step: Callable[[], str] = self.limits.step
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _dict

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        """Compile with a counted step at the start of every loop body, and `~` as a checked call.

        Macros need none: calling one is a counted step.
        """
        _Counting().visit(source)
        return super()._generate(source, name, filename, defer_init)

    def checked_concat(self, *parts: Any) -> str:
        """What `~` does, within the size limit."""
        texts = [str(part) for part in parts]
        self.limits.check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.limits.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.limits.step()
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "+":
            self.limits.check_size(sum(sizes))
        elif operator == "*" and len(sizes) == 1:
            times = next((side for side in (left, right) if isinstance(side, int)), 0)
            self.limits.check_size(sizes[0] * times)
        elif operator == "**" and isinstance(right, int):
            self.limits.check_size(abs(right) * 1024)
        return super().call_binop(context, operator, left, right)


class _Counting(jinja2.visitor.NodeTransformer):
    """Puts the calls that check limits into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("checked_concat")
        return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it
    is its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own annotation)

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be an attribute's name
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("names in a namespace can't begin with _")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
