"""A request body to the struct of its route, with errors that name what is wrong.

A body is never built whole: fields of type Raw stay as they came, others are bounded. So decoding 8
MiB costs one pass, whatever is in them. Knows nothing of what the fields mean.
"""

import difflib
import functools
import re
import typing
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from core.errors import RequestError
from core.frontend.errors import MAX_NAME_CHARACTERS, shorten
from core.frontend.fields import UNNAMED, FieldRules

T = TypeVar("T", bound=msgspec.Struct)
Fields = dict[str, msgspec.Raw]
SMALL_BODY_BYTES = 64 * 1024  # up to this a body may be taken apart field by field
MAX_FIELD_BYTES = 256 * 1024  # of a field that is not Raw: 16 stop strings fit, escaped
MAX_NAMED_BYTES = 256 * 1024  # of all unknown fields whose names are told
NULL = msgspec.Raw(b"null")
NO_RULES = FieldRules()
_UNKNOWN_FIELD = "Object contains unknown field"
_ABSENT = msgspec.Raw(b"null")  # known by its identity


class Decoded(NamedTuple, Generic[T]):
    """A body, and the names of the fields that were given and have no effect."""

    body: T
    ignored: list[str]


def decode(
    body: bytes, kind: type[T], rules: FieldRules = NO_RULES, *, strict: bool = False
) -> Decoded[T]:
    """A request body as `kind`. Raises RequestError naming the field and what is expected.

    Unknown fields are left out; with `strict` they are errors.
    """
    try:
        decoded, ignored = _decode(body, kind, rules, strict)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind, rules) from error
    except msgspec.DecodeError as error:
        raise _explain_malformed(str(error), body) from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    for name in rules.without_effect:
        raw = getattr(decoded, name)
        if raw is not NULL:
            _check_text(raw)
            if bytes(raw) not in (b"null", rules.reported.get(name, bytes(raw))):
                ignored.append(name)
    return Decoded(decoded, ignored)


def _check_text(raw: msgspec.Raw) -> None:
    """What is not built is not checked either, and a client should hear of broken text."""
    try:
        bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8", code="invalid_json") from error


def _decode(body: bytes, kind: type[T], rules: FieldRules, strict: bool) -> tuple[T, list[str]]:
    is_small = len(body) <= SMALL_BODY_BYTES
    try:
        if is_small:
            return msgspec.json.decode(body, type=kind), []
        return _build(_cut(body, _raw_twin(kind, None)), kind, rules, [])
    except msgspec.ValidationError as error:
        if strict or not str(error).startswith(_UNKNOWN_FIELD):
            raise
    known = set(kind.__struct_fields__)
    fields = _fields(body) if is_small else _cut(body, _raw_twin(kind, tuple(rules.refused)))
    rules.check_refused({name: fields[name] for name in fields.keys() - known})
    if not is_small and _num_bytes_left(body, fields) > MAX_NAMED_BYTES:
        names = [UNNAMED]  # there may be a million
    else:
        names = [name for name in _fields(body) if name not in known]
    try:
        return _build({name: fields[name] for name in fields if name in known}, kind, rules, names)
    except msgspec.ValidationError as error:
        # What is missing may be there under a name that is misspelt.
        raise _explain(str(error), kind, rules, names) from error


def _num_bytes_left(body: bytes, fields: Fields) -> int:
    return len(body) - sum(memoryview(raw).nbytes for raw in fields.values())


def _fields(body: bytes | msgspec.Raw) -> Fields:
    return msgspec.json.decode(body, type=Fields)


def _cut(body: bytes, twin: type[msgspec.Struct]) -> Fields:
    """The fields of a body that `twin` has, none of them built."""
    cut = msgspec.json.decode(body, type=twin)
    found = {name: getattr(cut, name) for name in twin.__struct_fields__}
    return {name: raw for name, raw in found.items() if raw is not _ABSENT}


@functools.cache
def _raw_twin(kind: type[msgspec.Struct], refused: tuple[str, ...] | None) -> type[msgspec.Struct]:
    """A struct with the fields of `kind`, each of them Raw; where unknown ones are allowed (not
    None), with those that are refused besides."""
    names = (*kind.__struct_fields__, *(refused or ()))
    return msgspec.defstruct(
        kind.__name__,
        [(name, msgspec.Raw, _ABSENT) for name in names],
        forbid_unknown_fields=refused is None,
    )


