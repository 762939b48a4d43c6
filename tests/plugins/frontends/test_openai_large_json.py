"""Large answers: the same JSON as in one piece, what is shared made once, built aside."""

import asyncio
import json
import threading

import pytest

from plugins.frontends._openai.large_json import (
    LARGE_VALUES,
    SLICE,
    WRITE_BYTES,
    json_parts,
    send_large_json,
)

LONG = [{"é": i, "top": [1, {"a": None}]} for i in range(3 * SLICE + 1)]


@pytest.mark.parametrize(
    "value",
    [
        {}, [], {"a": {}}, {"a": []}, {"a": [[]], "b": [{}]}, [[1], {"a": 'x"'}], LONG, {"a": LONG},
        {"choices": [{"logprobs": {"content": LONG, "refusal": None}, "index": 0}], "n": 1.5},
        list(range(SLICE)), list(range(SLICE + 1)), "text", None,
    ],
    ids=range(13),
)  # fmt: skip
def test_parts_are_the_values_json(value):
    assert json.loads(b"".join(json_parts(value))) == value


def test_a_list_that_comes_again_is_encoded_once():
    parts = json_parts({"choices": [{"prompt_logprobs": LONG, "index": i} for i in range(9)]})
    large = {id(part) for part in parts if len(part) > 1000}
    assert len(large) == 1


def sent(num_values, value):
    messages, threads = [], []

    def build():
        threads.append(threading.current_thread())
        return value

    async def send(message):
        messages.append(message)

    asyncio.run(send_large_json(send, num_values, build))
    body = b"".join(message.get("body", b"") for message in messages)
    assert dict(messages[0]["headers"])[b"content-length"] == str(len(body)).encode()
    assert not messages[-1].get("more_body")
    return json.loads(body), messages, threads[0] is threading.main_thread()


def test_a_large_answer_is_built_in_another_thread_and_written_in_pieces():
    shared = LONG * 60
    value = {"choices": [{"prompt_logprobs": shared, "index": i} for i in range(20)]}
    found, messages, in_loop = sent(LARGE_VALUES, value)
    assert found == value
    assert not in_loop
    assert len({id(m["body"]) for m in messages if len(m.get("body", b"")) >= WRITE_BYTES}) == 1


def test_a_small_answer_is_one_piece():
    found, messages, in_loop = sent(LARGE_VALUES - 1, {"a": 1})
    assert (found, in_loop, len(messages)) == ({"a": 1}, True, 2)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_the_prompts_log_probabilities_are_computed_for_one_of_n_answers(http, stack, route):
    body = {"n": 3, "max_tokens": 2, "prompt_logprobs": 2}
    if "chat" in route:
        body["messages"] = [{"role": "user", "content": "hi"}]
    else:
        body |= {"prompt": ["hello world", "one two"], "echo": True, "logprobs": 2}
    response = http.post(route, json=body).json()
    wanted = [request.sampling.prompt_logprobs for request in stack.engine.seen]
    assert sorted(wanted, key=str) == [2] * (len(wanted) // 3) + [None] * (len(wanted) // 3 * 2)
    if "chat" in route:
        assert len(response["prompt_logprobs"]) > 1
        return
    for first in (0, 3):
        of_prompt = response["choices"][first : first + 3]
        assert len(of_prompt[0]["prompt_logprobs"]) > 1
        assert len({json.dumps(choice["prompt_logprobs"]) for choice in of_prompt}) == 1
        assert len({json.dumps(choice["logprobs"]["tokens"][:2]) for choice in of_prompt}) == 1
