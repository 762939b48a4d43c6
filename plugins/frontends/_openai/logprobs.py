"""Log-probabilities in the two forms OpenAI's API has, and in the one for prompts.

Knows nothing of how they were computed. JSON has no infinity: the least value is -9999.
"""

from collections.abc import Sequence
from typing import Any

from core.interfaces.frontend import Tokenizer
from core.interfaces.messages import TokenLogprobs

LEAST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LEAST),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **one(entry.token_id, entry.logprob),
                "top_logprobs": [
                    one(token_id, logprob)
                    for token_id, logprob in zip(
                        entry.top_ids[:num_top], entry.top_logprobs[:num_top], strict=True
                    )
                ],
            }
            for entry in entries
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """`logprobs` of a completion choice; text offsets run on over a stream's chunks."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def prompt(self, prompt_ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """For an echoed prompt: its first token has no probability."""
        text = self._tokenizer.token_text(prompt_ids[0])
        result: dict[str, Any] = {
            "text_offset": [0],
            "token_logprobs": [None],
            "tokens": [text],
            "top_logprobs": [None],
        }
        self._offset = len(text)
        return join(result, self.add(entries))

    def add(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        result: dict[str, Any] = {
            "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": [],
        }  # fmt: skip
        for entry in entries:
            text = self._tokenizer.token_text(entry.token_id)
            result["text_offset"].append(self._offset)
            result["token_logprobs"].append(max(entry.logprob, LEAST))
            result["tokens"].append(text)
            result["top_logprobs"].append(self._top(entry, text))
            self._offset += len(text)
        return result

    def _top(self, entry: TokenLogprobs, chosen: str) -> dict[str, float]:
        """Text -> logprob, the chosen token always among them."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(
            entry.top_ids[: self._num_top], entry.top_logprobs[: self._num_top], strict=True
        ):
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, LEAST))
        top.setdefault(chosen, max(entry.logprob, LEAST))
        return top


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two completion logprobs, one after the other."""
    return {name: first[name] + second[name] for name in first}


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs] | None
) -> list[dict[str, Any] | None] | None:
    """`prompt_logprobs` as vLLM has it: a position's candidates by token id, null for the first."""
    if entries is None:
        return None
    result: list[dict[str, Any] | None] = [None]
    for entry in entries:
        candidates = zip(entry.top_ids, entry.top_logprobs, range(1, 1 << 30), strict=False)
        position = {
            str(token_id): _candidate(tokenizer, token_id, logprob, rank)
            for token_id, logprob, rank in candidates
        }
        own = _candidate(tokenizer, entry.token_id, entry.logprob, entry.rank)
        result.append({str(entry.token_id): own} | position)
    return result


def _candidate(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {
        "logprob": max(logprob, LEAST),
        "rank": rank,
        "decoded_token": tokenizer.token_text(token_id),
    }
