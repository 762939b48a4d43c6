"""The text service's processes: hostile templates and texts end their own job and nothing else."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import weakref

import psutil
import pytest
import uvloop
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from core.errors import ModelError, RequestError
from core.interfaces.text import ChatText, IdsToText, PromptTexts, TokenList
from core.serve.text.pool import TextPool
from core.serve.text.process import TextBoot
from plugins.tokenizers._hf.tokenizer import HfTokenizer
from tests.support import clock_loop
from tests.support.small_tokenizer import byte_level, write_folder

MIB = 1024 * 1024
# By what they use: none is a loop whose steps could be counted. Time: the first ones; memory: the
# others. (name, template)
BOMBS = {
    "power": "{{ (3 ** 65000) ** 65000 }}",
    "product": "{% set ns = namespace(x=3 ** 65000) %}{% for i in range(40) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "sort": "{% for i in [1] %}{{ (range(99999) | list * 60) | sort | length }}{% endfor %}",
    "indent": "{% set ns = namespace(x=[1]) %}{% for i in range(18) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{% for i in range(99) %}{{ ns.x | tojson(indent=400) | length }}{% endfor %}",
    "tree": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x | string }}",
    "lipsum": "{{ lipsum(n=9999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "join": "{{ range(99999) | join('y' * 99999) }}",
    "replace": "{{ ('x' * 999999) | replace('x', 'y' * 99999) }}",
    "recursion": "{% macro m(n) %}{{ m(n) ~ m(n) }}{% endmacro %}{{ m(1) }}",
}
# How each may end: a limit of the kernel, of the process's memory, or a counted step.
ENDS = ("CPU time", "memory", "recursed", "refuses", "elements", "characters")
STAY = b'[{"role": "user", "content": "stay"}]'


def bomb_template():
    cases = "".join(
        f"{{% if messages[0].content == '{name}' %}}{source}{{% endif %}}"
        for name, source in BOMBS.items()
    )
    return cases + "{{ messages[0].content }}"


def raw(content):
    return json.dumps([{"role": "user", "content": content}]).encode()


def boot(folder, **limits):
    limits = {"rendering_s": 0.4, "tokenizing_s": 0.4, "job_bytes": 256 * MIB} | limits
    return TextBoot(folder=str(folder), eos_ids=[], **limits)


async def answered(pool):
    """Ask until there is an answer: what was under way in a process that ended is 503."""
    while True:
        try:
            return await pool.chat(ChatText(messages=STAY))
        except RequestError as error:
            if error.status != 503:
                raise


class Loop:
    """An event loop with a pool in it, driven from a test."""

    def __init__(self, text_boot, num_workers=2, **arguments):
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.pool = self.run(TextPool.start(text_boot, num_workers, **arguments))

    def template(self):
        """The process that workers are forked from, once it has forked them all."""
        template = psutil.Process(self.pool._process.pid)
        while len(template.children()) < len(self.pool._workers):
            pass
        return template

    def run(self, coroutine):
        return self._runner.run(coroutine)

    def close(self):
        async def close():
            self.pool.close()

        self.run(close())
        self._runner.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pool"), template=bomb_template())


@pytest.fixture(scope="module")
def loop(folder):
    loop = Loop(boot(folder))
    yield loop
    loop.close()


@pytest.fixture
def own_loop():
    """Makes pools that end with the test."""
    made = []

    def make(*arguments, **named):
        made.append(Loop(*arguments, **named))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_every_kind_of_job(loop, folder):
    tokenizer = HfTokenizer.from_folder(folder)

    async def check():
        pool = loop.pool
        ids = tokenizer.encode("stay")
        assert (await pool.chat(ChatText(messages=STAY))).ids == ids
        prompts = PromptTexts(prompt=b'["a", "stay"]', vocab_size=9, max_prompts=2, echo=True)
        found = await pool.prompts(prompts)
        assert [(one.ids, one.text) for one in found] == [
            (tokenizer.encode("a"), "a"), (ids, "stay"),
        ]  # fmt: skip
        tokens = await pool.tokenize(TokenList(source=prompts))
        assert json.loads(tokens.tokens) == tokenizer.encode("a")
        text = await pool.detokenize(IdsToText(tokens=json.dumps(ids).encode(), vocab_size=500))
        assert json.loads(text) == "stay"
        with pytest.raises(RequestError) as caught:
            await pool.chat(ChatText(messages=b"[]"))
        assert (caught.value.param, caught.value.status) == ("messages", 400)

    loop.run(check())


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_its_own_job_only(loop, name):
    async def check():
        pool = loop.pool
        bomb = asyncio.create_task(pool.chat(ChatText(messages=raw(name))))
        others = [asyncio.create_task(pool.chat(ChatText(messages=STAY))) for _ in range(4)]
        for other in others:
            assert (await other).num_tokens > 0
        with pytest.raises(RequestError) as caught:
            await bomb
        assert caught.value.status == 400
        assert any(end in str(caught.value) for end in ENDS), str(caught.value)

    loop.run(check())


def test_wall_time_does_not_count(own_loop, folder):
    """A worker that is stopped for longer than its CPU time allows answers afterwards."""
    loop = own_loop(boot(folder, rendering_s=0.2), 1)
    [worker] = loop.template().children()

    async def check():
        worker.suspend()
        job = asyncio.create_task(loop.pool.chat(ChatText(messages=STAY)))
        await asyncio.sleep(0.5)
        assert not job.done()
        worker.resume()
        assert (await job).num_tokens > 0

    loop.run(check())


def test_a_machine_that_is_too_busy_is_503_and_costs_no_other_job(own_loop, folder):
    loop = own_loop(boot(folder), 1, wall_s=0.3)
    [worker] = loop.template().children()

    async def check():
        worker.suspend()
        with pytest.raises(RequestError, match="too busy") as caught:
            await loop.pool.chat(ChatText(messages=STAY))
        assert caught.value.status == 503
        await answered(loop.pool)  # the stopped worker is killed, and another takes its place

    loop.run(check())


def test_a_killed_worker_or_template_is_replaced(own_loop, folder):
    loop = own_loop(boot(folder), 2)
    template = loop.template()

    async def check():
        for worker in template.children():
            worker.kill()
        await answered(loop.pool)
        template.kill()
        while loop.pool._process is None or loop.pool._process.pid == template.pid:
            await answered(loop.pool)  # its workers may live for a moment longer
        await answered(loop.pool)

    loop.run(check())


@pytest.mark.parametrize(
    ("text", "message"),
    [("a" * 999, "can't be tokenized"), (("a" * 26 + "b") * 99, "CPU time")],
    ids=["the library gives up", "the limit ends it"],
)
def test_a_regex_that_backtracks_for_ever_ends_its_own_job(own_loop, tmp_path, text, message):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?:a|aa)+[^ab]"), "isolated")
    loop = own_loop(boot(write_folder(tmp_path, tokenizer, template=None)), 2)

    async def check():
        job = PromptTexts(prompt=json.dumps(text).encode(), vocab_size=2, max_tokens=10**6)
        bomb = asyncio.create_task(loop.pool.prompts(job))
        [found] = await loop.pool.prompts(PromptTexts(prompt=b'"ab"', vocab_size=2))
        assert found.ids == [0, 1]
        with pytest.raises(RequestError, match=message):
            await bomb
        [found] = await loop.pool.prompts(PromptTexts(prompt=b'"ba"', vocab_size=2))
        assert found.ids == [1, 0]

    loop.run(check())


@pytest.mark.parametrize(
    ("template", "limits", "message"),
    [
        ("{% for x in %}", {}, "broken"),
        (BOMBS["sort"] * 9, {"building_s": 1}, "1 s of CPU time"),
    ],
)
def test_what_can_not_be_built_is_the_checkpoints_fault(tmp_path, template, limits, message):
    folder = write_folder(tmp_path, template=template)

    async def start():
        await TextPool.start(boot(folder, **limits))

    with pytest.raises(ModelError, match=message):
        asyncio.run(start())


def test_large_jobs_leave_a_worker_for_small_ones(own_loop, folder):
    loop = own_loop(boot(folder, tokenizing_s=60), 2)
    large = json.dumps("word " * 100_000).encode()
    order = []

    async def one(name, prompt):
        await loop.pool.prompts(PromptTexts(prompt=prompt, vocab_size=9, max_tokens=10**7))
        order.append(name)

    async def check():
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(one("large", large))
            group.create_task(one("small", b'"x"'))

    loop.run(check())
    assert order[0] == "small"
    assert order.count("large") == 3


def test_jobs_that_run_into_their_limits_keep_nobody_waiting(own_loop, folder):
    """With one worker, and bombs before an honest job, that is done before the last of them."""
    loop = own_loop(boot(folder, rendering_s=0.2), 1)
    order = []

    async def one(content):
        try:
            await loop.pool.chat(ChatText(messages=raw(content)))
            order.append("honest")
        except RequestError:
            order.append("bomb")

    async def check():
        async with asyncio.TaskGroup() as group:
            for content in ("sort", "sort", "sort", "stay"):
                group.create_task(one(content))
        while len(loop.pool._workers) > 1:  # those that were added go again
            await answered(loop.pool)

    loop.run(check())
    assert order.count("bomb") == 3
    assert order[-1] == "bomb"


def test_a_worker_that_grew_is_replaced(own_loop, folder):
    loop = own_loop(boot(folder, keep_bytes=1), 1)
    template = loop.template()

    async def check():
        before = {worker.pid for worker in template.children()}
        for _ in range(3):
            text = json.dumps("x y " * 20_000).encode()
            await loop.pool.prompts(PromptTexts(prompt=text, vocab_size=9))
        assert not before & {worker.pid for worker in template.children()}

    loop.run(check())


def test_they_end_with_the_frontend(folder):
    code = (
        "import asyncio, sys, time\n"
        "from core.interfaces.text import PromptTexts\n"
        "from core.serve.text.pool import TextPool\n"
        "from core.serve.text.process import TextBoot\n"
        "async def main():\n"
        f"    pool = await TextPool.start(TextBoot(folder={str(folder)!r}, eos_ids=[]), 2)\n"
        "    await pool.prompts(PromptTexts(prompt=b'\"a\"', vocab_size=9))\n"
        "    print(pool._process.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    template = psutil.Process(int(process.stdout.readline()))
    ended = [template, *template.children()]
    assert len(ended) > 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ended, timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_the_library_gives_the_same_ids_without_offsets():
    """`encode_batch_fast` is what lets other threads run; `encode` holds them up."""
    tokenizer = byte_level()
    text = "über größe 日本語 🎉 <|im_start|>x" * 50
    [fast] = tokenizer.encode_batch_fast([text])
    assert fast.ids == tokenizer.encode(text).ids


def test_an_error_is_freed_with_its_body_without_the_cyclic_collector():
    """Its traceback holds the frames of all who waited, with the body."""

    async def main():
        pool = TextPool(TextBoot(folder="", eos_ids=[]), 1)  # without any process: nobody answers
        try:
            await pool.chat(ChatText(messages=STAY, max_tokens=8))
        except RequestError as error:
            code, gone = error.code, weakref.ref(error)
        await asyncio.sleep(0)  # the loop lets go of what woke this task
        return code, gone()

    gc.collect()
    gc.disable()
    try:
        assert clock_loop.run(main()) == ("text_busy", None)
    finally:
        gc.enable()
