"""What a person sees while the engine starts: progress, one summary, errors. Decides nothing.

With a terminal: a bar for each long task. Without: one line as each phase ends. The summary goes
to standard output, everything else to standard error.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from core.interfaces.control import ChildStatus, Progress, StartPhase

WAITING_LINE_S = 5.0  # between two lines about what is waited for, without a terminal
WAITING_QUIET_S = 1.0  # before the first of them
_CURL_QUESTION = "What is the capital of France?"


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryInfo:
    """What the start-up summary says."""

    served_name: str
    architecture: str  # as in config.json
    num_parameters: int
    dtype: str  # as computed in
    dtype_reason: str  # why that; "" where nobody needs to be told
    file_bytes: int  # of the weights; 0: none were read
    plan: str  # what the user chose: "tp=2"
    devices: str  # what the ranks run on: "cpu, 1 thread each", "cuda:0-1"
    num_ranks: int
    kv_tokens: int  # that fit in the KV pool
    kv_bytes: int  # of the KV pool, over all ranks
    memory: Mapping[str, int]  # bytes of what rank 0 holds on its GPU, by share; empty on a CPU
    graphs: str  # which steps are captured, or why none is; "" on a CPU
    steps: str  # how large they may be; "" on a CPU, whose steps are cut to a time
    phases: Mapping[str, float]  # seconds, the slowest rank's, in order
    total_s: float  # from the start of the command
    url: str  # of the server, without a path
    needs_key: bool


class Display:
    """Shows statuses as they come. Used from one thread."""

    def __init__(
        self,
        *,
        num_workers: int = 1,
        stderr: TextIO | None = None,
        stdout: TextIO | None = None,
    ) -> None:
        """`num_workers` may be set again once it is known: a task or phase ends when it ended
        in as many processes."""
        self.num_workers = num_workers
        self._stderr = stderr or sys.stderr
        self._stdout = stdout or sys.stdout
        self._live = self._stderr.isatty()
        self._bars: dict[str, tqdm] = {}
        self._shares: dict[str, dict[str, Progress]] = {}  # of a task, by process
        self._phases: dict[str, dict[str, float]] = {}
        self._is_waiting = False  # the terminal's last line says what is waited for
        self._next_waiting_s = time.monotonic() + WAITING_QUIET_S

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of every phase that ended so far in some process: the slowest one's."""
        return {phase: max(seconds.values()) for phase, seconds in self._phases.items()}

    def status(self, name: str, status: ChildStatus) -> None:
        """Show what the process `name` said. Failures are the supervisor's to report."""
        match status:
            case Progress():
                if self._live:
                    self._progress(name, status)
            case StartPhase(phase, seconds):
                ended = self._phases.setdefault(phase, {})
                ended[name] = seconds
                if not self._live and len(ended) == self.num_workers:
                    self._line(f"{phase}: {max(ended.values()):.1f} s")
            case _:
                return

    def note(self, text: str) -> None:
        """Print a line, above what is live."""
        self._end_waiting()
        if self._bars:
            tqdm.write(text, file=self._stderr)
        else:
            self._line(text)

    def waiting(self, text: str) -> None:
        """Show what is waited for; may be called often. A terminal has one line that changes,
        and none beside bars; elsewhere a line is printed every few seconds."""
        if self._live:
            if not self._bars:
                cut = text.replace("\n", " ")[: self._columns() - 1]
                print(f"\r\x1b[K{cut}", end="", file=self._stderr, flush=True)
                self._is_waiting = True
        elif (now := time.monotonic()) >= self._next_waiting_s:
            self._next_waiting_s = now + WAITING_LINE_S
            self._line(text)

    def summary(self, info: SummaryInfo) -> None:
        """Print the summary."""
        self._close_bars()
        print(summary(info), file=self._stdout, flush=True)

    def error(self, text: str) -> None:
        """Print why the engine ends, or did not start."""
        self._close_bars()
        self._line(f"error: {text}")

    def _progress(self, name: str, status: Progress) -> None:
        """Move a task's bar; processes that work on the same task share one."""
        shares = self._shares.setdefault(status.task, {})
        shares[name] = status
        total = sum(share.total for share in shares.values()) or None
        self._end_waiting()
        bar = self._bars.get(status.task)
        if bar is None:
            is_bytes = status.unit == "B"
            bar = self._bars[status.task] = tqdm(
                desc=status.task,
                total=total,
                unit="iB" if is_bytes else f" {status.unit}",
                unit_scale=is_bytes,
                unit_divisor=1024,
                file=self._stderr,
                ncols=self._columns(),
                miniters=0,  # redrawn by time only: sixteen ranks say much
            )
        bar.total = total
        bar.update(sum(share.done for share in shares.values()) - bar.n)
        done = all(share.done >= share.total > 0 for share in shares.values())
        if done and len(shares) >= self.num_workers:
            bar.close()
            del self._bars[status.task]

    def _end_waiting(self) -> None:
        if self._is_waiting:
            print("\r\x1b[K", end="", file=self._stderr, flush=True)
            self._is_waiting = False

    def _close_bars(self) -> None:
        self._end_waiting()
        while self._bars:
            self._bars.popitem()[1].close()

    def _columns(self) -> int:
        """Of the terminal; some (of containers) say 0."""
        return min(os.get_terminal_size(self._stderr.fileno()).columns or 80, 100)

    def _line(self, text: str) -> None:
        print(text, file=self._stderr, flush=True)


def summary(info: SummaryInfo) -> str:
    """The start-up summary: what is served, how, where, and a line to try it with."""
    files = f", {_bytes(info.file_bytes)} of files" if info.file_bytes else ", random weights"
    ranks = f"{info.num_ranks} {'rank' if info.num_ranks == 1 else 'ranks'} on {info.devices}"
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in info.phases.items())
    # A GPU is for the engine; a machine is used for other things as well.
    is_cpu = info.devices.startswith("cpu")
    of_host = " of this machine's memory (engine.kv_cache_tokens)" if is_cpu else ""
    memory = ", ".join(f"{share} {_bytes(number)}" for share, number in info.memory.items())
    body = {
        "model": info.served_name,
        "messages": [{"role": "user", "content": _CURL_QUESTION}],
        "temperature": 0,
    }
    key = ' -H "Authorization: Bearer $NODEWEAVE_API_KEY"' if info.needs_key else ""
    return "\n".join(
        [
            "",
            f"  model     {info.served_name}: {info.architecture}, "
            f"{_count(info.num_parameters)} parameters, {info.dtype}{files}",
            *([f"  dtype     {info.dtype}, {info.dtype_reason}"] if info.dtype_reason else []),
            f"  plan      {info.plan}: {ranks}",
            f"  KV cache  {info.kv_tokens:,} tokens, {_bytes(info.kv_bytes)}{of_host}",
            *([f"  memory    {memory} on each rank"] if memory else []),
            *([f"  steps     {info.steps}"] if info.steps else []),
            *([f"  graphs    {info.graphs}"] if info.graphs else []),
            f"  start-up  {info.total_s:.1f} s" + (f" ({phases})" if phases else ""),
            f"  URL       {info.url}",
            "",
            f"  curl {shlex.quote(info.url + '/v1/chat/completions')} "
            f"-H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}",
            "",
        ]
    )


def _count(number: int) -> str:
    """134515008 -> "134.5 M"."""
    for size, suffix in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return str(number)


def _bytes(number: int) -> str:
    """1610612736 -> "1.5 GiB"."""
    for exponent, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << exponent:
            return f"{number / (1 << exponent):.1f} {suffix}"
    return f"{number} bytes"
