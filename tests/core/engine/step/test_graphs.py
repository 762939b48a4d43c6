"""Captured decode steps: which sizes, when, and that they give the tokens of eager ones.

On a CPU a recorder that runs the work again stands for CUDA graphs: everything but the recording
itself is what runs on a GPU, static buffers and bounds on the host included. On a GPU the same
tests replay real graphs.
"""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

import core.engine.sample.choosing as choosing
import core.engine.step.decode_graphs as graphs
import core.engine.step.input as step_input
import core.engine.step.recorder as recorder
from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.rank import build_rank
from core.engine.local.offline import OfflineEngine
from core.engine.step.decode_graphs import graph_sizes, most_graph_rows, reason_for_eager
from core.engine.step.input import NUM_BLOCKS, StepInput, send_decodes
from core.engine.step.prompt_graphs import padding_pays, prompt_sizes
from core.errors import ConfigError
from core.interfaces.comm import SOLO, Comms, SoloCommunicator
from core.interfaces.messages import Abort, Generate, StepPlan
from core.ops.stage import DecodeRows, packed_length
from core.ops.torch_ops import TorchOps
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.resolve import resolve
from core.settings.config import EngineConfig, PluginChoice
from core.sources.files import resolve_files
from core.testing.ranks import ThreadCommunicator
from plugins.attention._torch_ref.heads import TorchRefBackend
from plugins.attention._torch_ref.latent import TorchRefLatentBackend
from tests.support.engine import app_config, folder_model, greedy, spread_engine
from tests.support.formats import FORMATS
from tests.support.models import VOCAB_SIZE

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
# Small pools: requests are preempted. Not all sizes of batches are captured: 12 takes 16.
ENGINE = {
    "device": DEVICE.type,
    "page_size": 4,
    "chunked_prefill_size": 16,
    "max_prefill_tokens": 32,
    "max_running_requests": 12,
    "kv_cache_tokens": 240,
}


class RunAgain:
    """Records nothing: runs the work whenever it is replayed."""

    def __init__(self):
        self.replays = 0

    def record(self, work):
        work()

        def replay():
            self.replays += 1
            return work()

        return replay

    def held_bytes(self):
        return 0


def from_device(batch):
    """A batch whose bounds on the host were replaced by what the device says."""
    contexts, starts = batch.context_lens_S.tolist(), batch.query_starts_S1.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    assert all(held <= most for held, most in zip(contexts, batch.context_lens, strict=True))
    assert sum(lengths) <= sum(batch.query_lens)
    real = [index for index, length in enumerate(lengths) if length]
    return replace(
        batch,
        query_lens=[lengths[index] for index in real],
        context_lens=[contexts[index] for index in real],
        page_table_SM=batch.page_table_SM[real],
    )


class Bounded(TorchRefBackend):
    """Attention by what the device says: a step's lists are bounds, as in a graph."""

    capturable = True

    def plan(self, batch):
        return super().plan(from_device(batch))


class BoundedLatent(TorchRefLatentBackend):
    capturable = True

    def plan(self, batch):
        return super().plan(from_device(batch))


class Plugin:
    """Registers both as "bounded"."""

    @hookimpl
    def register_attention(self):
        return [Registration(name="bounded", factory=lambda _, spec: Bounded(spec))]

    @hookimpl
    def register_latent_attention(self):
        return [Registration(name="bounded", factory=lambda _, spec: BoundedLatent(spec))]


PLUGINS = {"bounded": Plugin()}


@pytest.fixture
def replayed(monkeypatch):
    """Engines built from now on capture; the recorders they use."""
    made = []

    def made_recorder(device):
        made.append(recorder.CudaRecorder(device) if CUDA else RunAgain())
        return made[-1]

    monkeypatch.setattr(recorder, "select_recorder", made_recorder)
    monkeypatch.setattr(choosing, "FEW_LOGITS", 0)  # not even of few rows logits are gathered
    if not CUDA:
        monkeypatch.setattr(graphs, "reason_for_eager", lambda *_, **__: None)
        monkeypatch.setattr(ThreadCommunicator, "capturable", True)
        monkeypatch.setattr("core.engine.build.loaded.select_ops", lambda _: TorchOps())
    return made


