"""From a body to answers that can be run, and what is refused on the way; without a server."""

import asyncio
from types import SimpleNamespace

import pytest

from core.errors import RequestError
from core.frontend.admission import Admission
from core.frontend.fields import SamplingFields
from core.frontend.service import Service
from core.interfaces.frontend import EngineState, ServedModel
from core.interfaces.text import ChatText, Prompt
from core.settings.config import FrontendConfig

CHAT = ChatText(messages=b"[]")


class Text:
    """Takes so many tokens for any prompt, once it is let."""

    def __init__(self, num_tokens=3):
        self.prompt = Prompt(num_tokens=num_tokens, ids=list(range(num_tokens)))
        self.jobs = []
        self.let = asyncio.Event()
        self.let.set()

    async def chat(self, job):
        self.jobs.append(job)
        await self.let.wait()
        return self.prompt

    async def prompts(self, job):
        return [await self.chat(job)]


def service(text, *, num_live=0, max_live=4, **frontend):
    engine = SimpleNamespace(state=EngineState.SERVING, num_live=num_live)
    context = SimpleNamespace(
        engine=engine,
        tokenizer=SimpleNamespace(detokenizer=lambda **_: None),
        text=text,
        model=ServedModel(
            name="m", max_model_len=16, vocab_size=50, created=1, info={},
            default_sampling={"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1},
        ),
        config=FrontendConfig(**frontend),
        metrics=None,
        admission=Admission(engine, max_live),
    )  # fmt: skip
    return Service(context)


def ask(text, body, kind, *, n=1, default=None, **settings):
    frame = service(text, **settings)
    if kind == "chat":
        return asyncio.run(frame.chat_choices(body, CHAT, default_max_tokens=default, n=n))
    return asyncio.run(frame.choices(body, b'"x"', default_max_tokens=default, n=n))


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_the_models_values_are_those_of_fields_left_out(kind):
    text = Text()
    first, second = ask(text, SamplingFields(top_p=0.5, seed=7, priority=-1), kind, n=2)
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.5, 0.5, 1.1)
    assert (sampling.seed, second.sampling.seed) == (7, 8)
    assert (first.index, second.index, first.priority) == (0, 1, -1)
    assert sampling.max_tokens == 13, "the rest of the context"
    assert text.jobs[0].max_tokens == 15


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_lengths(kind):
    assert ask(Text(), SamplingFields(), kind, default=5)[0].sampling.max_tokens == 5
    assert ask(Text(), SamplingFields(max_tokens=99), kind)[0].sampling.max_tokens == 13
    with pytest.raises(RequestError, match="asks for 99") as caught:
        ask(Text(), SamplingFields(max_tokens=99), kind, strict_fields=True)
    assert caught.value.code == "context_length_exceeded"
    for num_tokens, code in ((0, "empty_prompt"), (16, "context_length_exceeded")):
        with pytest.raises(RequestError) as caught:
            ask(Text(num_tokens), SamplingFields(), kind)
        param = "messages" if kind == "chat" else "prompt"
        assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "n", "param"),
    [
        ({"temperature": 2.5}, 1, "temperature"),
        ({"max_tokens": 0}, 1, "max_tokens"),
        ({"stop": ["a"] * 17}, 1, "stop"),
        ({"stop_token_ids": [50]}, 1, "stop_token_ids"),
        ({"min_tokens": 14}, 1, "min_tokens"),
        ({}, 65, "n"),
    ],
)
def test_what_is_out_of_range_is_named_and_not_tokenized(fields, n, param):
    text = Text()
    with pytest.raises(RequestError) as caught:
        ask(text, SamplingFields(**fields), "prompt", n=n)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(text.jobs) == (param == "min_tokens"), "that one depends on the prompt"


def test_a_full_queue_is_known_before_anything_is_tokenized():
    text = Text()
    with pytest.raises(RequestError) as caught:
        ask(text, SamplingFields(), "prompt", num_live=3, n=2)
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    with pytest.raises(RequestError, match="5 answers at once; allowed: 1 to 4") as caught:
        ask(text, SamplingFields(), "chat", n=5)
    assert caught.value.status == 400
    assert not text.jobs


def test_what_is_being_tokenized_counts():
    async def run():
        text = Text()
        text.let.clear()
        frame = service(text, num_live=1, max_live=2)
        first = asyncio.ensure_future(frame.choices(SamplingFields(), b"0", default_max_tokens=1))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="has 2 requests and takes 2"):
            frame.admission.admit(1)
        first.cancel()
        await asyncio.wait([first])
        frame.admission.admit(1)  # who gave up is not counted any more
        with frame.admission.submitting(1) as submitted:
            submitted()
            frame.admission.admit(1)  # the engine counts it from here on

    asyncio.run(run())
