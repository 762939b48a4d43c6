"""What a request asks of logits processors, checked where requests are admitted.

A worker trusts what it is sent. Knows nothing of HTTP, and of processors only their kinds.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from core.errors import RequestError
from core.interfaces.sampling import LogitsProcessorKind, read_params

FIELD = "logits_processors"
MAX_BYTES = 256 * 1024  # of all parameters of a request, as they are sent to the ranks
MAX_NAME_CHARACTERS = 64  # shown of a name that is not there


def check_processors(asked: Any, kinds: Mapping[str, LogitsProcessorKind], vocab_size: int) -> None:
    """Raise RequestError (status 400) unless every processor that is named is there and takes the
    parameters given."""
    if type(asked) is not dict or not all(type(given) is dict for given in asked.values()):
        raise RequestError(
            f"{FIELD} must be an object of objects: the parameters of each processor by its name",
            param=FIELD,
            code="invalid_type",
        )
    if not asked:
        return
    for name in asked:
        if name not in kinds:
            raise RequestError(
                f"there is no logits processor {str(name)[:MAX_NAME_CHARACTERS]!r}; this server "
                f"has: {', '.join(sorted(kinds)) or 'none'}",
                param=FIELD,
                code="unsupported",
            )
    _check_size(asked)
    for name, given in asked.items():
        try:
            kinds[name].check(read_params(kinds[name], given), vocab_size)
        except ValueError as error:
            raise RequestError(
                f"{FIELD}.{name}: {error}", param=f"{FIELD}.{name}", code="invalid_value"
            ) from error


def _check_size(asked: dict[str, Any]) -> None:
    try:
        num_bytes = len(msgspec.msgpack.encode(asked))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(
            f"{FIELD} can't be sent: {error}; allowed: what JSON has, and numbers of 64 bits",
            param=FIELD,
            code="invalid_type",
        ) from error
    if num_bytes > MAX_BYTES:
        raise RequestError(
            f"{FIELD} has {num_bytes} bytes; allowed: 0 to {MAX_BYTES}",
            param=FIELD,
            code="out_of_range",
        )
