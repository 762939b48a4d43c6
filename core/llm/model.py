"""A model as a Python object: prompts in, answers out, without HTTP (`from core import LLM`).

The same configuration, checks, worker processes, scheduler and text service as the server has; this
module turns arguments into those. Importing it, or making an `LLM`, imports no torch here: that is
the workers' to do.
"""

import asyncio
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from core.cluster.nodes.endpoints import RunDirectory
from core.cluster.processes.display import Display
from core.cluster.processes.group import SingleNode
from core.errors import RequestError
from core.frontend.completion import Completion
from core.interfaces.control import ChildStatus
from core.interfaces.frontend import Tokenizer
from core.interfaces.messages import SamplingParams
from core.interfaces.text import ChatText, Prompt, PromptTexts
from core.llm.prompts import (
    Message,
    Sampling,
    TextPrompt,
    as_conversations,
    as_json,
    as_prompts,
    as_stops,
    each,
    named,
)
from core.llm.settings import configure
from core.serve.embedded import EmbeddedEngine
from core.settings.config import AppConfig
from core.settings.schema import did_you_mean
from core.start import frontend_boot, prepare, worker_spec

DEFAULT_MAX_TOKENS = 16  # of a prompt's answer, as POST /v1/completions has it
MAX_TEXT_JOBS = 64  # under way: one that waits for half a minute is given up


