"""Finds out what a chat template reads, by rendering small conversations with it once at start.

A template tells nothing of itself, and its source can be written in a thousand ways; what appears
in the text it makes is certain. A probe passes where every marker it put into a conversation comes
out again, and nothing of Python or of doubly encoded JSON with it. Knows nothing of jinja2.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from core.tokenizers.messages import Message, MessageForm, shape_messages

# Renders messages, which are in form already, with descriptions of tools or None.
Render = Callable[[list[Message], list[dict[str, Any]] | None], str]

USER, SECOND, TEXT = "nodeweave-user", "nodeweave-second", "nodeweave-text"
NAME, KEY, VALUE, RESULT = "nodeweave_name", "nodeweave_key", "nodeweave-value", "nodeweave-result"
CALL_ID = "call_nodeweave"
TOOL_NAME = "nodeweave_tool"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A place."}},
            "required": ["place"],
        },
    },
}
CALL = {
    "id": CALL_ID,
    "type": "function",
    "function": {"name": NAME, "arguments": f'{{"{KEY}": "{VALUE}"}}'},
}
# What shows that a value was printed as Python has it, or as JSON inside JSON.
_FOREIGN = ("'type'", '"type": "text"', '"type":"text"', "{'" + KEY, '\\"' + KEY)
_USER_TURN: Message = {"role": "user", "content": USER}


def probe(render: Render, source: str) -> MessageForm:
    """The form of messages that a template reads. `render` may raise anything."""
    form = _probe_content(render)
    form = _probe_system(render, form, source)
    form = _probe_calls(render, form)
    return replace(form, reads_tools=_reads_tools(render, form))


def _shows(
    render: Render,
    messages: list[Message],
    *markers: str,
    tools: list[dict[str, Any]] | None = None,
) -> bool:
    """Whether all markers come out, and nothing foreign with them."""
    text = _rendered(render, messages, tools)
    return all(marker in text for marker in markers) and not any(f in text for f in _FOREIGN)


def _rendered(
    render: Render, messages: list[Message], tools: list[dict[str, Any]] | None = None
) -> str:
    try:
        return render(messages, tools)
    except Exception:  # whatever a template does to messages that it doesn't expect
        return ""


def _around(role: str, content: Any) -> list[Message]:
    """A conversation in which a message of this role is in its place."""
    message = {"role": role, "content": content}
    if role == "assistant":
        return [_USER_TURN, message, _USER_TURN]
    return [message] if role == "user" else [message, _USER_TURN]


def _probe_content(render: Render) -> MessageForm:
    """Which roles' content is read as text, and which as parts. One that is read as neither (or
    where the template refuses the role) gets text."""
    text_roles, parts_roles = {"developer", "tool", "function"}, set()
    parts = [{"type": "text", "text": TEXT}, {"type": "text", "text": SECOND}]
    for role in ("system", "user", "assistant"):
        if _shows(render, _around(role, parts), TEXT, SECOND):
            parts_roles.add(role)
        only_parts = _shows(render, _around(role, parts[:1]), TEXT)
        if not only_parts or _shows(render, _around(role, TEXT), TEXT):
            text_roles.add(role)
    if "developer" not in parts_roles and "system" in parts_roles:
        parts_roles.add("developer")
    if "system" not in text_roles:
        text_roles.discard("developer")
    return MessageForm(text_roles=frozenset(text_roles), parts_roles=frozenset(parts_roles))


def _probe_system(render: Render, form: MessageForm, source: str) -> MessageForm:
    def shows(form: MessageForm, roles: Sequence[str]) -> bool:
        texts = (TEXT, SECOND)
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        shaped = shape_messages([*messages, _USER_TURN], form)
        return _shows(render, shaped, USER, *texts[: len(roles)])

    # A template that prints any role's name shows a developer's text too, without the model
    # having seen that role: it counts as known where the template names it.
    known = replace(form, reads_developer=True)
    if "developer" in source and shows(known, ["developer"]):
        form = known
    merged = replace(form, merges_system=True)
    second = "developer" if form.reads_developer else "system"
    for roles in (["system", "system"], ["system", second], [second, "system"]):
        if not shows(form, roles) and shows(merged, roles):
            form = merged
    # A template that refuses the role says so itself; one that drops the text doesn't.
    alone = _rendered(render, shape_messages(_around("system", TEXT), form))
    return replace(form, reads_system=TEXT in alone or alone == "")


def _probe_calls(render: Render, form: MessageForm) -> MessageForm:
    """How calls of tools and their answers have to be written for both to come out.

    The forms are tried in the order of preference; a template that shows calls in none is asked
    for answers alone.
    """
    found = next((f for f in _call_forms(form) if _shows_turn(render, f)), None)
    if found is None:
        return _probe_empty(render, form)
    found = replace(found, reads_calls=True)
    if not _shows_turn(render, found, text=TEXT):
        apart = replace(found, calls_apart=True)
        if _shows_turn(render, apart, text=TEXT, wants_text=True):
            return apart
    return found


def _call_forms(form: MessageForm) -> Iterator[MessageForm]:
    empty: tuple[tuple[str | None, ...], ...] = (("",), (None,), ())
    in_parts = form.parts_roles | {"tool"}
    tool_contents = ((form.text_roles, form.parts_roles), (form.text_roles - {"tool"}, in_parts))
    for names, short, (text_roles, parts_roles), as_text, no_content in product(
        (False, True), (False, True), tool_contents, (False, True), empty
    ):
        yield replace(
            form,
            names_results=names,
            short_call_ids=short,
            text_roles=text_roles,
            parts_roles=parts_roles,
            arguments_as_text=as_text,
            no_content=no_content,
        )


def _shows_turn(
    render: Render, form: MessageForm, text: str | None = None, wants_text: bool = False
) -> bool:
    """Whether a turn of tool use comes out whole, with `text` beside the call."""
    turn = [
        _USER_TURN,
        {"role": "assistant", "content": text, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL_ID, "content": RESULT},
    ]
    markers = (USER, NAME, KEY, VALUE, RESULT, *([text] if text and wants_text else []))
    shaped = shape_messages(turn, form)
    # Some templates show calls only beside descriptions, and some fail where there are none.
    return any(_shows(render, shaped, *markers, tools=tools) for tools in (None, [TOOL]))


def _probe_empty(render: Render, form: MessageForm) -> MessageForm:
    """How a message that only calls tools is written for a template that does not read calls."""
    turn = [_USER_TURN, {"role": "assistant", "tool_calls": [CALL]}, _USER_TURN]
    for no_content in (("",), (None,), ()):
        candidate = replace(form, no_content=no_content)
        if _shows(render, shape_messages(turn, candidate), USER):
            return candidate
    return form


def _reads_tools(render: Render, form: MessageForm) -> bool:
    """Whether the description of a tool comes out."""
    system = {"role": "system", "content": SECOND}
    for messages in ([_USER_TURN], [system, _USER_TURN]):
        if TOOL_NAME in _rendered(render, shape_messages(messages, form), [TOOL]):
            return True
    return False
