"""Messages of every form that clients send, in the one form that each template reads.

The right text is transformers' `apply_chat_template` of messages written by hand as that template's
family has them, or a text that is given with the case."""

import json
from pathlib import Path

import pytest

from core.errors import RequestError
from core.tokenizers.chat_template import ChatTemplate
from core.tokenizers.messages import (
    MAX_MESSAGES,
    MessageForm,
    check_messages,
    shape_messages,
    short_id,
)
from tests.support.template_manners import MANNERS

CASES = json.loads((Path(__file__).parent / "message_cases.json").read_text("utf-8"))
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
ARGUMENTS = {"city": "Tromsø", "days": 2}
QUESTION = {"role": "user", "content": "What is the weather?"}
ABSENT = object()
# By manner: content beside calls, arguments (as text?), the call's id, and whether tools are read.
WRITTEN = {
    "llama3": ("", False, True), "qwen2.5": ("", False, True), "qwen3": ("", False, True),
    "qwen3-coder": ("", False, True), "deepseek-v3": (None, True, False),
    "deepseek-r1": (None, True, False), "deepseek-v3.1": ("", True, False),
    "mistral": ("", False, True), "glm": ("", False, True), "kimi-k2": ("", False, True),
    "granite": ("", False, True), "gpt-oss": ("", False, True), "hermes": ("", False, True),
    "parts-only": ([], False, True),
}  # fmt: skip


def theirs(source, messages, tools=None):
    """As transformers renders, with the messages' own nulls: its tokenizers drop them first."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(source)
    return template.render(
        messages=messages, tools=tools, add_generation_prompt=True, **SPECIAL_TOKENS
    )


def ours(source, messages, tools=None):
    check_messages(messages)
    template = ChatTemplate(source, SPECIAL_TOKENS)
    template.check_reads(messages, tools)
    return template.render(messages, tools=tools)


def second_turn(content, arguments, call_id="call_0001"):
    call = {"name": "get_weather", "arguments": arguments}
    message = {
        "role": "assistant",
        "tool_calls": [{"id": call_id, "type": "function", "function": call}],
    }
    if content is not ABSENT:
        message["content"] = content
    answer = {"role": "tool", "tool_call_id": call_id, "content": "4 degrees"}
    return [QUESTION, message, answer]


@pytest.mark.parametrize("name", CASES)
def test_cases_with_their_right_text(name):
    case = CASES[name]
    template = ChatTemplate(case["template"], {})
    check_messages(case["messages"])
    assert template.render(case["messages"]) == case["right"]


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)])
@pytest.mark.parametrize("content", [None, "", ABSENT, []])
@pytest.mark.parametrize("manner", WRITTEN)
def test_a_second_turn_of_tool_use(manner, content, arguments):
    source = MANNERS[manner]
    own_content, as_text, reads_tools = WRITTEN[manner]
    tools = [TOOL] if reads_tools else None
    call_id = short_id("call_0001") if manner == "mistral" else "call_0001"
    own_arguments = json.dumps(ARGUMENTS, ensure_ascii=False) if as_text else ARGUMENTS
    right = second_turn(own_content, own_arguments, call_id)
    if manner == "parts-only":
        for message in (right[0], right[2]):
            message = message | {"content": [{"type": "text", "text": message["content"]}]}
            right[0 if message["role"] == "user" else 2] = message
    expected = theirs(source, right, tools)
    assert "Troms" in expected
    assert "4 degrees" in expected
    assert ours(source, second_turn(content, arguments), tools) == expected


@pytest.mark.parametrize("arguments", ["", " ", '{"city": "Os', None, "[1]", "null", '"text"'])
@pytest.mark.parametrize("manner", WRITTEN)
def test_arguments_that_are_no_object_become_an_empty_one(manner, arguments):
    tools = [TOOL] if WRITTEN[manner][2] else None
    expected = ours(MANNERS[manner], second_turn("", {}), tools)
    assert ours(MANNERS[manner], second_turn("", arguments), tools) == expected
    assert "get_weather" in expected


@pytest.mark.parametrize("manner", MANNERS)
def test_no_calls_are_no_calls(manner):
    answered = {"role": "assistant", "content": "Cold."}
    tools = [TOOL] if manner == "hermes" else None
    expected = ours(MANNERS[manner], [QUESTION, answered, QUESTION], tools)
    for empty in ([], None):
        messages = [QUESTION, answered | {"tool_calls": empty}, QUESTION]
        assert ours(MANNERS[manner], messages, tools) == expected


@pytest.mark.parametrize("manner", MANNERS)
def test_a_developers_words_are_never_dropped(manner):
    tools = [TOOL] if manner == "hermes" else None
    developer = {"role": "developer", "content": "Answer in Dutch."}
    system = {"role": "system", "content": "Be brief."}
    alone = ours(MANNERS[manner], [developer, QUESTION], tools)
    assert alone == ours(MANNERS[manner], [developer | {"role": "system"}, QUESTION], tools)
    both = ours(MANNERS[manner], [system, developer, QUESTION], tools)
    assert "Answer in Dutch." in both
    assert "Be brief." in both


def test_a_developer_keeps_the_role_where_the_template_names_it():
    developer = {"role": "developer", "content": "Dutch."}
    assert ChatTemplate(MANNERS["gpt-oss"], {}).form.reads_developer
    printed = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert ours(printed, [developer]) == "[system]Dutch."
    named = printed + "{# knows developer #}"
    assert ours(named, [developer]) == "[developer]Dutch."


@pytest.mark.parametrize("manner", MANNERS)
def test_refusals_are_text(manner):
    tools = [TOOL] if manner == "hermes" else None
    expected = ours(
        MANNERS[manner], [QUESTION, {"role": "assistant", "content": "I can't."}, QUESTION], tools
    )
    assert "I can't." in expected
    part = {"type": "refusal", "refusal": "I can't."}
    for message in ({"content": [part]}, {"content": None, "refusal": "I can't."}):
        messages = [QUESTION, {"role": "assistant", **message}, QUESTION]
        assert ours(MANNERS[manner], messages, tools) == expected


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_parts_come_out_as_text_whatever_the_role(manner, role):
    parts = [{"type": "text", "text": "part one"}, {"type": "input_text", "text": "part two"}]
    messages = [QUESTION, {"role": role, "content": parts}, QUESTION]
    if role == "tool":
        messages = [*second_turn(None, ARGUMENTS)[:2], messages[1] | {"tool_call_id": "call_0001"}]
        if not ChatTemplate(MANNERS[manner], SPECIAL_TOKENS).form.reads_calls:
            pytest.skip("a template without tools")
    elif role != "assistant":
        messages = messages[1:] if role == "system" else messages[1:2]
    text = ours(MANNERS[manner], messages, [TOOL] if manner == "hermes" else None)
    assert "part one" in text
    assert "part two" in text
    assert "type" not in text.replace(json.dumps(TOOL["function"]), "")


def test_text_beside_calls_is_kept():
    turn = second_turn("Let me look.", json.dumps(ARGUMENTS, ensure_ascii=False))
    beside = ours(MANNERS["qwen2.5"], turn)
    assert beside == theirs(MANNERS["qwen2.5"], second_turn("Let me look.", ARGUMENTS))
    apart = ours(MANNERS["deepseek-v3"], turn)
    assert apart == theirs(
        MANNERS["deepseek-v3"],
        [turn[0], {"role": "assistant", "content": "Let me look."}, turn[1] | {"content": None},
         turn[2]],
    )  # fmt: skip
    assert "Let me look." in apart
    assert "get_weather" in apart


@pytest.mark.parametrize(
    ("manner", "reads"),
    [
        (m, m not in ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "gemma", "phi"))
        for m in MANNERS
    ],
)
def test_tools_that_a_template_does_not_read_are_refused(manner, reads):
    template = ChatTemplate(MANNERS[manner], SPECIAL_TOKENS)
    assert template.form.reads_tools is reads
    if reads:
        assert "get_weather" in template.render([QUESTION], tools=[TOOL])
    else:
        with pytest.raises(RequestError, match="does not read tools") as caught:
            template.check_reads([QUESTION], [TOOL])
        assert caught.value.param == "tools"
        template.check_reads([QUESTION], [])


def test_a_role_that_would_be_dropped_is_refused():
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for role in ("system", "developer"):
        with pytest.raises(RequestError, match="does not read messages of role"):
            ours(source, [{"role": role, "content": "Dutch."}, QUESTION])


def test_openais_older_functions_are_calls():
    older = [
        QUESTION,
        {"role": "assistant", "content": None,
         "function_call": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "get_weather", "content": "4 degrees"},
    ]  # fmt: skip
    assert ours(MANNERS["llama3"], older) == ours(MANNERS["llama3"], second_turn(None, ARGUMENTS))
    assert short_id("call_0000") in ours(MANNERS["mistral"], older)


def test_a_short_id_stands_for_the_same_call():
    text = ours(MANNERS["mistral"], second_turn(None, ARGUMENTS, "call_EfGh12345678"))
    assert text.count(short_id("call_EfGh12345678")) == 2
    assert "abcDEF123" in ours(MANNERS["mistral"], second_turn(None, ARGUMENTS, "abcDEF123"))


@pytest.mark.parametrize("call_id", [7, [7], {"a": 7}, None])
def test_ids_of_odd_types_are_text(call_id):
    turn = second_turn(None, ARGUMENTS, call_id)
    del turn[1]["tool_calls"][0]["type"]
    shaped = shape_messages(turn, MessageForm(names_results=True))
    [call] = shaped[1]["tool_calls"]
    assert (shaped[2]["tool_call_id"], shaped[2]["name"]) == (call["id"], "get_weather")
    assert isinstance(call["id"], str)
    assert call["type"] == "function"


def test_the_request_is_left_as_it_was():
    turn = second_turn(None, "")
    before = json.dumps(turn)
    shape_messages(turn, MessageForm(short_call_ids=True, calls_apart=True))
    assert json.dumps(turn) == before


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({}, "expected array, got dict"),
        (None, "expected array, got nothing"),
        ([], "0 entries"),
        ([QUESTION] * (MAX_MESSAGES + 1), "allowed: 1 to 16384"),
        ([7], "role must be one of"),
        ([{"role": "user"}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type text only"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "type text only"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "type text only"),
        ([{"role": "assistant", "content": [{"type": "refusal"}]}], "refusal is missing"),
        ([{"role": "assistant", "tool_calls": 7}], "must be a list of calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "function that has a name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], "has a name"),
        ([{"role": "assistant", "function_call": "f"}], "has a name"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(RequestError, match=message) as caught:
        check_messages(messages)
    assert caught.value.param.startswith("messages")


def test_calls_count_as_text():
    turn = second_turn("abc", {"city": "x" * 100})
    plain = check_messages([QUESTION, {"role": "assistant", "content": "abc"}, turn[2]])
    assert check_messages(turn) >= plain + 100
