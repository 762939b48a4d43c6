"""The offline Python API over real worker processes, against transformers and the server."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from core import LLM, SamplingParams
from core.errors import ConfigError, NodeweaveError, RequestError, ResourceError, WorkerDied
from tests.support.oracle import TransformersOracle
from tests.support.server import ROOT, running_server

SETTINGS: dict[str, Any] = {
    "engine": {"device": "cpu", "page_size": 4, "kv_cache_tokens": 2048},
    "model.dtype": "float32",
    "model.max_model_len": 128,
    "launch": {"threads_per_worker": 1},
}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
TEXT = "One prompt as text."
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path) -> Iterator[LLM]:
    """Two ranks, each a process of its own."""
    with LLM(tiny_llama_folder, parallel="tp2", **SETTINGS) as model:
        yield model


@pytest.fixture(scope="module")
def oracle(tiny_llama_folder: Path) -> TransformersOracle:
    return TransformersOracle(tiny_llama_folder)


def byte_ids(text: str) -> list[int]:
    """What the tiny models' tokenizer makes of a text: a token for each byte."""
    return list(text.encode())


def test_answers_are_those_of_transformers(llm: LLM, oracle: TransformersOracle) -> None:
    """Texts and ids together, each with parameters of its own, in their order."""
    lengths = [5, 12, 1]
    prompts = [TEXT, IDS, (7,)]
    params = [
        SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=0) for n in lengths
    ]
    answers = llm.generate(prompts, params)
    assert [answer.prompt_token_ids for answer in answers] == [byte_ids(TEXT), IDS, [7]]
    for answer, length in zip(answers, lengths, strict=True):
        assert len(answer.token_ids) == length
        oracle.check_greedy(answer.prompt_token_ids, answer.token_ids)
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
        assert answer.logprobs is not None
        assert [entry.token_id for entry in answer.logprobs] == answer.token_ids


def test_one_prompt_in_every_form_gives_one_answer(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY) for prompt in (TEXT, byte_ids(TEXT), [TEXT])]
    assert [len(answers) for answers in alone] == [1, 1, 1]
    assert len({tuple(answer.token_ids) for [answer] in alone}) == 1
    assert llm.generate([]) == []


def test_prompt_logprobs_without_an_answer(llm: LLM, oracle: TransformersOracle) -> None:
    """What a user who scores texts does."""
    [answer] = llm.generate(IDS, SamplingParams(max_tokens=0, prompt_logprobs=2))
    assert (answer.text, answer.token_ids, answer.logprobs) == ("", [], None)
    assert answer.prompt_logprobs is not None
    assert [entry.token_id for entry in answer.prompt_logprobs] == IDS[1:]
    assert all(len(entry.top_ids) == 2 for entry in answer.prompt_logprobs)
    expected = oracle.prompt_logprobs(IDS).tolist()
    found = [entry.logprob for entry in answer.prompt_logprobs]
    assert found == pytest.approx(expected, abs=1e-3)


def test_an_answer_longer_than_the_context_ends_there(llm: LLM) -> None:
    [answer] = llm.generate([1] * 120, SamplingParams(max_tokens=10**6, ignore_eos=True))
    assert len(answer.token_ids) == 8
    assert answer.finish_reason == "length"


def test_without_parameters_the_models_own_are_taken(llm: LLM) -> None:
    [answer] = llm.generate("x")
    assert 1 <= len(answer.token_ids) <= 16
    assert llm.sampling() == SamplingParams(max_tokens=16)
    assert llm.sampling(8, top_k=3) == SamplingParams(max_tokens=8, top_k=3)
    with pytest.raises(RequestError, match="'temperature'"):
        llm.sampling(temprature=0)


def test_many_at_once_and_from_several_threads_are_the_same(llm: LLM) -> None:
    prompts = [[n, n + 1, n + 2] for n in range(40)]
    together = [answer.token_ids for answer in llm.generate(prompts, GREEDY)]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = llm.generate(prompts[index], GREEDY)[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in (0, 17, 39)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: together[index] for index in (0, 17, 39)}


def test_the_same_as_the_server(llm: LLM, tiny_llama_folder: Path) -> None:
    """Texts, reasons, stop strings, logprobs and a conversation, as the endpoint answers them."""
    whole = llm.generate(TEXT, GREEDY)[0].text
    stop = whole[3:6]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with running_server(
        "+model=custom", f"model.path={tiny_llama_folder}", "model.dtype=float32",
        "model.max_model_len=128", "engine.device=cpu", "engine.kv_cache_tokens=2048",
    ) as server:  # fmt: skip

        def post(path: str, **fields: object) -> dict[str, Any]:
            response = httpx.post(f"{server.url}/v1/{path}", json=body | fields, timeout=60)
            assert response.status_code == 200, response.text
            [choice] = response.json()["choices"]
            return choice

        http = post("completions", prompt=TEXT, stop=[stop], logprobs=1)
        [answer] = llm.generate(TEXT, params, stop=[stop])
        assert (answer.text, answer.stop_reason) == (http["text"], stop)
        assert (answer.finish_reason, http["stop_reason"]) == ("stop", stop)
        assert answer.logprobs is not None
        logprobs = [entry.logprob for entry in answer.logprobs]
        assert logprobs == pytest.approx(http["logprobs"]["token_logprobs"], abs=1e-3)
        http = post("chat/completions", messages=MESSAGES)
        [answer] = llm.chat(MESSAGES, params)
        assert answer.text == http["message"]["content"]
        assert server.stop() == 0