@contextmanager
def engine_of(folder, dtype="float32", **changes):
    """An engine with one rank, and that rank."""
    attention = {} if CUDA else {"prefill": choice("bounded"), "decode": choice("bounded")}
    config = app_config(
        folder_model(folder, dtype, max_model_len=256),
        engine=ENGINE | changes,
        attention=attention,
    )
    plugins = PluginManager.load([], objects=PLUGINS)
    files = resolve_files(config.model, FORMATS, lambda *_: None)
    resolved = resolve(config, plugins, files, DEVICE.type, native_dtypes())
    rank = build_rank(
        resolved.config,
        RankContext(
            plugins=plugins,
            files=files,
            plan=resolved.plan,
            rank=0,
            comms=SOLO,
            device=DEVICE,
            local_ranks=1,
            on_phase=lambda *_: None,
            on_progress=lambda *_: None,
        ),
    )
    yield OfflineEngine(rank), rank


def choice(name):
    return PluginChoice(name=name)


def prompts_of(seed, count):
    chance = random.Random(seed)
    return [
        [chance.randrange(VOCAB_SIZE - 10) for _ in range(chance.choice((1, 2, 3, 9, 20)))]
        for _ in range(count)
    ]


def mixed_sampling(seed, count):
    """Greedy rows and others: some draw, some want logprobs, some are forbidden to end."""
    chance = random.Random(seed)
    kinds = [
        {},
        {},
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"logprobs": 2},
        {"repetition_penalty": 1.3, "min_tokens": 4},
    ]
    return [greedy(chance.choice((2, 30, 60, 60)), **chance.choice(kinds)) for _ in range(count)]


def test_sizes_rise_and_end_with_the_largest():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(100) == [1, 2, 4, *range(8, 65, 8), 80, 96, 100]
    assert graph_sizes(256)[-3:] == [224, 240, 256]
    assert graph_sizes(400)[-4:] == [320, 352, 384, 400]
    assert graph_sizes(10, multiple=4) == [4, 8, 12]
    assert most_graph_rows(EngineConfig()) == 256
    assert most_graph_rows(EngineConfig(max_running_requests=4096)) == 512
    assert most_graph_rows(EngineConfig(max_graph_batch=1000, max_running_requests=700)) == 700


def test_sizes_of_steps_with_prompts():
    assert prompt_sizes(63) == []
    assert prompt_sizes(300) == [64, 128, 192, 256]
    assert prompt_sizes(1300)[-3:] == [896, 1024, 1280]
    assert prompt_sizes(128, multiple=48) == [96, 144]


def test_steps_with_prompts_are_padded_on_few_ranks_or_where_many_have_rows():
    assert padding_pays(1024, [897])
    assert padding_pays(1024, [1000, 0])
    assert padding_pays(1024, [1000, 30, 30])
    assert not padding_pays(1024, [1000, 30, 30, 30])
    assert padding_pays(1024, [900] * 9 + [30] * 7)
    assert not padding_pays(1024, [900] * 7 + [30] * 9)
    assert padding_pays(64, [60] + [1] * 31)


def test_what_is_configured_wrongly_is_said():
    with pytest.raises(ConfigError, match=r"engine\.cuda_graphs='on'.*auto, off"):
        EngineConfig(cuda_graphs="on")
    with pytest.raises(ConfigError, match=r"engine\.max_graph_batch=0"):
        EngineConfig(max_graph_batch=0)


class Dispatches:
    capturable = False


def test_why_steps_are_not_captured():
    gpu = torch.device("cuda", 0)
    good = {"attention": True, "dispatcher": None, "comms": SOLO}

    def reason(device=gpu, engine=None, **changes):
        return reason_for_eager(engine or EngineConfig(), device, **(good | changes))

    assert reason() is None
    assert "engine.cuda_graphs=off" in reason(engine=EngineConfig(cuda_graphs="off"))
    assert "cpu" in reason(torch.device("cpu"))
    assert "attention.decode" in reason(attention=False)
    assert "moe_a2a.decode" in reason(dispatcher=Dispatches())
    waiting = Comms(dict(SOLO.axes) | {"tp": SoloCommunicator(capturable=False)})
    assert "axes tp" in reason(comms=waiting)


