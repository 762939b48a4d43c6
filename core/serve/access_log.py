"""One line for each request, as text or as JSON. Knows nothing of connections.

Lines go through a bounded queue to a thread (core.cluster.processes.log_stream): a disk that is
full or a pipe that nobody reads costs lines, which are counted, and neither time nor memory.
"""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from core.errors import ConfigError
from core.interfaces.http import RequestRecord
from core.settings.config import FrontendConfig

MAX_PATH_CHARACTERS = 256
_STDOUT = 1

AccessLog = Callable[[RequestRecord], None]


class Writer(Protocol):
    """Takes a line for a descriptor, at once and without an error (`LogWriter`)."""

    def write(self, fd: int, data: bytes) -> None: ...

    def tell_losses(self, fd: int, notice: Callable[[int, str], bytes]) -> None:
        """How a line says that so many lines were lost, and why."""
        ...


def access_log(config: FrontendConfig, writer: Writer) -> AccessLog:
    """What is called with each request that ended. Raises ConfigError for a file that can't be
    opened. The file is appended to, so that it can be truncated under way (logrotate's
    copytruncate)."""
    if config.access_log == "off":
        return lambda record: None
    form = json_line if config.access_log == "json" else text_line
    fd = _STDOUT
    if config.access_log_file is not None:
        try:
            fd = os.open(config.access_log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        except OSError as error:
            raise ConfigError(
                f"frontend.access_log_file={config.access_log_file!r} can't be written: "
                f"{error.strerror}"
            ) from error

    if config.access_log == "json":
        writer.tell_losses(fd, json_notice)

    def log(record: RequestRecord) -> None:
        if not record.is_own or record.status >= 400:  # those are asked for all day
            writer.write(fd, form(record, time.time()))

    return log


def json_line(record: RequestRecord, ended_s: float) -> bytes:
    """A JSON object with every field of `record` that is told, null where nothing is known.
    `ended_s` in Unix seconds."""
    fields = {
        "time": _iso(ended_s),
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        "path": record.path[:MAX_PATH_CHARACTERS],
        "route": record.route,
        "status": record.status,
        "code": record.code or None,
        "answer_id": record.answer_id or None,
        "finish_reason": record.finish_reason or None,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "first_byte_s": _rounded(record.first_byte_s),
        "first_token_s": _rounded(record.first_token_s),
        "duration_s": _rounded(record.duration_s),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
    }
    return msgspec.json.encode(fields) + b"\n"


def json_notice(lines: int, reason: str) -> bytes:
    """In the place of lines that could not be written."""
    fields = {"time": _iso(time.time()), "dropped_lines": lines, "reason": reason}
    return msgspec.json.encode(fields) + b"\n"


def text_line(record: RequestRecord, ended_s: float) -> bytes:
    """`TIME CLIENT "METHOD PATH" STATUS DURATIONs name=value ...`, of what is known. `ended_s` in
    Unix seconds."""
    path = quote(record.path[:MAX_PATH_CHARACTERS], safe="/:@!$&'()*+,;=~")
    known: dict[str, Any] = {
        "id": record.request_id,
        "answer": record.answer_id,
        "prompt": record.prompt_tokens,
        "cached": record.cached_tokens,
        "completion": record.completion_tokens,
        "first_token": _seconds(record.first_token_s),
        "finish": record.finish_reason,
        "code": record.code,
    }
    told = " ".join(f"{name}={value}" for name, value in known.items() if value not in (None, ""))
    return (
        f'{_iso(ended_s)} {record.client} "{record.method} {path}" {record.status} '
        f"{record.duration_s:.3f}s {told}\n"
    ).encode()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.3f}s"
