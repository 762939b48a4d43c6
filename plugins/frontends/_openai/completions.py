"""POST /v1/completions. Knows nothing of engines or of sockets."""

import time
from functools import partial
from typing import Any

from core.errors import RequestError
from core.frontend.answer import Answer, Piece
from core.frontend.asgi import Call
from core.frontend.endpoint import new_id
from core.frontend.generation import Choice, make_choices, num_logprobs
from core.frontend.limits import answer_tokens, check_range
from core.frontend.sampling import sampling_params, stop_strings
from core.interfaces.messages import TokenLogprobs
from core.interfaces.text import Prompt, PromptTexts
from plugins.frontends._openai.endpoint import GenerationEndpoint, usage
from plugins.frontends._openai.large_json import large_raw, send_large_json
from plugins.frontends._openai.limits import check_generation
from plugins.frontends._openai.logprobs import (
    completion_logprobs,
    echoed_logprobs,
    join,
    prompt_logprobs,
)
from plugins.frontends._openai.protocol import CompletionRequest
from plugins.frontends._openai.streaming import EventStream, TextShape

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions(GenerationEndpoint[CompletionRequest]):
    """Prompts in, their continuations out."""

    route = "/v1/completions"
    body_type = CompletionRequest

    async def handle(self, body: CompletionRequest, call: Call) -> None:
        self._check(body)
        with self.service.admission.tokenizing(body.n or 1):
            prompts = await self._prompts(body)
        choices = self._choices(body, prompts)
        job = _Job(body, self.service.tokenizer, choices, prompts)
        if body.stream:
            await self._answer_streamed(job, call)
        else:
            await self._answer(job, call)

    def _check(self, body: CompletionRequest) -> None:
        config = self.service.config
        check_generation(body, config, self.service.model)
        check_range("max_tokens", body.max_tokens, 0 if body.echo else 1, float("inf"))
        check_range("logprobs", body.logprobs, 0, config.max_logprobs)
        if body.suffix:
            raise RequestError("suffix is not supported", param="suffix", code="unsupported")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise RequestError(
                f"best_of must equal n ({body.n or 1}): answers are not ranked",
                param="best_of",
                code="unsupported",
            )

    async def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        service = self.service
        return await service.prompts(
            PromptTexts(
                prompt=bytes(body.prompt),
                vocab_size=service.model.vocab_size,
                add_special_tokens=body.add_special_tokens is not False,
                max_prompts=service.config.max_batch_prompts,
                max_tokens=service.model.max_model_len - 1,
                echo=bool(body.echo),
                offsets=bool(body.echo) and body.logprobs is not None,
            )
        )

    def _choices(self, body: CompletionRequest, prompts: list[Prompt]) -> list[Choice]:
        service = self.service
        stops = stop_strings(body, service.config)
        of_prompt = body.logprobs if body.echo else None
        if body.prompt_logprobs is not None:
            of_prompt = max(body.prompt_logprobs, of_prompt or 0)

        def sampling_of(num_prompt: int) -> Any:
            max_tokens = answer_tokens(
                body.max_tokens,
                DEFAULT_MAX_TOKENS,
                num_prompt,
                service.model,
                "max_tokens",
                strict=service.config.strict_fields,
            )
            return sampling_params(
                body,
                max_tokens=max_tokens,
                logprobs=body.logprobs,
                prompt_logprobs=of_prompt,
                model=service.model,
            )

        def make_answer(prompt: Prompt) -> Answer:
            return Answer(
                service.tokenizer,
                prompt.ids,
                stops=stops,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                min_tokens=body.min_tokens or 0,
                wants_logprobs=body.logprobs is not None,
                takes_over=prompt.is_open,
            )

        return make_choices(
            [(p.ids, sampling_of(len(p.ids)), partial(make_answer, p)) for p in prompts],
            body.n or 1,
            priority=body.priority,
            prompt_logprobs_once=not body.stream,
        )

    async def _answer(self, job: "_Job", call: Call) -> None:
        request_id, created = new_id("cmpl"), int(time.time())
        seen = await self.collect(request_id, job.choices, call)

        def build() -> dict[str, Any]:
            return {
                "id": request_id,
                "object": "text_completion",
                "created": created,
                "model": self.service.model.name,
                "choices": [job.choice(choice, seen[choice.index]) for choice in job.choices],
                "usage": usage(job.choices, job.num_per_prompt),
            }

        await send_large_json(call.send, num_logprobs(job.choices), build)

    async def _answer_streamed(self, job: "_Job", call: Call) -> None:
        request_id = new_id("cmpl")
        envelope = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.model.name,
        }
        events = EventStream(call.send, envelope, job.body.stream_options)
        shapes: list[TextShape | None] = [None] * len(job.choices)
        plain = job.body.logprobs is None and not events.usage_in_all

        async def on_pieces(choice: Choice, pieces: list[Piece]) -> None:
            chunk = b""
            used = usage([choice]) if events.usage_in_all else None
            shape = shapes[choice.index]
            if shape is None:
                shape = events.text_shape(choice.index, b'"text":', b"")
                shapes[choice.index] = shape
                if job.body.echo:
                    of_prompt = await large_raw(
                        num_logprobs([choice]), lambda: job.echo_logprobs(choice)
                    )
                    chunk = shape.full(job.echo(choice), of_prompt, used)
            if plain:
                chunk += shape.plain([piece.text for piece in pieces])
            else:
                for piece in pieces:
                    chunk += shape.full(piece.text, job.logprobs(choice, [piece]), used)
            if choice.answer.finish_reason is not None:
                last = {"index": choice.index, "text": "", "logprobs": None, **ending(choice)}
                chunk += events.event(last, used)
            if chunk:
                await events.write(chunk)

        await self.stream(request_id, job.choices, call, events, on_pieces, job.num_per_prompt)


