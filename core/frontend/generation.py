"""Running the answers of one HTTP request: admission, submission, reading, and the end.

Knows nothing of what a response looks like. One request becomes prompts x n engine requests;
whatever happens, each of them has finished or is aborted when `Generation` is left.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import TracebackType

import msgspec

from core.errors import RequestError
from core.frontend.answer import Answer, Piece
from core.frontend.limits import seed_of_choice
from core.interfaces.frontend import FrontendContext, OutputStream
from core.interfaces.http import RequestRecord
from core.interfaces.messages import RequestOutput, SamplingParams

SUBMIT_PAUSE_TOKENS = 32 * 1024
SLICE_TOKENS = 256  # of an output, between two pauses
OnPieces = Callable[["Choice", list[Piece]], Awaitable[None]]


class Choice:
    """One answer under way. `index` is its place in the response."""

    __slots__ = ("answer", "index", "priority", "prompt_ids", "sampling", "stream")

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        sampling: SamplingParams,
        answer: Answer,
        priority: int,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.answer = answer
        self.priority = priority
        self.stream: OutputStream | None = None


def make_choices(
    prompts: Sequence[tuple[list[int], SamplingParams, Callable[[], Answer]]],
    n: int,
    *,
    priority: int | None = None,
    prompt_logprobs_once: bool = False,
) -> list[Choice]:
    """prompts x n choices, the answers of a prompt next to each other. With `prompt_logprobs_once`
    prompt logprobs come with a prompt's first answer only."""
    choices: list[Choice] = []
    for prompt_ids, sampling, make_answer in prompts:
        for i in range(n):
            own = sampling
            if (seed := seed_of_choice(sampling.seed, i)) != sampling.seed:
                own = msgspec.structs.replace(own, seed=seed)
            if i and prompt_logprobs_once and own.prompt_logprobs is not None:
                own = msgspec.structs.replace(own, prompt_logprobs=None)
            choices.append(Choice(len(choices), prompt_ids, own, make_answer(), priority or 0))
    return choices


def num_logprobs(choices: Sequence[Choice]) -> int:
    """How many log-probabilities the answers consist of, prompts included."""
    total = 0
    for choice in choices:
        if choice.sampling.logprobs is not None:
            total += choice.answer.num_tokens * (choice.sampling.logprobs + 1)
        if choice.sampling.prompt_logprobs is not None:
            total += len(choice.prompt_ids) * (choice.sampling.prompt_logprobs + 1)
    return total


def sliced(output: RequestOutput) -> Iterator[RequestOutput]:
    """The same output in parts of few tokens: what piled up for a slow client may be a whole
    answer, and others should get their turn while it is worked on."""
    num_tokens = len(output.token_ids)
    if num_tokens <= SLICE_TOKENS:
        yield output
        return
    for begin in range(0, num_tokens, SLICE_TOKENS):
        end = begin + SLICE_TOKENS
        part = msgspec.structs.replace(
            output,
            token_ids=output.token_ids[begin:end],
            logprobs=output.logprobs and output.logprobs[begin:end],
        )
        if begin:
            part.prompt_logprobs = part.num_cached_tokens = None
        if end < num_tokens:
            part.finish_reason = part.stop_token_id = part.error = part.error_code = None
        yield part


class Generation:
    """A context manager: `run` submits and reads, leaving it aborts what has not finished."""

    def __init__(
        self, context: FrontendContext, request_id: str, choices: Sequence[Choice]
    ) -> None:
        self._context = context
        self._request_id = request_id
        self._choices = choices
        self._meter = context.metrics.begin()
        self.disconnected = False

    def __enter__(self) -> "Generation":
        """Raises RequestError 429 where the queue is full."""
        self._context.admission.admit(len(self._choices))
        return self

    async def _submit(self) -> None:
        """Raises RequestError 503 where nothing is accepted. Pauses after so many tokens: each
        request is checked and packed."""
        engine = self._context.engine
        num_tokens = 0
        with self._context.admission.submitting(len(self._choices)) as submitted:
            for choice in self._choices:
                if self.disconnected:
                    return
                request_id = f"{self._request_id}-{choice.index}"
                choice.stream = engine.generate(
                    request_id,
                    choice.prompt_ids,
                    choice.sampling,
                    priority=choice.priority,
                    meter=self._meter,
                )
                submitted()
                num_tokens += len(choice.prompt_ids)
                if num_tokens > SUBMIT_PAUSE_TOKENS:
                    num_tokens = 0
                    await asyncio.sleep(0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close("error" if error else None)
        self._meter.release()

    def disconnect(self) -> None:
        """The client is gone: abort now; `run` returns soon after."""
        self.disconnected = True
        self._close()

    def tell(self, record: RequestRecord) -> None:
        """Write down what became of the request, however it ended."""
        choices = self._choices
        prompts = {id(choice.prompt_ids): choice for choice in choices}.values()
        reasons = [choice.answer.finish_reason or "unfinished" for choice in choices]
        record.answer_id = self._request_id
        record.prompt_tokens = sum(len(choice.prompt_ids) for choice in prompts)
        record.cached_tokens = sum(choice.answer.num_cached_tokens for choice in prompts)
        record.completion_tokens = sum(choice.answer.num_tokens for choice in choices)
        record.first_token_s = self._meter.first_token_s
        record.finish_reason = ",".join(dict.fromkeys(reasons))

    async def run(self, on_pieces: OnPieces) -> None:
        """Read every answer to its end, all at once, handing on what becomes visible.

        `on_pieces` is called at least once for each choice, and last when its finish_reason is
        set. Raises WorkerDied or RequestError for the first answer that fails.
        """
        await self._submit()
        if self.disconnected:
            return
        if len(self._choices) == 1:
            await self._read(self._choices[0], on_pieces)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(self._read(choice, on_pieces))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _read(self, choice: Choice, on_pieces: OnPieces) -> None:
        answer, stream = choice.answer, choice.stream
        assert stream is not None
        async for output in stream:
            for part in sliced(output):
                pieces = answer.feed(part)
                if pieces or answer.finish_reason is not None or part.num_cached_tokens is not None:
                    await on_pieces(choice, pieces)
                if answer.finish_reason is not None:
                    stream.close(answer.finish_reason)  # aborts where a stop string ended it
                    return
                if part is not output:
                    await asyncio.sleep(0)
        if not self.disconnected:
            raise RequestError("the answer ended early", code="internal_error", status=500)

    def _close(self, finish_reason: str | None = None) -> None:
        for choice in self._choices:
            if choice.stream is not None:
                choice.stream.close(finish_reason)
