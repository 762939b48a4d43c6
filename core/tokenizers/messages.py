"""A request's messages: checked, and brought into the one form that a chat template reads.

Clients write the same conversation in many ways: content that is null, absent or a list of parts,
tool arguments as JSON text or as an object, an empty list of calls, a role that is newer than the
model. What a template does with each differs, so `MessageForm` says what one template reads (see
core.tokenizers.template_probe) and `shape_messages` writes every conversation in that form. Knows
nothing of jinja2 or of tokens.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from core.errors import RequestError

MAX_MESSAGES = 16_384
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Parts that are text, by type, and the key that holds it. Responses' names are taken too.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
INSTRUCTIONS = frozenset({"system", "developer"})
MAY_BE_EMPTY = frozenset({"assistant", "tool", "function"})  # content null or absent
CALL_ID_CHARACTERS = 9  # what Mistral's templates demand
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageForm:
    """What one template reads. The defaults are those of a template that reads anything."""

    text_roles: frozenset[str] = frozenset(ROLES)  # whose content may be text
    parts_roles: frozenset[str] = frozenset()  # whose content may be a list of text parts
    # What stands for content beside tool calls where there is none: (text or None,), or () where
    # the key has to be absent.
    no_content: tuple[str | None, ...] = ("",)
    arguments_as_text: bool = False  # else as an object
    calls_apart: bool = False  # text beside tool calls would hide them: two messages
    short_call_ids: bool = False  # ids of calls are nine letters and digits
    names_results: bool = False  # a tool's answer needs the tool's name
    merges_system: bool = False  # several instructions at the start have to be one message
    reads_developer: bool = False  # else the role is called system
    reads_system: bool = True
    reads_tools: bool = False  # descriptions of tools
    reads_calls: bool = False  # calls of tools and their answers


def check_messages(messages: Any) -> int:
    """The characters of all texts, calls of tools included.

    Raises RequestError unless every message has a known role, content of text only, and calls
    that name a function.
    """
    if not isinstance(messages, list):
        raise RequestError(
            "messages: expected array, got "
            + ("nothing" if messages is None else type(messages).__name__),
            param="messages",
            code="invalid_type",
        )
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(
            f"messages has {len(messages)} entries; allowed: 1 to {MAX_MESSAGES}", param="messages"
        )
    return sum(_check_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def text_size(value: Any) -> int:
    """The characters of every string in a value of lists and objects, names included."""
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        else:
            size += 1
    return size


def shape_messages(messages: Iterable[Mapping[str, Any]], form: MessageForm) -> list[Message]:
    """Copies of checked messages in a template's form."""
    shaped: list[Message] = []
    calls: dict[str, str] = {}  # id -> name, of the calls so far
    for message in messages:
        plain = _plain(message)
        if plain["role"] == "assistant":
            shaped += _shape_assistant(plain, form, calls)
        elif plain["role"] == "tool":
            shaped.append(_shape_result(plain, form, calls))
        else:
            if plain["role"] == "developer" and not form.reads_developer:
                plain["role"] = "system"
            plain["content"] = _content(_parts(plain.get("content")), plain["role"], form)
            shaped.append(plain)
    if form.merges_system:
        shaped = _merge_system(shaped, form)
    return shaped


def _check_message(message: Any, where: str) -> int:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", param=where)
    size = _check_content(message, role, where)
    if role == "assistant":
        for index, call in enumerate(_calls_of(message, where)):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise RequestError(
                    f"{where}.tool_calls[{index}] must be an object with a function that has a "
                    "name",
                    param=f"{where}.tool_calls",
                )
            size += text_size(function)
    return size


def _check_content(message: Message, role: str, where: str) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    if content is None and role in MAY_BE_EMPTY:
        return 0
    if not isinstance(content, list):
        raise RequestError(
            f"{where}.content must be text or a list of parts", param=f"{where}.content"
        )
    size = 0
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None or (kind == "refusal" and role != "assistant"):
            raise RequestError(
                f"{where}.content may hold parts of type text only (an assistant's also refusal): "
                "this model reads no others",
                param=f"{where}.content",
            )
        if not isinstance(part.get(key), str):
            raise RequestError(f"{where}.content: {key} is missing", param=f"{where}.content")
        size += len(part[key])
    return size


