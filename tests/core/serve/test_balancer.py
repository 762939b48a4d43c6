"""Balancers of third parties: chosen by key, and whatever one does wrong costs one request."""

import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest

from core.errors import ConfigError, PluginError, RequestError
from core.interfaces.messages import EngineStats, SamplingParams
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.serve.balancer import (
    BLOCK_TOKENS,
    GuardedBalancer,
    SoloBalancer,
    make_balancer,
    prefix_hashes,
    request_view,
)
from core.settings.compose import compose, parse_overrides
from core.settings.config import ParallelConfig
from tests.support.http_stack import ANSWER, Stack

CHAT = "/v1/chat/completions"


class Told:
    """Names what `choose` returns for a request, and keeps what it was told."""

    def __init__(self, choose):
        self.choose, self.told, self.gauges = choose, [], None

    def add(self, request, gauges):
        self.told.append(("add", request))
        self.gauges = gauges
        return self.choose(request)

    def progress(self, request_id, num_tokens):
        self.told.append(("progress", request_id))

    def remove(self, request_id, *, finished):
        self.told.append(("remove", request_id, finished))


@dataclass(slots=True, kw_only=True)
class StickyOptions:
    rank: int = 0


class Sticky:
    """A third party's plugin: all requests to the rank that its option names."""

    @hookimpl
    def register_balancer(self):
        return [Registration(name="sticky", factory=make_sticky, config=StickyOptions)]


def make_sticky(options, spec):
    return Told(lambda _: min(options.rank, spec.num_ranks - 1))


def registering(factory) -> PluginManager:
    registers = hookimpl(lambda: [Registration(name="bad", factory=factory)])
    plugin = type("Plugin", (), {"register_balancer": staticmethod(registers)})
    return PluginManager.load(objects={"acme_bad": plugin()})


def view(request_id="a", prompt_ids=(1, 2), **sampling):
    return request_view(request_id, prompt_ids, SamplingParams(**({"max_tokens": 9} | sampling)))


def test_a_third_party_is_chosen_by_key_with_its_options():
    manager = PluginManager.load(objects={"acme": Sticky()})
    words = ["model=smollm2", "parallel.dp_balancer=sticky", "parallel.dp_balancer_options.rank=2"]
    config = compose(parse_overrides(words))
    manager.check_choices(config)
    balancer = make_balancer(manager.table("balancer"), config.parallel, 4)
    assert balancer.add(view(), []) == 2


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["parallel.dp_balancer=stick"], ["did you mean 'sticky'?", "least_tokens"]),
        (["parallel.dp_balancer=auto"], ["parallel.dp_balancer=auto", "no balancer plugin"]),
        (
            ["parallel.dp_balancer=sticky", "parallel.dp_balancer_options.ranks=2"],
            ["unknown key 'parallel.dp_balancer_options.ranks'"],
        ),
        (["parallel.dp_balancer_options.rank=2"], ["parallel.dp_balancer_options"]),
        (
            ["parallel.dp_balancer=prefix_aware", "parallel.dp_balancer_options.blocks_per_rank=0"],
            ["parallel.dp_balancer_options.blocks_per_rank=0", "at least 1"],
        ),
        (["frontend.name=auto"], ["there is no frontend plugin 'auto'", "openai"]),
        (["launch.name=auto"], ["there is no launcher plugin 'auto'"]),
        (["metrics.exporters=[auto]"], ["there is no metrics_exporter plugin 'auto'"]),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_starts(words, fragments):
    manager = PluginManager.load(objects={"acme": Sticky()})
    with pytest.raises(ConfigError) as caught:
        manager.check_choices(compose(parse_overrides(["model=smollm2", *words])))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda options, spec: 1 / 0, "can't be built: ZeroDivisionError"),
        (lambda options, spec: None, "made a NoneType without add, progress, remove"),
        (lambda: None, "can't be built: TypeError"),
        (lambda options, spec: sys.exit(3), r"can't be built: it called sys.exit(3)"),
    ],
)
def test_one_that_can_not_be_built_is_named(factory, says):
    table = registering(factory).table("balancer")
    with pytest.raises(PluginError, match=r"'bad' \(from acme_bad\)") as caught:
        make_balancer(table, ParallelConfig(dp_balancer="bad"), 2)
    assert says in str(caught.value)
    alone = make_balancer(table, ParallelConfig(dp_balancer="bad"), 1)
    assert isinstance(alone, SoloBalancer), "one rank needs none"


