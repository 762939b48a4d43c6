"""What the text service does for one job: parse, check, render, tokenize. Plain calls, one process.

Knows nothing of processes, except that `TextLimits` is told before a template runs and before a
text is tokenized.
"""

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import msgspec

from core.errors import RequestError
from core.interfaces.text import (
    MAX_TOKENIZED,
    BodyParts,
    ChatText,
    IdsToText,
    PromptTexts,
    SplitBody,
    TextJob,
    TokenList,
    TokensJson,
)
from core.interfaces.tokenizer import Tokenizer

_OWN_VARIABLES = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
_encode_json = msgspec.json.Encoder().encode


class PackedPrompt(msgspec.Struct, kw_only=True):
    """core.interfaces.text.Prompt with its ids as four bytes each."""

    num_tokens: int
    ids: bytes = b""
    at_least: bool = False
    text: str | None = None
    is_open: bool = False
    offsets: bytes | None = None  # four bytes each


class TextLimits(Protocol):
    """Bounds of the work inside the `with` block."""

    def rendering(self) -> AbstractContextManager[None]: ...

    def tokenizing(self, num_characters: int) -> AbstractContextManager[None]: ...


class NoLimits:
    """For a process that nobody waits for."""

    def rendering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tokenizing(self, num_characters: int) -> AbstractContextManager[None]:
        return nullcontext()


