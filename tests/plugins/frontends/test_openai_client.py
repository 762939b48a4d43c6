"""The real `openai` client against the real server over a fake engine."""

import threading

import openai
import pytest

from tests.support.http_stack import ANSWER, MAX_MODEL_LEN, MODEL

USER = [{"role": "user", "content": "What is the capital of France?"}]


def chat(client, **arguments):
    arguments.setdefault("messages", USER)
    return client.chat.completions.create(model=MODEL, **arguments)


def complete(client, prompt="hello", **arguments):
    arguments.setdefault("max_tokens", 200)
    return client.completions.create(model=MODEL, prompt=prompt, **arguments)


def streamed_text(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == MAX_MODEL_LEN
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat(client, stack):
    response = chat(client)
    choice = response.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stack.tokenizer.eos_ids[0])
    seen = stack.engine.seen[0]
    prompt = stack.tokenizer.apply_chat_template(USER)
    assert seen.prompt_ids == stack.tokenizer.encode(prompt, add_special_tokens=False)
    assert seen.sampling.max_tokens == MAX_MODEL_LEN - len(seen.prompt_ids)
    assert response.usage.prompt_tokens == len(seen.prompt_ids)
    assert response.usage.completion_tokens == len(stack.answer_ids) + 1, "with the eos token"
    assert response.usage.total_tokens == len(seen.prompt_ids) + len(stack.answer_ids) + 1


def test_chat_streamed_with_usage(client, stack):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert streamed_text(chunks) == ANSWER
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(stack.answer_ids) + 1


def events_one_by_one(client, stack, event_of, **arguments):
    """For each token that ends a character: (tokens so far, what `event_of` finds in the first
    chunk in which it finds something); the next token is not computed before. Then the rest."""
    permits = stack.engine.permits = threading.Semaphore(1)
    events = (
        event for chunk in chat(client, stream=True, **arguments) if (event := event_of(chunk))
    )
    for count in range(1, len(stack.answer_ids) + 1):
        if not stack.tokenizer.decode(stack.answer_ids[:count]).endswith("\ufffd"):
            yield count, next(events)
        permits.release()
    yield from ((None, event) for event in events)


def test_a_token_is_an_event(client, stack):
    def text_of(chunk):
        return chunk.choices and chunk.choices[0].delta.content

    events = list(events_one_by_one(client, stack, text_of))
    assert all(count is not None for count, _ in events), "nothing is left for the last event"
    assert "".join(text for _, text in events) == ANSWER


def test_continuous_usage(client, stack):
    def tokens_of(chunk):
        has_text = chunk.choices and chunk.choices[0].delta.content
        return chunk.usage.completion_tokens if has_text or not chunk.choices else None

    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, (_, total) = events_one_by_one(client, stack, tokens_of, stream_options=options)
    assert all(told == count for count, told in events), events
    assert total == len(stack.answer_ids) + 1, "with the eos token"


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_n_requests_with_their_own_seeds(client, stack, stream):
    answers = {0: "zero", 1: "one and more", 2: ""}
    stack.engine.reply = lambda request: stack.tokenizer.encode(answers[request.sampling.seed - 7])
    result = chat(client, n=3, seed=7, stream=stream)
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    if stream:
        for chunk in result:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    else:
        texts = {choice.index: choice.message.content for choice in result.choices}
        reasons = {choice.index: choice.finish_reason for choice in result.choices}
    assert texts == answers
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}
    assert sorted(request.sampling.seed for request in stack.engine.seen) == [7, 8, 9]


def test_sampling_parameters_arrive(client, stack):
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [3, 4], "logits_processors": {"allowed_token_ids": {"ids": [3, 9]}},
    }  # fmt: skip
    chat(
        client,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        logit_bias={"7": -100},
        seed=-1,
        max_completion_tokens=4,
        extra_body=extra,
    )
    sampling = stack.engine.seen[0].sampling
    found = {name: getattr(sampling, name) for name in extra}
    assert found == extra
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.2)
    assert sampling.logit_bias == {7: -100.0}
    assert sampling.seed == 2**64 - 1
    chat(client, extra_body={"allowed_token_ids": [7]})
    sampling = stack.engine.seen[1].sampling
    assert sampling.logits_processors == {"allowed_token_ids": {"ids": [7]}}


