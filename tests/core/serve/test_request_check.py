"""What a frontend may hand to `Engine.generate`: anything. What a worker gets: what it can bear.

The worker here is the real scheduler and the real sampler behind the real decoder, over an
embedding of as many rows as the model has.
"""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from core.engine.sample.processors import ProcessorChain
from core.engine.sample.sampler import Sampler
from core.engine.schedule.scheduler import Scheduler
from core.errors import RequestError
from core.interfaces.frontend import OutputStream
from core.interfaces.messages import (
    Abort,
    EngineInput,
    EngineStats,
    Generate,
    SamplingParams,
    StepOutput,
    StepResult,
)
from core.interfaces.sampling import ProcessorSpec
from core.serve.balancer import SoloBalancer
from core.serve.engine_client import ZmqEngine
from core.serve.request_check import MAX_LOGPROBS, RequestLimits, size_problem
from core.settings.config import EngineConfig
from plugins.logits_processors.allowed import AllowedTokenIds
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support.fake_engine import endpoints_in
from tests.support.small_tokenizer import write_folder

VOCAB_SIZE, MAX_MODEL_LEN = 263, 40
KINDS = {"allowed_token_ids": AllowedTokenIds()}
LIMITS = RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, processors=KINDS)
FIELDS = ("request_id", "prompt_ids", "priority", *SamplingParams.__struct_fields__)