class TextJobs:
    """Does jobs with one tokenizer, one after the other. All raise RequestError."""

    def __init__(self, tokenizer: Tokenizer, limits: TextLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    def run(self, job: TextJob) -> list[PackedPrompt] | TokensJson | BodyParts | bytes:
        try:
            if isinstance(job, ChatText):
                return [self._chat(job)]
            if isinstance(job, PromptTexts):
                return self._prompts(job)
            if isinstance(job, TokenList):
                return self._token_list(job)
            if isinstance(job, SplitBody):
                with self._limits.rendering():
                    return _split_body(job)
            return self._detokenize(job)
        except MemoryError as error:
            raise RequestError(
                "rendering or tokenizing this takes more memory than a request may have",
                code="too_large",
            ) from error

    def _chat(self, job: ChatText) -> PackedPrompt:
        tokenizer = self._tokenizer
        with self._limits.rendering():
            messages = _parse(job.messages, "messages")
            tools = _tools(job)
            variables = _variables(job)
            size = tokenizer.check_chat(messages, tools)
            least = self._least_tokens(size)
            if least > job.max_tokens:
                return PackedPrompt(num_tokens=least, at_least=True)
            text = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=job.add_generation_prompt,
                continue_final_message=job.continue_final_message,
                **(job.defaults | variables),
            )
        return self._encode(_whole(text), job.add_special_tokens, job.max_tokens)

    def _prompts(self, job: PromptTexts) -> list[PackedPrompt]:
        found = []
        for prompt in _split(_parse(job.prompt, "prompt"), job):
            if isinstance(prompt, str):
                packed = self._encode(prompt, job.add_special_tokens, job.max_tokens)
                packed.text = prompt if job.echo else None
                if job.offsets and packed.ids:
                    packed.offsets = self._offsets(prompt, packed.ids, job.add_special_tokens)
            else:
                packed = _pack(prompt, job.max_tokens)
                if job.echo and packed.ids:
                    packed.text, packed.is_open = self._tokenizer.decode_open(prompt)
            found.append(packed)
        return found

    def _offsets(self, text: str, packed_ids: bytes, add_special_tokens: bool) -> bytes | None:
        """Where tokens begin in a text that the tokenizer changed; None where it did not."""
        ids = array("I", packed_ids).tolist()
        with self._limits.tokenizing(len(text)):
            if text in self._tokenizer.decode(ids, skip_special_tokens=False):
                return None
            offsets = self._tokenizer.offsets(text, add_special_tokens=add_special_tokens)
        return array("I", offsets).tobytes()

    def _token_list(self, job: TokenList) -> TokensJson:
        source = job.source
        prompts = [self._chat(source)] if isinstance(source, ChatText) else self._prompts(source)
        prompt = prompts[0]
        if prompt.num_tokens > MAX_TOKENIZED:
            least = "at least " if prompt.at_least else ""
            raise RequestError(
                f"this has {least}{prompt.num_tokens} tokens; allowed here: {MAX_TOKENIZED}",
                param="prompt",
                code="out_of_range",
            )
        ids = array("I", prompt.ids).tolist()
        texts = [self._tokenizer.token_text(i) for i in ids] if job.strings else None
        return TokensJson(
            num_tokens=len(ids), tokens=_encode_json(ids), strings=_encode_json(texts)
        )

    def _detokenize(self, job: IdsToText) -> bytes:
        token_ids = _parse(job.tokens, "tokens")
        if not isinstance(token_ids, list):
            raise RequestError(
                f"tokens: expected array, got {_kind(token_ids)}",
                param="tokens",
                code="invalid_type",
            )
        if len(token_ids) > MAX_TOKENIZED:
            raise RequestError(
                f"tokens has {len(token_ids)} entries; allowed: 0 to {MAX_TOKENIZED}",
                param="tokens",
                code="out_of_range",
            )
        _check_ids(token_ids, "tokens", job.vocab_size)
        return _encode_json(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _least_tokens(self, num_characters: int) -> int:
        return num_characters // max(self._tokenizer.max_token_characters, 1)

    def _encode(self, text: str, add_special_tokens: bool, max_tokens: int) -> PackedPrompt:
        least = self._least_tokens(len(text))
        if least > max_tokens:
            return PackedPrompt(num_tokens=least, at_least=True)
        with self._limits.tokenizing(len(text)):
            return _pack(
                self._tokenizer.encode(text, add_special_tokens=add_special_tokens), max_tokens
            )


def _split_body(job: SplitBody) -> BodyParts:
    try:
        fields = msgspec.json.decode(job.body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise RequestError(
            "the body: expected object, got array or value", code="invalid_type"
        ) from error
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    texts = {name: bytes(fields.pop(name)) for name in job.text_fields if name in fields}
    rest = {name: msgspec.Raw(b"null") for name in texts}
    rest |= {n: _short(n, fields.pop(n), job) for n in job.known_fields if n in fields}
    if sum(len(n) + len(bytes(raw)) for n, raw in fields.items()) > job.max_unknown_bytes:
        fields = {job.unnamed: msgspec.Raw(b"0")}  # there may be a million
    rest |= dict.fromkeys(fields, msgspec.Raw(b"0"))
    return BodyParts(rest=_encode_json(rest), texts=texts)


def _short(name: str, raw: msgspec.Raw, job: SplitBody) -> msgspec.Raw:
    """A known field's value, unless it is longer than allowed."""
    size = len(bytes(raw))
    if size <= job.max_field_bytes:
        return raw
    if name in job.ignored_fields:
        return msgspec.Raw(b"{}")
    raise RequestError(
        f"{name} takes {size} bytes; allowed: {job.max_field_bytes}",
        param=name,
        code="out_of_range",
    )


def _pack(token_ids: Sequence[int], max_tokens: int) -> PackedPrompt:
    if len(token_ids) > max_tokens:
        return PackedPrompt(num_tokens=len(token_ids))
    return PackedPrompt(num_tokens=len(token_ids), ids=array("I", token_ids).tobytes())


def _parse(raw: bytes, param: str) -> Any:
    """The value of a field that the event loop left as it came."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise RequestError(f"{param} is not valid JSON: {error}", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{param} is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError(f"{param} is nested too deeply", code="invalid_json") from error


def _whole(text: str) -> str:
    """Without halves of surrogate pairs, which JSON in tool arguments may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _tools(job: ChatText) -> list[dict[str, Any]] | None:
    """Descriptions of tools, under their name or the older one of functions."""
    for param, raw in (("tools", job.tools), ("functions", job.functions)):
        found = _parse(raw, param)
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise RequestError(
                f"{param}: expected array of objects", param=param, code="invalid_type"
            )
        if found and param == "functions":
            return [{"type": "function", "function": one} for one in found]
        if found:
            return found
    return None


def _variables(job: ChatText) -> dict[str, Any]:
    param = "chat_template_kwargs"
    variables = _parse(job.variables, param)
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise RequestError(
            f"{param}: expected object, got {_kind(variables)}", param=param, code="invalid_type"
        )
    for name in _OWN_VARIABLES & variables.keys():
        raise RequestError(f"{param} may not set {name!r}", param=param)
    return variables


def _split(prompt: Any, job: PromptTexts) -> list[str | list[int]]:
    """The prompts of a body: one text, texts, one list of ids, or lists of ids; null is an empty
    text."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if not isinstance(prompt, list):
        raise RequestError(
            f"prompt: expected str or array, got {_kind(prompt)}",
            param="prompt",
            code="invalid_type",
        )
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt", code="empty_prompt")
    if isinstance(prompt[0], int):
        _check_ids(prompt, "prompt", job.vocab_size)
        return [prompt]
    if len(prompt) > job.max_prompts:
        raise RequestError(
            f"prompt has {len(prompt)} prompts; allowed: 1 to {job.max_prompts}",
            param="prompt",
            code="out_of_range",
        )
    kind = type(prompt[0])
    if kind not in (str, list) or not all(type(one) is kind for one in prompt):
        raise RequestError(
            "prompt must be text, a list of texts, a list of token ids, or a list of those",
            param="prompt",
            code="invalid_type",
        )
    if kind is list:
        for token_ids in prompt:
            _check_ids(token_ids, "prompt", job.vocab_size)
    return prompt


def _check_ids(token_ids: list[Any], param: str, vocab_size: int) -> None:
    """Raise RequestError unless all are integers of the vocabulary."""
    if not token_ids:
        return
    if set(map(type, token_ids)) != {int}:
        other = next(one for one in token_ids if type(one) is not int)
        raise RequestError(
            f"{param} must hold integers only: expected int, got {_kind(other)}",
            param=param,
            code="invalid_type",
        )
    least, most = min(token_ids), max(token_ids)
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        shown = f" ({wrong})" if abs(wrong) < 10**18 else ""
        raise RequestError(
            f"{param} holds a token id{shown} outside the vocabulary; "
            f"allowed: 0 to {vocab_size - 1}",
            param=param,
            code="out_of_range",
        )


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    names = {dict: "object", list: "array", str: "str", bool: "bool", int: "int", float: "float"}
    return names.get(type(value), "nothing")
