"""The text of one answer as it grows: detokenizing, stop strings, hidden stop tokens.

Knows nothing of HTTP or of sampling. Text that may turn out to be part of a stop string, and
bytes that may be part of a character, are held back, so nothing is ever taken back.
"""

from collections.abc import Sequence
from typing import NamedTuple

from core.errors import RequestError
from core.interfaces.frontend import Tokenizer
from core.interfaces.messages import RequestOutput, TokenLogprobs


class Piece(NamedTuple):
    """What becomes visible at once: text, and the logprobs of the tokens it came from.

    `offsets` has one entry a logprob: the characters of the answer that begin before the token. A
    character of several tokens begins with its first.
    """

    text: str
    logprobs: Sequence[TokenLogprobs] = ()
    offsets: Sequence[int] = ()


class StopMatcher:
    """Finds the stop string that is complete first; of several, the one that began first.

    The result does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str, counts: bool = True) -> tuple[str, str | None]:
        """(text to give out, the stop string that was found or None).

        Where the text does not count, no stop string ends in it, but one may begin.
        """
        buffer = self._held + text
        best_end, best_begin, found = len(buffer) + 1, 0, None
        for stop in self._stops if counts else ():
            # What was held ends no stop string: either none was complete, or it did not count.
            begin = buffer.find(stop, max(len(self._held) - len(stop) + 1, 0))
            if begin >= 0 and (begin + len(stop), begin) < (best_end, best_begin):
                best_end, best_begin, found = begin + len(stop), begin, stop
        if found is not None:
            self._held = ""
            return buffer[:best_begin], found
        safe = self._safe_length(buffer)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def finish(self) -> str:
        """What was held back: no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, buffer: str) -> int:
        """Where the longest end of `buffer` that begins a stop string starts."""
        safe = len(buffer)
        for stop in self._stops:
            at = buffer.find(stop[0], max(len(buffer) - len(stop) + 1, 0))
            while 0 <= at < safe:
                if stop.startswith(buffer[at:]):
                    safe = at
                    break
                at = buffer.find(stop[0], at + 1)
        return safe


class Answer:
    """One choice. `finish_reason` is set by the piece that ends it."""

    __slots__ = (
        "_detokenizer", "_include_stop", "_matcher", "_min_tokens", "_num_characters", "_offsets",
        "_plain", "_unseen", "_wants_logprobs", "finish_reason", "num_cached_tokens", "num_tokens",
        "prompt_logprobs", "stop_reason",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        stops: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
        min_tokens: int,
        wants_logprobs: bool,
        takes_over: bool = False,
    ) -> None:
        """Only stop strings that end after `min_tokens` tokens count. `takes_over`: a character
        that the prompt began is this answer's, whatever becomes of it."""
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=skip_special_tokens,
            prompt_ids=prompt_ids,
            takes_over=takes_over,
        )
        self._matcher = StopMatcher(stops)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._wants_logprobs = wants_logprobs
        self._plain = not stops and not wants_logprobs
        self._unseen: list[TokenLogprobs] = []  # of tokens whose text is held back
        self._offsets: list[int] = []  # of those tokens
        self._num_characters = 0  # of all tokens so far, given out or held back
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def feed(self, output: RequestOutput) -> list[Piece]:
        """The pieces an output makes visible, at most one a token and one more at the end.

        Raises RequestError where the engine gave the request up.
        """
        if output.finish_reason == "error":
            message = output.error or "the engine failed"
            if output.error_code == "queue_timeout":
                raise RequestError(message, code="queue_timeout", status=503)
            raise RequestError(message, code="engine_error", status=500)
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        token_ids = output.token_ids
        visible = len(token_ids)
        if output.stop_token_id is not None and not self._include_stop and token_ids:
            visible -= token_ids[-1] == output.stop_token_id
        if self._plain:
            self.num_tokens += len(token_ids)
            add = self._detokenizer.add
            pieces = [Piece(text) for token_id in token_ids[:visible] if (text := add((token_id,)))]
        else:
            pieces = self._feed_checked(output, visible)
        if output.finish_reason is not None and self.finish_reason is None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_token_id
            self._flush(pieces)
        return pieces

    def _feed_checked(self, output: RequestOutput, visible: int) -> list[Piece]:
        """Token by token, so that the token that completes a stop string is the last."""
        pieces: list[Piece] = []
        for index, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if index >= visible:
                break  # the hidden stop token
            if self._wants_logprobs and output.logprobs:
                self._unseen.append(output.logprobs[index])
                self._offsets.append(self._num_characters + self._detokenizer.holding)
            text = self._detokenizer.add((token_id,))
            if text:
                self._match(text, pieces)
                if self.finish_reason is not None:
                    break
        return pieces

    def _match(self, text: str, pieces: list[Piece]) -> None:
        self._num_characters += len(text)
        text, stop = self._matcher.add(text, self.num_tokens > self._min_tokens)
        if stop is not None:
            self.finish_reason = "stop"
            self.stop_reason = stop
            text += stop if self._include_stop else ""
        if text or (stop is not None and self._unseen):
            self._give(text, pieces)

    def _flush(self, pieces: list[Piece]) -> None:
        """The engine ended the answer: give out what was held back, unless it holds a stop."""
        if text := self._detokenizer.finish():
            self._match(text, pieces)
        if not isinstance(self.stop_reason, str) and (held := self._matcher.finish()):
            self._give(held, pieces)
        if self._unseen:
            self._give("", pieces)

    def _give(self, text: str, pieces: list[Piece]) -> None:
        pieces.append(Piece(text, self._unseen, self._offsets))
        self._unseen, self._offsets = [], []
