"""Chat templates against transformers' apply_chat_template, and their limits."""

import time

import pytest

from core.errors import ModelError, RequestError
from core.tokenizers.chat_template import ChatTemplate
from tests.support.small_tokenizer import SMOLLM2_TEMPLATE, byte_level

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
# Written for these tests, with the constructs of Llama 3.1's and Qwen3's templates.
LLAMA31_STYLE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system<|end_header|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today: " + date_string + "\n\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}
"""
QWEN3_STYLE = """{%- macro body(message) %}{{ message.content }}{% endmacro %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') }}
            {{- '\n</think>\n' ~ content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- endgeneration %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + body(message) + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
PARTS_STYLE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }};{% endfor %}{% endif %}{% endfor %}"
)
TEMPLATES = {"smollm2": SMOLLM2_TEMPLATE, "llama31": LLAMA31_STYLE, "qwen3": QWEN3_STYLE}
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": ["<x>"]}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"q": "ä"}}}
USER = {"role": "user", "content": "  What is 1 < 2 & 'x'?\n"}
CONVERSATIONS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be\nbrief. "}, USER],
    "turns": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
    "none": [USER, {"role": "assistant", "content": "yes", "tool_calls": None, "name": None}],
}
TOOL_TURNS = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]


def theirs(source, messages, **arguments):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)
    return tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **arguments
    )


def ours(source, messages, variables=None, **arguments):
    return ChatTemplate(source, SPECIAL_TOKENS).render(messages, variables=variables, **arguments)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(name, conversation, add_generation_prompt):
    arguments = {"add_generation_prompt": add_generation_prompt}
    messages = CONVERSATIONS[conversation]
    expected = theirs(TEMPLATES[name], messages, **arguments)
    assert ours(TEMPLATES[name], messages, **arguments) == expected


def test_equals_transformers_with_tools_and_variables():
    expected = theirs(
        LLAMA31_STYLE, TOOL_TURNS, tools=[TOOL], add_generation_prompt=True, date_string="1 May"
    )
    found = ours(LLAMA31_STYLE, TOOL_TURNS, {"date_string": "1 May", "unknown": 1}, tools=[TOOL])
    assert found == expected
    expected = theirs(QWEN3_STYLE, [USER], add_generation_prompt=True, enable_thinking=False)
    assert ours(QWEN3_STYLE, [USER], {"enable_thinking": False}) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["The capital of France is", "ends with a space "])
def test_continues_the_final_message_as_transformers_does(name, text):
    messages = [USER, {"role": "assistant", "content": text}]
    expected = theirs(TEMPLATES[name], messages, continue_final_message=True)
    found = ours(
        TEMPLATES[name], messages, continue_final_message=True, add_generation_prompt=False
    )
    assert found == expected
    assert found.rstrip().endswith(text.rstrip())


def test_text_parts_become_what_the_template_understands():
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]
    assert "user\none\ntwo<|im_end|>" in ours(SMOLLM2_TEMPLATE, parts)
    assert ours(PARTS_STYLE, parts) == theirs(PARTS_STYLE, parts) == "[user]one;two;"
    only_parts = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    assert ours(only_parts, [{"role": "user", "content": "plain"}]) == "plain"


def test_a_template_refuses_in_its_own_words():
    messages = [{"role": "assistant", "tool_calls": [CALL, CALL]}]
    with pytest.raises(RequestError, match="only supports single tool-calls"):
        ours(LLAMA31_STYLE, messages)
    with pytest.raises(RequestError, match="refuses these messages") as caught:
        ours("{{ messages[0]['name'] + messages[0]['content'] }}", [USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["messages", "eos_token", "chat_template"])
def test_reserved_variables_are_refused(name):
    with pytest.raises(RequestError, match=name):
        ours(SMOLLM2_TEMPLATE, [USER], {name: "x"})


def test_a_broken_template_is_the_checkpoints_fault():
    with pytest.raises(ModelError, match="broken"):
        ChatTemplate("{% for x in %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{% set ns = namespace(x='abcd') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x='abcd') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        "{{ 2 ** (10 ** 9) }}",
    ],
)
def test_runaway_templates_end(source):
    guarded = "{% if messages[0].content == 'go' %}" + source + "{% endif %}"
    template = ChatTemplate(guarded, {}, deadline_s=0.3, max_characters=1_000_000)
    begin = time.monotonic()
    with pytest.raises(RequestError, match="template"):
        template.render([{"role": "user", "content": "go"}])
    assert time.monotonic() - begin < 5
    assert template.render([{"role": "user", "content": "stay"}]) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(RequestError, match="refuses"):
        ours(source, [USER])
