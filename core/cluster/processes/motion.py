"""Whether a worker that is in a step gets anywhere, by its beats. Knows nothing of processes.

Time alone says little: on a machine with too much to do a healthy step takes minutes. A step that
ends, or a piece of one (a layer, some rows of prompt logprobs), is progress. So is CPU time of the
thread that computes, but not for ever: one that spins uses it as well, and is told apart by how
much it used for one piece.
"""

from core.interfaces.control import Beat

# CPU time that counts as a sign of life: more than a thread uses that only wakes to wait again.
ACTIVE_CPU_S = 0.25
PATIENCE = 10.0  # times what the whole step is expected to take, for one piece of it


class Motion:
    """What the beats of one worker came to. Times are those of the watcher's clock."""

    def __init__(self, now_s: float) -> None:
        self.beat: Beat | None = None  # the last one
        self._active_s = now_s  # when it last showed any sign of progress, or had nothing to do
        self._active_cpu_s = 0.0  # CPU time it had used then
        self._piece_cpu_s = 0.0  # CPU time it had used when it last finished a piece

    @property
    def in_step(self) -> bool:
        return self.beat is not None and self.beat.launched > self.beat.finished

    @property
    def behind(self) -> tuple[int, int, int]:
        """Less for one that is further behind: of ranks that wait for each other the cause."""
        beat = self.beat
        return (beat.finished, beat.launched, beat.pieces) if beat is not None else (0, 0, 0)

    def take(self, beat: Beat, now_s: float) -> None:
        """A beat came."""
        before, self.beat = self.beat, beat
        if before is None or not _waits(before) or not _waits(beat) or _moved(before, beat):
            self._active_s = now_s
            self._active_cpu_s = self._piece_cpu_s = beat.cpu_s
        elif beat.cpu_s - self._active_cpu_s >= ACTIVE_CPU_S:
            self._active_s, self._active_cpu_s = now_s, beat.cpu_s

    def forgive(self, paused_s: float, now_s: float) -> None:
        """The watcher did not run for so long."""
        self._active_s = min(self._active_s + paused_s, now_s)

    def problem(self, now_s: float, timeout_s: float) -> str | None:
        """How its step is stuck, in words; None where it is not."""
        beat = self.beat
        if beat is None or not self.in_step:
            return None
        step = beat.finished + 1
        if now_s - self._active_s >= timeout_s:
            return f"step {step} made no progress for {timeout_s:g} s (launch.step_timeout_s)"
        most_cpu_s = max(timeout_s, PATIENCE * beat.expected_s)
        used_s = beat.cpu_s - self._piece_cpu_s
        if used_s >= most_cpu_s:
            return (
                f"step {step} used {used_s:.0f} s of CPU time without finishing a piece of it; it "
                f"was expected to take {beat.expected_s:.1f} s in all (launch.step_timeout_s="
                f"{timeout_s:g})"
            )
        return None


def _waits(beat: Beat) -> bool:
    """Whether a step is under way."""
    return beat.launched > beat.finished


def _moved(before: Beat, beat: Beat) -> bool:
    return (before.finished, before.pieces) != (beat.finished, beat.pieces)