@functools.cache
def _raw_fields(kind: type[msgspec.Struct]) -> frozenset[str]:
    hints = typing.get_type_hints(kind)
    return frozenset(name for name in kind.__struct_fields__ if hints[name] is msgspec.Raw)


def _build(
    fields: Fields, kind: type[T], rules: FieldRules, names: list[str]
) -> tuple[T, list[str]]:
    """The struct of these fields. `names` of what has no effect grow by those of inner fields."""
    long = {name: fields[name] for name in fields if name in _raw_fields(kind)}
    short = {name: fields[name] for name in fields if name not in long}
    for name, raw in short.items():
        if memoryview(raw).nbytes > MAX_FIELD_BYTES:
            raise RequestError(
                f"{name} takes {memoryview(raw).nbytes} bytes; allowed: {MAX_FIELD_BYTES}",
                param=name,
                code="out_of_range",
            )
    if names:
        names = names + _drop_unknown_inner(short, rules)
    decoded = msgspec.json.decode(msgspec.json.encode(short | dict.fromkeys(long, NULL)), type=kind)
    for name, raw in long.items():
        setattr(decoded, name, raw)
    return decoded, names


def _drop_unknown_inner(fields: Fields, rules: FieldRules) -> list[str]:
    """Leave out what objects inside don't have; returns the names."""
    dropped: list[str] = []
    for outer, kind in rules.objects.items():
        if not bytes(fields.get(outer, NULL)).startswith(b"{"):
            continue
        inner = _fields(fields[outer])
        known = {name: raw for name, raw in inner.items() if name in kind.__struct_fields__}
        fields[outer] = msgspec.Raw(msgspec.json.encode(known))
        dropped += [f"{outer}.{name}" for name in inner if name not in known]
    return dropped


def _explain(
    text: str, kind: type[msgspec.Struct], rules: FieldRules, left_out: Sequence[str] = ()
) -> RequestError:
    """A msgspec sentence, "Expected `int`, got `str` - at `$.n`", in our words. `left_out`:
    fields that are not known."""
    message, _, path = text.partition(" - at ")
    found = re.search(r"\$\.?([^`]*)", path)
    param = found.group(1) if found else None
    unknown = re.match(_UNKNOWN_FIELD + r" `(.*)`", message, re.DOTALL)
    if unknown:
        name = str(shorten(unknown.group(1), MAX_NAME_CHARACTERS))
        known = rules.objects.get(param or "", kind).__struct_fields__
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        full = f"{param}.{name}" if param else name
        return RequestError(
            f"Unrecognized request argument supplied: {full}{hint}",
            param=full,
            code="unknown_parameter",
        )
    missing = re.match(r"Object missing required field `(.*)`", message)
    if missing:
        name = missing.group(1)
        close = difflib.get_close_matches(name, left_out[:64], n=1)
        hint = f"; {shorten(close[0], MAX_NAME_CHARACTERS)} is no field" if close else ""
        return RequestError(f"{name} is required{hint}", param=name, code="missing_parameter")
    words = message.replace("`", "").replace("null", "nothing").replace(" | ", " or ")
    words = words[:1].lower() + words[1:]
    subject = param or "the body"
    return RequestError(f"{subject}: {words}", param=param, code="invalid_type")


def _explain_malformed(text: str, body: bytes) -> RequestError:
    position = re.search(r"\(byte (\d+)\)", text)
    if position:
        at = int(position.group(1))
        before = re.search(rb'"(\w{1,64})"\s*:\s*-?[NIa-z]*$', body[max(at - 100, 0) : at + 1])
        if before and re.match(rb"-?(NaN|Infinity)", body[max(at - 1, 0) : at + 9].lstrip(b": ")):
            name = before.group(1).decode()
            return RequestError(
                f"{name} is NaN or infinite; it must be a finite number",
                param=name,
                code="invalid_json",
            )
    return RequestError(f"the body is not valid JSON: {text}", code="invalid_json")
