"""Which processes of a start are ready, who is told of it, and whom the start waits for.

Knows nothing of deadlines, of stages, or of what follows a start.
"""

from collections.abc import Sequence

from core.cluster.processes.group import Group
from core.cluster.processes.process import Child
from core.interfaces.control import EngineReady, Ready


class Readiness:
    """Of the processes of one node, and of the nodes it belongs to."""

    def __init__(self, children: Sequence[Child], group: Group) -> None:
        """`children` may grow until the first `greet`."""
        self._children = children
        self._group = group
        self._told_group = self._told_frontends = False

    def greet(self) -> None:
        """Tell the other nodes, and the frontends once all nodes are, that workers are ready."""
        workers = [child for child in self._children if child.spec.is_worker]
        infos = [child.ready.info for child in workers if child.ready]
        if not infos or len(infos) < len(workers):
            return
        if not self._told_group:
            self._told_group = True
            self._group.workers_ready()
        if not self._told_frontends and self._group.others_ready:
            self._told_frontends = True
            for child in self._children:
                if not child.spec.is_worker:
                    child.send(EngineReady(infos[0], {c.spec.name: c.pid for c in workers}))

    @property
    def complete(self) -> bool:
        """Whether every process is ready, here and on the other nodes."""
        return all(child.ready for child in self._children) and self._group.others_ready

    def infos(self) -> dict[str, Ready]:
        """What each process said as it became ready, by its name."""
        own = {child.spec.name: child.ready for child in self._children if child.ready}
        return {**own, **self._group.infos}

    def waiting_for(self) -> list[str]:
        """A line for each process, or node, that is not ready."""
        # Frontends are ready after the workers: until these are, one that lives is no news.
        own = [
            f"{child.label}: last heard: {child.last_heard}"
            for child in self._children
            if not child.ready
            and (child.spec.is_worker or self._told_frontends or not child.was_heard)
        ]
        return [*own, *self._group.waiting_for()]
