"""The example's logits processor, installed as a third party's, in engines that serve."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from core import LLM, SamplingParams
from core.errors import RequestError, WorkerDied
from tests.support.oracle import TransformersOracle

EXAMPLE = Path(__file__).parents[2] / "examples/acme_sampling"
SETTINGS = {
    "engine": {"device": "cpu", "page_size": 4, "kv_cache_tokens": 1024},
    "model.dtype": "float32",
    "model.max_model_len": 64,
    "launch": {"threads_per_worker": 1},
}
PROMPTS = [[7, 8, 9, 7, 8], [3, 3, 3], [5]]
SIZES = [3, 2, None]
FAILING = """
from core.plugin.hookspecs import Registration, hookimpl
from acme_sampling.ngram import NoRepeatNgram
from acme_sampling.on_device import NgramMask

class Mask(NgramMask):
    def apply(self, logits_PX, rows):
        raise KeyError("no such table")

class Fails(NoRepeatNgram):
    def build(self, spec):
        return Mask()

@hookimpl
def register_logits_processor():
    return [Registration(name="fails", factory=lambda options, config: Fails())]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example, and a plugin whose processor fails, in a folder that every process sees."""
    site = tmp_path_factory.mktemp("site")
    (site / "acme_sampling").symlink_to(EXAMPLE / "acme_sampling")
    (site / "acme_failing.py").write_text(FAILING)
    for name in ("acme_sampling", "acme_failing"):
        info = site / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[nodeweave]\n{name} = {name}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
        yield site
    for name in [name for name in sys.modules if name.split(".")[0] in ("acme_sampling",)]:
        del sys.modules[name]


def masked_greedy(oracle: TransformersOracle, prompt: list[int], size: int | None, n: int):
    known = list(prompt)
    for _ in range(n):
        logits_1V = oracle.logits(known)[-1:]
        if size is not None:
            logits_1V = NoRepeatNGramLogitsProcessor(size)(torch.tensor([known]), logits_1V)
        known.append(int(logits_1V.argmax()))
    return known[len(prompt) :]


def greedy(size: int | None, **fields: object) -> SamplingParams:
    asked = {} if size is None else {"no_repeat_ngram": {"size": size}}
    return SamplingParams(
        max_tokens=40, temperature=0.0, ignore_eos=True, logits_processors=asked, **fields
    )


@pytest.mark.parametrize("parallel", [pytest.param("tp1", marks=pytest.mark.slow), "tp2"])
def test_answers_are_those_of_transformers_with_its_processor(
    installed: Path, tiny_llama_folder: Path, parallel: str
) -> None:
    """Rows that ask for it beside one that doesn't, alone and cut over ranks."""
    oracle = TransformersOracle(tiny_llama_folder)
    expected = [
        masked_greedy(oracle, prompt, size, 40) for prompt, size in zip(PROMPTS, SIZES, strict=True)
    ]
    with LLM(tiny_llama_folder, parallel=parallel, **SETTINGS) as llm:
        answers = llm.generate(PROMPTS, [greedy(size) for size in SIZES])
        assert [answer.token_ids for answer in answers] == expected
        assert expected[0] != oracle.greedy(PROMPTS[0], 40), "the mask changed nothing"
        with pytest.raises(RequestError, match="this server has: allowed_token_ids, fails, no_re"):
            llm.generate(PROMPTS[0], SamplingParams(max_tokens=1, logits_processors={"bans": {}}))
        with pytest.raises(RequestError, match="size=0 is out of range; allowed: 1 to 64"):
            llm.generate(PROMPTS[0], greedy(0))
        allowed = {"allowed_token_ids": {"ids": [5, 90, 200]}, "no_repeat_ngram": {"size": 3}}
        params = SamplingParams(max_tokens=8, temperature=0.0, logits_processors=allowed)
        assert set(llm.generate([7], params)[0].token_ids) <= {5, 90, 200}
        assert llm.generate(PROMPTS[:1], greedy(3))[0].token_ids == expected[0]


@pytest.mark.slow
def test_a_processor_that_raises_is_named(installed: Path, tiny_llama_folder: Path) -> None:
    params = SamplingParams(max_tokens=1, logits_processors={"fails": {"size": 2}})
    says = r"logits processor 'fails' failed in apply: KeyError"
    with LLM(tiny_llama_folder, **SETTINGS) as llm, pytest.raises(WorkerDied, match=says):
        llm.generate([1], params)
