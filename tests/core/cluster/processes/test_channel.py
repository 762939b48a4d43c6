"""The child's end of the pipes, with a test as its parent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import errors
from core.cluster.processes.channel import failure_exit_code, failure_kind

ROOT = Path(__file__).parents[4]
START = (
    "import os, sys\nfrom core.cluster.processes.channel import Channel\nchannel = Channel.open()\n"
)


class Parent:
    """Starts a child that runs `code` with an open channel."""

    def __init__(self, code: str) -> None:
        self.status_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_fd,),
            env=os.environ | {"NODEWEAVE_STATUS_FD": str(write_fd)},
        )
        os.close(write_fd)

    def end(self, text: str = "") -> tuple[int, list[dict[str, object]], str, str]:
        """Write the rest of the child's input and wait: status, messages, stdout, stderr."""
        out, err = self.process.communicate(text.encode(), timeout=30)
        with os.fdopen(self.status_fd) as file:
            messages = [json.loads(line) for line in file]
        return self.process.returncode, messages, out.decode(), err.decode()


def test_boot_line_then_messages_then_the_end() -> None:
    code = """
import threading
from core.interfaces.control import Progress
ended = threading.Event()
seen = []
print(channel.boot_line())
channel.listen(lambda message: ended.set() if message is None else seen.append(message))
ended.wait(20)
print(seen)
channel.send(Progress("x", 1, 2, "B"))
"""
    text = '{"boot": 1}\n{"type":"Drain","grace_s":2.5}\n{"type":"EngineDied","cause":"c"}\n'
    status, messages, out, err = Parent(code).end(text)
    assert (status, err) == (0, "")
    boot, seen = out.splitlines()
    assert boot == "b'{\"boot\": 1}'"
    assert seen == "[Drain(grace_s=2.5), EngineDied(cause='c')]"
    assert messages == [{"type": "Progress", "task": "x", "done": 1, "total": 2, "unit": "B"}]


def test_the_end_of_input_ends_a_busy_process() -> None:
    code = "channel.boot_line(); print('x'); channel.exit_at_end()\nwhile True: pass"
    assert Parent(code).end("{}\n") == (0, [], "x\n", "")


def test_a_parent_that_is_gone_before_the_boot_line() -> None:
    assert Parent("channel.boot_line(); print('never')").end("{") == (1, [], "", "")


def test_standard_input_is_not_left_to_others() -> None:
    code = "import subprocess; print(sys.stdin.read() + subprocess.getoutput('cat') + '.')"
    assert Parent(code).end("secret\n") == (0, [], ".\n", "")


def test_lines_from_many_threads_stay_whole() -> None:
    code = """
import threading
from core.interfaces.control import Progress
def work(number):
    for step in range(10):
        channel.send(Progress(str(number) * 200_000, step, 10, "B"))
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    parent = Parent(code)
    with os.fdopen(os.dup(parent.status_fd)) as file:
        messages = [json.loads(line) for line in file]
    assert parent.end()[0] == 0
    assert len(messages) == 40
    assert {message["task"] for message in messages} == {str(n) * 200_000 for n in range(4)}


def test_failures_carry_their_kind_and_status() -> None:
    code = """
from core.errors import PlanError
try:
    raise PlanError(["parallel.tp=7 is wrong"])
except PlanError as error:
    sys.exit(channel.report_failure(error))
"""
    text = "the plan does not fit:\n  - parallel.tp=7 is wrong"
    failed = {"type": "Failed", "kind": "PlanError", "message": text}
    assert Parent(code).end() == (2, [failed], "", "")


def test_a_failing_handler_ends_the_process() -> None:
    code = "import time\nchannel.listen(lambda message: 1 / 0)\nwhile True: time.sleep(1)"
    status, messages, _, err = Parent(code).end('{"type":"Drain","grace_s":1}\n')
    assert (status, err) == (1, "")
    assert messages[0]["kind"] == "internal"
    assert str(messages[0]["message"]).endswith("ZeroDivisionError: division by zero")


def test_a_process_without_supervisor_says_how_it_is_started() -> None:
    result = subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True)
    assert result.returncode == 1
    assert b"ConfigError: this process is started by `python -m core.run`" in result.stderr


class ThirdPartyError(errors.ModelError):
    """An error class of a plugin."""


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (errors.ConfigError("x"), "ConfigError", 2),
        (errors.WorkerDied("x"), "WorkerDied", 1),
        (ThirdPartyError("x"), "ModelError", 2),
        (ValueError("x"), "internal", 1),
    ],
)
def test_kinds_and_exit_statuses(error: Exception, kind: str, exit_code: int) -> None:
    assert failure_kind(error) == kind
    assert failure_exit_code(kind) == exit_code


def test_a_made_up_kind_is_an_internal_error() -> None:
    for kind in ("Sequence", "__name__", "nothing"):
        assert failure_exit_code(kind) == 1


def test_beats_say_what_is_counted_until_the_end() -> None:
    code = """
import itertools, threading
count = itertools.count(1)
enough = threading.Event()
from core.interfaces.control import Heartbeat
def heartbeat():
    launched = next(count)
    if launched == 3:
        enough.set()
    return Heartbeat(launched, launched - 1)
channel.heartbeat(heartbeat)
enough.wait(20)
"""
    status, messages, _, err = Parent(code).end()
    assert (status, err) == (0, "")
    rest = {"pieces": 0, "cpu_s": 0.0, "expected_s": 0.0}
    heartbeats = [
        {"type": "Heartbeat", "launched": n, "finished": n - 1, **rest} for n in (1, 2, 3)
    ]
    assert messages[:2] == heartbeats[:2]  # the third may be cut off by the end