def test_a_step_in_flight_keeps_its_numbers(monkeypatch):
    """Blocks are used in turn, and one is written only when the device has read it."""
    sent, waited = [], []

    class Read:
        last = None

        def record(self):
            self.last = len(sent)
            sent.append(self.last)

        def synchronize(self):
            if self.last is not None:
                waited.append(self.last)

    monkeypatch.setattr(step_input, "_read", lambda device: Read())
    source = StepInput(packed_length(4), torch.device("cpu"))
    empty = torch.zeros(4, dtype=torch.int64)
    rows = DecodeRows(
        source.packed[: packed_length(4)], empty, empty, empty, empty, torch.zeros(4, 2)
    )
    for step in range(NUM_BLOCKS + 2):
        plan = StepPlan(step, [], 2, [step, 3], [7, step], [1, 1], [True] * 2, [step], [1], [9])
        slots, positions = send_decodes(source, plan, rows)
        assert slots.tolist() == [step, 3]
        assert positions.tolist() == [7, step]
        packed = rows.packed.tolist()
        assert packed[:4] == [2, 1, step, 3]
        assert packed[6:8] == [7, step]
        assert [packed[10], packed[14], packed[18]] == [step, 1, 9]
        assert sent == list(range(step + 1))
        assert waited == sent[: max(0, step + 1 - NUM_BLOCKS)]
    arrays = {block.array(1).ctypes.data for block in source._blocks}
    assert len(arrays) == NUM_BLOCKS
    crowded = StepPlan(0, [], 1, [1], [2], [1], [True], [1] * 5, list(range(5)), [3] * 5)
    send_decodes(source, crowded, rows)
    assert np.array_equal(rows.packed[:2], [1, 0])  # whoever calls has entered the pages