class LLM:
    """A model that is loaded and answers. A context manager; `close` ends its processes.

    May be used from several threads at once, whose requests are then computed together.
    """

    def __init__(self, model: str | os.PathLike[str], **settings: Any) -> None:
        """Load a model; returns once it answers.

        `model`: a preset ("smollm2"), a Hugging Face folder, a .gguf file or a Hub id.
        `settings`: what the command line sets, by group (`parallel="tp2"`), by section
        (`engine={"page_size": 32}`) or by key (`**{"model.dtype": "float32"}`).

        Raises ConfigError, ModelError or ResourceError for what the caller can mend, WorkerDied
        for a worker that ended otherwise while it loaded; nothing is left running then.
        """
        config, plugins, launcher = configure(model, settings)
        display = _display()
        node = prepare(config, plugins, launcher, SingleNode(), display)
        display.num_workers = node.resolved.plan.world_size
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(RunDirectory(node.resolved.plan.dp))
            endpoints = directory.endpoints()
            boot = frontend_boot(node.resolved, endpoints)
            workers = [worker_spec(node, endpoints, place) for place in node.placements]
            engine = EmbeddedEngine(boot, plugins, workers, display.status)
            stack.callback(engine.close)
            engine.open()
            resources = stack.pop_all()
        self._engine = engine
        self._config = node.resolved.config
        self._defaults = {**boot.files.default_sampling, **config.model.default_sampling}
        # Also when the program ends, or forgets this object.
        self._end = weakref.finalize(self, _close, engine, resources, os.getpid())

    def generate(
        self,
        prompts: TextPrompt | Sequence[TextPrompt],
        sampling: Sampling = None,
        *,
        stop: str | Sequence[str] = (),
    ) -> list[Completion]:
        """Continue one prompt or several, each a text or a list of token ids.

        `sampling`: one for all or one each; None: the model's own defaults and 16 tokens. `stop`:
        strings that end an answer, and are left out of its text. Answers come in the order of the
        prompts. Blocks; if this is interrupted, or one prompt is refused, none is computed on.

        Raises RequestError for what can't be answered, before anything is computed; WorkerDied
        where a worker ends meanwhile.
        """
        found = as_prompts(prompts)
        return self._run(self._answers(found, sampling, stop, self._tokenize, DEFAULT_MAX_TOKENS))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: Sampling = None,
        *,
        stop: str | Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """The assistant's next message of one conversation or several.

        Messages are those of OpenAI's API: {"role": "user", "content": "..."}. `tools` and
        `template_variables` are given to the model's chat template. The rest is as in `generate`,
        except that without `sampling` an answer may take the rest of the context.
        """
        render = _Render(self._engine, tools, template_variables)
        found = as_conversations(messages)
        return self._run(self._answers(found, sampling, stop, render, None))

    def sampling(self, max_tokens: int = DEFAULT_MAX_TOKENS, **fields: Any) -> SamplingParams:
        """SamplingParams with the model's own defaults for temperature, top_p, top_k, min_p and
        repetition_penalty where `fields` don't say otherwise."""
        known = {**self._defaults, **fields}
        try:
            if "top_k" in self._defaults and "top_k" not in fields:
                known["top_k"] = int(known["top_k"])
            return SamplingParams(max_tokens=max_tokens, **known)
        except TypeError as error:
            wrong = sorted(set(fields) - set(SamplingParams.__struct_fields__))
            if not wrong:
                raise
            hint = did_you_mean(wrong[0], SamplingParams.__struct_fields__)
            raise RequestError(
                f"{wrong[0]} is no sampling parameter{hint}; there are: "
                + ", ".join(SamplingParams.__struct_fields__),
                param=wrong[0],
                code="unknown_parameter",
            ) from error

    @property
    def config(self) -> AppConfig:
        """The configuration with everything settled that was left open."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.limits.max_model_len

    def close(self) -> None:
        """End the workers and give back what they held; again it does nothing."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, answers: Coroutine[Any, Any, list[Completion]]) -> list[Completion]:
        try:
            return self._engine.run(answers)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _answers(
        self,
        prompts: Sequence[Any],
        sampling: Sampling,
        stop: str | Sequence[str],
        to_tokens: Callable[[Any], Awaitable[Prompt]],
        default_max_tokens: int | None,
    ) -> list[Completion]:
        """All checks come before the first request."""
        stops = as_stops(stop)
        params_of = each(sampling, len(prompts))
        busy = asyncio.Semaphore(MAX_TEXT_JOBS)

        async def tokens_of(index: int) -> list[int]:
            async with busy:
                with named(index, len(prompts)):
                    return self._checked(await to_tokens(prompts[index]))

        async with asyncio.TaskGroup() as group:
            coming = [group.create_task(tokens_of(index)) for index in range(len(prompts))]
        requests = []
        for index, task in enumerate(coming):
            ids, params = task.result(), params_of[index]
            with named(index, len(prompts)):
                requests.append((ids, self._settled(params, ids, default_max_tokens)))
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(self._engine.generate(ids, params, stops))
                for ids, params in requests
            ]
        return [answer.result() for answer in answers]

    async def _tokenize(self, prompt: TextPrompt) -> Prompt:
        if not isinstance(prompt, str):
            ids = list(prompt)
            return Prompt(num_tokens=len(ids), ids=ids)
        job = PromptTexts(
            prompt=as_json(prompt, "prompts"),
            vocab_size=self._engine.limits.vocab_size,
            max_tokens=self.max_model_len - 1,
        )
        [found] = await self._engine.text.prompts(job)
        return found

    def _checked(self, prompt: Prompt) -> list[int]:
        if prompt.at_least or prompt.num_tokens >= self.max_model_len:
            least = "at least " if prompt.at_least else ""
            raise RequestError(
                f"the prompt has {least}{prompt.num_tokens} tokens; allowed: 1 to "
                f"{self.max_model_len - 1}, as the context is {self.max_model_len} tokens, prompt "
                "and answer together",
                param="prompts",
                code="context_length_exceeded",
            )
        return prompt.ids

    def _settled(
        self, params: SamplingParams | None, ids: list[int], default_max_tokens: int | None
    ) -> SamplingParams:
        """Parameters that the engine takes for this prompt. Raises RequestError."""
        room = self.max_model_len - len(ids)
        if params is None:
            params = self.sampling(room if default_max_tokens is None else default_max_tokens)
        self._engine.limits.check("prompt", ids, params, 0)
        if params.top_p == 0:  # no share of the probability at all leaves the best token
            params = msgspec.structs.replace(params, top_p=1.0, temperature=0.0)
        return msgspec.structs.replace(params, max_tokens=min(params.max_tokens, room))


class _Render:
    """A conversation to a prompt, with what the template gets besides the messages."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> None:
        self._engine = engine
        self._tools = as_json(tools, "tools")
        self._variables = as_json(variables, "template_variables")

    async def __call__(self, messages: Sequence[Message]) -> Prompt:
        return await self._engine.text.chat(
            ChatText(
                messages=as_json(messages, "messages"),
                tools=self._tools,
                variables=self._variables,
                max_tokens=self._engine.limits.max_model_len - 1,
            )
        )


class _Quiet(Display):
    """Warnings only, where nobody watches a terminal."""

    def status(self, name: str, status: ChildStatus) -> None:
        pass


def _display() -> Display:
    return Display() if sys.stderr.isatty() else _Quiet()


def _close(engine: EmbeddedEngine, resources: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a fork of the program: the workers are not its own
    if threading.current_thread() in engine.threads:  # the garbage collector's choice
        threading.Thread(target=resources.close).start()
    else:
        resources.close()
