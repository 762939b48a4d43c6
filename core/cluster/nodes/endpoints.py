"""Where the processes of a run meet. Opens no socket.

On one host everything they meet through lies in a folder that only this user may enter, so no port
is open for it. Between nodes it is TCP ports (`core.cluster.nodes.ports`) and a key.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from core.cluster.nodes.ports import Ports, node_of
from core.disk.owned_dir import OwnedDir
from core.errors import ResourceError
from core.interfaces.control import Endpoints
from core.parallel.plan import Plan
from core.settings.address import join_address

PREFIX = "nodeweave-"
_MAX_SOCKET_PATH_BYTES = 107  # sun_path in <sys/un.h> holds 108 with its end


class RunDirectory:
    """A new folder (mode 0700) for one run; a context manager that removes it at the end."""

    def __init__(self, num_dp: int) -> None:
        """Make it under $XDG_RUNTIME_DIR, the temporary folder or /tmp: the first that can be
        written and leaves room for a socket's name. Folders of runs that were killed are removed
        there. Raises ResourceError where none does."""
        self._num_dp = num_dp
        refused = []
        for parent in _parents():
            try:
                self._dir = OwnedDir(parent, PREFIX)
            except OSError as error:
                refused.append(f"{parent}: {error.strerror}")
                continue
            self.path = self._dir.path
            longest = max(len(os.fsencode(path)) for path in self._socket_paths())
            if longest <= _MAX_SOCKET_PATH_BYTES:
                return
            self._dir.remove()
            refused.append(
                f"{parent}: a socket's path would have {longest} bytes, {_MAX_SOCKET_PATH_BYTES} "
                "are allowed"
            )
        raise ResourceError(
            "no folder for this run's sockets; set XDG_RUNTIME_DIR or TMPDIR to a short path you "
            "can write to. Tried:\n  " + "\n  ".join(refused)
        )

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def rendezvous(self) -> Path:
        """Where the ranks meet (`core.parallel.mesh`); no file is there yet."""
        return self.path / "rendezvous"

    def endpoints(self) -> Endpoints:
        """The addresses of this run's sockets."""
        engine, lockstep, *steps = (f"ipc://{path}" for path in self._socket_paths())
        return Endpoints(engine=engine, lockstep=lockstep, steps=steps, store=str(self.rendezvous))

    def remove(self) -> None:
        """Delete it with all it holds; again is no error."""
        self._dir.remove()

    def _socket_paths(self) -> list[Path]:
        steps = [f"steps-{dp_rank}" for dp_rank in range(self._num_dp)]
        return [self.path / name for name in ("engine", "lockstep", *steps)]


def node_endpoints(plan: Plan, ports: Ports, addresses: Sequence[str], key: str) -> Endpoints:
    """The same for ranks on several nodes, whose `addresses` are by node rank."""
    nnodes = len(addresses)

    def at(node: int, port: int) -> str:
        return join_address(addresses[node], port)

    leaders = [dp_rank * plan.tp_attn for dp_rank in range(plan.dp)]
    return Endpoints(
        engine=f"tcp://{at(0, ports.engine)}",
        lockstep=f"tcp://{at(0, ports.lockstep)}",
        steps=[
            f"tcp://{at(node_of(leader, plan, nnodes), ports.plan(dp_rank))}"
            for dp_rank, leader in enumerate(leaders)
        ],
        store=f"tcp://{at(0, ports.store)}",
        key=key,
    )


def _parents() -> list[str]:
    """Folders to try, without repetition."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    candidates = [*([runtime] if runtime else []), tempfile.gettempdir(), "/tmp"]
    return list(dict.fromkeys(candidates))
