"""What the kernel says of a process: whether it runs, is stopped, or is on its way out.

Reads /proc; where there is none it knows nothing.
https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
"""

import signal
from pathlib import Path

PROC = Path("/proc")
_PF_EXITING = 0x4  # <linux/sched.h>
_FLAGS, _EXIT_CODE = 9 - 3, 52 - 3  # fields of stat, counted from the state


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does ("R", "S", "T": stopped); "" where it can't be
    told."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def end_under_way(pid: int) -> tuple[bool, int | None]:
    """Whether a process has begun to end, and what its exit status will be, as far as that can be
    told: as `subprocess` puts it, negative where a signal ended it.

    A process with much memory, or with a GPU, takes seconds from a SIGKILL to the moment when its
    parent hears of it; its files are closed somewhere in between.
    """
    fields = _stat(pid)
    if fields is None:
        return False, None
    ended = fields[0] in "ZX"
    if ended or int(fields[_FLAGS]) & _PF_EXITING:
        code = int(fields[_EXIT_CODE])
        if not (code or ended):  # not written yet, or indeed 0
            return True, None
        return True, -(code & 0x7F) if code & 0x7F else code >> 8
    return (True, -signal.SIGKILL) if _is_being_killed(pid) else (False, None)


def _stat(pid: int) -> list[str] | None:
    try:
        stat = (PROC / f"{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # it is gone, or this is no Linux
        return None
    return stat.rpartition(")")[2].split()


def _is_being_killed(pid: int) -> bool:
    """Whether a SIGKILL waits for it to come out of the kernel, where a driver may keep it."""
    try:
        lines = (PROC / f"{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    pending = [line.split()[1] for line in lines.splitlines() if line[:7] in ("SigPnd:", "ShdPnd:")]
    return any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)
