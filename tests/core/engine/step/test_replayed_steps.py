"""Captured steps of one rank give the tokens of eager ones."""

import random

import pytest
import torch

import core.engine.step.decode_graphs as graphs
from core.interfaces.messages import Abort
from tests.support.engine import greedy
from tests.support.replay import CUDA, engine_of, mixed_sampling, prompts_of


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
