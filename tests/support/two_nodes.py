"""Two nodes on one machine: network namespaces joined by a veth pair, for tests. Needs root.

with two_namespaces() as network:
    with running_nodes(network, "+model=...", ...) as nodes:
        nodes.wait_ready()
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from core.cluster.nodes.network import INTERFACE_VARIABLES

ROOT = Path(__file__).parents[2]
BASE_PORT = 20000
ADDRESSES = ("10.98.0.1", "10.98.0.2")
START_TIMEOUT_S = 120
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>

T = TypeVar("T")


def why_not() -> str | None:
    """Why this machine can't have network namespaces; None where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command"
    name = f"nodeweave-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    try:
        pair = ["veth0", "netns", name, "type", "veth", "peer", "name", "veth1", "netns", name]
        made = subprocess.run(["ip", "link", "add", *pair], capture_output=True, text=True)
        return None if made.returncode == 0 else f"no veth pair: {made.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@dataclass(frozen=True)
class Network:
    """Namespace and address of each node; the interface is called veth0 in both."""

    names: tuple[str, str]

    def cut(self) -> None:
        """Take node 1's end of the link down."""
        _ip("-n", self.names[1], "link", "set", "veth0", "down")
        state = subprocess.run(
            ["ip", "-n", self.names[1], "link", "show", "veth0"], capture_output=True, text=True
        )
        assert "state DOWN" in state.stdout, state.stdout

    def inside(self, node: int, function: Callable[[], T]) -> T:
        """Call a function in a thread that lives in a node's namespace: its sockets are there."""

        def enter() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(f"/run/netns/{self.names[node]}", os.O_RDONLY)
            try:
                if libc.setns(fd, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)

        with ThreadPoolExecutor(1, initializer=enter) as thread:
            return thread.submit(function).result()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_namespaces() -> Iterator[Network]:
    """Two namespaces, and the link between them."""
    names = (f"nodeweave-a-{os.getpid()}", f"nodeweave-b-{os.getpid()}")
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        pair = ["veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0"]
        _ip("link", "add", *pair, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Network(names)
    finally:
        for name in made:
            _ip("netns", "del", name)


def _environment() -> dict[str, str]:
    """This process's, without the interfaces that meshes opened in it were kept on."""
    kept = {name: value for name, value in os.environ.items() if name not in INTERFACE_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1"}


class Node:
    """One started node. `lines` grows while it runs; each has the time it came."""

    def __init__(self, words: Sequence[str], env: dict[str, str], prefix: Sequence[str]) -> None:
        self.lines: list[tuple[float, str]] = []
        self.ended_s: float | None = None  # monotonic
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "core.run", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment() | env,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._await_end, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append((time.monotonic(), line))
                self._news.notify_all()

    def _await_end(self) -> None:
        self.process.wait()
        self.ended_s = time.monotonic()
        self._reader.join(5)
        with self._news:
            self._news.notify_all()

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> float:
        """When (monotonic) a line came that holds `pattern`; blocks until it does."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._news:
            while True:
                for came_s, line in self.lines[seen:]:
                    if re.search(pattern, line):
                        return came_s
                seen = len(self.lines)
                left = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                assert left > 0, f"no {pattern!r} in:\n{self.text}"
                assert not ended, f"no {pattern!r} in:\n{self.text}"
                self._news.wait(min(left, 0.5))

    def wait(self, timeout_s: float) -> int:
        """The exit status, with all output read."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        deadline = time.monotonic() + 5
        while self.ended_s is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return status

    def workers(self) -> list[psutil.Process]:
        """Its worker processes, by rank."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "core.worker" in child.cmdline()
        ]
        return sorted(found, key=lambda child: child.pid)


@dataclass
class Nodes:
    """Both nodes."""

    network: Network
    nodes: list[Node]

    def __getitem__(self, rank: int) -> Node:
        return self.nodes[rank]

    def wait_ready(self) -> None:
        """Until node 0 printed its summary."""
        self.nodes[0].wait_for("http://")

    def end_seconds(self, begin_s: float, timeout_s: float = 30.0) -> list[float]:
        """How long after `begin_s` (monotonic) each node ended."""
        seconds = []
        for node in self.nodes:
            node.wait(timeout_s)
            assert node.ended_s is not None
            seconds.append(node.ended_s - begin_s)
        return seconds

    def statuses(self) -> list[int | None]:
        return [node.process.poll() for node in self.nodes]


@contextmanager
def running_nodes(
    network: Network,
    *words: str,
    token: str | Sequence[str],
    extra: Sequence[Sequence[str]] = ((), ()),
    env: Sequence[dict[str, str]] = ({}, {}),
    ranks: Sequence[int] = (0, 1),
    nnodes: int | None = 2,
    port: int = BASE_PORT,
) -> Iterator[Nodes]:
    """Start the same command in both namespaces (in the second all but the first), except for
    `extra`, `env` and `ranks`. `nnodes`: None where `extra` says it. What is left at the end is
    killed."""
    tokens = [token] * len(ranks) if isinstance(token, str) else list(token)
    started = Nodes(network, [])
    try:
        for index, rank in enumerate(ranks):
            started.nodes.append(
                Node(
                    [
                        *words,
                        *([f"launch.nnodes={nnodes}"] if nnodes else []),
                        f"launch.node_rank={rank}",
                        f"launch.dist_init_addr={ADDRESSES[0]}:{port}",
                        *extra[index],
                    ],
                    {"NODEWEAVE_CLUSTER_TOKEN": tokens[index], **env[index]},
                    ["ip", "netns", "exec", network.names[min(index, 1)]],
                )
            )
        yield started
    finally:
        for node in started.nodes:
            if node.process.poll() is None:
                for child in psutil.Process(node.process.pid).children(recursive=True):
                    child.kill()
                node.process.send_signal(signal.SIGKILL)
                node.process.wait(10)
