"""Files that come from strangers, opened so that none stalls this process or fills its memory.

Only regular files are read: a pipe would be waited for, a device never ends. Knows nothing of what
the files hold.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from core.errors import ModelError

MAX_JSON_BYTES = 64 << 20  # of a config; tokenizer.json and an index have limits of their own
MAX_TEMPLATE_BYTES = 4 << 20  # of a chat template; published ones have some 20 KB
MAX_DEPTH = 64  # of JSON objects and lists in each other
_LARGEST_INT = 1 << 63
_FETCH = "repair it, or fetch it again"
# What other programs write into JSON, by what it begins with.
_NO_JSON = {
    b"NaN": "NaN is no JSON; allowed: null, or the key left out",
    b"Infinity": "Infinity is no JSON; allowed: a number, null, or the key left out",
    b"\xef\xbb\xbf": "it begins with a byte order mark; save it as UTF-8 without one",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<": "it looks like a web page; fetch the file itself",
}
_T = TypeVar("_T")

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(path: str | Path) -> int:
    """A descriptor to read a regular file with; the caller closes it. Never waits. Raises
    ModelError for what is no such file or can't be read."""
    try:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise ModelError(f"can't read {str(path)!r}: {error}") from error
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise ModelError(f"can't read {path}: it is {kind}; needed: a regular file")


def read_plain(path: str | Path, max_bytes: int) -> bytes:
    """The contents of a regular file. Raises ModelError where it is larger than `max_bytes`."""
    with open(open_plain(path), "rb") as file:
        try:
            num_bytes = os.fstat(file.fileno()).st_size
            content = file.read(max_bytes + 1) if num_bytes <= max_bytes else b""
        except OSError as error:
            raise ModelError(f"can't read {path}: {error.strerror}") from error
    if num_bytes > max_bytes or len(content) > max_bytes:
        raise ModelError(f"{path} has {num_bytes} bytes; allowed: up to {max_bytes}")
    return content


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError that names the file."""
    return decode_json(path, read_plain(path, max_bytes), dict[str, Any])


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file, of values that other processes can be told. Raises ModelError that
    names the file, and the key where one has another value."""
    content = read_json(path)
    for key, value in content.items():
        _check_value(path, key, value)
    return content


def decode_json(path: Path, content: bytes, kind: type[_T]) -> _T:
    """`content` as JSON of that type. Raises ModelError naming the file."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        words = _json_words(content, str(error))
        raise ModelError(f"{path} is not a JSON object: {words}") from error
    except RecursionError as error:
        raise ModelError(f"{path} is not a JSON object: nested too deeply; {_FETCH}") from error


def _json_words(content: bytes, error: str) -> str:
    """What is wrong with a JSON file, where, and what to do."""
    found = re.search(r" \(byte (\d+)\)$", error)
    at = int(found[1]) if found else 0
    # A number is begun before the decoder knows that it is none.
    starts = [content[max(0, at - back) : at + 32] for back in (0, 1)]
    line = content[:at].count(b"\n") + 1
    place = f" (line {line})" if at else ""
    for beginning, words in _NO_JSON.items():
        if any(start.startswith(beginning) for start in starts):
            return words.replace(" is no JSON", f"{place} is no JSON")
    if not content.strip():
        return f"it is empty; {_FETCH}"
    return f"{error[: found.start() if found else None]}{place}; {_FETCH}"


def _check_value(path: Path, key: str, value: object) -> None:
    """Raise ModelError for numbers that other processes could not be told, and deep nesting."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ModelError(f"{path}: {key[:100]} is nested deeper than {MAX_DEPTH} levels")
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, int) and not -_LARGEST_INT <= item < _LARGEST_INT:
                raise ModelError(
                    f"{path}: {key[:100]} holds a number of more than 64 bits; allowed: from "
                    "-2**63 to 2**63 - 1"
                )
        level = below