def _calls_of(message: Mapping[str, Any], where: str) -> list[Any]:
    """The calls of an assistant's message; OpenAI's older `function_call` is one without an id."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(
            f"{where}.tool_calls must be a list of calls", param=f"{where}.tool_calls"
        )
    older = message.get("function_call")
    if older is None:
        return calls or []
    return [*(calls or []), {"type": "function", "function": older}]


def _plain(message: Mapping[str, Any]) -> Message:
    """A copy without nulls, reasoning under each name that templates use, and OpenAI's older
    names of calls and their answers replaced."""
    plain = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING:
        if name in plain:
            plain = {"thinking": plain[name], **plain, "reasoning_content": plain[name]}
            break
    if plain["role"] == "function":
        plain["role"] = "tool"
    calls = _calls_of(plain, "messages")
    plain.pop("function_call", None)
    plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = calls
    refusal = plain.pop("refusal", None)
    if isinstance(refusal, str) and not plain.get("content"):
        plain["content"] = refusal  # an answer of ours or OpenAI's, sent back as it came
    return plain


def _parts(content: Any) -> str | list[dict[str, str]]:
    """Text, or parts of type text."""
    if not isinstance(content, list):
        return content or ""
    return [{"type": "text", "text": part[TEXT_PARTS[part["type"]]]} for part in content]


def _content(content: str | list[dict[str, str]], role: str, form: MessageForm) -> Any:
    """Content as the template reads it in messages of this role."""
    if isinstance(content, list) and role in form.parts_roles:
        return content
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    if role in form.text_roles:
        return text
    return [{"type": "text", "text": text}] if text else []


def _shape_assistant(plain: Message, form: MessageForm, calls: dict[str, str]) -> list[Message]:
    content = _parts(plain.get("content"))
    if "tool_calls" not in plain:
        return [{**plain, "content": _content(content, "assistant", form)}]
    shaped = [_shape_call(call, form, len(calls) + i) for i, call in enumerate(plain["tool_calls"])]
    calls.update((call.get("id", ""), call["function"]["name"]) for call in shaped)
    message = {**plain, "tool_calls": shaped}
    message.pop("content", None)
    if content and form.calls_apart:
        text = {key: value for key, value in plain.items() if key != "tool_calls"}
        text["content"] = _content(content, "assistant", form)
        return [text, message | _no_content(form)]
    if content:
        message["content"] = _content(content, "assistant", form)
        return [message]
    return [message | _no_content(form)]


def _no_content(form: MessageForm) -> Message:
    if form.no_content == ("",):
        return {"content": _content("", "assistant", form)}
    return dict.fromkeys(("content",), form.no_content[0]) if form.no_content else {}


def _shape_call(call: Mapping[str, Any], form: MessageForm, index: int) -> Message:
    function = dict(call["function"])
    function["arguments"] = _arguments(function.get("arguments"), form)
    shaped = {**call, "function": function}
    shaped.setdefault("type", "function")
    given = shaped.get("id")
    shaped["id"] = f"call_{index:04d}" if given is None else str(given)
    if form.short_call_ids:
        shaped["id"] = short_id(shaped["id"])
    return shaped


def _arguments(given: Any, form: MessageForm) -> Any:
    """An object or its JSON text. What is no object (blank, broken, cut off) becomes an empty one:
    it is in the history of the conversation, and would come again with every turn."""
    found, text = given, None
    if isinstance(given, str):
        text = given
        try:
            found = json.loads(given, strict=False)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        found, text = {}, "{}"
    if not form.arguments_as_text:
        return found
    return json.dumps(found, ensure_ascii=False) if text is None else text


def _shape_result(plain: Message, form: MessageForm, calls: dict[str, str]) -> Message:
    """A tool's answer. One without an id answers the latest call."""
    shaped = {**plain, "content": _content(_parts(plain.get("content")), "tool", form)}
    call_id = plain.get("tool_call_id")
    if call_id is None:
        call_id = next(reversed(calls), None)
    else:
        call_id = short_id(str(call_id)) if form.short_call_ids else str(call_id)
    if call_id is not None:
        shaped["tool_call_id"] = call_id
    if form.names_results and "name" not in shaped and call_id in calls:
        shaped["name"] = calls[call_id]
    return shaped


def short_id(call_id: str) -> str:
    """Nine letters and digits that stand for an id: itself where it has that form."""
    if len(call_id) == CALL_ID_CHARACTERS and call_id.isascii() and call_id.isalnum():
        return call_id
    return sha256(call_id.encode("utf-8", "replace")).hexdigest()[:CALL_ID_CHARACTERS]


def _merge_system(shaped: Sequence[Message], form: MessageForm) -> list[Message]:
    """The system's and developer's messages at the start as one, an empty line between them."""
    roles = [message["role"] for message in shaped]
    num_first = next((i for i, r in enumerate(roles) if r not in INSTRUCTIONS), len(roles))
    if num_first < 2:
        return list(shaped)
    texts = [_text(message["content"]) for message in shaped[:num_first]]
    merged = {**shaped[0], "content": _content("\n\n".join(texts), roles[0], form)}
    return [merged, *shaped[num_first:]]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
