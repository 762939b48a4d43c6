"""Finds processes that live but don't move: stopped by a signal, silent, or stuck in a step.

Looks only; `core.cluster.processes.supervisor` acts. It also sees whether the kernel is at ending
one, which may take long before the parent hears of it. A worker tells some times a second how far
its steps are (`Channel.heartbeat`, `core.cluster.processes.motion`); that needs Python's lock now
and then, so that on a machine with too much to do heartbeats come late, and silence must be long to
count. A process that is stopped is told apart by the kernel's word, which needs no patience. Only
time in which this watcher ran itself counts: where both were paused (`docker pause`), nobody is to
blame.
"""

import time
from collections.abc import Sequence

from core.cluster.processes.process import Child
from core.cluster.processes.process_stat import process_state
from core.cluster.processes.watch_clock import WatchClock

LOOK_S = 0.25  # between two looks
LONGEST_GAP_S = 1.0  # between two looks, as far as it counts against those who are watched
STOPPED_S = 0.75  # in the stopped state, before that counts as lasting
SILENT_S = 15.0  # without a heartbeat, after the first


class Watchdog:
    """Watches the processes of one node."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._next_look_s = 0.0
        self._clock = WatchClock(longest_gap_s=LONGEST_GAP_S)
        self._stopped_since: dict[int, float] = {}  # by process id

    @property
    def pause_s(self) -> float:
        """Until `look` has something to do."""
        return max(self._next_look_s - time.monotonic(), 0.0)

    def look(self, children: Sequence[Child]) -> float:
        """Set `frozen` of children that are. Call after what they said was read.

        Returns the time (s) since the last look that does not count: this process did not run.
        """
        now = time.monotonic()
        if now < self._next_look_s:
            return 0.0
        self._next_look_s = now + LOOK_S
        living = [child for child in children if child.returncode is None]
        paused_s = self._clock.tick()
        if paused_s:
            for child in living:
                child.forgive(paused_s)
            self._stopped_since.clear()
        for child in living:
            child.look_whether_ending()
            self._look_at_state(child, now)
            heard_s = child.heartbeat_s
            if heard_s is not None and now - heard_s >= SILENT_S:
                child.frozen = f"is frozen: it said nothing for {now - heard_s:.0f} s"
        if not any(child.frozen for child in living):
            self._look_for_stuck_step(living, now)
        return paused_s

    def _look_at_state(self, child: Child, now: float) -> None:
        if process_state(child.pid) != "T":
            self._stopped_since.pop(child.pid, None)
            return
        since = self._stopped_since.setdefault(child.pid, now)
        if now - since >= STOPPED_S:
            child.frozen = "is frozen: it was stopped by a signal (SIGSTOP)"

    def _look_for_stuck_step(self, living: Sequence[Child], now: float) -> None:
        """Of ranks that wait for each other the one that is behind is the likeliest cause. As long
        as one gets on, the others may be waiting for it."""
        in_step = [child for child in living if child.motion.in_step]
        problems = [child.motion.problem(now, self._step_timeout_s) for child in in_step]
        if in_step and all(problems):
            problem, child = min(
                zip(problems, in_step, strict=True), key=lambda pair: pair[1].motion.behind
            )
            child.frozen = f"is frozen: {problem}"