class Worker:
    """A rank's side of the socket, and what it does with a request there."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, b"0")
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.connect(endpoint)
        self._decoder = msgspec.msgpack.Decoder(EngineInput)
        self._generator = torch.Generator().manual_seed(0)
        self._embedding = torch.nn.Embedding(VOCAB_SIZE, 4)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def receive(self) -> Generate | Abort:
        return self._decoder.decode(self.socket.recv())

    def serve(self, request: Generate, most_steps: int = 3) -> list[int]:
        """Admit, compute and sample some steps; the tokens of the answer."""
        config = EngineConfig(page_size=4, max_running_requests=2)
        scheduler = Scheduler(
            config, num_pages=40, max_model_len=MAX_MODEL_LEN, eos_ids=[VOCAB_SIZE + 7]
        )
        cpu = torch.device("cpu")
        spec = ProcessorSpec(max_slots=2, vocab_size=VOCAB_SIZE, device=cpu)
        sampler = Sampler(
            max_slots=2,
            vocab_size=VOCAB_SIZE,
            device=cpu,
            eos_ids=[2],
            processors=ProcessorChain(KINDS, spec),
        )
        tokens_SL = torch.zeros((2, MAX_MODEL_LEN + 1), dtype=torch.int32)
        assert scheduler.admit([request]) == []
        answer: list[int] = []
        for _ in range(most_steps):
            plan = scheduler.next_batch()
            if plan is None:
                break
            for init in plan.inits:
                ids = torch.tensor(init.token_ids)
                self._embedding(ids)
                tokens_SL[init.slot, : len(ids)] = ids.int()
            sampler.init_slots(plan.inits)
            rows = zip(plan.slots, plan.starts, plan.lengths, plan.samples, strict=True)
            sampled = [(slot, start + length) for slot, start, length, samples in rows if samples]
            slots, ends = [slot for slot, _ in sampled], [end for _, end in sampled]
            logits = torch.randn((len(slots), VOCAB_SIZE), generator=self._generator)
            chosen = sampler.sample(sampler.prepare(slots, ends), logits, tokens_SL).tolist()
            for slot, end, token_id in zip(slots, ends, chosen, strict=True):
                tokens_SL[slot, end] = token_id
            scheduler.check()
            prompts = {} if request.sampling.prompt_logprobs is None else {0: []}
            if plan.num_logprob_rows:
                return answer  # the entries would be made up
            outputs = scheduler.commit(plan, StepResult(chosen, {}, prompts))
            msgspec.msgpack.encode(StepOutput(outputs, scheduler.stats()))
            answer += [token_id for output in outputs for token_id in output.token_ids]
        return answer


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ZmqEngine, Worker]]:
    """The engine client, serving, and the only worker."""
    endpoints = endpoints_in(tmp_path_factory.mktemp("engine"))
    loop = asyncio.new_event_loop()
    engine = ZmqEngine(endpoints, loop, SoloBalancer(), LIMITS)
    engine.engine_ready({})
    worker = Worker(endpoints.engine)
    worker.socket.send(msgspec.msgpack.encode(StepOutput([], EngineStats(kv_pages_total=3))))

    async def serving() -> None:
        async with asyncio.timeout(20):
            while engine.stats.kv_pages_total != 3:
                await asyncio.sleep(0.001)

    loop.run_until_complete(serving())
    yield engine, worker
    engine.close()
    worker.close()
    loop.close()


def ids(least: int = 0, most: int = 8) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=least, max_size=most)


RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.text("abc-9", min_size=1, max_size=20),
    "prompt_ids": ids(1, MAX_MODEL_LEN - 1),
    "priority": st.integers(-5, 5),
    "max_tokens": st.integers(0, 2**31 - 1),
    "temperature": st.floats(0, 1000) | st.just(1),
    "top_k": st.integers(-1, 2**31 - 1),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-1000, 1000),
    "frequency_penalty": st.floats(-1000, 1000),
    "repetition_penalty": st.floats(0.001, 1000),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-1e6, 1e6), max_size=4),
    "logits_processors": st.dictionaries(
        st.just("allowed_token_ids"), st.fixed_dictionaries({"ids": ids(1)}), max_size=1
    ),
    "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
    "stop_token_ids": ids(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 2**31 - 1),
    "logprobs": st.none() | st.integers(0, MAX_LOGPROBS),
    "prompt_logprobs": st.none() | st.integers(0, MAX_LOGPROBS),
}
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**64, -(2**70), 1e308, -0.0])
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(st.characters(), max_size=5),
    st.binary(max_size=3),
    st.lists(NUMBERS | st.booleans() | st.text(max_size=2), max_size=3),
    st.lists(st.integers(-2, VOCAB_SIZE + 2), max_size=MAX_MODEL_LEN + 3),
    st.dictionaries(st.integers(-2, VOCAB_SIZE + 2), NUMBERS, max_size=3),
    st.tuples(st.integers(0, 9)),
    st.sampled_from([object(), torch.tensor(3), {"a": 1}, 1j]),
)


@st.composite
def requests(draw: st.DrawFn, most_wrong: int) -> tuple[dict[str, Any], set[str]]:
    """Every argument and field, and the names of those that may be anything."""
    wrong = draw(st.sets(st.sampled_from(FIELDS), max_size=most_wrong))
    return {name: draw(ANYTHING if name in wrong else RIGHT[name]) for name in FIELDS}, wrong


def submit(engine: ZmqEngine, values: dict[str, Any]) -> OutputStream | RequestError:
    fields = {name: values[name] for name in SamplingParams.__struct_fields__}
    try:
        return engine.generate(
            values["request_id"],
            values["prompt_ids"],
            SamplingParams(**fields),
            priority=values["priority"],
        )
    except RequestError as error:
        return error


def test_every_field_has_a_strategy() -> None:
    assert set(RIGHT) == set(FIELDS)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(request=requests(most_wrong=2))
def test_what_is_not_refused_leaves_the_worker_alive(
    sides: tuple[ZmqEngine, Worker], request: tuple[dict[str, Any], set[str]]
) -> None:
    engine, worker = sides
    values, wrong = request
    submitted = submit(engine, values)
    if isinstance(submitted, RequestError):
        assert submitted.status == 400
        assert submitted.param in wrong, "what was right is refused, or the wrong field is named"
        assert len(str(submitted)) < 500
        assert engine.num_live == 0
        return
    received = worker.receive()
    assert isinstance(received, Generate)
    answer = worker.serve(received)
    assert all(0 <= token_id < VOCAB_SIZE for token_id in answer)
    submitted.close()
    assert worker.receive() == Abort([values["request_id"]])


@pytest.mark.parametrize("name", FIELDS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_the_wrong_field_is_named(name: str, data: st.DataObject) -> None:
    """Of every field something that no worker may see."""
    values = {field: data.draw(RIGHT[field]) for field in FIELDS}
    values[name] = data.draw(st.sampled_from([object(), "\udcff", [math.nan], {1: math.inf}, b""]))
    fields = {field: values[field] for field in SamplingParams.__struct_fields__}
    with pytest.raises(RequestError) as caught:
        LIMITS.check(
            values["request_id"],
            values["prompt_ids"],
            SamplingParams(**fields),
            values["priority"],
        )
    assert (caught.value.param, caught.value.status) == (name, 400)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True])
@pytest.mark.parametrize(
    "name",
    [
        "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty",
    ],
)  # fmt: skip
def test_numbers_that_are_none(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=name):
        LIMITS.check("a", [1], SamplingParams(max_tokens=1, **{name: value}), 0)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**31, 2**64, True, 1.0])
@pytest.mark.parametrize("name", ["prompt_ids", "stop_token_ids", "logit_bias"])
def test_ids_outside_the_embedding(name: str, token_id: int) -> None:
    prompt, fields = [1], {}
    if name == "prompt_ids":
        prompt = [1, token_id, 2]
    else:
        fields = {name: {token_id: 1.0} if name == "logit_bias" else [3, token_id]}
    with pytest.raises(RequestError) as caught:
        LIMITS.check("a", prompt, SamplingParams(max_tokens=1, **fields), 0)
    assert caught.value.param == name


def test_a_live_id_is_refused_and_the_first_request_stays(
    sides: tuple[ZmqEngine, Worker],
) -> None:
    engine, worker = sides
    sampling = SamplingParams(max_tokens=1)
    stream = engine.generate("twice", [1], sampling)
    with pytest.raises(RequestError, match="'twice' is live") as caught:
        engine.generate("twice", [1], sampling)
    assert (caught.value.param, engine.num_live) == ("request_id", 1)
    stream.close()
    assert worker.receive() == Generate("twice", [1], sampling)
    assert worker.receive() == Abort(["twice"])


def test_prompt_logprobs_that_fit_no_message() -> None:
    limits = RequestLimits(vocab_size=10, max_model_len=1_000_000)
    limits.check("a", [1] * 131_072, SamplingParams(max_tokens=1, prompt_logprobs=20), 0)
    with pytest.raises(RequestError, match="allowed for this prompt: 0 to 31"):
        limits.check("a", [1] * 131_072, SamplingParams(max_tokens=1, prompt_logprobs=100), 0)


def test_the_context_that_workers_have_counts() -> None:
    sampling = SamplingParams(max_tokens=1)
    LIMITS.at_most(None).check("a", [1] * (MAX_MODEL_LEN - 1), sampling, 0)
    with pytest.raises(RequestError, match="1 to 9") as caught:
        LIMITS.at_most(10).check("a", [1] * 10, sampling, 0)
    assert caught.value.code == "context_length_exceeded"


def test_a_tokenizer_beyond_the_embedding_is_told(tmp_path) -> None:
    tokenizer = HfTokenizer.from_folder(write_folder(tmp_path), [2])
    largest = tokenizer.max_token_id
    assert size_problem(tokenizer, largest + 1) is None
    assert size_problem(tokenizer, largest + 1000) is None
    problem = size_problem(tokenizer, largest)
    assert problem is not None
    assert f"ids up to {largest}" in problem
    assert f"{largest} rows" in problem
    assert "status 400" in problem
    assert "end an answer" not in problem
    assert "end an answer" in str(size_problem(tokenizer, 2))
