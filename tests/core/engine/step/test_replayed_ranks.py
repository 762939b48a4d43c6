"""Captured steps of ranks that work together, each in a thread, give the tokens of one rank."""

import random
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

import core.engine.step.decode_graphs as graphs
from core.interfaces.messages import Abort, Generate
from core.settings.config import PluginChoice
from tests.support.engine import app_config, folder_model, greedy, spread_engine
from tests.support.replay import (
    CUDA,
    ENGINE,
    PLUGINS,
    choice,
    engine_of,
    mixed_sampling,
    prompts_of,
)

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
