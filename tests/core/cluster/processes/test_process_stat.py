"""What is read from /proc, with lines as the kernel writes them and with real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.cluster.processes import process_stat
from core.cluster.processes.process_stat import end_under_way, process_state

EXITING, ORDINARY = 0x4, 0x400000


@pytest.mark.parametrize(
    ("state", "flags", "exit_code", "shared_pending", "expected"),
    [
        ("S", ORDINARY, 0, 0, (False, None)),
        ("S", ORDINARY, 0, 1 << 14, (False, None)),  # SIGTERM waits
        ("D", ORDINARY, 0, 1 << 8, (True, -9)),  # SIGKILL waits, in a driver
        ("D", ORDINARY | EXITING, 9, 0, (True, -9)),
        ("R", ORDINARY | EXITING, 0, 0, (True, None)),  # its code is not written yet
        ("Z", ORDINARY | EXITING, 0, 0, (True, 0)),
        ("Z", ORDINARY | EXITING, 7 << 8, 0, (True, 7)),
        ("Z", ORDINARY | EXITING, 11 | 0x80, 0, (True, -11)),  # with a core
    ],
)
def test_ends_under_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    flags: int,
    exit_code: int,
    shared_pending: int,
    expected: tuple[bool, int | None],
) -> None:
    numbers = ["1"] * 49
    numbers[9 - 4], numbers[52 - 4] = str(flags), str(exit_code)
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "stat").write_text(f"17 (a (b) c) {state} {' '.join(numbers)}\n")
    (tmp_path / "17" / "status").write_text(
        f"Name:\ta\nSigPnd:\t{0:016x}\nShdPnd:\t{shared_pending:016x}\nSigBlk:\t{1 << 8:016x}\n"
    )
    monkeypatch.setattr(process_stat, "PROC", tmp_path)
    assert end_under_way(17) == expected
    assert process_state(17) == state


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os; os._exit(7)", 7),
        ("import os; os._exit(0)", 0),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_the_kernel_says_how_a_process_ended_before_it_is_reaped(code: str, status: int) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert end_under_way(process.pid) == (True, status)
    assert process.wait() == status
    assert end_under_way(process.pid) == (False, None)
    assert end_under_way(os.getpid()) == (False, None)
