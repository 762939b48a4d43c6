"""What a body may say of sampling, and what becomes of fields that a route does not have.

Fields have OpenAI's names, and those of other engines beyond; every one may be null. A frontend's
own struct inherits `SamplingFields`, or fills one from fields of other names. Knows nothing of
limits (`core.frontend.sampling`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from core.errors import RequestError
from core.frontend.errors import MAX_NAME_CHARACTERS

HEADER = b"x-nodeweave-ignored-fields"
MAX_NAMED = 16  # fields in the header; more are a "..." at its end
UNNAMED = "..."  # fields whose names are not told
_ASKS_NOTHING = (b"null", b"false", b"[]", b'""')


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How answers are sampled, and where they end."""

    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    logits_processors: dict[str, dict[str, Any]] | None = None  # by name: its parameters
    # Beyond OpenAI, named as in other engines.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    priority: int | None = None  # the lower, the sooner a waiting request is begun


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """What becomes of the fields of a route beside those that do something.

    A field that is not known is ignored and named in a response header, as long as the answer is
    still one that the client can use; where it would not be (a format it parses, a filter it relies
    on, a prompt it sent elsewhere), it is refused by name.
    """

    # Known fields of type msgspec.Raw that change no answer.
    without_effect: tuple[str, ...] = ()
    # Those of them that are reported -> the JSON that asks for nothing, besides null.
    reported: Mapping[str, bytes] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # unknown -> why, what to do instead
    # Known fields that are objects: their own unknown fields are ignored as well.
    objects: Mapping[str, type[msgspec.Struct]] = field(default_factory=dict)

    def check_refused(self, unknown: Mapping[str, msgspec.Raw]) -> None:
        """Raise RequestError for a field without which the answer would be of no use."""
        for name, value in unknown.items():
            reason = self.refused.get(name)
            if reason is not None and bytes(value) not in _ASKS_NOTHING:
                raise RequestError(
                    f"{name} is not supported: {reason}", param=name, code="unsupported"
                )


def header_value(names: Iterable[str]) -> bytes:
    """Names with commas between them, of a bounded length, with nothing that ends a header."""
    names = list(names)
    shown = [_printable(name) for name in names[:MAX_NAMED]]
    return ", ".join([*shown, UNNAMED] if len(names) > MAX_NAMED else shown).encode()


def _printable(name: str) -> str:
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name)
    return clean[:MAX_NAME_CHARACTERS] or "?"
