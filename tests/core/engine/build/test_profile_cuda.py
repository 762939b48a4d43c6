"""After the start on a GPU: no step compiles a kernel or takes memory that was not planned."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.rank import RankEngine, build_rank
from core.engine.local.offline import OfflineEngine
from core.interfaces.comm import SOLO
from core.interfaces.messages import SamplingParams
from core.plugin.plugin_manager import PluginManager
from core.resolve import resolve
from core.settings.config import AppConfig
from core.sources.files import resolve_files
from tests.support.engine import app_config, folder_model
from tests.support.formats import FILE_PLUGINS
from tests.support.models import VOCAB_SIZE, write_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
NUM_REQUESTS = 80


@pytest.fixture(autouse=True)
def kernels_of_no_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))


def build(config: AppConfig) -> RankEngine:
    plugins = PluginManager.load([])
    files = resolve_files(config.model, FILE_PLUGINS, lambda *_: None)
    resolved = resolve(config, plugins, files, "cuda", native_dtypes())
    return build_rank(
        resolved.config,
        RankContext(
            plugins=plugins,
            files=files,
            plan=resolved.plan,
            rank=0,
            comms=SOLO,
            device=CUDA,
            local_ranks=1,
            on_phase=lambda *_: None,
            on_progress=lambda *_: None,
        ),
    )


def traffic(seed: int) -> Iterator[tuple[list[int], SamplingParams]]:
    choose = random.Random(seed)
    for index in range(NUM_REQUESTS):
        prompt = [choose.randrange(VOCAB_SIZE - 10) for _ in range(choose.randint(1, 150))]
        sampling = SamplingParams(max_tokens=choose.randint(1, 40), temperature=0.0)
        if index % 3 == 0:
            sampling = SamplingParams(
                max_tokens=choose.randint(1, 40),
                top_p=0.9,
                presence_penalty=0.5,
                logprobs=3,
                prompt_logprobs=2,
                seed=index,
            )
        yield prompt, sampling


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_serving_compiles_nothing_and_takes_no_memory(name: str, tmp_path: Path) -> None:
    from core.gpu_tools.compile_ahead import counted_compilations

    folder = write_tiny_model(tmp_path / name, name)
    config = app_config(
        folder_model(folder, dtype="bfloat16", max_model_len=256),
        engine={
            "device": "cuda",
            "page_size": 4,
            "max_running_requests": 24,
            "chunked_prefill_size": 64,
            "max_prefill_tokens": 160,
            "kv_cache_tokens": 4096,
        },
    )
    engine = OfflineEngine(build(config))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved(CUDA)
    with counted_compilations() as names:
        for seed in range(2):
            prompts, sampling = zip(*traffic(seed), strict=True)
            answers = engine.generate(list(prompts), list(sampling))
            assert all(answer.token_ids for answer in answers)
    assert names == []
    assert torch.cuda.memory_reserved(CUDA) == reserved


def test_the_shares_are_told_and_fill_the_fraction(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "llama", "llama")
    config = app_config(
        folder_model(folder, dtype="bfloat16", max_model_len=128), engine={"device": "cuda"}
    )
    rank = build(replace(config, engine=replace(config.engine, max_running_requests=8)))
    info = rank.describe()
    assert info["activation_bytes"] > 0
    assert info["state_bytes"] > 0
    held = sum(
        info[f"{share}_bytes"] for share in ("weight", "state", "activation", "graph", "kv_pool")
    )
    assert held < 0.85 * torch.cuda.mem_get_info(CUDA)[1]
