"""One answer read to its end: tokens, text, why it ended. Knows nothing of HTTP or of processes.

Nothing is given out before the end. Stop strings are found as in a stream (`core.frontend.answer`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import RequestError
from core.frontend.answer import StopMatcher
from core.interfaces.frontend import OutputStream, Tokenizer
from core.interfaces.messages import RequestOutput, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model answered to one prompt."""

    text: str  # without the stop string or stop token that ended it, and without special tokens
    token_ids: list[int]  # all that were generated, the one that ended the answer included
    finish_reason: str  # "stop": by itself or by what it was told to stop at; "length": max_tokens
    stop_reason: int | str | None  # the token id or the string that ended it; None: "length"
    logprobs: list[TokenLogprobs] | None  # one for each of token_ids; None: not asked for
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs] | None  # of prompt_token_ids[1:]; None: not asked for
    num_cached_tokens: int  # of the prompt, which the prefix cache had


async def read_completion(
    stream: OutputStream,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    sampling: SamplingParams,
    stops: Sequence[str],
) -> Completion:
    """Read a stream until it ends or a string of `stops` is complete, and close it.

    Raises WorkerDied where the engine ended before, RequestError where it gave the request up; the
    caller closes it then.
    """
    reader = _Reader(tokenizer, prompt_ids, sampling, stops)
    async for output in stream:
        reader.add(output)
        if reader.finish_reason is not None:
            stream.close(reader.finish_reason)
            return reader.completion()
    raise RequestError("the answer ended early", code="internal_error", status=500)


class _Reader:
    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        sampling: SamplingParams,
        stops: Sequence[str],
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt_ids=prompt_ids)
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._matcher = StopMatcher(stops)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def add(self, output: RequestOutput) -> None:
        if output.finish_reason == "error":
            code = output.error_code or "engine_error"
            message = output.error or "the engine failed"
            raise RequestError(message, code=code, status=500)
        self._num_cached_tokens += output.num_cached_tokens or 0
        self._prompt_logprobs += output.prompt_logprobs or []
        logprobs = output.logprobs or []
        for index, token_id in enumerate(output.token_ids):
            self._token_ids.append(token_id)
            self._logprobs += logprobs[index : index + 1]
            is_last = index == len(output.token_ids) - 1
            if is_last and token_id == output.stop_token_id:
                break  # ends the answer, and is no part of its text
            self._append(self._detokenizer.add((token_id,)))
            if self.finish_reason is not None:
                return
        if output.finish_reason is not None:
            self._append(self._detokenizer.finish())
            if self.finish_reason is None:
                self._text += self._matcher.finish()
                self.finish_reason = output.finish_reason
                self._stop_reason = output.stop_token_id

    def _append(self, text: str) -> None:
        """Add text; where a stop string is complete in it, cut there and finish."""
        if not text:
            return
        counts = len(self._token_ids) > self._sampling.min_tokens
        text, stop = self._matcher.add(text, counts)
        self._text += text
        if stop is not None:
            self.finish_reason, self._stop_reason = "stop", stop

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        sampling = self._sampling
        return Completion(
            text=self._text,
            token_ids=self._token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=None if sampling.logprobs is None else self._logprobs,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=None if sampling.prompt_logprobs is None else self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )
