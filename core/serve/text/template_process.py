"""Starts and ends the template process of the text service, and says what a worker's end means.

Blocks, and knows nothing of the event loop, of jobs or of who waits for them.
"""

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import msgspec

from core import errors
from core.errors import ModelError, RequestError
from core.serve.text.process import (
    BUILDING_SIGNAL,
    RENDERING_SIGNAL,
    TOKENIZING_SIGNAL,
    BuildFailed,
    TemplateStatus,
    TextBoot,
    read_frame,
    send_frame,
)


def start_process(boot: TextBoot) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A template process that has built everything. Blocks meanwhile."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.serve.text.process", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # One text is one thread's work; a pool of threads would not survive the fork.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
    finally:
        theirs.close()
    send_frame(ours, msgspec.msgpack.encode(boot))
    frame = read_frame(ours)
    status = None if frame is None else msgspec.msgpack.decode(frame, type=TemplateStatus)
    if status is None or isinstance(status, BuildFailed):
        ours.close()
        code = process.wait()
        raise _build_error(status, code, boot)
    return process, ours


def _build_error(status: BuildFailed | None, code: int, boot: TextBoot) -> Exception:
    if status is not None:
        kind: Any = getattr(errors, status.kind, ModelError)
        return kind(status.message) if kind is ModelError else ModelError(status.message)
    if code == -BUILDING_SIGNAL:
        why = f"takes more than {boot.building_s:.0f} s of CPU time"
    else:
        why = f"ended its process with {code}; it may need more memory than is allowed"
    return ModelError(f"building the tokenizer and chat template in {boot.folder} {why}")


def end_process(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0)
    except subprocess.TimeoutExpired:
        process.kill()  # its pipes are closed: it was about to end
        process.wait()


def error_of(ended_by: int, boot: TextBoot) -> RequestError:
    """What a signal that ended a worker says about its job."""
    if ended_by == RENDERING_SIGNAL:
        return RequestError(
            f"the chat template took more than {boot.rendering_s} s of CPU time for these messages",
            param="messages",
            code="template_limit",
        )
    if ended_by == TOKENIZING_SIGNAL:
        return RequestError(
            "the tokenizer took more CPU time for this text than a request may have "
            f"({boot.tokenizing_s} s and {boot.tokenizing_s_per_million} s a million characters)",
            code="tokenizer_limit",
        )
    if ended_by == signal.SIGKILL:
        return RequestError(
            "the process that rendered and tokenized this was killed; try again later",
            code="text_busy",
            status=503,
        )
    return RequestError(
        "rendering or tokenizing this ended its process: it takes more memory than a request may "
        "have, or the library fails on it",
        code="too_large",
    )
