"""One node of a run, as a Ray actor holds it: a child process with the same command.

Knows nothing of Ray: the driver makes an actor of this class, with two threads, so that `stop` is
answered while `run` waits. Ray pickles what goes between driver and actor (plain strings and
numbers); that is Ray's own protocol on Ray's own sockets, none of ours.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence

LAST_LINES = 20  # of a node's output, kept for the driver's report
# The child ends (SIGTERM: it finishes what runs) when this process does, however that happens.
# prctl(PR_SET_PDEATHSIG = 1) is bound to the thread that starts the child; `run` stays in it.
_BOOTSTRAP = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
parent, module = int(sys.argv[1]), sys.argv[2]
if os.getppid() != parent:
    sys.exit(1)
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class NodeProcess:
    """Starts one node of a run and waits for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = threading.Event()

    def host_name(self) -> str:
        """For people."""
        return socket.gethostname()

    def run(
        self, module: str, words: Sequence[str], env: Mapping[str, str], folder: str
    ) -> tuple[int, list[str]]:
        """Run `python -m module words` until it ends: its status (of a signal: minus its number)
        and its last lines. In `folder` where this machine has it. Everything it prints is printed
        here as well, where Ray picks it up."""
        if self._stopped.is_set():
            return -signal.SIGTERM, []
        lines: deque[str] = deque(maxlen=LAST_LINES)
        with subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(os.getpid()), module, *words],
            env={**os.environ, **env},
            cwd=folder if os.path.isdir(folder) else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            self._process = process
            if self._stopped.is_set():  # asked between the check above and the start
                process.terminate()
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
        return process.returncode, list(lines)

    def stop(self, kill: bool = False) -> None:
        """Ask the child to end, or kill it; does not wait."""
        self._stopped.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
