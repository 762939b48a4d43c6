"""Fields of a body that this server does not have: which are ignored, and which refused.

Clients of many servers send fields of all of them. A field that is unknown is ignored and named in
a response header, as long as the answer is still one that the client can use; where it would not
be (a format it parses, a filter it relies on, a prompt it sent elsewhere), it is refused by name.

Knows nothing of what the known fields mean.
"""

from collections.abc import Iterable, Mapping

import msgspec

from core.errors import RequestError

HEADER = b"x-nodeweave-ignored-fields"
MAX_NAMED = 16  # fields in the header; more are a "..." at its end
MAX_NAME_CHARACTERS = 64
UNNAMED = "..."  # fields whose names are not told

_FORMAT = "the answer would not be in the form that is asked for"
_PROMPT = "write what it says into the messages or the prompt"
REFUSED = {  # field -> why, and what to do instead
    # Structured output: vLLM's names, SGLang's, llama.cpp's.
    "structured_outputs": _FORMAT, "guided_json": _FORMAT, "guided_regex": _FORMAT,
    "guided_choice": _FORMAT, "guided_grammar": _FORMAT, "structural_tag": _FORMAT,
    "regex": _FORMAT, "ebnf": _FORMAT, "json_schema": _FORMAT, "grammar": _FORMAT,
    # What may be generated, and where it ends.
    "bad_words": "use logit_bias with -100 for single tokens",
    "stop_regex": "use stop, with strings",
    "custom_logit_processor": "name one that a plugin registers in logits_processors",
    "use_beam_search": "answers are sampled; use n",
    # What the answer follows.
    "chat_template": "a request never brings a template; the checkpoint's is used",
    "documents": "give them in chat_template_kwargs where the template reads them, or in messages",
    "session_params": _PROMPT,
    "truncate_prompt_tokens": "shorten the prompt; /tokenize counts its tokens",
    "input_ids": "send them as prompt to /v1/completions",
    "input_embeds": "send text or token ids", "prompt_embeds": "send text or token ids",
    # Another model, and who may share a cache.
    "lora_path": "this server has no adapters", "lora": "this server has no adapters",
    "cache_salt": "the prefix cache is shared; engine.disable_prefix_cache=true turns it off",
}  # fmt: skip
_ASKS_NOTHING = (b"null", b"false", b"[]", b'""')


def check_refused(unknown: Mapping[str, msgspec.Raw]) -> None:
    """Raise RequestError for a field without which the answer would be of no use."""
    for name, value in unknown.items():
        reason = REFUSED.get(name)
        if reason is not None and bytes(value) not in _ASKS_NOTHING:
            raise RequestError(f"{name} is not supported: {reason}", param=name, code="unsupported")


def header_value(names: Iterable[str]) -> bytes:
    """Names with commas between them, of a bounded length, with nothing that ends a header."""
    names = list(names)
    shown = [_printable(name) for name in names[:MAX_NAMED]]
    return ", ".join([*shown, UNNAMED] if len(names) > MAX_NAMED else shown).encode()


def _printable(name: str) -> str:
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name)
    return clean[:MAX_NAME_CHARACTERS] or "?"