class _Job:
    """What both forms of a response are made of."""

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Any,
        choices: list[Choice],
        prompts: list[Prompt],
    ) -> None:
        self.body = body
        self.choices = choices
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.num_per_prompt = len(choices) // len(prompts)
        self._echo_logprobs: dict[int, dict[str, Any]] = {}  # by prompt: built once, not n times
        self._prompt_logprobs: dict[int, Any] = {}

    def echo(self, choice: Choice) -> str:
        """The text to put in front."""
        return self._prompts[self._prompt_of(choice)].text or ""

    def echo_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        prompt = self._prompt_of(choice)
        if prompt not in self._echo_logprobs:
            self._echo_logprobs[prompt] = echoed_logprobs(
                self._tokenizer,
                self._prompts[prompt],
                self._of_prompt(choice) or [],
                self.body.logprobs,
            )
        return self._echo_logprobs[prompt]

    def logprobs(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        before = len(self.echo(choice))
        return completion_logprobs(
            self._tokenizer,
            [entry for piece in pieces for entry in piece.logprobs],
            [before + offset for piece in pieces for offset in piece.offsets],
            self.body.logprobs,
        )

    def prompt_logprobs(self, choice: Choice) -> Any:
        prompt = self._prompt_of(choice)
        if prompt not in self._prompt_logprobs:
            entries = self._of_prompt(choice)
            self._prompt_logprobs[prompt] = prompt_logprobs(self._tokenizer, entries)
        return self._prompt_logprobs[prompt]

    def _of_prompt(self, choice: Choice) -> list[TokenLogprobs] | None:
        """The prompt's log-probabilities, which came with one of its answers or with each."""
        first = self.choices[self._prompt_of(choice) * self.num_per_prompt]
        return choice.answer.prompt_logprobs or first.answer.prompt_logprobs

    def _prompt_of(self, choice: Choice) -> int:
        return choice.index // self.num_per_prompt

    def choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        before = self.echo_logprobs(choice) if self.body.echo else None
        logprobs = self.logprobs(choice, pieces)
        result = {
            "index": choice.index,
            "text": self.echo(choice) + text,
            "logprobs": join(before, logprobs) if before and logprobs else logprobs,
            **ending(choice),
        }
        if self.body.prompt_logprobs is not None:
            result["prompt_logprobs"] = self.prompt_logprobs(choice)
        return result


def ending(choice: Choice) -> dict[str, Any]:
    """How a finished choice ended."""
    return {
        "finish_reason": choice.answer.finish_reason,
        "stop_reason": choice.answer.stop_reason,
    }
