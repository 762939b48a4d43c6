"""Running the answers of one HTTP request: admission, submission, reading, and the end.

Knows nothing of what a response looks like. One request becomes prompts x n engine requests;
whatever happens, each of them has finished or is aborted when `Generation` is left.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

import msgspec

from core.errors import RequestError
from core.interfaces.frontend import OutputStream
from core.interfaces.messages import SamplingParams
from plugins.frontends._openai.answer import Answer, Piece
from plugins.frontends._openai.limits import seed_of_choice
from plugins.frontends._openai.service import Service

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
    prompts: Sequence[tuple[list[int], SamplingParams]],
    n: int,
    make_answer: Callable[[list[int]], Answer],
    *,
    priority: int | None = None,
) -> list[Choice]:
    """prompts x n choices, the answers of a prompt next to each other. `make_answer` gets the
    prompt's tokens."""
    choices: list[Choice] = []
    for prompt_ids, sampling in prompts:
        for i in range(n):
            seed = seed_of_choice(sampling.seed, i)
            own = (
                sampling if seed == sampling.seed else msgspec.structs.replace(sampling, seed=seed)
            )
            answer = make_answer(prompt_ids)
            choices.append(Choice(len(choices), prompt_ids, own, answer, priority or 0))
    return choices


class Generation:
    """A context manager: submits on entry, aborts on exit what has not finished."""

    def __init__(self, service: Service, request_id: str, choices: Sequence[Choice]) -> None:
        self._service = service
        self._request_id = request_id
        self._choices = choices
        self._begin = time.perf_counter()
        self.disconnected = False

    def __enter__(self) -> "Generation":
        """Raises RequestError 429 where the queue is full, 503 where nothing is accepted."""
        self._service.admit(len(self._choices))
        engine = self._service.engine
        try:
            for choice in self._choices:
                request_id = f"{self._request_id}-{choice.index}"
                choice.stream = engine.generate(
                    request_id, choice.prompt_ids, choice.sampling, priority=choice.priority
                )
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        metrics = self._service.metrics
        for choice in self._choices:
            metrics.finished[choice.answer.finish_reason or ("error" if error else "abort")] += 1
        metrics.request_s.observe(time.perf_counter() - self._begin)

    def disconnect(self) -> None:
        """The client is gone: abort now; `run` returns soon after."""
        self.disconnected = True
        self._close()

    async def run(self, on_pieces: OnPieces) -> None:
        """Read every answer to its end, all at once, handing on what becomes visible.

        `on_pieces` is called at least once for each choice, and last when its finish_reason is
        set. Raises WorkerDied or RequestError for the first answer that fails.
        """
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
        metrics, answer, stream = self._service.metrics, choice.answer, choice.stream
        assert stream is not None
        clock = time.perf_counter
        last = 0.0
        async for output in stream:
            now = clock()
            if last:
                num_tokens = len(output.token_ids) or 1
                metrics.next_token_s.observe((now - last) / num_tokens, num_tokens)
            else:
                metrics.first_token_s.observe(now - self._begin)
            last = now
            pieces = answer.feed(output)
            if pieces or answer.finish_reason is not None or output.num_cached_tokens is not None:
                await on_pieces(choice, pieces)
            if answer.finish_reason is not None:
                stream.close()  # aborts where a stop string ended it
                return
        if not self.disconnected:
            raise RequestError("the answer ended early", code="internal_error", status=500)

    def _close(self) -> None:
        for choice in self._choices:
            if choice.stream is not None:
                choice.stream.close()