def test_what_a_balancer_is_told_of_a_request():
    seen = view(prompt_ids=list(range(BLOCK_TOKENS + 1)), ignore_eos=True)
    assert (seen.num_prompt_tokens, seen.max_tokens) == (BLOCK_TOKENS + 1, 9)
    assert seen.fills_max_tokens
    assert not view(ignore_eos=True, stop_token_ids=[3]).fills_max_tokens
    assert list(seen.prefix_hashes()) == prefix_hashes(list(range(BLOCK_TOKENS)))
    assert len(seen.prefix_hashes()) == 1


@pytest.mark.parametrize(
    "answer", [2, -1, None, "0", 0.0, object(), pytest.param(10**6000, id="huge")]
)
def test_a_rank_that_is_not_there_fails_that_request(answer, caplog):
    told = Told(lambda request: answer if request.request_id == "bad" else 1)
    balancer = GuardedBalancer("acme", told, 2)
    with pytest.raises(RequestError, match="the balancer 'acme' failed") as caught:
        balancer.add(view("bad"), [])
    assert (caught.value.status, caught.value.code) == (500, "balancer_failed")
    assert "'acme' failed in add" in caplog.text
    assert "there are the ranks 0 to 1" in caplog.text
    assert told.told[-1] == ("remove", "bad", False), "it need not be remembered"
    assert balancer.add(view("good"), []) == 1


def raiser(error):
    def fails(*arguments, **named):
        raise error

    return fails


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), RecursionError(), StopIteration()])
def test_what_it_raises_ends_nothing_and_is_told_once_a_minute(error, caplog, monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr("core.serve.balancer.time", SimpleNamespace(monotonic=lambda: now_s))
    broken = SimpleNamespace(add=raiser(error), progress=raiser(error), remove=raiser(error))
    balancer = GuardedBalancer("acme", broken, 2)
    for _ in range(3):
        with pytest.raises(RequestError, match="the balancer 'acme' failed"):
            balancer.add(view(), [])
        balancer.progress("a", 1)
        balancer.remove("a", finished=True)
    methods = [record.getMessage().split()[5].strip(":") for record in caplog.records]
    assert methods == ["add", "progress", "remove"]
    now_s += 60
    balancer.progress("a", 1)
    assert len(caplog.records) == 4


def chat(http: httpx.Client, content: str, **fields):
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return http.post(CHAT, json=body)


def test_requests_go_where_a_third_party_says_and_its_faults_cost_one_each(caplog):
    """Over HTTP and two DP ranks: while one answer streams, others fail."""
    of_two = iter([0, 5])  # the second of two answers has no rank

    def choose(request):
        if request.max_tokens == 11:
            raise KeyError("no such table")
        return {12: lambda: 2, 13: lambda: next(of_two)}.get(request.max_tokens, lambda: 1)()

    told = Told(choose)
    with (
        Stack(num_dp=2, balancer=told) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        engine = stack.engines[1]
        engine.permits = threading.Semaphore(0)
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with http.stream("POST", CHAT, json=body) as streaming:
            engine.wait_for(lambda: len(engine.seen) == 1)
            for max_tokens in (11, 12):
                failed = chat(http, "hi", max_tokens=max_tokens)
                error = failed.json()["error"]
                assert (failed.status_code, error["code"]) == (500, "balancer_failed")
                assert "'of the test'" in error["message"]
                assert "table" not in error["message"], "that is the server's to know"
            assert chat(http, "hi", max_tokens=13, n=2).status_code == 500
            assert http.get("/health").status_code == 200
            engine.permits.release(1000)
            assert "[DONE]" in streaming.read().decode()
        assert stack.call(lambda: stack.client.num_live) == 0
        assert chat(http, "hi").json()["choices"][0]["message"]["content"] == ANSWER
        assert len(engine.seen) == 2
        assert [type(each) for each in told.gauges] == [EngineStats, EngineStats]
    assert "no such table" in caplog.text
    ends = [each for each in told.told if each[0] == "remove"]
    adds = [each for each in told.told if each[0] == "add" and each[1].max_tokens != 11]
    assert len(ends) == len(adds)


def test_a_balancer_that_forgets_everything_costs_no_answer(caplog):
    told = Told(lambda request: 0)
    told.progress = told.remove = raiser(LookupError("who?"))
    with (
        Stack(num_dp=2, balancer=told) as stack,
        httpx.Client(base_url=stack.url, timeout=20) as http,
    ):
        for _ in range(3):
            assert chat(http, "hi").json()["choices"][0]["message"]["content"] == ANSWER
        assert stack.call(lambda: stack.client.num_live) == 0
    assert len([r for r in caplog.records if "'of the test' failed" in r.getMessage()]) == 2
