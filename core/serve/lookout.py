"""What a frontend watches by itself: its node's workers, and its parent, which may be stopped.

The parent finds everything sooner and knows the cause. But a parent that was stopped (SIGSTOP, a
debugger) tells nobody, and clients would wait for ever for a worker that is gone. Reads /proc;
where there is none it finds nothing.
"""

from collections.abc import Mapping

from core.cluster.processes.process_stat import process_state
from core.cluster.processes.watch_clock import WatchClock

LOOK_S = 0.5  # between two looks
PARENT_FIRST_S = 1.5  # in which a parent that runs would have told it
_GONE = ("Z", "X", "")  # a zombie, as nobody reaps it; reaped, where the parent just went on
_STOPPED = "T"


class Lookout:
    """Used from one thread, which calls `look` every `LOOK_S`."""

    def __init__(self, workers: Mapping[str, int], parent: int, *, parent_limit_s: float) -> None:
        """`workers`: name -> process id. A parent that is stopped for longer than `parent_limit_s`
        counts as lost itself: with several nodes the others have given this one up by then."""
        self._parent = parent
        self._parent_limit_s = parent_limit_s
        self._workers = {name: pid for name, pid in workers.items() if process_state(pid)}
        self._clock = WatchClock(longest_gap_s=2 * LOOK_S)
        self._since_s: dict[int, float] = {}  # by process id: since when it does not run

    def look(self) -> str | None:
        """Why the engine is dead, where it is; one line that may be shown to clients."""
        self._clock.tick()
        for name, pid in self._workers.items():
            state = process_state(pid)
            if self._lasts(pid, state in _GONE or state == _STOPPED, PARENT_FIRST_S):
                what = "is stopped" if state == _STOPPED else "ended"
                return f"{name} (pid {pid}) {what}, and {self._parent_text()}"
        limit_s = self._parent_limit_s
        is_stopped = process_state(self._parent) == _STOPPED
        if self._lasts(self._parent, is_stopped, max(limit_s, PARENT_FIRST_S)):
            return (
                f"the parent process (pid {self._parent}) of node 0 is stopped, and other nodes "
                f"wait for it no longer than {limit_s:g} s (cluster.heartbeat_timeout_s)"
            )
        return None

    def _lasts(self, pid: int, happens: bool, limit_s: float) -> bool:
        if not happens:
            self._since_s.pop(pid, None)
            return False
        return self._clock.now_s - self._since_s.setdefault(pid, self._clock.now_s) >= limit_s

    def _parent_text(self) -> str:
        stopped = process_state(self._parent) == _STOPPED
        return (
            f"the parent process (pid {self._parent}), which should have said so, "
            f"{'is stopped' if stopped else 'does not answer'}"
        )