def test_length(client, stack):
    response = chat(client, max_tokens=3)
    assert response.choices[0].finish_reason == "length"
    assert response.choices[0].message.content == stack.tokenizer.decode(stack.answer_ids[:3])
    assert response.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("Paris", "The capital of France is "),
        (["nothing", "is Par"], "The capital of France "),
        (["🎉"], "The capital of France is Paris. "),
        ("The", ""),
        ("go onward", ANSWER),
    ],
)
def test_stop_strings(client, stack, stop, expected, stream):
    result = chat(client, stop=stop, stream=stream)
    text = streamed_text(result) if stream else result.choices[0].message.content
    assert text == expected
    if expected != ANSWER:
        ours = stack.engine.seen[0].request_id
        stack.engine.wait_for(lambda: ours in stack.engine.aborted or not stack.engine.live)
    if not stream:
        assert result.choices[0].finish_reason == "stop"
        stops = [stop] if isinstance(stop, str) else stop
        assert expected == ANSWER or result.choices[0].stop_reason in stops


def test_stop_string_in_output_and_tokens_counted_until_it(client, stack):
    response = chat(client, stop="Paris", extra_body={"include_stop_str_in_output": True})
    assert response.choices[0].message.content == "The capital of France is Paris"
    whole = next(
        n
        for n in range(len(stack.answer_ids))
        if "Paris" in stack.tokenizer.decode(stack.answer_ids[:n])
    )
    assert response.usage.completion_tokens == whole


def test_stop_token_is_hidden_and_special_tokens_can_be_shown(client, stack):
    stop_id = stack.answer_ids[4]
    response = chat(client, extra_body={"stop_token_ids": [stop_id]})
    assert response.choices[0].message.content == stack.tokenizer.decode(stack.answer_ids[:4])
    assert response.choices[0].stop_reason == stop_id
    special = stack.tokenizer.encode("a<|im_start|>b")
    stack.engine.reply = lambda _: special
    assert chat(client).choices[0].message.content == "ab"
    shown = chat(client, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].message.content == "a<|im_start|>b"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, stack, stream):
    result = chat(client, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        parts = [c.choices[0] for c in result if c.choices and c.choices[0].logprobs]
        content = [entry for part in parts for entry in part.logprobs.content]
    else:
        content = result.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == ANSWER
    assert [round(entry.logprob, 1) for entry in content[:3]] == [-0.1, -0.2, -0.3]
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(stack.answer_ids)
    assert content[0].top_logprobs[0].token == content[0].token


def test_logprobs_without_top_and_with_a_stop_string(client, stack):
    response = chat(client, logprobs=True, stop=" is")
    content = response.choices[0].logprobs.content
    assert stack.engine.seen[0].sampling.logprobs == 0
    assert all(entry.top_logprobs == [] for entry in content)
    assert "".join(entry.token for entry in content).startswith(response.choices[0].message.content)
    assert len(content) == response.usage.completion_tokens


def test_completions_of_every_prompt_form(client, stack):
    ids = stack.tokenizer.encode("hello world")
    for prompt in ("hello world", ["hello world"], ids, [ids]):
        stack.engine.seen.clear()
        response = complete(client, prompt)
        assert response.choices[0].text == ANSWER
        assert [request.prompt_ids for request in stack.engine.seen] == [ids]
    endless = complete(client, max_tokens=None, extra_body={"ignore_eos": True})
    assert endless.usage.completion_tokens == 16, "OpenAI's default"


@pytest.mark.parametrize("stream", [False, True])
def test_batches_and_n_have_their_places(client, stack, stream):
    def reply(request):
        text = f"{stack.tokenizer.decode(request.prompt_ids)}/{request.sampling.seed}"
        return stack.tokenizer.encode(text)

    stack.engine.reply = reply
    result = complete(client, ["aa", "bb"], n=2, seed=1, stream=stream)
    texts = [""] * 4
    for chunk in result if stream else [result]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["aa/1", "aa/2", "bb/1", "bb/2"]
    if not stream:
        lengths = [len(stack.tokenizer.encode(prompt)) for prompt in ("aa", "bb")]
        assert result.usage.prompt_tokens == sum(lengths)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client, stack, stream):
    prompt = "hello world"
    ids = stack.tokenizer.encode(prompt)
    result = complete(client, prompt, echo=True, logprobs=2, max_tokens=3, stream=stream)
    choices = [c.choices[0] for c in result] if stream else [result.choices[0]]
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    values = [value for part in parts for value in part.token_logprobs]
    offsets = [offset for part in parts for offset in part.text_offset]
    text = "".join(choice.text for choice in choices)
    assert text == prompt + stack.tokenizer.decode(stack.answer_ids[:3])
    assert "".join(tokens) == text
    assert values[0] is None
    assert len(values) == len(ids) + 3
    assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == tokens
    assert parts[0].top_logprobs[0] is None
    assert len(parts[-1].top_logprobs[-1]) == 2