REFUSED = [
    ((7,), "prompts is int"),
    (([TEXT, 3],), r"prompts\[1\] is int"),
    (([[1, 2], [1, "a"]],), r"prompts\[1\]\[1\] is str; it must be a token id"),
    (([1, True],), r"prompts\[0\] is int"),
    (({"prompt": TEXT},), "prompts is dict"),
    ((b"x",), "prompts is bytes"),
    (([[]],), "the prompt is empty"),
    (("",), "the prompt is empty"),
    (([1] * 128,), "128 tokens; allowed: 1 to 127"),
    (("x" * 128,), "128 tokens; allowed: 1 to 127"),
    ((["x", "y" * 4000],), r"prompt 1 \(of 0 to 1\): the prompt has at least \d+ tokens"),
    (([IDS, [10**6]],), r"prompt 1 .*token id \(1000000\).*allowed: 0 to 262"),
    (("\ud800",), "can't be written as JSON"),
    ((TEXT, {"temperature": 0}), "sampling is dict; it must be SamplingParams"),
    ((TEXT, [GREEDY, GREEDY]), "1 prompts and 2 SamplingParams"),
    ((TEXT, SamplingParams(max_tokens=1, temperature=-1.0)), "temperature .*out of range"),
    (([TEXT, IDS], [GREEDY, SamplingParams(max_tokens=-1)]), r"prompt 1 .*max_tokens .*range"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused(llm: LLM, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(*arguments)


def test_other_arguments_that_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop must be a text that is not empty"):
        llm.generate(TEXT, GREEDY, stop="")
    with pytest.raises(RequestError, match="this is list of dict and str"):
        llm.chat([*MESSAGES, "x"])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="role"):
        llm.chat([{"content": "x"}])
    assert len(llm.chat([MESSAGES, MESSAGES], GREEDY)) == 2


def test_a_configuration_that_is_refused_starts_nothing() -> None:
    before = psutil.Process().children(recursive=True)
    for settings, message in (
        ({"tensor_parallel_size": 2}, "did you mean parallel.tp"),
        ({"engine": {"page_sise": 2}}, "'page_size'"),
        ({"model.path": "/x"}, "are both set"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM("smollm2", **settings)  # type: ignore[arg-type]
    assert psutil.Process().children(recursive=True) == before


def test_what_a_worker_finds_wrong_is_raised_here(tiny_llama_folder: Path) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ResourceError, match=r"lower engine\.kv_cache_tokens to at most"):
        LLM(tiny_llama_folder, engine={"device": "cpu", "kv_cache_tokens": 10**12})
    assert psutil.Process().children(recursive=True) == before


def test_a_dead_worker_is_named_and_the_end_leaves_nothing(tiny_llama_folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    model = LLM(tiny_llama_folder, **SETTINGS)
    started = set(psutil.Process().children(recursive=True)) - before
    [worker] = [one for one in started if "core.worker" in one.cmdline()]
    worker.kill()
    with pytest.raises((WorkerDied, RequestError), match="worker 0"):
        model.generate([TEXT] * 8, SamplingParams(max_tokens=100, ignore_eos=True))
    with pytest.raises(NodeweaveError, match="worker 0"):
        model.generate(TEXT)
    model.close()
    model.close()
    with pytest.raises(RequestError, match="closed"):
        model.generate(TEXT)
    psutil.wait_procs(started, timeout=10)
    assert not any(process.is_running() for process in started)


PROGRAM = """
import sys
import core
assert "core.llm.model" not in sys.modules
model = core.LLM(sys.argv[1], engine={"device": "cpu", "kv_cache_tokens": 256})
assert "torch" not in sys.modules
import psutil
print(*(child.pid for child in psutil.Process().children(recursive=True)))
print(model.generate("x", core.SamplingParams(max_tokens=1, temperature=0))[0].finish_reason)
"""


def test_a_program_that_ends_without_closing(tiny_llama_folder: Path) -> None:
    """No torch in it, nothing printed by us, its processes end with it, and so does it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_llama_folder],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    pids, reason = done.stdout.splitlines()
    assert reason == "length"
    assert len(pids.split()) >= 2
    left = [psutil.Process(int(pid)) for pid in pids.split() if psutil.pid_exists(int(pid))]
    assert not psutil.wait_procs(left, timeout=10)[1]


def test_the_lines_in_the_readme() -> None:
    """With a model that loads faster, and knows no capitals."""
    _, _, rest = (ROOT / "README.md").read_text().partition("## In Python, without a server\n")
    code = [line[4:] for line in rest.partition("\n##")[0].splitlines() if line[:4] == "    "]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code).replace("smollm2", "qwen3_moe_tiny")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("length") == 2
