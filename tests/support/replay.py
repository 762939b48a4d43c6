"""Engines of tiny models whose steps are captured and replayed.

On a CPU a recorder that runs the work again stands for CUDA graphs: everything but the recording
itself is what runs on a GPU, static buffers and bounds on the host included. On a GPU the same
tests replay real graphs.
"""

import itertools
import random
from contextlib import contextmanager
from dataclasses import replace

import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.rank import build_rank
from core.engine.local.offline import OfflineEngine
from core.interfaces.comm import SOLO
from core.plugin.hookspecs import Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.resolve import resolve
from core.settings.config import PluginChoice
from core.sources.files import resolve_files
from plugins.attention._torch_ref.heads import TorchRefBackend
from plugins.attention._torch_ref.latent import TorchRefLatentBackend
from tests.support.engine import app_config, folder_model, greedy
from tests.support.formats import FILE_PLUGINS
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
    files = resolve_files(config.model, FILE_PLUGINS, lambda *_: None)
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