def test_steps_with_prompts_are_replayed_too(tiny_folder, replayed, monkeypatch):
    """More prompts than sequences of a captured step, longer ones than its rows, parts of prompts
    (which sample nothing), prompts beside decodes, and some whose logprobs are wanted."""
    monkeypatch.setattr(graphs, "MOST_SEQUENCES", 30)
    prompts = [*prompts_of(3, 40), *([index % 250 for index in range(n)] for n in (70, 150, 99))]
    chance = random.Random(2)
    kinds = [{}, {}, {}, {"temperature": 0.8, "seed": 3}, {"logprobs": 1}]
    sampling = [
        greedy(
            chance.choice((1, 4, 9)),
            **chance.choice(kinds),
            prompt_logprobs=1 if index == 5 else None,
        )
        for index in range(len(prompts))
    ]
    sizes = {
        "kv_cache_tokens": 4096,
        "chunked_prefill_size": 60,
        "max_prefill_tokens": 155,
        "max_running_requests": 40,
    }
    folder = tiny_folder("llama")
    with engine_of(folder, max_graph_tokens=0, **sizes) as (engine, rank):
        if rank.cuda_graphs.startswith("off"):
            pytest.skip(rank.cuda_graphs)
        assert "with prompts" not in rank.cuda_graphs
        expected = engine.generate(prompts, sampling)
    before = replayed[-1].replays if not CUDA else 0  # of decodes alone
    with engine_of(folder, max_graph_tokens=192, **sizes) as (engine, rank):
        assert "3 steps with prompts, of up to 192 tokens" in rank.cuda_graphs
        found = engine.generate(prompts, sampling)
    if not CUDA:
        assert replayed[-1].replays >= before + 2
    for mine, other in zip(found, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert [entry.token_id for entry in mine.prompt_logprobs] == [
            entry.token_id for entry in other.prompt_logprobs
        ]


MODELS = ["llama", "qwen3_moe", "deepseek_v3"]


DTYPES = ["float32", "bfloat16"] if CUDA else ["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_give_the_tokens_of_eager_ones(tiny_folder, replayed, name, dtype):
    folder = tiny_folder(name)
    prompts, sampling = prompts_of(name, 25), mixed_sampling(name, 25)
    eager = {"cuda_graphs": "off" if CUDA else "auto", "max_graph_batch": 1}
    with engine_of(folder, dtype, **eager) as (engine, rank):
        if not CUDA:
            rank.executor._runner.steps._captured.clear()
        expected = engine.generate(prompts, sampling)
    with engine_of(folder, dtype) as (engine, rank):
        if rank.cuda_graphs.startswith("off"):
            pytest.skip(rank.cuda_graphs)
        found = engine.generate(prompts, sampling)
        engine.scheduler.check()
        assert engine.scheduler.stats().num_preemptions > 0
    if not CUDA:
        assert replayed[-1].replays > 10
    for mine, other in zip(found, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.finish_reason == other.finish_reason
        assert [entry.token_id for entry in mine.logprobs] == [
            entry.token_id for entry in other.logprobs
        ]


def test_requests_that_come_and_go_between_steps(tiny_folder, replayed):
    """Joins and leaves at random, one step at a time; each answer is that of the request alone."""
    chance = random.Random(5)
    prompts = prompts_of(6, 30)
    with engine_of(tiny_folder("llama"), kv_cache_tokens=640) as (engine, rank):
        if rank.cuda_graphs.startswith("off"):
            pytest.skip(rank.cuda_graphs)
        alone = [engine.generate([prompt], greedy(12))[0].token_ids for prompt in prompts]
        answers, aborted, waiting = {}, set(), list(enumerate(prompts))
        while waiting or engine.has_work:
            for _ in range(chance.randrange(3)):
                if waiting:
                    index, prompt = waiting.pop()
                    answers[engine.submit(prompt, greedy(12))] = (index, [])
            if answers and chance.random() < 0.1:
                gone = chance.choice(list(answers))
                aborted.add(gone)
                engine.send(Abort(request_ids=[gone]))
            for output in engine.step():
                answers[output.request_id][1].extend(output.token_ids)
        for request_id, (index, token_ids) in answers.items():
            whole = alone[index]
            if request_id in aborted:
                whole = whole[: len(token_ids)]
            assert token_ids == whole


ATTENTION_GROUPS = {"plan": "dp_attention", "tp": 4, "ep": 2, "dp_attention": 2}
PLANS = {
    # Two DP ranks of two ranks each, whose rows are shared out; some are idle at times.
    "shared_head": ("qwen3_moe", ATTENTION_GROUPS, "allgather"),
    "own_heads": ("qwen3_moe", ATTENTION_GROUPS | {"dp_lm_head": True}, "allgather"),
    "fixed_exchange": ("qwen3_moe", ATTENTION_GROUPS, "nccl"),
    # Ranks that have all rows, and choose tokens together.
    "tp": ("llama", {"plan": "tp", "tp": 2}, "auto"),
    "experts_add_up": ("qwen3_moe", {"plan": "tp_ep", "tp": 2, "ep": 2}, "auto"),
}


@pytest.mark.skipif(CUDA, reason="ranks in threads share one device's streams")
@pytest.mark.parametrize("name", list(PLANS))
def test_ranks_replay_the_same_sizes(tiny_folder, replayed, name):
    family, parallel, a2a = PLANS[name]
    carries = PluginChoice(name=a2a, options={"exchange": "fixed"} if a2a == "nccl" else {})
    prompts = prompts_of(9, 9)
    sampling = mixed_sampling(9, 9)

    def answers():
        config = app_config(
            folder_model(tiny_folder(family), max_model_len=256),
            engine=ENGINE,
            attention={"prefill": choice("bounded"), "decode": choice("bounded")},
            parallel=parallel,
            moe_a2a={"prefill": carries, "decode": carries},
        )
        with spread_engine(config, PLUGINS) as engine:
            return [
                (answer.token_ids, [entry.top_ids for entry in answer.logprobs])
                for answer in engine.generate(prompts, sampling)
            ]

    found = answers()
    assert all(made.replays > 5 for made in replayed)
    assert len({made.replays for made in replayed}) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "reason_for_eager", lambda *_, **__: "test")
        assert answers() == found


TWO_DP_RANKS = {"plan": "dp_attention", "tp": 2, "ep": 2, "dp_attention": 2}
# Prompts of up to 40 tokens a step fit into the captured step of 64 rows, those of 60 do not, with
# other rows beside them.
PROMPT_STEPS = {
    "kv_cache_tokens": 4096,
    "chunked_prefill_size": 64,
    "max_prefill_tokens": 70,
    "max_running_requests": 5,
    "cpu_step_s": 0,
}


@pytest.mark.skipif(CUDA, reason="ranks in threads share one device's streams")
@pytest.mark.parametrize(
    ("parallel", "a2a"),
    [
        (TWO_DP_RANKS, "allgather"),
        (ATTENTION_GROUPS | {"dp_lm_head": True}, "nccl"),
    ],
    ids=["shared_head", "attention_groups"],
)
def test_dp_ranks_replay_steps_with_prompts_too(tiny_folder, replayed, monkeypatch, parallel, a2a):
    """Ranks with prompts beside others that decode, draw, or have nothing to do, and steps with
    more sequences than a captured one: all replay the same, with the tokens of eager steps."""
    monkeypatch.setattr(graphs, "MOST_SEQUENCES", 4)
    carries = PluginChoice(name=a2a, options={"exchange": "fixed"} if a2a == "nccl" else {})
    prompts = [*prompts_of(11, 24), *([index % 250 for index in range(n)] for n in (40, 61, 130))]
    random.Random(3).shuffle(prompts)
    sampling = [
        msgspec.structs.replace(each, max_tokens=min(each.max_tokens, 2 + index % 7))
        for index, each in enumerate(mixed_sampling(11, len(prompts)))
    ]
    sampling[7] = msgspec.structs.replace(sampling[7], prompt_logprobs=1)

    def answers(most_tokens):
        config = app_config(
            folder_model(tiny_folder("qwen3_moe"), max_model_len=256),
            engine=ENGINE | PROMPT_STEPS | {"max_graph_tokens": most_tokens},
            attention={"prefill": choice("bounded"), "decode": choice("bounded")},
            parallel=parallel,
            moe_a2a={"prefill": carries, "decode": carries},
        )
        replayed.clear()
        with spread_engine(config, PLUGINS) as engine:
            alone = engine.generate([[5] * 20], greedy(3))
            found = [
                (answer.token_ids, [entry.top_ids for entry in answer.logprobs])
                for answer in [*alone, *engine.generate(prompts, sampling)]
            ]
        (num_replays,) = {made.replays for made in replayed}
        return found, num_replays

    expected, of_decodes = answers(0)
    found, of_all = answers(64)
    assert found == expected
    assert of_all > of_decodes + 3


@pytest.mark.skipif(CUDA, reason="ranks in threads share one device's streams")
@pytest.mark.parametrize("num_dp", [2, 4])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_dp_ranks_whose_requests_come_and_go_give_the_tokens_of_one(
    tiny_folder, replayed, name, num_dp
):
    """Joins and aborts at random, also while others compute prompts, decode or have nothing to do;
    each answer is that of a rank alone."""
    chance, folder = random.Random(num_dp), tiny_folder(name)
    prompts = [*prompts_of(13, 14), *([index % 250 for index in range(n)] for n in (61, 90))]
    with engine_of(folder, kv_cache_tokens=640) as (engine, _):
        alone = [answer.token_ids for answer in engine.generate(prompts, greedy(12))]
    replayed.clear()
    allgather = PluginChoice(name="allgather")
    config = app_config(
        folder_model(folder, max_model_len=256),
        engine=ENGINE | PROMPT_STEPS | {"kv_cache_tokens": 160},
        attention={"prefill": choice("bounded"), "decode": choice("bounded")},
        parallel={"plan": "dp_attention", "tp": num_dp, "ep": num_dp, "dp_attention": num_dp},
        moe_a2a={"prefill": allgather, "decode": allgather},
    )
    answers, aborted = [[] for _ in prompts], set()
    rank_of = {}  # of those that are not finished, by index
    waiting = list(enumerate(prompts))
    with spread_engine(config, PLUGINS) as engine, ThreadPoolExecutor(num_dp) as pool:
        leaders = engine._leaders
        while waiting or any(leader.has_work for leader in leaders):
            if waiting and chance.random() < 0.4:
                index, prompt = waiting.pop()
                rank_of[index] = chance.randrange(num_dp)
                leaders[rank_of[index]].send(Generate(str(index), prompt, greedy(12)))
            if rank_of and chance.random() < 0.05:
                index = chance.choice(sorted(rank_of))
                leaders[rank_of.pop(index)].send(Abort([str(index)]))
                aborted.add(index)
            for outputs in pool.map(lambda leader: leader.step(), leaders):
                for output in outputs:
                    answers[int(output.request_id)] += output.token_ids
                    if output.finish_reason is not None:
                        rank_of.pop(int(output.request_id), None)
        for scheduler in engine.schedulers:
            scheduler.check()
    assert aborted
    assert len({made.replays for made in replayed}) == 1
    assert replayed[0].replays > 20
    for index, (found, expected) in enumerate(zip(answers, alone, strict=True)):
        assert found == (expected[: len(found)] if index in aborted else expected)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_memory_does_not_grow(tiny_folder, replayed):
    prompts = prompts_of(4, 12)
    with engine_of(tiny_folder("llama"), kv_cache_tokens=4096) as (engine, rank):
        if rank.cuda_graphs.startswith("off"):
            pytest.skip(rank.cuda_graphs)

        def held():
            torch.cuda.synchronize()
            return torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]

        engine.generate(prompts, greedy(190))
        before = held()
        for _ in range(11):
            engine.generate(prompts, greedy(190))
        assert held() == before