def test_scoring_a_prompt_without_an_answer(client, stack):
    response = complete(client, "hello world", echo=True, logprobs=0, max_tokens=0)
    choice = response.choices[0]
    assert (choice.text, choice.finish_reason) == ("hello world", "length")
    assert "".join(choice.logprobs.tokens) == "hello world"
    assert response.usage.completion_tokens == 0


def test_prompt_logprobs(client, stack):
    response = chat(client, extra_body={"prompt_logprobs": 1}, max_tokens=1)
    prompt_ids = stack.engine.seen[0].prompt_ids
    assert response.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in response.prompt_logprobs[1:]] == [
        str(token_id) for token_id in prompt_ids[1:]
    ]
    first = response.prompt_logprobs[1][str(prompt_ids[1])]
    assert first["decoded_token"] == stack.tokenizer.token_text(prompt_ids[1])


def test_content_parts_tools_and_continuing(client, stack):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(client, messages=[{"role": "user", "content": parts}])
    assert "user\none\ntwo" in stack.tokenizer.decode(stack.engine.seen[-1].prompt_ids)
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    chat(client, messages=messages, extra_body={"continue_final_message": True})
    assert stack.tokenizer.decode(stack.engine.seen[-1].prompt_ids).endswith("assistant\nIt is")
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="does not read tools"):
        chat(client, tools=tools, tool_choice="auto")
    chat(client, tools=tools, tool_choice="none")


def test_harmless_fields_of_openai_are_ignored(client):
    response = chat(
        client,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert response.choices[0].message.content == ANSWER


def test_errors_have_the_classes_the_client_knows(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-x", messages=USER)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert bad.value.param == "temperature"
    assert "0.0 to 2.0" in bad.value.message


def test_an_error_of_the_engine_reaches_its_request_alone(client, stack):
    stack.engine.reply = lambda request: "no room" if request.sampling.seed else stack.answer_ids
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, seed=1)
    assert (caught.value.code, caught.value.body["message"]) == ("engine_error", "no room")
    assert chat(client, seed=0).choices[0].message.content == ANSWER


def test_default_sampling_of_the_model(client):
    from tests.support.http_stack import Stack

    with (
        Stack(default_sampling={"temperature": 0.6, "top_k": 20, "top_p": 0.95}) as stack,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as own,
    ):
        chat(own)
        chat(own, temperature=0, top_p=1.0)
        first, second = (request.sampling for request in stack.engine.seen)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 0.95)
    assert (second.temperature, second.top_k, second.top_p) == (0.0, 20, 1.0)
