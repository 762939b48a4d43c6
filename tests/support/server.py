"""A real server for tests: `python -m core.run` as a user starts it, on a free port."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
URL = re.compile(r"http://(?:127\.0\.0\.1|localhost):\d+")
START_TIMEOUT_S = 120


class Server:
    """A started server. `output` grows while it runs."""

    def __init__(
        self, arguments: Sequence[str], python: Path, folder: Path, threads: int | None
    ) -> None:
        self.output: list[str] = []
        self._found_url = threading.Event()
        self._url = ""
        given = [] if threads is None else [f"launch.threads_per_worker={threads}"]
        self.process = subprocess.Popen(
            [python, "-m", "core.run", "frontend.port=0", *given, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": ""},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            found = URL.search(line)
            if found and not self._url:
                self._url = found.group()
                self._found_url.set()
        self._found_url.set()

    @property
    def url(self) -> str:
        """Where it listens; blocks until the summary is printed, fails where it ends before."""
        assert self._found_url.wait(START_TIMEOUT_S), f"no URL printed:\n{self.text}"
        assert self._url, f"the server ended with {self.process.wait(10)}:\n{self.text}"
        return self._url

    @property
    def text(self) -> str:
        return "".join(self.output)

    def children(self) -> dict[str, psutil.Process]:
        """Its processes by role, once it serves: "frontend", "worker" (rank 0), "worker 1" ..."""
        assert self.url
        found: dict[str, psutil.Process] = {}
        workers = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            command = " ".join(child.cmdline())
            if "core.worker" in command:
                workers.append(child)
            elif "core.serve.process" in command:
                found["frontend"] = child
        for rank, worker in enumerate(sorted(workers, key=lambda process: process.pid)):
            found["worker" if rank == 0 else f"worker {rank}"] = worker
        return found

    def wait(self, timeout_s: float) -> int:
        """The exit status, with all output read."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(60)


@contextmanager
def running_server(
    *arguments: str,
    python: Path = Path(sys.executable),
    folder: Path = ROOT,
    threads: int | None = 1,
) -> Iterator[Server]:
    """A server that is killed at the end, with everything it started. A worker has one thread, as
    beside other tests two wait for each other at every operation; None: what the server chooses."""
    server = Server(arguments, python, folder, threads)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            for child in psutil.Process(server.process.pid).children(recursive=True):
                child.kill()
            server.process.kill()
            server.process.wait(10)
