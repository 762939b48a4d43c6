"""Log-probabilities in the two forms OpenAI's API has, and in the one for prompts.

Knows nothing of how they were computed. JSON has no infinity: the least value is -9999.
"""

from collections.abc import Sequence
from typing import Any

from core.interfaces.frontend import Tokenizer
from core.interfaces.messages import TokenLogprobs
from core.interfaces.text import Prompt

LEAST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": chat_token(tokenizer, token_id),
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


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], offsets: Sequence[int], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a completion choice. `offsets`: where each token begins in the text."""
    tokens = [completion_token(tokenizer, entry.token_id) for entry in entries]
    return {
        "text_offset": list(offsets),
        "token_logprobs": [max(entry.logprob, LEAST) for entry in entries],
        "tokens": tokens,
        "top_logprobs": [
            _top(tokenizer, entry, text, num_top)
            for entry, text in zip(entries, tokens, strict=True)
        ],
    }


def echoed_logprobs(
    tokenizer: Tokenizer, prompt: Prompt, entries: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """The same of a prompt that the text begins with: its first token has no probability."""
    offsets = prompt.offsets
    if offsets is None:
        offsets = prompt_offsets(tokenizer, prompt.ids, prompt.text or "")
    first: dict[str, Any] = {
        "text_offset": offsets[:1],
        "token_logprobs": [None],
        "tokens": [completion_token(tokenizer, prompt.ids[0])],
        "top_logprobs": [None],
    }
    return join(first, completion_logprobs(tokenizer, entries, offsets[1:], num_top))


def prompt_offsets(tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Where each token of a prompt begins in its text, in characters.

    The tokens' text may have more around it, such as a bos token: that has no place of its own. A
    character that the text leaves out at its end, since more tokens are to follow, begins there.
    """
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces: list[str] = []
    offsets: list[int] = []
    size = 0
    for token_id in prompt_ids:
        offsets.append(size + detokenizer.holding)
        pieces.append(detokenizer.add((token_id,)))
        size += len(pieces[-1])
    whole = "".join(pieces)
    at_end = whole.endswith(text)
    before = len(whole) - len(text) if at_end else max(whole.find(text), 0)
    end = len(text) + (at_end and detokenizer.holding)
    return [min(max(offset - before, 0), end) for offset in offsets]


def chat_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole characters as OpenAI writes them, each with a
    backslash: clients tell tokens apart by their texts."""
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return repr(content)[2:-1]


def completion_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The same as OpenAI's completions have it, with "bytes:" before such bytes."""
    text = chat_token(tokenizer, token_id)
    whole = text.encode() == tokenizer.token_bytes(token_id)
    return text if whole else f"bytes:{text}"


def _top(tokenizer: Tokenizer, entry: TokenLogprobs, chosen: str, num_top: int) -> dict[str, float]:
    """Text -> logprob, best first, the chosen token always among them and under its own text. Of
    other tokens with the same text the less likely are named by their ids."""
    top: dict[str, float] = {}
    for token_id, logprob in zip(
        entry.top_ids[:num_top], entry.top_logprobs[:num_top], strict=True
    ):
        text = completion_token(tokenizer, token_id)
        if token_id != entry.token_id and (text == chosen or text in top):
            text = f"token_id:{token_id}"
        top[text] = max(logprob, LEAST)
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
