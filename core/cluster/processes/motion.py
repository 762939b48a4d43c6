"""Whether a worker that is in a step gets anywhere, by its heartbeats. Knows nothing of processes.

Time alone says little: on a machine with too much to do a healthy step takes minutes. A step that
ends, or a piece of one (a layer, some rows of prompt logprobs), is progress. So is CPU time of the
thread that computes, but not for ever: one that spins uses it as well, and is told apart by how
much it used for one piece.
"""

from core.interfaces.control import Heartbeat

# CPU time that counts as a sign of life: more than a thread uses that only wakes to wait again.
ACTIVE_CPU_S = 0.25
PATIENCE = 10.0  # times what the whole step is expected to take, for one piece of it


class Motion:
    """What the heartbeats of one worker came to. Times are those of the watcher's clock."""

    def __init__(self, now_s: float) -> None:
        self.heartbeat: Heartbeat | None = None  # the last one
        self._active_s = now_s  # when it last showed any sign of progress, or had nothing to do
        self._active_cpu_s = 0.0  # CPU time it had used then
        self._piece_cpu_s = 0.0  # CPU time it had used when it last finished a piece

    @property
    def in_step(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.launched > self.heartbeat.finished

    @property
    def behind(self) -> tuple[int, int, int]:
        """Less for one that is further behind: of ranks that wait for each other the cause."""
        last = self.heartbeat
        return (last.finished, last.launched, last.pieces) if last is not None else (0, 0, 0)

    def take(self, heartbeat: Heartbeat, now_s: float) -> None:
        """A heartbeat came."""
        before, self.heartbeat = self.heartbeat, heartbeat
        if (
            before is None
            or not _waits(before)
            or not _waits(heartbeat)
            or _moved(before, heartbeat)
        ):
            self._active_s = now_s
            self._active_cpu_s = self._piece_cpu_s = heartbeat.cpu_s
        elif heartbeat.cpu_s - self._active_cpu_s >= ACTIVE_CPU_S:
            self._active_s, self._active_cpu_s = now_s, heartbeat.cpu_s

    def forgive(self, paused_s: float, now_s: float) -> None:
        """The watcher did not run for so long."""
        self._active_s = min(self._active_s + paused_s, now_s)

    def problem(self, now_s: float, timeout_s: float) -> str | None:
        """How its step is stuck, in words; None where it is not."""
        heartbeat = self.heartbeat
        if heartbeat is None or not self.in_step:
            return None
        step = heartbeat.finished + 1
        if now_s - self._active_s >= timeout_s:
            return f"step {step} made no progress for {timeout_s:g} s (launch.step_timeout_s)"
        most_cpu_s = max(timeout_s, PATIENCE * heartbeat.expected_s)
        used_s = heartbeat.cpu_s - self._piece_cpu_s
        if used_s >= most_cpu_s:
            return (
                f"step {step} used {used_s:.0f} s of CPU time without finishing a piece of it; it "
                f"was expected to take {heartbeat.expected_s:.1f} s in all (launch.step_timeout_s="
                f"{timeout_s:g})"
            )
        return None


def _waits(heartbeat: Heartbeat) -> bool:
    """Whether a step is under way."""
    return heartbeat.launched > heartbeat.finished


def _moved(before: Heartbeat, heartbeat: Heartbeat) -> bool:
    return (before.finished, before.pieces) != (heartbeat.finished, heartbeat.pieces)
